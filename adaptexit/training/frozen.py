"""Heads on a frozen backbone, trained on labels by cross-entropy: the plain recipe."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import Tensor
from torch.nn import functional as F

from adaptexit.core.frontier import checked_number
from adaptexit.staging.rows import mapped
from adaptexit.training.cache import FeatureCache
from adaptexit.training.loop import minimise

if TYPE_CHECKING:
    from adaptexit.heads import Head, HeadOutput


EPOCHS, MINIBATCHES = 20, 500
"""Of training, at least, where the epochs are left open."""


class FrozenRecipe(BaseEstimator):
    """Cross-entropy for the classes of every head, then binary cross-entropy for its confidence.

    All heads learn together, one pass a minibatch. They share no parameters and a chained head reads the previous
    head's state without a gradient, so each learns as if it were trained alone.

    Parameters
    ----------
    epochs : int or "auto", default="auto"
        "auto" is 20, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.01
        AdamW's.
    batch_size : int, default=256
        At least 2.
    confidence_epochs : int or None, default=None
        For the confidence outputs, where heads have them; None takes ``epochs``.
    """

    def __init__(
        self,
        epochs: int | str = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        confidence_epochs: int | None = None,
    ) -> None:
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.confidence_epochs = confidence_epochs

    def train(
        self,
        heads: Sequence[Head],
        cache: FeatureCache,
        rows: ArrayLike,
        targets: ArrayLike,
        *,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> dict[str, list[list[float]]]:
        """Train the heads in place; they are in evaluation mode afterwards.

        Parameters
        ----------
        heads : sequence of K - 1 Heads
        cache : FeatureCache
        rows : integer array (n,)
            Samples of the cache to train on.
        targets : integer array (n,)
            Class index of each of them: labels, or what the backbone predicts.
        random_state : int, RandomState or None
        verbose : int
            From 1 on, a bar over epochs.

        Returns
        -------
        dict
            ``"loss"`` and ``"confidence_loss"``: for each head, its mean loss in every epoch; empty for a head without
            a confidence output.

        Raises
        ------
        ValueError
            For parameters, rows, targets or logits outside what is allowed.
        FloatingPointError
            When a loss becomes NaN or infinite.
        """
        settings = self.check()
        if len(heads) != len(cache.features):
            raise ValueError(f"heads must be one for each of the {len(cache.features)} early exits; got {len(heads)}.")
        wanted, classes = _checked_rows(rows, targets, cache)
        target = torch.from_numpy(classes)
        epochs = self.epochs
        if isinstance(epochs, str):
            epochs = max(EPOCHS, -(-MINIBATCHES // -(-len(wanted) // self.batch_size)))
        random = check_random_state(random_state)
        shared = settings | {"random_state": random, "verbose": verbose}

        def answers(batch: Tensor, needed: Sequence[bool]) -> list[tuple[HeadOutput, Tensor]]:
            return _answers(heads, needed, cache, wanted[batch.numpy()], target[batch])

        everyone = [True] * len(heads)
        confidence = [[p for p in head.confidence_parameters() if p.requires_grad] for head in heads]
        sure = {id(parameter) for group in confidence for parameter in group}
        history: dict[str, list[list[float]]] = {name: [[] for _ in heads] for name in ("loss", "confidence_loss")}
        if learning := [p for head in heads for p in head.parameters() if p.requires_grad and id(p) not in sure]:
            loss = minimise(
                lambda batch: torch.stack([F.cross_entropy(out.logits, y) for out, y in answers(batch, everyone)]),
                heads,
                len(wanted),
                epochs=epochs,
                parameters=learning,
                description="training heads",
                **shared,
            )
            history["loss"] = _by_head(loss, everyone)
        if sure:
            having = [bool(group) for group in confidence]
            loss = minimise(
                lambda batch: torch.stack([_confidence_loss(out, y) for out, y in answers(batch, having)]),
                heads,
                len(wanted),
                epochs=epochs if self.confidence_epochs is None else self.confidence_epochs,
                parameters=[parameter for group in confidence for parameter in group],
                training=False,
                description="training confidence",
                **shared,
            )
            history["confidence_loss"] = _by_head(loss, having)
        return history

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        if not (isinstance(self.epochs, str) and self.epochs == "auto"):
            _check_whole("epochs", self.epochs, 1, " or 'auto'")
        _check_whole("batch_size", self.batch_size, 2)
        if self.confidence_epochs is not None:
            _check_whole("confidence_epochs", self.confidence_epochs, 1)
        lr = checked_number("lr", self.lr, "a finite number above 0", np.nextafter(0, 1))
        weight_decay = checked_number("weight_decay", self.weight_decay, "a finite number, 0 or above", 0.0)
        return {"lr": lr, "weight_decay": weight_decay, "batch_size": self.batch_size}


def _answers(
    heads: Sequence[Head], needed: Sequence[bool], cache: FeatureCache, rows: NDArray[Any], target: Tensor
) -> list[tuple[HeadOutput, Tensor]]:
    """Outputs of the needed heads and the targets beside them, in each head's type and on its device."""
    found, state = [], None
    for k, head in enumerate(heads):
        if not needed[k] and not any(later.chained for later in heads[k + 1 :]):
            continue
        like = next(head.parameters(), torch.empty(0))
        out = head.answer(
            cache.rows(k, rows).to(like.device, like.dtype), mapped(state, _detached) if head.chained else None
        )
        state = state if out.state is None else out.state
        if out.logits.shape != (len(rows), cache.logits.shape[1]):
            raise ValueError(
                f"head {k} must answer with logits of shape (B, C) = ({len(rows)}, {cache.logits.shape[1]}), C being "
                f"the classes of the full model; got shape {tuple(out.logits.shape)}."
            )
        if needed[k]:
            found.append((out, target.to(like.device)))
    return found


def _confidence_loss(out: HeadOutput, target: Tensor) -> Tensor:
    """Binary cross-entropy of the predicted class's entry against whether that class is right."""
    if out.confidence_logits is None:
        raise ValueError("a head with confidence_parameters must give confidence_logits in its answer; got None.")
    predicted = out.logits.argmax(1, keepdim=True)
    entry = out.confidence_logits.gather(1, predicted).squeeze(1)
    return F.binary_cross_entropy_with_logits(entry, (predicted.squeeze(1) == target).to(entry.dtype))


def _detached(left: Any) -> Any:
    return left.detach() if isinstance(left, Tensor) else left


def _by_head(history: list[list[float]], having: Sequence[bool]) -> list[list[float]]:
    """From epochs of terms to heads of epochs; heads without a term get an empty list."""
    terms = iter(zip(*history, strict=True))
    return [list(next(terms)) if has else [] for has in having]


def _checked_rows(rows: ArrayLike, targets: ArrayLike, cache: FeatureCache) -> tuple[NDArray[Any], NDArray[np.int64]]:
    wanted, classes = np.asarray(rows), np.asarray(targets)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or not len(wanted):
        raise ValueError(
            f"rows must be an integer array (n,) of at least one sample; got {wanted.dtype} of shape {wanted.shape}."
        )
    if wanted.min() < 0 or wanted.max() >= cache.n_samples:
        raise ValueError(
            f"rows must lie in 0 ... {cache.n_samples - 1}, the samples of the cache; got values from {wanted.min()} "
            f"to {wanted.max()}."
        )
    if classes.shape != wanted.shape or classes.dtype.kind not in "iu":
        raise ValueError(
            f"targets must be an integer array of shape {wanted.shape}, one class index a row; got {classes.dtype} of "
            f"shape {classes.shape}."
        )
    n_classes = cache.logits.shape[1]
    if classes.min() < 0 or classes.max() >= n_classes:
        raise ValueError(
            f"targets must lie in 0 ... {n_classes - 1}; got values from {classes.min()} to {classes.max()}. "
            "Map other label values to indices first."
        )
    return wanted, classes.astype(np.int64)


def _check_whole(name: str, value: Any, least: int, other: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}{other}; got {value!r}.")
