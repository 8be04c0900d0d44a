"""What every calibrator offers to the estimators: a frontier, the point in use, and one rule offline and online."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, reference
from adaptexit.core.outputs import ExitBatch, ExitOutputs
from adaptexit.core.routing import accepts, exit_index
from adaptexit.core.scores import resolve_score, widened


class CalibrationWarning(UserWarning):
    """Calibration data say less than they seem to: the backbone may have learned from them, or classes are missing."""


class Calibrator(BaseEstimator):
    """Base of the calibrators. A subclass fits ``frontier_`` and ``point_`` and may rescore outputs and batches.

    Attributes
    ----------
    frontier_ : ParetoFrontier
        The stored operating points on the calibration data.
    point_ : OperatingPoint
        The one in use when no budget is given.
    """

    needs_logits: bool = False
    """Whether outputs and batches must carry logits."""

    needs_features: bool = False
    """Whether outputs and batches are to carry features, where the model has any."""

    needs_training: bool = False
    """Whether ``fit`` takes ``training=``, the outputs on the data that the heads were trained on."""

    remembers: bool = False
    """Whether scores read what was found at earlier exits: all up to the deepest one on are run and paid for."""

    frontier_: ParetoFrontier
    point_: OperatingPoint

    def fit(self, outputs: ExitOutputs) -> Calibrator:
        """Learn from calibration outputs; with ``needs_training`` there is ``training=`` too."""
        raise NotImplementedError

    @property
    def extra_costs_(self) -> NDArray[np.float64]:
        """What the calibrator itself costs a sample at each exit that is on, shape (K,), in the outputs' unit."""
        return np.zeros(len(self.point_.cutoffs))

    @property
    def thresholds_(self) -> NDArray[np.float64]:
        """Thresholds of the point in use, shape (K,) or (K, C); the last row is -inf."""
        return self.point_.thresholds

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """The outputs under the score that this calibrator thresholds."""
        return outputs

    def rescored_batch(self, k: int, batch: ExitBatch) -> ExitBatch:
        """The same of one batch at exit k; one that ``remembers`` reads ``batch.earlier`` and adds to it."""
        return batch

    def charged(self, outputs: ExitOutputs) -> ExitOutputs:
        """The outputs at the costs that are paid when this calibrator decides."""
        extra = self.extra_costs_
        if not (extra.any() or self.remembers):
            return outputs
        chained = outputs.chained or self.remembers
        return outputs.with_costs(outputs.stage_costs, outputs.exit_costs + extra, chained)

    def get_state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        """What was learned, as a JSON value and named arrays, for writing."""
        check_is_fitted(self)
        described, arrays = self.frontier_.to_arrays()
        in_use = next(i for i, point in enumerate(self.frontier_.points) if point is self.point_)
        return {"frontier": described, "point_in_use": in_use}, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, NDArray[np.float64]]) -> None:
        """Take back what :meth:`get_state` gave."""
        self.frontier_ = ParetoFrontier.from_arrays(state["frontier"], arrays)
        self.point_ = self.frontier_.points[state["point_in_use"]]

    def operating_point(self, budget: float | None = None) -> OperatingPoint:
        """The stored point for a budget (mean relative cost), or the one in use."""
        check_is_fitted(self)
        return self.point_ if budget is None else self.frontier_.at(budget=budget)

    def accept(self, k: int, batch: ExitBatch, point: OperatingPoint | None = None) -> NDArray[np.bool_]:
        """Who of the batch leaves at exit k, shape (B,): the rule of :meth:`exit_index`, online.

        Parameters
        ----------
        k : int
        batch : ExitBatch
            What exit k knows of B samples that reached it.
        point : OperatingPoint, optional
            The operating point to apply instead of the one in use.
        """
        return self.decide(k, batch, point)[0]

    def decide(
        self, k: int, batch: ExitBatch, point: OperatingPoint | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[Any] | None]:
        """What :meth:`accept` gives, and what later exits are to be given as ``batch.earlier``, (B, m) or None."""
        check_is_fitted(self)
        cutoffs = (self.point_ if point is None else point).cutoffs
        scored = self.rescored_batch(k, batch)
        return accepts(scored, cutoffs[k]), scored.earlier

    def exit_index(self, outputs: ExitOutputs, point: OperatingPoint | None = None) -> NDArray[np.intp]:
        """The exit of every sample, shape (N,), on recorded outputs."""
        check_is_fitted(self)
        check_outputs(outputs, self.point_.cutoffs)
        return exit_index(self.rescored(outputs), (self.point_ if point is None else point).cutoffs)

    def pareto(self, outputs: ExitOutputs | None = None) -> ParetoFrontier:
        """The calibrated frontier, or every point of it re-evaluated on other outputs, in the same order."""
        check_is_fitted(self)
        if outputs is None:
            return self.frontier_
        check_outputs(outputs, self.point_.cutoffs)
        return self.frontier_.on(self.rescored(outputs)).beside(outputs)


def sweep_of(
    points: list[tuple[OperatingPoint, OperatingPoint | None]], calibration: ExitOutputs, outputs: ExitOutputs | None
) -> ParetoFrontier:
    """The frontier of a sweep that learns anew at each point.

    Parameters
    ----------
    points : list of (OperatingPoint, OperatingPoint or None)
        Each on the calibration outputs, and on ``outputs`` where there are any.
    calibration : ExitOutputs
        What a point is chosen on.
    outputs : ExitOutputs or None
        Other data to report.
    """
    ordered = sorted(points, key=lambda pair: (pair[0].cost, pair[0].accuracy))
    chosen_on = ParetoFrontier([point for point, _ in ordered], *reference(calibration))
    if outputs is None:
        return chosen_on
    return ParetoFrontier([point for _, point in ordered if point], *reference(outputs), chosen_on=chosen_on)


def check_sweep(name: str, values: Any, calibrator: Any, outputs: ExitOutputs | None) -> None:
    """Refuse a sweep over nothing, on outputs of another model, or of a calibrator that was loaded."""
    check_is_fitted(calibrator)
    if not hasattr(calibrator, "_kept"):
        raise ValueError("refit=True learns anew from the data of fit, which are not saved. Fit the calibrator first.")
    if outputs is not None:
        check_outputs(outputs, calibrator.point_.cutoffs)
    if isinstance(values, str) or not np.iterable(values) or not list(values):
        raise ValueError(f"{name} must be a sequence of at least one number; got {values!r}.")


class ScoreCalibrator(Calibrator):
    """Base of the calibrators with a parameter ``score``: what is compared with the thresholds."""

    score: str | Callable[[Any], Any]

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        """Whether outputs and batches must carry logits."""
        return not (isinstance(self.score, str) and self.score == "recorded")

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        if not self.needs_logits:
            return outputs
        formula = self._formula()
        if outputs.logits is None:
            raise ValueError(
                f"score={self.score!r} needs logits, but the outputs have none. Record them (keep_logits=True), "
                "or use score='recorded'."
            )
        return outputs.with_scores(
            np.stack([np.asarray(formula(widened(exit_logits))) for exit_logits in outputs.logits])
        )

    def rescored_batch(self, k: int, batch: ExitBatch) -> ExitBatch:
        if not self.needs_logits:
            return batch
        if batch.logits is None:
            raise ValueError(f"score={self.score!r} needs logits, but the batch has none.")
        return dataclasses.replace(batch, scores=np.asarray(self._formula()(widened(batch.logits))))

    def _formula(self) -> Callable[[Any], NDArray[Any]]:
        return resolve_score(self.score, "score", also=("recorded",))


def check_outputs(outputs: Any, cutoffs: NDArray[np.float64] | None = None) -> None:
    """Refuse what is no :class:`ExitOutputs`, or has other exits or classes than were calibrated."""
    if not isinstance(outputs, ExitOutputs):
        raise TypeError(f"outputs must be ExitOutputs; got {type(outputs).__name__}. Estimators make them by record.")
    if cutoffs is None:
        return
    if outputs.n_exits != len(cutoffs):
        raise ValueError(f"outputs must have the {len(cutoffs)} exits that were calibrated; got {outputs.n_exits}.")
    if cutoffs.ndim == 2 and (outputs.predictions is None or outputs.n_classes != cutoffs.shape[1]):
        came = "no predictions" if outputs.predictions is None else f"{outputs.n_classes} classes"
        raise ValueError(
            f"outputs must have predictions of the {cutoffs.shape[1]} classes that were calibrated, as thresholds are "
            f"by class; got {came}."
        )
