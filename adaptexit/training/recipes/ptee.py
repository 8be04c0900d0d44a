"""PTEEnet: heads on a frozen backbone that learn its answers, all with one summed loss."""

from __future__ import annotations

from typing import Literal

from adaptexit.training.recipes.base import LearnFrom, MarginRecipe


class PTEERecipe(MarginRecipe):
    """Cross-entropy with what the full model answers, summed over the exits; then confidence on correctness.

    Lahiany and Aperstein, "PTEENet: Post-Trained Early-Exit Neural Networks Augmentation for Inference Cost
    Optimization" (2022), as CalexNet (2026), section 3.4.4 and appendix A.4, sets it up beside its own recipe: basic
    prototype heads, thresholds by class precision margins on all calibration data. On a frozen backbone the sum ties
    nothing together: every head learns as it would alone.

    Parameters
    ----------
    epochs : int or "auto", default="auto"
        "auto" is 200, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.0
    batch_size : int, default=2048
    confidence_epochs : int or None, default=None
        None takes ``epochs``.
    learn_from : {"backbone", "labels"}, default="backbone"
        What the heads are to answer: what the full model answers, or the labels.
    clamp : float, default=1e-7
        Confidence counts as no nearer to 0 and 1 than this in its loss.
    """

    usual_epochs = 200
    own_head = "prototype"

    def __init__(
        self,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 2048,
        confidence_epochs: int | None = None,
        learn_from: LearnFrom = "backbone",
        clamp: float = 1e-7,
    ) -> None:
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.confidence_epochs = confidence_epochs
        self.learn_from = learn_from
        self.clamp = clamp
