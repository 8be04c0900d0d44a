"""What every calibrator offers to the estimators: a frontier, the point in use, and policies of either."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from adaptexit.core.answer import Answer
from adaptexit.core.chance import warn_of_chance
from adaptexit.core.costs import Costs
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.policy import ThresholdPolicy, recorded_scores
from adaptexit.core.routing import exit_index
from adaptexit.core.scores import resolve_score, scores_of, widened
from adaptexit.utils.learning import twin_of
from adaptexit.utils.schema import check_form, whole

Memory = NDArray[Any] | None
ScoreName = Literal["recorded", "max_proba", "entropy", "margin"]


class Calibrator(BaseEstimator):
    """Base of the calibrators. A subclass fits ``frontier_`` and ``point_`` and may rescore outputs and batches.

    Attributes
    ----------
    frontier_ : ParetoFrontier
        The stored operating points on the calibration data.
    point_ : OperatingPoint
        The one in use when no budget is given.
    costs_ : Costs
        What stages and exits cost when this calibrator decides, its own work included.
    """

    needs_logits: bool = False
    """Whether outputs and batches must carry logits."""

    needs_features: bool = False
    """Whether outputs and batches are to carry features, where the model has any."""

    needs_training: bool = False
    """Whether ``fit`` takes ``training=``, the outputs on the data that the heads were trained on."""

    reads_weights: bool = True
    """Whether ``fit`` takes outputs whose samples have weights; evaluating on such is always possible."""

    remembers: bool = False
    """Whether scores read what was found at earlier exits: all up to the deepest one on are run and paid for."""

    frontier_: ParetoFrontier
    point_: OperatingPoint
    costs_: Costs

    def fit(self, outputs: ExitOutputs) -> Calibrator:
        """Learn from calibration outputs; with ``needs_training`` there is ``training=`` too."""
        raise NotImplementedError

    def _keep(self, points: Iterable[OperatingPoint], point: OperatingPoint, outputs: ExitOutputs) -> None:
        """Store the points, the one in use, and what exits cost; remark on models that only guess."""
        warn_of_chance(outputs)
        self.frontier_, self.point_ = ParetoFrontier.of(points, outputs), point
        self.costs_ = outputs.pricing.charged(self.extra_costs_, self.remembers)

    @property
    def extra_costs_(self) -> NDArray[np.float64]:
        """What the calibrator itself costs a sample at each exit that is on, shape (K,), in the outputs' unit."""
        return np.zeros(len(self.point_.cutoffs))

    @property
    def thresholds_(self) -> NDArray[np.float64]:
        """Thresholds of the point in use, shape (K,) or (K, C); the last row is -inf."""
        return self.point_.thresholds

    # -- offline ---------------------------------------------------------------------------------------------------

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """The outputs under the score that this calibrator thresholds."""
        return outputs

    def charged(self, outputs: ExitOutputs) -> ExitOutputs:
        """The outputs at the costs that are paid when this calibrator decides."""
        costs = outputs.pricing.charged(self.extra_costs_, self.remembers)
        return outputs.with_costs(costs.stages, costs.exits, costs.chained)

    def exit_index(self, outputs: ExitOutputs, point: OperatingPoint | None = None) -> NDArray[np.intp]:
        """The exit of every sample, shape (N,), on recorded outputs."""
        check_is_fitted(self)
        own = twin_of(self)
        check_outputs(outputs, own.point_.cutoffs)
        return exit_index(own.rescored(outputs), (own.point_ if point is None else point).cutoffs)

    def pareto(self, outputs: ExitOutputs | None = None) -> ParetoFrontier:
        """The calibrated frontier, or every point of it re-evaluated on other outputs, in the same order."""
        check_is_fitted(self)
        if outputs is None:
            return self.frontier_
        own = twin_of(self)
        check_outputs(outputs, own.point_.cutoffs)
        return own.frontier_.on(own.rescored(outputs)).beside(outputs)

    # -- online ----------------------------------------------------------------------------------------------------

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        """What :meth:`rescored` makes of one batch at exit k, and what it is to be given at the next exit."""
        return batch.scores, None

    def policy(
        self,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        point: OperatingPoint | None = None,
    ) -> ThresholdPolicy:
        """An operating point made ready: the rule of :meth:`exit_index`, online. It stays when this is fitted again.

        Parameters
        ----------
        budget : float, optional
            Mean relative cost: the stored point of best calibrated accuracy within it.
        max_drop : float, optional
            Instead: the cheapest stored point that loses at most so much calibrated accuracy (0.01 is one point).
        point : OperatingPoint, optional
            Instead: this one. With none of the three, ``point_``.

        Raises
        ------
        ValueError
            For a budget below the cheapest stored point, or more than one of the three.
        """
        check_is_fitted(self)
        if sum(choice is not None for choice in (budget, max_drop, point)) > 1:
            raise ValueError(f"give at most one of budget, max_drop and point; got {budget=}, {max_drop=}, {point=}.")
        own = twin_of(self)  # a policy outlives the next fit, which replaces what scores are made with
        if point is None:
            in_use = budget is None and max_drop is None
            point = own.point_ if in_use else own.frontier_.at(budget=budget, max_drop=max_drop)
        scoring = recorded_scores if own._keeps_scores else own.scores
        return ThresholdPolicy.of(
            point, own.costs_, scoring, needs_logits=own._decides_on_logits, needs_features=own.needs_features
        )

    @property
    def _keeps_scores(self) -> bool:
        """Whether the model's own scores are compared with the thresholds."""
        return type(self).scores is Calibrator.scores

    @property
    def _decides_on_logits(self) -> bool:
        """Whether :meth:`scores` reads logits; what is learned by ``fit`` may need them besides."""
        return self.needs_logits

    # -- persistence -----------------------------------------------------------------------------------------------

    def get_state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        """What was learned, as a JSON value and named arrays, for writing."""
        check_is_fitted(self)
        header, arrays = self.frontier_.to_arrays()
        return {"frontier": header, "point_in_use": self.frontier_.index(self.point_)}, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, NDArray[np.float64]], outputs: ExitOutputs) -> None:
        """Take back what :meth:`get_state` gave; ``outputs`` are those of the calibration.

        Raises
        ------
        ValueError
            For a state, arrays or outputs that do not belong together.
        """
        check_form(state, {"frontier": dict, "point_in_use": whole(0), "*": object}, "calibrator")
        frontier = ParetoFrontier.from_arrays(state["frontier"], arrays)
        check_form(state["point_in_use"], whole(0, len(frontier.points) - 1), "calibrator.point_in_use")
        check_outputs(outputs, frontier.points[0].cutoffs)
        if frontier.n_samples != outputs.n_samples:
            raise ValueError(f"outputs must be the {frontier.n_samples} calibrated on; got {outputs.n_samples}.")
        self.frontier_, self.point_ = frontier, frontier.points[state["point_in_use"]]
        self.costs_ = outputs.pricing.charged(self.extra_costs_, self.remembers)


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
    pairs = sorted(points, key=lambda pair: (pair[0].cost, pair[0].accuracy))
    frontier = ParetoFrontier.of([point for point, _ in pairs], calibration)
    if outputs is None:
        return frontier
    return ParetoFrontier.of([point for _, point in pairs if point], outputs, chosen_on=frontier)


def check_sweep(name: str, values: Any, calibrator: Any, outputs: ExitOutputs | None) -> None:
    """Refuse a sweep over nothing, on outputs of another model, or of a calibrator that was loaded."""
    check_is_fitted(calibrator)
    if not hasattr(calibrator, "_fit_data"):
        raise ValueError("refit=True learns anew from the data of fit, which are not saved. Fit the calibrator first.")
    if outputs is not None:
        check_outputs(outputs, calibrator.point_.cutoffs)
    if isinstance(values, str) or not np.iterable(values) or not list(values):
        raise ValueError(f"{name} must be a sequence of at least one number; got {values!r}.")


class ScoreCalibrator(Calibrator):
    """Base of the calibrators with a parameter ``score``: what is compared with the thresholds."""

    score: ScoreName | Callable[[Any], Any]

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
        return outputs.with_scores(np.stack([scores_of(exit_logits, formula) for exit_logits in outputs.logits]))

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        if not self.needs_logits:
            return batch.scores, None
        if batch.logits is None:
            raise ValueError(f"score={self.score!r} needs logits, but the batch has none.")
        return np.asarray(self._formula()(widened(batch.logits))), None

    @property
    def _keeps_scores(self) -> bool:
        return not self.needs_logits

    def _formula(self) -> Callable[[Any], NDArray[Any]]:
        return resolve_score(self.score, "score", also=("recorded",))


def check_weights(calibrator: Calibrator, *weights: Any) -> None:
    """Refuse weights, of which any may be None, where what is learned would not read them."""
    if not calibrator.reads_weights and any(own is not None for own in weights):
        raise ValueError(
            f"{type(calibrator).__name__} does not read sample_weight, which samples have here. ThresholdCalibrator, "
            "TemperatureCalibrator, PatienceCalibrator and CPMCalibrator do; or draw a sample by weight, as "
            "rng.choice(n, size=n, p=weights / weights.sum()), and calibrate on that without weights."
        )


def check_outputs(outputs: Any, cutoffs: NDArray[np.float64] | None = None) -> None:
    """Refuse what is no :class:`ExitOutputs`, or has other exits or classes than were calibrated."""
    if not isinstance(outputs, ExitOutputs):
        raise TypeError(f"outputs must be ExitOutputs; got {type(outputs).__name__}. Estimators make them by record.")
    if cutoffs is None:
        return
    if outputs.n_exits != len(cutoffs):
        raise ValueError(f"outputs must have the {len(cutoffs)} exits that were calibrated; got {outputs.n_exits}.")
    if cutoffs.ndim == 2 and (outputs.predictions is None or outputs.n_classes != cutoffs.shape[1]):
        others = "no predictions" if outputs.predictions is None else f"{outputs.n_classes} classes"
        raise ValueError(
            f"outputs must have predictions of the {cutoffs.shape[1]} classes that were calibrated, as thresholds are "
            f"by class; got {others}."
        )
