"""TinySaver: a small pretrained model answers what it is sure of, the large one the rest."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from adaptexit.calibrators.base import Calibrator
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.saver import JobCurve, SaverReport, job_curve, saver_reports
from adaptexit.core.scores import resolve_score
from adaptexit.core.undo import unchanged_on_failure
from adaptexit.data import as_batches, is_stream
from adaptexit.estimator import AdaptiveClassifier, below
from adaptexit.labels import hold_out, known_classes
from adaptexit.models import (
    ScikitModel,
    WholeModel,
    build_model,
    describe_model,
    is_fitted,
    is_scikit,
    restore_model,
    unspoiled,
)
from adaptexit.staging.cost import measure_latency
from adaptexit.staging.executor import MEMORY_LIMIT, StagedModel
from adaptexit.staging.modes import evaluating


class SaverWarning(UserWarning):
    """A saver does not pay: running it costs more than the work it takes off the models behind it."""


class CascadeSaver(AdaptiveClassifier):
    """A cascade of whole models for one task, as in TinySaver (Wang et al., ECCV 2024).

    The saver answers first; samples on which it is not sure enough go on to the next saver and at last to the base. One
    calibration run finds the thresholds for every budget; which one is used is chosen at predict time.

    Parameters
    ----------
    base : str, callable, nn.Module or scikit-learn classifier
        The large model: a timm name (made with its pretrained weights), a factory of a module, a module that answers
        with logits (B, C), or a classifier with ``predict_proba``. Modules are frozen and shared, not copied.
        Unfitted classifiers are cloned and fitted on the part of the data that is not held out for calibration.
    saver : the same, or a list of them from small to large
        The small model(s).
    confidence : {"max_proba", "entropy", "margin"} or callable, default="max_proba"
        From a model's output (a tensor of logits (B, C)) to one number a sample, larger = surer.
    calibrator : Calibrator, optional
        ``ThresholdCalibrator()`` unless given.
    budget : float, optional
        Mean relative cost (1 = the base alone) to keep to when ``predict`` gets none.
    cost : {"auto", "macs", "latency"} or sequence of K floats, default="auto"
        Cost of each model a sample, savers first, base last. MACs are counted for modules; latency is measured on
        the first batch and so differs a little from fit to fit; numbers are taken as given. "auto" counts MACs where
        all models are modules and measures otherwise.
    base_preprocess, saver_preprocess : "auto", None or callable, default="auto"
        From a batch of inputs to what the model takes; for several savers one for all or a list. "auto" is timm's data
        config for timm models (inputs are images in [0, 1], resized and normalised for each) and nothing for others.
    classes : sequence of C labels, optional
        Labels in the order of the modules' outputs; 0 ... C-1 unless given.
    calibration_size : float, default=0.25
        Share of the samples held out for calibration where classifiers have to be fitted.
    batch_size : int, default=128
        For arrays and datasets, and for merged survivors; loaders bring their own.
    memory_limit : int, default=2**30
        Bytes that survivors waiting for a full batch may hold.
    device : str, optional
        Where models made from names and factories go ("cuda", "cpu" ...). Modules stay where they are, and data follow
        them; models may lie on different devices.
    random_state : int, default=0
        Seed of the hold-out split.
    verbose : int, default=0
        At 1 long work shows a progress bar.

    Attributes
    ----------
    classes_ : array (C,)
    calibrator_ : the fitted calibrator
    outputs_ : ExitOutputs
        What every model answered on the calibration data.
    saver_reports_ : list of SaverReport
        Job ratio (eq. 7) and ΔC (eq. 10) of every saver on the calibration data.
    cost_unit_ : "MACs", "seconds" or "given"

    Examples
    --------
    >>> cascade = CascadeSaver("resnet50", "resnet18").fit(val_images, val_labels)  # doctest: +SKIP
    >>> cascade.predict(images, budget=0.4)  # doctest: +SKIP

    Notes
    -----
    Calibrate on data that the models were not trained on: on its training data a model is too sure. A budget is kept on
    the calibration data, and elsewhere as far as the data are like those.

    scikit-learn's ``clone`` (and so ``GridSearchCV``) forgets what classifiers have learned and copies modules: wrap a
    fitted classifier in ``sklearn.frozen.FrozenEstimator`` to keep it. To predict from several threads at once, put
    modules into evaluation mode first.
    """

    def __init__(
        self,
        base: Any,
        saver: Any,
        *,
        confidence: str | Callable[[Any], Any] = "max_proba",
        calibrator: Calibrator | None = None,
        budget: float | None = None,
        cost: Any = "auto",
        base_preprocess: Any = "auto",
        saver_preprocess: Any = "auto",
        classes: Any = None,
        calibration_size: float = 0.25,
        batch_size: int = 128,
        memory_limit: int = MEMORY_LIMIT,
        device: str | None = None,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.base = base
        self.saver = saver
        self.confidence = confidence
        self.calibrator = calibrator
        self.budget = budget
        self.cost = cost
        self.base_preprocess = base_preprocess
        self.saver_preprocess = saver_preprocess
        self.classes = classes
        self.calibration_size = calibration_size
        self.batch_size = batch_size
        self.memory_limit = memory_limit
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> CascadeSaver:
        """Build the models, fit those that are not, and calibrate.

        Parameters
        ----------
        X : array (N, ...), Dataset or DataLoader of (x, y), or a pair (X, y)
        y : array (N,), optional

        Raises
        ------
        ValueError, TypeError
            For bad data or parameters; the estimator is then left as it was.
        """
        with unchanged_on_failure(self):
            X, y = self._validated(X, y, reset=True)
            given = self._given()
            fitted, X, y = self._fit_classifiers(given, X, y)
            self._models = [
                build_model(model, preprocess, label, self.device) for model, (_, preprocess, label) in fitted
            ]
            return self._calibrate(X, y)

    def calibrate(self, X: Any, y: Any = None) -> CascadeSaver:
        """Calibrate anew on other data (as for :meth:`fit`); the models stay as they are."""
        check_is_fitted(self)
        with unchanged_on_failure(self):
            X, y = self._validated(X, y, reset=False)
            return self._calibrate(X, y)

    def _given(self) -> list[tuple[Any, Any, str]]:
        """(model, preprocessing, name in errors) of every saver, then the base."""
        savers = list(self.saver) if isinstance(self.saver, (list, tuple)) else [self.saver]
        if not savers:
            raise ValueError("saver must be a model or a list of at least one; got an empty list.")
        several = isinstance(self.saver_preprocess, (list, tuple))
        preprocesses = list(self.saver_preprocess) if several else [self.saver_preprocess] * len(savers)
        if len(preprocesses) != len(savers):
            raise ValueError(
                f"saver_preprocess must be one for all savers or one each; got {len(preprocesses)} for {len(savers)}."
            )
        labels = ["saver"] if len(savers) == 1 else [f"saver[{k}]" for k in range(len(savers))]
        return [*zip(savers, preprocesses, labels, strict=True), (self.base, self.base_preprocess, "base")]

    def _fit_classifiers(self, given: list[Any], X: Any, y: Any) -> tuple[list[Any], Any, Any]:
        """Unfitted classifiers fitted on the held-in part; the part for calibration is what remains."""
        unfitted = [is_scikit(model) and not is_fitted(model) for model, _, _ in given]
        if not any(unfitted):
            return [(entry[0], entry) for entry in given], X, y
        if is_stream(X):
            raise ValueError(
                f"X must be an array where a classifier has to be fitted; got a {type(X).__name__}. Fit the classifier "
                "first, or give arrays."
            )
        X, y = np.asarray(X), np.asarray(y)
        held_in, held_out = hold_out(y, self.calibration_size, self.random_state)
        flat = X.reshape(len(X), -1)
        models = [
            clone(entry[0]).fit(flat[held_in], y[held_in]) if new else entry[0]
            for entry, new in zip(given, unfitted, strict=True)
        ]
        return list(zip(models, given, strict=True)), X[held_out], y[held_out]

    def _calibrate(self, X: Any, y: Any) -> CascadeSaver:
        calibrator = self._fresh_calibrator()
        batches = as_batches(X, y, batch_size=self.batch_size, labels=True, ordered=False)
        with evaluating(self._modules()):
            example = batches.first()
            classes = self._known_classes(example)
            costs, unit = self._costs(example)
        outputs = self._recorded(
            batches, classes, calibrator, "calibrating", stage_costs=np.zeros(len(costs)), exit_costs=costs,
            cost_unit=unit,
        )  # fmt: skip
        _check_rising(costs)
        calibrator.fit(outputs)
        reports = saver_reports(calibrator.rescored(outputs))
        if self.budget is not None:
            calibrator.operating_point(self.budget)
        _warn_of_savers(reports, self.exit_names)
        self.classes_, self.outputs_, self.calibrator_ = classes, outputs, calibrator
        self.saver_reports_ = reports
        return self

    def _known_classes(self, x: Tensor) -> NDArray[Any]:
        """Labels in the order of the outputs, on which all models have to agree."""
        scikit = [model for model in self._models if isinstance(model, ScikitModel)]
        widths = {model.label: _width(model, x[:1]) for model in self._models}
        if len(set(widths.values())) > 1:
            raise ValueError(f"base and savers must answer for the same number of classes; got {widths}.")
        width = next(iter(widths.values()))
        for model in scikit[1:]:
            if not np.array_equal(model.classes, scikit[0].classes):
                raise ValueError(
                    f"base and savers must be fitted on the same classes; {scikit[0].label} has "
                    f"{scikit[0].classes.tolist()}, {model.label} has {model.classes.tolist()}."
                )
        return known_classes(self.classes, width, scikit[0].classes if scikit else None)

    def _costs(self, x: Tensor) -> tuple[NDArray[np.float64], str]:
        modules = [not isinstance(model, ScikitModel) for model in self._models]
        if not isinstance(self.cost, str):
            try:
                costs = np.asarray(self.cost, dtype=np.float64)
            except (TypeError, ValueError):
                costs = np.empty(0)
            if costs.shape != (len(self._models),) or not (np.isfinite(costs).all() and (costs > 0).all()):
                raise ValueError(
                    f"cost must be {len(self._models)} positive numbers, savers first and base last; got {self.cost!r}."
                )
            return costs, "given"
        if self.cost not in ("auto", "macs", "latency"):
            raise ValueError(f"cost must be 'auto', 'macs', 'latency' or a sequence of numbers; got {self.cost!r}.")
        if self.cost == "latency" or (self.cost == "auto" and not all(modules)):
            return np.array([measure_latency(model, x) for model in self._models]), "seconds"
        counted = []
        for model in self._models:
            if isinstance(model, ScikitModel):
                raise ValueError(
                    f"cost='macs' cannot be counted for {model.label}, a scikit-learn classifier. Use cost='latency' "
                    "or give the costs."
                )
            counted.append(model.macs(x[:1]))
            if counted[-1] <= 0:
                raise ValueError(
                    f"cost='macs' found no multiply-accumulates in {model.label}. Use cost='latency' or give the costs."
                )
        return np.array(counted), "MACs"

    # -- what the base class runs --------------------------------------------------------------------------------------

    @property
    def exit_names(self) -> list[str]:
        """How pictures and tables name the models, savers first."""
        return [label for _, _, label in self._given()]

    def _staged(self, calibrator: Calibrator | None = None) -> StagedModel:
        confidence = resolve_score(self.confidence, "confidence", torch)
        return StagedModel([None] * len(self._models), self._models, confidence)

    def _modules(self) -> list[nn.Module]:
        return [model.module for model in self._models if model.module is not None]

    def _tabular(self, X: Any) -> bool:
        """Whether X is a table for scikit-learn classifiers, validated as scikit-learn does."""
        return all(is_scikit(model) for model, _, _ in self._given()) and not is_stream(X)

    # -- reporting and persistence -------------------------------------------------------------------------------------

    def job_curve(self, saver: int = 0, X: Any = None, y: Any = None) -> JobCurve:
        """TinySaver's Fig. 3 of one saver against the base, on the calibration data or on (X, y)."""
        check_is_fitted(self)
        if saver not in range(self.outputs_.n_exits - 1):
            raise ValueError(f"saver must be one of 0 ... {self.outputs_.n_exits - 2}; got {saver!r}.")
        outputs = self.outputs_ if X is None else self.record(X, y)
        return job_curve(outputs.scores[saver], outputs.graded[saver], outputs.graded[-1])

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super()._get_state()
        for k, model in enumerate(self._models):
            if model.module is not None:
                tensors |= {f"models.{k}.{key}": value for key, value in model.module.state_dict().items()}
        state["models"] = [describe_model(model) for model in self._models]
        state["saver_reports"] = [dataclasses.asdict(report) for report in self.saver_reports_]
        return state, tensors

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        given, described = self._given(), state["models"]
        if len(given) != len(described):
            raise ValueError(f"saver must be the {len(described) - 1} that were saved; got {len(given) - 1}.")
        self._models = [
            restore_model(*entry, described[k], below(f"models.{k}.", tensors), self.device)
            for k, entry in enumerate(given)
        ]
        self.saver_reports_ = [SaverReport(**report) for report in state["saver_reports"]]
        super()._set_state(state, tensors, outputs)


def _width(model: WholeModel, x: Tensor) -> int:
    """Number of classes that a model answers for; it has to leave its input alone."""
    with torch.inference_mode(), unspoiled(x, model.label):
        return int(model(x).shape[-1])


def _check_rising(costs: NDArray[np.float64]) -> None:
    if len(costs) > 2 and (np.diff(costs) <= 0).any():
        warnings.warn(
            f"savers are meant to come from small to large, base last; their costs are {costs.tolist()}.",
            SaverWarning,
            stacklevel=4,
        )


def _warn_of_savers(reports: list[SaverReport], labels: list[str]) -> None:
    for report in reports:
        if not report.pays and report.delta_cost == 0 and len(reports) > 1:
            warnings.warn(
                f"{labels[report.saver]} does not pay beside the other savers: at no loss of accuracy the cascade "
                "costs the same without it (ΔC = 0). Leave it out, or allow a drop of accuracy.",
                SaverWarning,
                stacklevel=4,
            )
        elif not report.pays:
            warnings.warn(
                f"{labels[report.saver]} does not pay: at no loss of accuracy it changes the mean cost by "
                f"{100 * report.delta_cost:+.1f}% of the base's (ΔC >= 0; it could take {100 * report.job_ratio:.1f}% "
                "of the samples). Choose a cheaper or a more accurate one, or allow a drop of accuracy.",
                SaverWarning,
                stacklevel=4,
            )
