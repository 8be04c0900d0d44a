"""What recipes share: settings, the head that belongs to them, and training in two phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from adaptexit.training.feature_cache import FeatureCache
from adaptexit.training.head_trainer import Lesson, checked_rows, class_loss
from adaptexit.utils.validation import check_whole, checked_number, checked_settings

if TYPE_CHECKING:
    from adaptexit.heads.base import Head
    from adaptexit.heads.by_name import HeadName

History = dict[str, Any]
LearnFrom = Literal["backbone", "labels"]


@runtime_checkable
class Recipe(Protocol):
    """A way to train heads on cached features, in place; it returns losses as JSON holds them.

    It may have more: ``check()``, asked before anything is run, refuses settings that cannot be; ``head_for(head)``
    turns the user's choice of a head, "auto" included, into what ``make_head`` takes; ``check_heads(heads)`` refuses
    heads that it cannot train.
    """

    def train(
        self,
        heads: Sequence[Head],
        cache: FeatureCache,
        rows: ArrayLike,
        targets: ArrayLike,
        *,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> History: ...


class HeadRecipe(BaseEstimator):
    """Base of the recipes: all heads learn classes together, one pass a minibatch, and then confidence.

    Heads share no parameters, and a chained head reads the previous head's state without a gradient, so each learns as
    if it were trained alone. A subclass has the parameters ``epochs``, ``lr``, ``weight_decay``, ``batch_size`` and
    ``confidence_epochs``.
    """

    usual_epochs: int
    """Where ``epochs`` is "auto", unless more are needed for 500 minibatches."""

    own_head: HeadName
    """The head that the recipe takes where the user leaves it open."""

    learn_from: LearnFrom = "labels"
    """What heads are to answer: the labels, or what the full model answers."""

    clamp: float = 0.0
    """How near to 0 and 1 a confidence counts in its loss, at least."""

    epochs: int | Literal["auto"]
    lr: float
    weight_decay: float
    batch_size: int
    confidence_epochs: int | None

    def head_for(self, head: Any) -> Any:
        """What answers at a cut, for :func:`adaptexit.heads.make_head`: the user's choice, or the recipe's own."""
        return self.own_head if isinstance(head, str) and head == "auto" else head

    def check_heads(self, heads: Sequence[Head]) -> None:
        """Refuse heads that the recipe cannot train."""

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        settings = checked_settings(self.epochs, self.lr, self.weight_decay, self.batch_size)
        if self.confidence_epochs is not None:
            check_whole("confidence_epochs", self.confidence_epochs, 1)
        if self.learn_from not in get_args(LearnFrom):
            raise ValueError(f"learn_from must be 'backbone' or 'labels'; got {self.learn_from!r}.")
        if not 0 <= checked_number("clamp", self.clamp, "a number from 0 to below 0.5") < 0.5:
            raise ValueError(f"clamp must lie between 0 and 0.5; got {self.clamp!r}.")
        return settings

    def train(
        self,
        heads: Sequence[Head],
        cache: FeatureCache,
        rows: ArrayLike,
        targets: ArrayLike,
        *,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> History:
        """Train the heads in place; they are in evaluation mode afterwards.

        Parameters
        ----------
        heads : sequence of K - 1 Heads
        cache : FeatureCache
        rows : integer array (n,)
            Samples of the cache to train on.
        targets : integer array (n,)
            Class index of each of them; only where the recipe learns from labels do heads learn it.
        random_state : int, RandomState or None
        verbose : int
            From 1 on, a bar over epochs.

        Returns
        -------
        dict
            ``"loss"`` and ``"confidence_loss"``: for each head, its mean loss in every epoch; empty for a head without
            a confidence output. Some recipes add to it.

        Raises
        ------
        ValueError
            For parameters, rows, targets or logits outside what is allowed.
        FloatingPointError
            When a loss becomes NaN or infinite.
        """
        lesson = self._lesson(heads, cache, rows, targets, random_state, verbose)
        return self._taught(lesson)

    def _taught(self, lesson: Lesson) -> History:
        epochs = lesson.epochs(self.epochs, self.usual_epochs)
        return {
            "loss": lesson.learn_classes(class_loss, lesson.everyone, epochs=epochs),
            "confidence_loss": self._confidence(lesson, epochs),
        }

    def _confidence(self, lesson: Lesson, epochs: int) -> list[list[float]]:
        """The second phase of all heads."""
        return lesson.learn_confidence(lesson.everyone, self.clamp, epochs=self.confidence_epochs or epochs)

    def _lesson(
        self,
        heads: Sequence[Head],
        cache: FeatureCache,
        rows: ArrayLike,
        targets: ArrayLike,
        random_state: Any,
        verbose: int,
    ) -> Lesson:
        settings = self.check()
        if len(heads) != len(cache.features):
            raise ValueError(f"heads must be one for each of the {len(cache.features)} early exits; got {len(heads)}.")
        self.check_heads(heads)
        samples, classes = checked_rows(rows, targets, cache)
        if self.learn_from == "backbone":
            classes = cache.logits[samples].argmax(axis=1)
        loop = settings | {"random_state": check_random_state(random_state), "verbose": verbose}
        return Lesson(heads, cache, samples, torch.from_numpy(classes), loop)


class MarginRecipe(HeadRecipe):
    """Base of the recipes whose paper leaves by class precision margins: ``CPMCalibrator.published_with(recipe)``."""

    cascade_aware: bool = False
    """Whether precision is counted on survivors."""
