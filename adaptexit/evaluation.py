"""Models in the two settings of papers on networks with exits: anytime prediction and budgeted batch classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from adaptexit.base import AdaptiveClassifier
from adaptexit.calibrators import ThresholdCalibrator
from adaptexit.calibrators.base import Calibrator
from adaptexit.calibrators.offline import calibrated, check_like, check_needs
from adaptexit.comparison import made_up_names
from adaptexit.core.cost_curves import AnytimeCurve, BudgetCurve, CostCurve, readable_scale
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search.shares import geometric_frontier
from adaptexit.utils.frames import aligned, as_frame
from adaptexit.utils.validation import check_switch, check_whole

if TYPE_CHECKING:
    import pandas

    import adaptexit

Floats = NDArray[np.float64]
Setting = Literal["anytime", "budgeted"]

_COLUMNS = ("model", "setting", "exit", "budget", "cost", "accuracy")

_COSTS = ("stage_costs", "exit_costs")

_MOST_STEPS = 6
"""Between the costs at which the printed table gives accuracies."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What :func:`evaluate_settings` found, on test data; costs are absolute, of a sample.

    Attributes
    ----------
    anytime : dict of str to AnytimeCurve
        Of every model, in the order given: accuracy of every exit, which answers for everybody, at its cost.
    budgeted : dict of str to BudgetCurve
        Accuracy and mean cost along the budget, thresholds being chosen on the calibration data.
    unit : "MACs", "seconds", "given" or None
        Of costs.
    every_exit_paid : bool
        Whether whoever passes an exit pays for it.
    n_samples : dict of str to int
        Test samples of every model.
    """

    anytime: dict[str, AnytimeCurve]
    budgeted: dict[str, BudgetCurve]
    unit: str | None
    every_exit_paid: bool
    n_samples: dict[str, int]

    def cost_at(self, accuracy: float, setting: Setting = "budgeted") -> dict[str, float]:
        """The least cost at which every model reaches an accuracy (a share), NaN where never; see CostCurve.cost_at."""
        return {name: curve.cost_at(accuracy) for name, curve in self._curves(setting).items()}

    def accuracy_at(self, cost: float, setting: Setting = "budgeted") -> dict[str, float]:
        """Every model's accuracy at its dearest point within a cost (in ``unit``), NaN where all cost more."""
        return {name: curve.accuracy_at(cost) for name, curve in self._curves(setting).items()}

    def _curves(self, setting: Setting) -> Mapping[str, CostCurve]:
        if setting not in get_args(Setting):
            raise ValueError(f"setting must be one of {[*get_args(Setting)]}; got {setting!r}.")
        return self.anytime if setting == "anytime" else self.budgeted

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a point (needs pandas): model, setting, exit, budget, cost and accuracy.

        ``exit`` is the exit's name in the anytime setting, ``budget`` the mean cost asked of the calibration data in
        the budgeted one; each is missing in the other setting.
        """
        rows: list[tuple[Any, ...]] = []
        for name, curve in self.anytime.items():
            points = zip(curve.exit_names, curve.cost, curve.accuracy, strict=True)
            rows += [(name, "anytime", exit_name, np.nan, *point) for exit_name, *point in points]
        for name, line in self.budgeted.items():
            rows += [(name, "budgeted", None, *p) for p in zip(line.budgets, line.cost, line.accuracy, strict=True)]
        return as_frame(rows, columns=list(_COLUMNS))

    def plot(
        self, ax: Any = None, *, static: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> adaptexit.AnytimeDisplay:
        """Draw both settings; ``AnytimeDisplay.from_evaluation(self, static=static).plot(ax, **kwargs)``."""
        import adaptexit  # pictures are optional, and lie above: only the package's face knows both

        return adaptexit.AnytimeDisplay.from_evaluation(self, static=static).plot(ax, **kwargs)

    def __str__(self) -> str:
        curves: list[CostCurve] = [*self.anytime.values(), *self.budgeted.values()]
        divisor, unit = readable_scale(max(float(curve.cost.max()) for curve in curves), self.unit)
        exits = [
            [name, exit_name, f"{cost / divisor:.4g}", f"{accuracy:.4f}"]
            for name, curve in self.anytime.items()
            for exit_name, cost, accuracy in zip(curve.exit_names, curve.cost, curve.accuracy, strict=True)
        ]
        lines = list(self.budgeted.values())
        costs = _round_costs(min(line.cost.min() for line in lines), max(line.cost.max() for line in lines))
        columns = [list(self.accuracy_at(float(cost)).values()) for cost in costs]
        along = [
            [name, *("-" if np.isnan(accuracy) else f"{accuracy:.4f}" for accuracy in accuracies)]
            for name, *accuracies in zip(self.budgeted, *columns, strict=True)
        ]
        numbers = sorted(set(self.n_samples.values()))
        samples = " to ".join(f"{number:,}" for number in {numbers[0]: None, numbers[-1]: None})
        pricing = (
            "whoever passes an exit pays for it" if self.every_exit_paid else "exits switched off are not paid for"
        )
        return "\n".join(
            [
                "Anytime: every exit answers for everybody",
                *aligned([["model", "exit", unit, "accuracy"], *exits], n_words=2),
                "",
                f"Budgeted batch: accuracy at a mean of at most so many {unit}",
                *aligned([["model", *(f"{cost / divisor:.4g}" for cost in costs)], *along], n_words=1),
                "",
                f"Costs of a sample, where {pricing}; {samples} samples.",
            ]
        )

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(self.anytime)}; {readable_scale(0.0, self.unit)[1]})"


def evaluate_settings(
    models: Any,
    X: Any = None,
    y: Any = None,
    *,
    every_exit_paid: bool = True,
    calibrator: Calibrator | Literal["own", "geometric"] = "own",
    n_budgets: int = 39,
) -> Evaluation:
    """Anytime prediction and budgeted batch classification, as papers on networks with exits report them.

    Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (ICLR 2018), and those after
    it. Anytime: what every exit alone says of all samples, at its cost. Budgeted: thresholds are chosen on calibration
    data for a range of budgets; accuracy and mean cost are those on test data. Every model is run over these once.

    Parameters
    ----------
    models : dict of str to model, or one estimator
        A model is a fitted :class:`CascadeSaver` or :class:`MultiExitClassifier`, or a pair of ExitOutputs,
        (calibration, test), of the same exits at the same costs, of which nothing is run. All in one unit of cost.
    X, y : as for the estimators' ``record``
        Test data; not for recorded pairs alone.
    every_exit_paid : bool, default=True
        Price as these papers do: whoever passes an exit pays for it (:meth:`ExitOutputs.every_exit_paid`), in a
        cascade for every saver. Otherwise exits that are switched off cost nothing, as everywhere else in this package;
        in the anytime setting these are all others. What a calibrator itself costs is paid at exits that are on.
    calibrator : "own", "geometric" or Calibrator, default="own"
        What chooses thresholds. ``own`` is an estimator's own calibrator, which learns anew under another pricing; for
        a recorded pair a :class:`ThresholdCalibrator`. ``geometric`` is the rule of these papers on the scores recorded
        (:func:`adaptexit.core.search.shares.geometric_frontier`). A calibrator is cloned and fitted for every model.
    n_budgets : int, default=39
        Points of a budgeted curve, at least 2: even budgets from the cheapest operating point to the dearest, or for
        ``geometric`` so many q (39 are MSDNet's).

    Returns
    -------
    Evaluation

    Raises
    ------
    TypeError
        For models that are none of these.
    ValueError
        For costs in several units, a pair that does not belong together, data without the logits or features that a
        calibrator reads, X without an estimator or the reverse, or other arguments outside what is allowed.
    NotFittedError
        For an estimator that is not fitted.
    """
    check_switch("every_exit_paid", every_exit_paid)
    check_whole("n_budgets", n_budgets, 2)
    _check_calibrator(calibrator)
    candidates = _checked_models(models, X)
    sources = {name: _Source.of(name, model, calibrator, every_exit_paid) for name, model in candidates.items()}
    unit = _unit_of(sources)
    anytime, budgeted, n_samples = {}, {}, {}
    for name, source in sources.items():
        test = source.test(X, y, every_exit_paid)
        anytime[name] = AnytimeCurve.of(test, source.exit_names)
        budgeted[name] = source.budget_curve(test, n_budgets)
        n_samples[name] = test.n_samples
    return Evaluation(anytime, budgeted, unit, bool(every_exit_paid), n_samples)


@dataclass(frozen=True, eq=False)
class _Source:
    """A model to evaluate: priced calibration outputs, what chooses thresholds, and what gives test outputs."""

    model: Any
    exit_names: list[str]
    calibration: ExitOutputs
    training: ExitOutputs | None
    method: Calibrator | None
    """None for the geometric rule."""
    is_fitted: bool

    @classmethod
    def of(cls, name: str, model: Any, calibrator: Any, every_exit_paid: bool) -> _Source:
        is_pair = isinstance(model, tuple)
        outputs = model[0] if is_pair else model.outputs_
        training = _at_price(None if is_pair else getattr(model, "training_outputs_", None), every_exit_paid)
        calibration = _at_price(outputs, every_exit_paid)
        exit_names = made_up_names(outputs.n_exits) if is_pair else model.exit_names
        if isinstance(calibrator, str) and calibrator == "geometric":
            return cls(model, exit_names, calibration, training, None, True)
        if isinstance(calibrator, str) and not is_pair and calibration is outputs:
            return cls(model, exit_names, calibration, training, model.calibrator_, True)
        scale = 1.0
        if isinstance(calibrator, str):
            calibrator = ThresholdCalibrator() if is_pair else model.calibrator_
            scale = outputs.full_cost / calibration.full_cost
        method = _for_all_budgets(calibrator, scale)
        origin = f"models[{name!r}]"
        check_needs(
            method,
            type(method).__name__,
            {
                f"calibration outputs of {origin}": calibration,
                f"training outputs of {origin}": training if method.needs_training else None,
            },
            {f"test outputs of {origin}": model[1]} if is_pair else {},
            **(_WITHOUT_RECORDED if is_pair else _WITHOUT),
        )
        return cls(model, exit_names, calibration, training, method, False)

    def test(self, X: Any, y: Any, every_exit_paid: bool) -> ExitOutputs:
        """Priced outputs on the test data."""
        outputs = self.model[1] if isinstance(self.model, tuple) else self.model.record(X, y)
        return _at_price(outputs, every_exit_paid)

    def budget_curve(self, test: ExitOutputs, n_budgets: int) -> BudgetCurve:
        """What thresholds chosen on the calibration outputs give on the test outputs."""
        if self.method is None:
            return BudgetCurve.of(geometric_frontier(self.calibration, n_budgets).on(test), test.full_cost)
        method = self.method if self.is_fitted else calibrated(self.method, self.calibration, self.training)
        return BudgetCurve.served(method.pareto(test), method.charged(test).full_cost, n_budgets)


_OTHERWISE = ", or evaluate by a calibrator that does without (calibrator='geometric' reads recorded scores alone)."
_WITHOUT_RECORDED = {
    "without_logits": f"Record them (keep_logits=True){_OTHERWISE}",
    "without_features": f"Record them{_OTHERWISE}",
}
_WITHOUT = dict.fromkeys(
    _WITHOUT_RECORDED, f"Calibrate the model with such a calibrator, which records them{_OTHERWISE}"
)


def _at_price(outputs: Any, every_exit_paid: bool) -> Any:
    return outputs.every_exit_paid() if every_exit_paid and outputs is not None else outputs


def _for_all_budgets(method: Calibrator, own_scale: float) -> Calibrator:
    """A copy to be fitted for its frontier, whose point in use nobody asks for.

    A budget that a schedule learns for stays the same absolute cost: ``own_scale`` is the full model's cost under the
    pricing it was meant for, relative to the present one.
    """
    copy: Calibrator = clone(method)
    params = copy.get_params(deep=False)
    if {"budget", "max_drop"} <= params.keys():  # of an allowed drop there might be a warning
        return copy.set_params(budget=1.0, max_drop=None)
    if params.get("budget") is not None:
        return copy.set_params(budget=params["budget"] * own_scale)
    return copy


def _round_costs(least: float, most: float) -> Floats:
    """Costs in round steps, from the first that reaches ``least`` to the first that reaches ``most``."""
    if least == most:
        return np.array([most])
    decade = 10.0 ** np.floor(np.log10((most - least) / _MOST_STEPS))
    step = next(round_one * decade for round_one in (1, 2, 5, 10) if round_one * decade * _MOST_STEPS >= most - least)
    return step * np.arange(np.ceil(least / step), np.ceil(most / step) + 1)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_calibrator(calibrator: Any) -> None:
    if isinstance(calibrator, Calibrator) or (isinstance(calibrator, str) and calibrator in ("own", "geometric")):
        return
    own = f"the class {calibrator.__name__}: call it first" if isinstance(calibrator, type) else repr(calibrator)
    raise TypeError(f"calibrator must be 'own', 'geometric' or a Calibrator, as ThresholdCalibrator(); got {own}.")


def _checked_models(models: Any, X: Any) -> dict[str, Any]:
    """Models by name, every one usable."""
    form = "a dict of names to fitted estimators or pairs of ExitOutputs, (calibration, test), or one fitted estimator"
    if isinstance(models, AdaptiveClassifier):
        models = {type(models).__name__: models}
    if not isinstance(models, Mapping):
        raise TypeError(f"models must be {form}; got {type(models).__name__}.")
    if not models:
        raise ValueError(f"models must be {form}; got an empty dict.")
    candidates: dict[str, Any] = {}
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f"models must be {form}; got the key {name!r}.")
        if isinstance(model, AdaptiveClassifier):
            check_is_fitted(model)
            model._remark()
            candidates[name] = model
        elif isinstance(model, (tuple, list)):
            candidates[name] = _checked_pair(f"models[{name!r}]", model)
        else:
            other = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise TypeError(f"models must be {form}; models[{name!r}] is {other}.")
    n_run = sum(isinstance(model, AdaptiveClassifier) for model in candidates.values())
    if n_run and X is None:
        raise ValueError("X must be the test data, which estimators are run on; got None. Give X and y.")
    if not n_run and X is not None:
        raise ValueError("X is for estimators, but models are recorded outputs alone. Leave it out.")
    return candidates


def _checked_pair(label: str, pair: Any) -> tuple[ExitOutputs, ExitOutputs]:
    if len(pair) != 2 or not all(isinstance(outputs, ExitOutputs) for outputs in pair):
        kinds = ", ".join(type(outputs).__name__ for outputs in pair)
        raise TypeError(f"{label} must be two ExitOutputs, (calibration, test); got ({kinds}).")
    calibration, test = pair
    check_like(f"{label}[1]", test, calibration, f"{label}[0]")
    stages, exits = (np.allclose(getattr(test, n), getattr(calibration, n), rtol=1e-9, atol=0.0) for n in _COSTS)
    if not (stages and exits) or calibration.chained != test.chained:
        got = " beside ".join(
            f"stage_costs={outputs.stage_costs.tolist()}, exit_costs={outputs.exit_costs.tolist()}, "
            f"chained={outputs.chained}"
            for outputs in pair
        )
        raise ValueError(
            f"{label} must be two outputs at the same costs; got {got}. "
            "Record both with the same estimator, or use with_costs."
        )
    return calibration, test


def _units(sources: Mapping[str, _Source]) -> Iterator[tuple[str, str | None]]:
    for name, source in sources.items():
        yield f"models[{name!r}]", source.calibration.cost_unit
        if isinstance(source.model, tuple):
            yield f"models[{name!r}][1]", source.model[1].cost_unit


def _unit_of(sources: Mapping[str, _Source]) -> str | None:
    units = dict(_units(sources))
    if len(set(units.values())) > 1:
        got = ", ".join(f"{unit!r} ({label})" for label, unit in units.items())
        raise ValueError(
            f"models must have costs in one unit; got {got}. Fit estimators with the same cost=, or give recorded "
            "outputs their cost_unit."
        )
    return next(iter(units.values()))
