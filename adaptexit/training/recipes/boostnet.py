"""BoostNet on a frozen backbone: every head corrects what the heads before it add up to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.heads.chained import BoostedHead
from adaptexit.training.head_trainer import HeadBatch, Lesson, class_loss
from adaptexit.training.recipes.base import History, LearnFrom, MarginRecipe
from adaptexit.utils.validation import checked_number

if TYPE_CHECKING:
    from adaptexit.heads.base import Head

Rescale = Literal["fixed", "learnable"]
RESCALES = get_args(Rescale)


class BoostNetRecipe(MarginRecipe):
    """Cross-entropy of each head's logits added to those before it, which stand still; then confidence.

    Yu et al., "Boosted Dynamic Neural Networks" (AAAI 2023), with the backbone frozen as CalexNet (2026), section 5,
    adapts it: loss sum_n CE(out_n + F_(n-1)), F_n = w (out_n + F_(n-1)), F without a gradient.

    Parameters
    ----------
    weight : float, default=0.5
        w, what earlier answers count.
    rescale : {"fixed", "learnable"} or None, default="fixed"
        What the gradient of each exit's loss is multiplied by. "fixed": 1 / (number of early exits from this one on),
        the published rescaling's share of an exit. "learnable": g = softplus(g~), one a head, starting at 1 and
        trained with the heads on sum_n g_n L_n, as CalexNet adapts it.
    epochs : int or "auto", default="auto"
        "auto" is 200, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.0
    batch_size : int, default=2048
    confidence_epochs : int or None, default=None
        None takes ``epochs``.
    learn_from : {"backbone", "labels"}, default="backbone"
    clamp : float, default=1e-7
        Confidence counts as no nearer to 0 and 1 than this in its loss.

    Notes
    -----
    The published rescaling balances what the exits ask of the layers they share. Heads on a frozen backbone share none,
    and Adam divides a constant factor out again: "fixed" hardly changes what is learned here. A learnable factor can
    only be driven down, since every loss is positive; CalexNet reports its collapse. ``train`` adds where each factor
    ended to the history, ``"rescale"``.

    Heads chosen by the user are boosted too (wrapped in :class:`adaptexit.heads.chained.BoostedHead`).
    """

    usual_epochs = 200
    own_head = "prototype"

    def __init__(
        self,
        weight: float = 0.5,
        rescale: Rescale | None = "fixed",
        *,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 2048,
        confidence_epochs: int | None = None,
        learn_from: LearnFrom = "backbone",
        clamp: float = 1e-7,
    ) -> None:
        self.weight = weight
        self.rescale = rescale
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.confidence_epochs = confidence_epochs
        self.learn_from = learn_from
        self.clamp = clamp

    def head_for(self, head: Any) -> Any:
        return partial(BoostedHead, head=super().head_for(head), weight=self.weight)

    def check_heads(self, heads: Sequence[Head]) -> None:
        if not all(isinstance(head, BoostedHead) for head in heads):
            raise ValueError(
                f"heads must be BoostedHeads for BoostNet; got {sorted({type(head).__name__ for head in heads})}. "
                "Make them with recipe.head_for(head)."
            )
        weights = sorted({head.weight for head in heads if isinstance(head, BoostedHead)})
        if weights != [self.weight]:
            raise ValueError(
                f"heads must count earlier answers as the recipe does, weight={self.weight}; got {weights}. Make them "
                "with recipe.head_for(head)."
            )

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        if self.rescale is not None and self.rescale not in RESCALES:
            raise ValueError(f"rescale must be one of {list(RESCALES)} or None; got {self.rescale!r}.")
        checked_number("weight", self.weight, "a finite number, at least 0", 0.0)
        return super().check()

    def _taught(self, lesson: Lesson) -> History:
        factors = _Factors(len(lesson.heads), self.rescale)
        factors.to(next((p.device for head in lesson.heads for p in head.parameters()), torch.device("cpu")))
        epochs = lesson.epochs(self.epochs, self.usual_epochs)
        learning = [p for k in lesson.everyone for p in lesson.class_parameters(k)]
        loss = lesson.learn(
            factors.scaled,
            lesson.everyone,
            [*learning, *factors.parameters()],
            description="training heads",
            epochs=epochs,
        )
        return {
            "loss": loss,
            "confidence_loss": self._confidence(lesson, epochs),
            "rescale": factors.values().tolist(),
        }


class _Factors(nn.Module):
    """What each exit's gradient is multiplied by."""

    def __init__(self, n_heads: int, rescale: Rescale | None) -> None:
        super().__init__()
        self.fixed = 1.0 / torch.arange(n_heads, 0, -1) if rescale == "fixed" else torch.ones(n_heads)
        one = torch.tensor(1.0).expm1().log()  # softplus of it is 1
        self.raw = nn.Parameter(one.repeat(n_heads)) if rescale == "learnable" else None

    def values(self) -> Tensor:
        return self.fixed if self.raw is None else F.softplus(self.raw)

    def scaled(self, answer: HeadBatch) -> Tensor:
        """The loss of a head: its own value, with the gradient of itself times the factor."""
        loss = class_loss(answer)
        product = self.values()[answer.exit] * loss
        return product + (loss - product).detach()  # the value of the loss, the gradient of the product
