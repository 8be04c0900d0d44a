"""Heads on a frozen backbone, trained on labels by cross-entropy: the plain recipe."""

from __future__ import annotations

from typing import Literal

from adaptexit.training.recipes.base import HeadRecipe


class FrozenRecipe(HeadRecipe):
    """Cross-entropy with the labels for the classes of every head, then binary cross-entropy for its confidence.

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

    usual_epochs = 20
    own_head = "mlp"

    def __init__(
        self,
        epochs: int | Literal["auto"] = "auto",
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
