"""Zero Time Waste: heads that read the head before them, then an ensemble of all heads so far."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adaptexit.heads.chained import ZTWHead
from adaptexit.training.feature_cache import MEMORY_LIMIT
from adaptexit.training.head_trainer import CHUNK, HeadBatch, Lesson
from adaptexit.training.loop import minimise
from adaptexit.training.recipes.base import History, LearnFrom, MarginRecipe
from adaptexit.utils.validation import check_whole

if TYPE_CHECKING:
    from adaptexit.heads.base import Head


class ZTWRecipe(MarginRecipe):
    """Cross-entropy of each head's own answer, then of the ensemble's, the heads standing still.

    Wołczyk et al., "Zero Time Waste" (NeurIPS 2021), with the backbone frozen and set up as CalexNet (2026), section
    3.4.4, compares it: heads read the previous head's logits without a gradient, exits answer with a weighted geometric
    mean of all heads so far, and its largest probability is the confidence.

    Parameters
    ----------
    size : int or None, default=4
        Rows and columns that the maps are pooled to before the heads' residual blocks (ours: it makes them cheap). None
        leaves the maps whole, as CalexNet (2026) describes the blocks: cached features are the maps themselves.
    epochs : int or "auto", default="auto"
        "auto" is 200, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.0
    batch_size : int, default=2048
    ensemble_epochs : int or None, default=None
        None takes ``epochs``.
    learn_from : {"backbone", "labels"}, default="backbone"

    Notes
    -----
    ``train`` adds ``"ensemble_loss"`` to the history, by head and epoch. Heads have no confidence output.
    """

    usual_epochs = 200
    confidence_epochs = None

    def __init__(
        self,
        size: int | None = 4,
        *,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 2048,
        ensemble_epochs: int | None = None,
        learn_from: LearnFrom = "backbone",
    ) -> None:
        self.size = size
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.ensemble_epochs = ensemble_epochs
        self.learn_from = learn_from

    def head_for(self, head: Any) -> Any:
        return partial(ZTWHead, size=self.size) if isinstance(head, str) and head == "auto" else head

    def check_heads(self, heads: Sequence[Head]) -> None:
        if not all(isinstance(head, ZTWHead) for head in heads):
            raise ValueError(
                f"heads must be ZTWHeads for ZTW; got {sorted({type(head).__name__ for head in heads})}. Leave "
                "head='auto', or make them with adaptexit.heads.chained.ZTWHead."
            )
        sizes = [len(cast(ZTWHead, head).ensemble_weight) for head in heads]
        if sizes != list(range(1, len(heads) + 1)):
            raise ValueError(
                f"heads must have one ensemble weight for every head up to them; got {sizes}. Call head.place(k) for "
                "head k (estimators do)."
            )

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        if self.size is not None:
            check_whole("size", self.size, 1, " or None")
        if self.ensemble_epochs is not None:
            check_whole("ensemble_epochs", self.ensemble_epochs, 1)
        return super().check()

    def _taught(self, lesson: Lesson) -> History:
        epochs = lesson.epochs(self.epochs, self.usual_epochs)
        heads = cast(Sequence[ZTWHead], lesson.heads)
        ensemble = {id(p) for head in heads for p in head.ensemble_parameters}
        own = [p for k in lesson.everyone for p in lesson.class_parameters(k) if id(p) not in ensemble]
        loss = lesson.learn(_own_loss, lesson.everyone, own, description="training heads", epochs=epochs)
        together = _log_probabilities(lesson)
        device = heads[-1].ensemble_weight.device

        def ensemble_losses(batch: Tensor) -> Tensor:
            log_p, target = torch.from_numpy(together[batch.numpy()]).to(device), lesson.target[batch].to(device)
            answers = [head.ensemble(log_p[:, : k + 1]) for k, head in enumerate(heads)]
            return torch.stack([F.cross_entropy(logits, target) for logits in answers])

        terms = minimise(
            ensemble_losses,
            heads,
            lesson.n_samples,
            epochs=self.ensemble_epochs or epochs,
            parameters=[p for head in heads for p in head.ensemble_parameters],
            training=False,
            description="training ensembles",
            **lesson.loop,
        )
        return {
            "loss": loss,
            "confidence_loss": [[] for _ in lesson.heads],
            "ensemble_loss": [list(losses) for losses in zip(*terms, strict=True)],
        }


def _own_loss(answer: HeadBatch) -> Tensor:
    return F.cross_entropy(answer.output.state[0], answer.target)


def _log_probabilities(lesson: Lesson) -> NDArray[Any]:
    """Of every head's own answer, (n, K-1, C), in memory or, where they are many, in a file without a name."""
    last, n_classes = len(lesson.heads) - 1, lesson.cache.logits.shape[1]
    shape = (lesson.n_samples, last + 1, n_classes)
    dtype = np.float64 if next(lesson.heads[last].parameters()).dtype == torch.float64 else np.float32
    together: NDArray[Any]
    if np.dtype(dtype).itemsize * np.prod(shape) > MEMORY_LIMIT:
        with tempfile.TemporaryFile(prefix="adaptexit-") as file:  # the mapping holds on to it
            together = np.memmap(file, dtype, mode="w+", shape=shape)
    else:
        together = np.empty(shape, dtype)
    with torch.no_grad():
        for rows in torch.arange(lesson.n_samples).split(CHUNK):
            (answer,) = lesson.answers(rows, [last])
            together[rows[0] : rows[-1] + 1] = answer.output.state[1].cpu().numpy()
    return together
