"""CalexNet: heads that learn, one after the other, what the heads before them leave over."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.margins import margin_thresholds
from adaptexit.core.outputs import ExitOutputs
from adaptexit.data.classes import hold_out
from adaptexit.exceptions import warn
from adaptexit.training.head_trainer import Lesson, class_loss, distillation_loss
from adaptexit.training.recipes.base import History, LearnFrom, MarginRecipe
from adaptexit.utils.validation import check_switch, check_whole, checked_number

Alignment = Literal["soft", "hard"]
ALIGNMENTS = get_args(Alignment)

LEAST_WEIGHT = 1e-12
"""Of a sample that an earlier head is entirely sure of."""

FEWEST_SURVIVORS = 2


class CalexNetRecipe(MarginRecipe):
    """Head after head: classes from the full model's probabilities, then confidence, on what earlier heads leave over.

    CalexNet (2026), section 3.4. A head learns on samples drawn with weights prod_k (1 - R_k), R_k being how sure
    head k before it is of its answer (equation 11); its classes learn the full model's softened probabilities
    (equation 13); its confidence then learns whether its answer is the full model's (equation 9). Labels serve
    calibration only.

    Parameters
    ----------
    alignment : {"soft", "hard"} or None, default="soft"
        "soft" weights samples by equation 11. "hard" keeps those only that no earlier head would let leave
        (equation 10); the thresholds for that come from part of the training samples. None trains every head on all
        samples alike.
    distillation : bool, default=True
        False learns the class that the full model answers by cross-entropy (equation 8) instead of its probabilities.
    cascade_aware : bool, default=True
        Whether margins are counted on survivors (equation 12): by ``CPMCalibrator.published_with(recipe)``, and for the
        hard filter.
    temperature : float, default=4.0
        Of the softened probabilities.
    epochs : int or "auto", default="auto"
        Of each head; "auto" is 100, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.0
    batch_size : int, default=2048
    distillation_batch_size : int, default=256
        In place of ``batch_size`` where classes are learned by distillation.
    confidence_epochs : int or None, default=None
        None takes ``epochs``.
    learn_from : {"backbone", "labels"}, default="backbone"
        What an answer has to be to count as right, and what is learned without distillation.
    clamp : float, default=1e-7
        Confidence counts as no nearer to 0 and 1 than this in its loss.
    filter_margin : float, default=0.2
        Margin of the hard filter's thresholds.
    filter_size : float, default=0.2
        Share of the training samples that those are found on, and that the heads do not learn from.

    Notes
    -----
    The paper prints the divergence with the head's probabilities first and calls it Hinton's soft target; ours is
    Hinton's: KL(full model || head) at temperature T, times T^2. Drawing by weight repeats samples within an epoch. The
    paper weights the loss of the classes; here confidence learns from samples drawn by the same weights.

    ``train`` adds ``"effective_samples"`` to the history: (sum w)^2 / sum w^2 of each head's weights, or how many
    samples the filter left to it.
    """

    usual_epochs = 100
    own_head = "refined_prototype"

    def __init__(
        self,
        alignment: Alignment | None = "soft",
        distillation: bool = True,
        cascade_aware: bool = True,
        *,
        temperature: float = 4.0,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 2048,
        distillation_batch_size: int = 256,
        confidence_epochs: int | None = None,
        learn_from: LearnFrom = "backbone",
        clamp: float = 1e-7,
        filter_margin: float = 0.2,
        filter_size: float = 0.2,
    ) -> None:
        self.alignment = alignment
        self.distillation = distillation
        self.cascade_aware = cascade_aware
        self.temperature = temperature
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.distillation_batch_size = distillation_batch_size
        self.confidence_epochs = confidence_epochs
        self.learn_from = learn_from
        self.clamp = clamp
        self.filter_margin = filter_margin
        self.filter_size = filter_size

    @classmethod
    def reference(cls, **settings: Any) -> CalexNetRecipe:
        """The paper's own baseline: the same heads and phases without alignment and without distillation."""
        return cls(alignment=None, distillation=False, cascade_aware=False, **settings)

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        if self.alignment is not None and self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {list(ALIGNMENTS)} or None; got {self.alignment!r}.")
        for name in ("distillation", "cascade_aware"):
            check_switch(name, getattr(self, name))
        checked_number("temperature", self.temperature, "a finite number above 0", np.nextafter(0, 1))
        check_whole("distillation_batch_size", self.distillation_batch_size, 2)
        checked_number("filter_margin", self.filter_margin, "a share of precision, at least 0", 0.0)
        if not 0 < checked_number("filter_size", self.filter_size, "a share between 0 and 1") < 1:
            raise ValueError(f"filter_size must lie between 0 and 1; got {self.filter_size!r}.")
        return super().check()

    def _taught(self, lesson: Lesson) -> History:
        history: History = {"loss": [], "confidence_loss": [], "effective_samples": []}
        survivors = _Survivors(self, lesson)
        for k in lesson.everyone:
            current, weights = survivors.lesson, survivors.weights
            history["effective_samples"].append(_effective(weights, current.n_samples))
            loss, confidence = self._learned(current, k, weights)
            history["loss"].append(loss)
            history["confidence_loss"].append(confidence)
            if k < len(lesson.heads) - 1:
                survivors.pass_exit(k)
        return history

    def _learned(self, lesson: Lesson, k: int, weights: NDArray[np.float64] | None) -> tuple[list[float], list[float]]:
        """Both phases of one head, and their losses."""
        batch_size = self.distillation_batch_size if self.distillation else self.batch_size
        loss = lesson.learn_classes(
            partial(distillation_loss, temperature=self.temperature) if self.distillation else class_loss,
            [k],
            epochs=lesson.epochs(self.epochs, self.usual_epochs, batch_size),
            batch_size=batch_size,
            sample_weight=weights,
        )
        epochs = self.confidence_epochs or lesson.epochs(self.epochs, self.usual_epochs)
        return loss[k], lesson.learn_confidence([k], self.clamp, epochs=epochs, sample_weight=weights)[k]


class _Survivors:
    """Who is left for the next head to learn from: weights, or a part of the samples."""

    def __init__(self, recipe: CalexNetRecipe, lesson: Lesson) -> None:
        self.recipe = recipe
        self.lesson = lesson
        self.weights: NDArray[np.float64] | None = None
        self._tuning: Lesson | None = None
        self._observed: list[tuple[NDArray[Any], NDArray[Any]]] = []
        if recipe.alignment == "hard" and len(lesson.heads) > 1:
            seed = int(lesson.loop["random_state"].randint(np.iinfo(np.int32).max))
            try:
                learning, tuning = hold_out(lesson.target.numpy(), recipe.filter_size, seed)
            except ValueError as error:
                raise ValueError(
                    f"alignment='hard' finds its thresholds on a part of the training samples, filter_size="
                    f"{recipe.filter_size}, and {lesson.n_samples} of them cannot be parted ({error}). Give more, or "
                    "take alignment='soft'."
                ) from error
            self.lesson, self._tuning = lesson.subset(learning), lesson.subset(tuning)

    def pass_exit(self, k: int) -> None:
        """Account for head k, which is trained now."""
        if self.recipe.alignment == "soft":
            _, confidence = self.lesson.observed(k)
            before = np.ones(self.lesson.n_samples) if self.weights is None else self.weights
            self.weights = np.maximum(before * (1.0 - confidence), LEAST_WEIGHT)
        elif self._tuning is not None:
            predictions, confidence = self.lesson.observed(k)
            stay = np.flatnonzero(confidence <= self._cutoffs(k, self._tuning)[predictions])
            if len(stay) < FEWEST_SURVIVORS:
                warn(
                    f"all but {len(stay)} training samples leave by exit {k}, so the next head learns from the same "
                    "samples as this one. Lower filter_margin, or take alignment='soft'.",
                    UserWarning,
                )
            else:
                self.lesson = self.lesson.subset(stay)

    def _cutoffs(self, k: int, tuning: Lesson) -> NDArray[np.float64]:
        """Of exit k by class, on the samples kept apart, after the exits before it."""
        self._observed.append(tuning.observed(k))
        full = tuning.cache.logits[tuning.rows].argmax(axis=1)
        outputs = ExitOutputs(
            predictions=np.stack([*(predictions for predictions, _ in self._observed), full]),
            scores=np.stack([*(scores for _, scores in self._observed), np.ones(len(full))]),
            labels=tuning.target.numpy(),
            n_classes=tuning.cache.logits.shape[1],
            costs=np.arange(1, k + 3),
        )
        _, cutoffs = margin_thresholds(
            outputs, [self.recipe.filter_margin], cascade_aware=bool(self.recipe.cascade_aware)
        )
        return cutoffs[0, k]


def _effective(weights: NDArray[np.float64] | None, n_samples: int) -> float:
    return float(n_samples) if weights is None else float(weights.sum() ** 2 / np.square(weights).sum())
