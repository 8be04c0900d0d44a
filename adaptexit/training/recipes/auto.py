"""The default: which head learns, and from the full model or from labels, is found out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from adaptexit.heads.by_name import NAMED, HeadFactory, heads_to_try
from adaptexit.heads.layout import FeatureSpec
from adaptexit.training.head_trainer import HeadBatch, Lesson, class_loss, distillation_loss
from adaptexit.training.loop import n_epochs
from adaptexit.training.recipes.base import HeadRecipe, History, LearnFrom
from adaptexit.utils.validation import checked_number


class AutoRecipe(HeadRecipe):
    """Heads learn the full model's softened probabilities or labels; head and teacher are those with the best frontier.

    Where the estimator's ``head`` is left open, the heads of ``heads`` are trained, some of them in full, on a part
    of the training samples, and compared on the rest of these by the mean accuracy of their calibrated frontiers over
    budgets from 0.4 to 0.9, what the heads cost counted in; so is learning from labels, which is better where the full
    model is weak, and from both. The best one then learns from all. Where a head is named, it alone is trained.

    Parameters
    ----------
    heads : "auto" or sequence of str or callable, default="auto"
        What is compared: names of ``adaptexit.heads.NAMED``, or factories ``(FeatureSpec, n_classes) ->
        nn.Module``. "auto" is a perceptron, a linear layer and, on features that are maps, residual blocks of several
        widths.
    epochs : int or "auto", default="auto"
        Of the training that counts. "auto" is 20, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-2
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.01
        AdamW's.
    batch_size : int, default=256
        At least 2.
    distillation : float or "auto", default="auto"
        a, from 0 to 1: a T^2 KL(full model || head) + (1 - a) CE(labels, head) is minimised (Hinton et al.,
        "Distilling the Knowledge in a Neural Network", 2015). "auto" is 1, or 0.5 or 0 where these were
        compared and are better.
    temperature : float, default=2.0
        T, above 0, of the probabilities that are distilled.
    confidence_epochs : int or None, default=None
        For the confidence outputs, where heads have them; None takes ``epochs``.
    """

    usual_epochs = 20
    own_head = "mlp"  # reads every feature; another takes its place once it is chosen

    def __init__(
        self,
        heads: Literal["auto"] | Sequence[str | HeadFactory] = "auto",
        *,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-2,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        distillation: float | Literal["auto"] = "auto",
        temperature: float = 2.0,
        confidence_epochs: int | None = None,
    ) -> None:
        self.heads = heads
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.distillation = distillation
        self.temperature = temperature
        self.confidence_epochs = confidence_epochs

    @property
    def learn_from(self) -> LearnFrom:  # type: ignore[override]
        """Labels, unless heads learn from the full model alone."""
        return "backbone" if self._share == 1.0 else "labels"

    @property
    def _share(self) -> float:
        """What distillation counts."""
        return 1.0 if isinstance(self.distillation, str) else float(self.distillation)

    def candidates(self, specs: Sequence[FeatureSpec]) -> dict[str, HeadFactory]:
        """The heads that are compared where the choice is open, by the names that a save keeps of them."""
        if isinstance(self.heads, str):
            return {name: NAMED[name] for name in heads_to_try(specs)}
        return {
            head if isinstance(head, str) else f"heads[{place}]": NAMED[head] if isinstance(head, str) else head
            for place, head in enumerate(self.heads)
        }

    def named(self, name: str) -> HeadFactory:
        """The head that a save names, or a ValueError."""
        heads = NAMED if isinstance(self.heads, str) else self.candidates(())
        if name not in heads:
            raise ValueError(f"head must be one of those that were compared, {', '.join(heads)}; got {name!r}.")
        return heads[name]

    def n_epochs(self, n_samples: int) -> int:
        """Epochs of a training on so many samples."""
        return n_epochs(self.epochs, n_samples, self.batch_size, self.usual_epochs)

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        self._check_heads()
        if not (isinstance(self.distillation, str) and self.distillation == "auto") and not (
            0 <= checked_number("distillation", self.distillation, "a number from 0 to 1, or 'auto'") <= 1
        ):
            raise ValueError(f"distillation must lie between 0 and 1, or be 'auto'; got {self.distillation!r}.")
        checked_number("temperature", self.temperature, "a finite number above 0", np.nextafter(0, 1))
        return super().check()

    def _taught(self, lesson: Lesson) -> History:
        epochs = lesson.epochs(self.epochs, self.usual_epochs)
        return {
            "loss": lesson.learn_classes(self._loss, lesson.everyone, epochs=epochs),
            "confidence_loss": self._confidence(lesson, epochs),
        }

    def _loss(self, answer: HeadBatch) -> Tensor:
        share = self._share
        if share == 1.0:
            return distillation_loss(answer, self.temperature)
        if share == 0.0:
            return class_loss(answer)
        return share * distillation_loss(answer, self.temperature) + (1 - share) * class_loss(answer)

    def _check_heads(self) -> None:
        heads = self.heads
        if isinstance(heads, str) and heads == "auto":
            return
        if isinstance(heads, str) or not isinstance(heads, Sequence) or not len(heads):
            raise ValueError(f"heads must be 'auto' or a list of heads to compare; got {heads!r}.")
        for head in heads:
            if isinstance(head, str):
                if head not in NAMED:
                    near = difflib.get_close_matches(head, NAMED, n=3, cutoff=0.4)
                    raise ValueError(
                        f"heads must be names among {', '.join(NAMED)}, or factories (spec, n_classes) -> module; got "
                        f"{head!r}." + (f" Near it: {', '.join(near)}." if near else "")
                    )
            elif isinstance(head, nn.Module) or not callable(head):
                raise TypeError(
                    f"heads must be names or factories (spec, n_classes) -> module; got {head!r}. Every exit needs a "
                    "head of its own: pass a function that makes one."
                )
        if len(names := [head for head in heads if isinstance(head, str)]) > len(set(names)):
            raise ValueError(f"heads must name each head once; got {list(heads)!r}.")
