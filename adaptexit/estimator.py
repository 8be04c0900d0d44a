"""What every adaptive estimator does once it is fitted: answer at a budget, report, save."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from tqdm import tqdm

from adaptexit.calibrators import ThresholdCalibrator
from adaptexit.calibrators.base import Calibrator
from adaptexit.core.checks import checked_number
from adaptexit.core.frontier import TOLERANCE, OperatingPoint, ParetoFrontier
from adaptexit.core.metrics import (
    Exemplars,
    ExitCalibration,
    SurvivorShift,
    exemplars,
    exit_calibration,
    flow,
    survivor_shift,
)
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import softmax
from adaptexit.data import Batches, as_batches, is_stream, split_pair
from adaptexit.persistence import load, save
from adaptexit.staging.executor import Accept, Answers, StagedModel, execute, record
from adaptexit.staging.modes import evaluating
from adaptexit.trace import ExitTrace

_TABLE_ATTRIBUTES = ("n_features_in_", "feature_names_in_")


class AdaptiveClassifier(ClassifierMixin, BaseEstimator):
    """Base of the estimators: everything behind the stages and exits, which a subclass provides.

    A subclass has the parameters ``calibrator``, ``budget``, ``batch_size``, ``memory_limit`` and ``verbose``, learns
    ``classes_``, ``outputs_`` and ``calibrator_``, and says what it runs (:meth:`_staged`,
    :meth:`_modules`), what it calls its exits (:attr:`exit_names`) and whether data are a table (:meth:`_tabular`).

    Attributes
    ----------
    classes_ : array (C,)
    calibrator_ : the fitted calibrator
    outputs_ : ExitOutputs
        What every exit answered on the calibration data.
    cost_unit_ : "MACs", "seconds" or "given"
    """

    calibrator: Calibrator | None
    budget: float | None
    batch_size: int
    memory_limit: int
    verbose: int
    classes_: NDArray[Any]
    calibrator_: Calibrator
    outputs_: ExitOutputs

    # -- what a subclass provides --------------------------------------------------------------------------------------

    @property
    def exit_names(self) -> list[str]:
        """How pictures and tables name the exits, from shallow to deep."""
        raise NotImplementedError

    def _staged(self, calibrator: Calibrator | None = None) -> StagedModel:
        """What is run; with the features that a calibrator reads."""
        raise NotImplementedError

    def _modules(self) -> list[nn.Module]:
        raise NotImplementedError

    def _tabular(self, X: Any) -> bool:
        raise NotImplementedError

    def _labels_needed(self) -> bool:
        """Whether accuracy is measured against labels; otherwise it is agreement with the full model."""
        return True

    @property
    def cost_unit_(self) -> str | None:
        """Unit of the costs: "MACs", "seconds" or "given"."""
        return self.outputs_.cost_unit

    # -- answering -----------------------------------------------------------------------------------------------------

    def predict(self, X: Any, budget: float | None = None) -> NDArray[Any]:
        """Labels (N,), every sample leaving as early as the operating point allows.

        Parameters
        ----------
        X : array (N, ...), Dataset or DataLoader (not shuffling)
        budget : float, optional
            Mean relative cost to keep to: the stored point of best calibrated accuracy within it. Without one the
            constructor's budget counts, and without that the calibrator's point: no calibrated loss of accuracy, or
            the calibrator's own setting (CPM's margin).

        Raises
        ------
        ValueError
            For a budget below the cheapest operating point.
        """
        answers = self._answer(X, self._point(budget))
        return self.classes_[answers.predictions]

    def predict_proba(self, X: Any, budget: float | None = None) -> NDArray[Any]:
        """Class probabilities (N, C) of the exit that answered each sample; arguments as for :meth:`predict`."""
        answers = self._answer(X, self._point(budget), keep_logits=True)
        return np.asarray(softmax(answers.logits))

    def trace(self, X: Any, budget: float | None = None) -> ExitTrace:
        """Label, exit, cost and score of every sample; arguments as for :meth:`predict`."""
        point = self._point(budget)
        answers = self._answer(X, point)
        return ExitTrace(
            labels=self.classes_[answers.predictions],
            exits=answers.exits,
            costs=self._paid().path_costs(point.on)[answers.exits],
            scores=answers.scores,
            full_cost=self.outputs_.full_cost,
        )

    def _paid(self) -> ExitOutputs:
        """The calibration outputs at the costs that a sample pays when thresholds decide."""
        return self.calibrator_.charged(self.outputs_)

    def predict_anytime(self, X: Any, limit: float) -> NDArray[Any]:
        """Labels (N,) when nobody may spend more than ``limit`` (relative cost): the deepest exit within it answers.

        Raises
        ------
        ValueError
            For a limit below the cheapest exit.
        """
        check_is_fitted(self)
        limit = checked_number("limit", limit, "a finite relative cost (0.4 is 40% of the full model)")
        alone = self.outputs_.alone_costs() / self.outputs_.full_cost
        within = np.flatnonzero(alone <= limit + TOLERANCE)
        if not len(within):
            raise ValueError(
                f"limit must be at least {alone.min():.4g}, the relative cost of the cheapest exit; got {limit:.4g}."
            )
        only = int(within[-1])
        point_on = np.arange(len(alone)) == only
        answers = self._run(X, lambda k, batch: np.ones(len(batch.scores), dtype=bool), point_on)
        return self.classes_[answers.predictions]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, *, budget: float | None = None) -> float:
        """Accuracy on (X, y), where X may be a Dataset or DataLoader of (x, y); budget as for :meth:`predict`."""
        point = self._point(budget)
        X, y = split_pair(X, y)
        if is_stream(X):
            batches = as_batches(X, y, batch_size=self.batch_size, labels=True, ordered=False)
            answers = self._run(batches, self._accept(point), self._on(point))
            y = batches.labels
        elif y is None:
            raise ValueError(
                "labels are needed: give y, a pair (X, y), or a Dataset or DataLoader of (x, y); got y=None."
            )
        else:
            answers = self._answer(X, point)
        return float(accuracy_score(y, self.classes_[answers.predictions], sample_weight=sample_weight))

    def pareto(self, X: Any = None, y: Any = None) -> ParetoFrontier:
        """The frontier on the calibration data, or every calibrated point re-evaluated on (X, y).

        Re-evaluated points keep their order, dominated or not, and ``at`` still chooses by the calibration data.
        """
        check_is_fitted(self)
        if X is None:
            return self.calibrator_.pareto()
        return self.calibrator_.pareto(self.record(X, y))

    def exit_calibration(
        self, X: Any = None, y: Any = None, *, budget: float | None = None, n_bins: int = 10
    ) -> ExitCalibration:
        """How well scores match accuracy among those who leave at each exit, on (X, y) or the calibration data."""
        point = self._point(budget)
        return exit_calibration(self._thresholded(X, y), point, n_bins)

    def exit_flow(self, X: Any = None, y: Any = None, *, budget: float | None = None) -> NDArray[np.int64]:
        """How many samples of each true class reach each exit, (K, C), on (X, y) or the calibration data."""
        point = self._point(budget)
        return flow(self._thresholded(X, y), point)

    def survivor_shift(self, X: Any = None, y: Any = None, *, budget: float | None = None) -> SurvivorShift:
        """How the classes of those who reach each exit differ from everybody's, on (X, y) or the calibration data."""
        point = self._point(budget)
        return survivor_shift(self._thresholded(X, y), point)

    def exemplars(self, X: Any = None, y: Any = None, *, budget: float | None = None, n: int = 6) -> Exemplars:
        """Who leaves each early exit barely and who with ease, on (X, y), not shuffling, or the calibration data."""
        point = self._point(budget)
        return exemplars(self._thresholded(X, y, ordered=True), point, n)

    def _thresholded(self, X: Any, y: Any, ordered: bool = False) -> ExitOutputs:
        """Outputs on (X, y) or the calibration data, under the score that is thresholded."""
        return self.calibrator_.rescored(self.outputs_ if X is None else self._record(X, y, ordered))

    def record(self, X: Any, y: Any = None) -> ExitOutputs:
        """What every exit answers on (X, y), as :class:`ExitOutputs` for calibrators, metrics and pictures."""
        return self._record(X, y, ordered=False)

    def _record(self, X: Any, y: Any, ordered: bool) -> ExitOutputs:
        check_is_fitted(self)
        needed = self._labels_needed()
        X, y = split_pair(X, y)
        X, y = self._validated(X, y, reset=False) if needed or y is not None else (self._validated_inputs(X), None)
        batches = as_batches(X, y, batch_size=self.batch_size, labels=needed or None, ordered=ordered)
        known = self.outputs_
        described = {name: getattr(known, name) for name in ("stage_costs", "exit_costs", "chained", "cost_unit")}
        return self._recorded(batches, self.classes_, self.calibrator_, "recording", **described)

    def _recorded(
        self, batches: Batches, classes: NDArray[Any], calibrator: Calibrator, doing: str, **described: Any
    ) -> ExitOutputs:
        """What every exit answers; batches without labels are graded by the full model's answers."""
        with evaluating(self._modules()), self._progress(batches, doing) as shown:
            recorded = record(self._staged(calibrator), shown, keep_logits=calibrator.needs_logits)
        answered = recorded.predictions
        labels = batches.indices(classes, answered.shape[1]) if batches.labelled else answered[-1]
        return ExitOutputs(labels=labels, n_classes=len(classes), **recorded._asdict(), **described)

    def point_index(self, budget: float | None = None) -> int:
        """Index in ``pareto().points`` of the operating point that ``predict`` uses."""
        point = self._point(budget)
        return next(i for i, stored in enumerate(self.calibrator_.frontier_.points) if stored is point)

    def _point(self, budget: float | None) -> OperatingPoint:
        check_is_fitted(self)
        return self.calibrator_.operating_point(self.budget if budget is None else budget)

    def _accept(self, point: OperatingPoint) -> Accept:
        return lambda k, batch: self.calibrator_.decide(k, batch, point)

    def _on(self, point: OperatingPoint) -> NDArray[np.bool_]:
        """Exits that are run at an operating point."""
        return self._paid().paid_exits(point.on) if self.calibrator_.remembers else point.on

    def _answer(self, X: Any, point: OperatingPoint, keep_logits: bool = False) -> Answers:
        return self._run(X, self._accept(point), self._on(point), keep_logits=keep_logits)

    def _run(self, X: Any, accept: Accept, on: NDArray[np.bool_], keep_logits: bool = False) -> Answers:
        given = isinstance(X, Batches)
        batches = X if given else as_batches(self._validated_inputs(X), batch_size=self.batch_size)
        with evaluating(self._modules()), self._progress(batches, "predicting") as shown:
            return execute(
                self._staged(self.calibrator_),
                shown,
                accept,
                on,
                batch_size=batches.batch_size,
                memory_limit=self.memory_limit,
                needs_logits=self.calibrator_.needs_logits,
                keep_logits=keep_logits,
            )

    # -- data ----------------------------------------------------------------------------------------------------------

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Any, Any]:
        X, y = split_pair(X, y)
        if is_stream(X):
            return X, y
        if y is None:
            raise ValueError(
                "requires y to be passed, but the target y is None: give y, a pair (X, y), or a Dataset or DataLoader "
                "of (x, y)."
            )
        if self._tabular(X):
            X, y = validate_data(self, X, y, reset=reset)
            check_classification_targets(y)
        return X, y

    def _validated_inputs(self, X: Any) -> Any:
        if isinstance(X, tuple) and len(X) == 2 and np.ndim(X[1]) == 1 and np.ndim(X[0]) > 1:
            raise ValueError("X must be inputs alone here; got a pair, which looks like (X, y). Pass X only.")
        return validate_data(self, X, reset=False) if self._tabular(X) else X

    @contextmanager
    def _progress(self, batches: Batches, doing: str) -> Iterator[Iterable[Any]]:
        with tqdm(batches, total=batches.n_batches, desc=doing, disable=self.verbose < 1) as shown:
            yield shown

    # -- persistence ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a folder; :func:`adaptexit.load` reads it.

        Weights of modules are written; scikit-learn classifiers, modules and callables have to be given to ``load``
        again by their argument's name.
        """
        check_is_fitted(self)
        save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **given: Any) -> Self:
        """Read what :meth:`save` wrote; as :func:`adaptexit.load`, for this class only."""
        loaded = load(folder, **given)
        if not isinstance(loaded, cls):
            raise ValueError(f"folder must hold a {cls.__name__}; {folder} holds a {type(loaded).__name__}.")
        return loaded

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was learned, as a JSON value and tensors; a subclass adds its own."""
        calibrator, arrays = self.calibrator_.get_state()
        state = {
            "calibrator": calibrator,
            "classes": self.classes_,
            "classes_dtype": self.classes_.dtype.str,
            "table": {name: getattr(self, name) for name in _TABLE_ATTRIBUTES if hasattr(self, name)},
        }
        return state, {f"calibrator.{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        arrays = {name: tensor.numpy() for name, tensor in below("calibrator.", tensors).items()}
        self.calibrator_ = self._fresh_calibrator()
        self.calibrator_.set_state(state["calibrator"], arrays)
        self.classes_ = np.array(state["classes"], dtype=state["classes_dtype"])
        self.outputs_ = outputs
        for name, value in state["table"].items():
            setattr(self, name, np.array(value, dtype=object) if isinstance(value, list) else value)

    def _fresh_calibrator(self) -> Calibrator:
        return ThresholdCalibrator() if self.calibrator is None else clone(self.calibrator)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibrator_")


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
