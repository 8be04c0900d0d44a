"""What a fitted estimator says of its exits: curves, who leaves where, how sure they are, how long they take."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted
from torch import nn

from adaptexit.calibrators.base import Calibrator
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
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
from adaptexit.data.validated import TakesData
from adaptexit.networks.base import Network
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.cost import StageLatencies


class ExitReports(TakesData):
    """Reports of the estimators, on their calibration data or on others."""

    budget: float | None
    calibrator_: Calibrator
    outputs_: ExitOutputs
    classes_: NDArray[Any]
    _network: Network

    @abstractmethod
    def record(self, X: Any, y: Any = None, sample_weight: Any = None) -> ExitOutputs:
        """What every exit answers on (X, y)."""

    @abstractmethod
    def _record(self, X: Any, y: Any, ordered: bool) -> ExitOutputs:
        """The same; ``ordered`` refuses a loader that shuffles."""

    @abstractmethod
    def _remark(self) -> None:
        """Warn of what should be known before thresholds are used."""

    def pareto(self, X: Any = None, y: Any = None, sample_weight: Any = None) -> ParetoFrontier:
        """The frontier on the calibration data, or every calibrated point re-evaluated on (X, y).

        Re-evaluated points keep their order, dominated or not, and ``at`` still chooses by the calibration data. With
        ``sample_weight`` (N,) samples count by weight, as :meth:`record` says.
        """
        check_is_fitted(self)
        self._remark()
        _check_alone(X, y, sample_weight)
        return self.calibrator_.pareto(None if X is None else self.record(X, y, sample_weight))

    def operating_point(self, budget: float | None = None, max_drop: float | None = None) -> OperatingPoint:
        """The stored operating point that ``predict`` uses; arguments as for :meth:`at`."""
        check_is_fitted(self)
        self._remark()
        if budget is None and max_drop is None:
            budget = self.budget
        return self.calibrator_.policy(budget=budget, max_drop=max_drop).point

    def exit_calibration(
        self,
        X: Any = None,
        y: Any = None,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        n_bins: int = 10,
    ) -> ExitCalibration:
        """How well scores match accuracy among those who leave at each exit, on (X, y) or the calibration data."""
        point = self.operating_point(budget, max_drop)
        return exit_calibration(self._thresholded(X, y), point, n_bins)

    def exit_flow(
        self, X: Any = None, y: Any = None, *, budget: float | None = None, max_drop: float | None = None
    ) -> NDArray[np.int64]:
        """How many samples of each true class reach each exit, (K, C), on (X, y) or the calibration data."""
        point = self.operating_point(budget, max_drop)
        return flow(self._thresholded(X, y), point)

    def survivor_shift(
        self, X: Any = None, y: Any = None, *, budget: float | None = None, max_drop: float | None = None
    ) -> SurvivorShift:
        """How the classes of those who reach each exit differ from everybody's, on (X, y) or the calibration data."""
        point = self.operating_point(budget, max_drop)
        return survivor_shift(self._thresholded(X, y), point)

    def exemplars(
        self, X: Any = None, y: Any = None, *, budget: float | None = None, max_drop: float | None = None, n: int = 6
    ) -> Exemplars:
        """Who leaves each early exit barely and who with ease, on (X, y), not shuffling, or the calibration data."""
        point = self.operating_point(budget, max_drop)
        return exemplars(self._thresholded(X, y, ordered=True), point, n)

    def _thresholded(self, X: Any, y: Any, ordered: bool = False) -> ExitOutputs:
        """Outputs on (X, y) or the calibration data, under the score that is thresholded."""
        _check_alone(X, y)
        return self.calibrator_.rescored(self.outputs_ if X is None else self._record(X, y, ordered))

    def latencies(self, X: Any, batch_sizes: Sequence[int] = (1, 8, 64)) -> StageLatencies:
        """Measured seconds of every stage and exit on batches of several sizes, made from the first inputs of X.

        MACs mispredict time; this says what leaving early is worth on this machine.
        """
        check_is_fitted(self)
        with evaluating(self._network.modules):
            return self._network.latencies(self._input_batches(X).first(), batch_sizes)

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        estimator: Any = self
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = {
            name: value for name, value in estimator.get_params(deep=False).items() if not _is(value, defaults[name])
        }
        arguments = ", ".join(f"{name}={_short(value)}" for name, value in changed.items())
        if not hasattr(self, "calibrator_"):
            return f"{type(self).__name__}({arguments})"
        point, outputs = self.calibrator_.point_, self.outputs_
        return (
            f"{type(self).__name__}({arguments})\n"
            f"  exits: {' → '.join(self._network.exit_names)}\n"
            f"  calibrated on {outputs.n_samples:,} samples, {len(self.classes_)} classes: accuracy "
            f"{point.accuracy:.4f} at relative cost {point.cost:.3f} (full model {outputs.full_accuracy:.4f}), "
            f"{len(self.calibrator_.frontier_.points)} operating points"
        )


def _check_alone(X: Any, y: Any, sample_weight: Any = None) -> None:
    """Refuse labels and weights without the data that they are of."""
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if X is None and value is not None:
            raise ValueError(
                f"X must be given where {name} is; got {name} alone. Leave both out for the calibration data."
            )


def _is(value: Any, default: Any) -> bool:
    """Whether a parameter has its default; only plain values are compared, as arrays and modules may be anything."""
    plain = isinstance(value, (str, int, float)) and type(value) is type(default)
    return value is default or (plain and value == default)


def _short(value: Any) -> str:
    """A parameter in a line: of modules and the like their class alone."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_short, value))}]"
    if inspect.isroutine(value):
        return value.__name__
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__
