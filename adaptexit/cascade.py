"""TinySaver: a small pretrained model answers what it is sure of, the large one the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from torch import Tensor

from adaptexit.base import AdaptiveClassifier, ConfidenceName, CostName
from adaptexit.calibrators.base import Calibrator
from adaptexit.core.costs import Costs
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.saver import JobCurve, SaverReport, job_curve, saver_reports
from adaptexit.data.batches import Batches, as_batches
from adaptexit.data.classes import hold_out, known_classes
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import check_source, check_table, is_stream, split_pair
from adaptexit.exceptions import CalibrationWarning, SaverWarning, warn
from adaptexit.networks.base import Network, below
from adaptexit.networks.build import seed_of
from adaptexit.networks.models import (
    ScikitModel,
    WholeModel,
    build_model,
    is_fitted,
    is_scikit,
    restore_model,
    unspoiled,
)
from adaptexit.networks.row import Row
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.executor import MEMORY_LIMIT
from adaptexit.utils.learning import learned_at_once


class CascadeSaver(AdaptiveClassifier):
    """A cascade of whole models for one task, as in TinySaver (Wang et al., ECCV 2024).

    The saver answers first; samples on which it is not sure enough go on to the next saver and at last to the base. One
    calibration run finds the thresholds for every budget; which one is used is chosen at predict time.

    Parameters
    ----------
    base : str, callable, nn.Module or scikit-learn classifier
        The large model: a timm name (made with its pretrained weights), a factory of a module, a module that answers
        with logits (B, C) or an object with ``.logits``, or a classifier with ``predict_proba``. Modules are frozen and
        shared, not copied. Unfitted classifiers are cloned and fitted on the part of the data that is not held out for
        calibration.
    saver : the same, or a list of them from small to large
        The small model(s).
    confidence : {"auto", "max_proba", "entropy", "margin"} or callable, default="auto"
        From a model's logits (B, C) to one number a sample, larger = surer. "auto" is the largest probability.
    calibrator : Calibrator, optional
        ``ThresholdCalibrator()`` unless given.
    budget : float, optional
        Mean relative cost (1 = the base alone) to keep to when ``predict`` gets none.
    cost : {"auto", "macs", "latency"} or sequence of K floats, default="auto"
        MACs are counted for modules; latency is measured on the first batch and so differs a little from fit to fit;
        "auto" counts MACs where all models are modules and measures otherwise. Numbers are what a sample costs that
        one exit answers, the others switched off: here each model's own, savers first, base last (see Notes).
    base_preprocess, saver_preprocess : "auto", None or callable, default="auto"
        From a batch of inputs to what the model takes; for several savers one for all or a list. "auto" is timm's data
        config for timm models (inputs are images in [0, 1], resized and normalised for each) and nothing for others; an
        image processor of transformers will do.
    classes : sequence of C labels, optional
        Labels in the order of the modules' outputs; 0 ... C-1 unless given. Where they are names, ``y`` may hold names
        or positions.
    calibration_size : float, default=0.25
        Share of the samples held out for calibration where classifiers have to be fitted.
    batch_size : int, default=128
        For arrays and datasets, and for merged survivors; loaders bring their own.
    memory_limit : int, default=2**30
        Bytes that survivors waiting for a full batch may hold.
    device : str, optional
        Where models made from names and factories go ("cuda", "cpu" ...). Modules stay where they are, and data follow
        them; models may lie on different devices.
    random_state : int, RandomState or None, default=0
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
    stages_, heads_ : nn.ModuleList
        What is run; the heads are the models.
    cost_unit_ : "MACs", "seconds" or "given"

    Examples
    --------
    >>> cascade = CascadeSaver("resnet50", "resnet18").fit(val_images, val_labels)  # doctest: +SKIP
    >>> cascade.predict(images, budget=0.4)  # doctest: +SKIP

    Notes
    -----
    ``cost=[3, 10]`` says what a sample costs that each exit answers alone, as for :class:`MultiExitClassifier`::

        a cascade: models share nothing          exits on one model: stages are shared
        saver  ###         3                     layer1  ###         3
        base   ##########  10                    full    ##########  10
        both on: 3, or 3 + 10 = 13               both on: 3, or 10

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
        confidence: ConfidenceName | Callable[[Any], Any] = "auto",
        calibrator: Calibrator | None = None,
        budget: float | None = None,
        cost: CostName | Sequence[float] = "auto",
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

    @learned_at_once
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> CascadeSaver:
        """Build the models, fit those that are not, and calibrate.

        Parameters
        ----------
        X : array (N, ...), Dataset or DataLoader of (x, y), or a pair (X, y)
        y : array (N,), optional
        sample_weight : array (N,), optional
            How much each sample counts, where the mix of these is not that to come, in the order of X (a loader must
            not shuffle then). Classifiers that have to be fitted get theirs too.

        Raises
        ------
        ValueError, TypeError
            For bad data or parameters; the estimator is then left as it was.

        Warns
        -----
        CalibrationWarning
            Where a classifier has to be fitted that takes no weights: it learns without.
        """
        self._check_parameters()
        seed = seed_of(self.random_state)
        weights = self._checked_weights(X, sample_weight)
        self._fresh_calibrator(weights)
        X, y = split_pair(X, y)
        check_source(X)
        X, y = self._validated(X, y, reset=True)
        entries = self._given()
        models, X, y, weights = self._fit_classifiers(entries, X, y, weights, seed)
        network = Row(
            [build_model(model, how, label, self.device) for model, how, label in models],
            [label for _, _, label in entries],
        )
        ordered = weights is not None
        batches = as_batches(X, y, batch_size=self.batch_size, labels=True, ordered=ordered)
        return self._calibrate(network, batches, weights)

    @learned_at_once
    def calibrate(self, X: Any, y: Any = None, sample_weight: Any = None) -> CascadeSaver:
        """Calibrate anew on other data (as for :meth:`fit`); the models stay as they are."""
        check_is_fitted(self)
        self._check_parameters()
        weights = self._checked_weights(X, sample_weight)
        batches = self._labelled_batches(X, y, needed=True, ordered=weights is not None)
        return self._calibrate(self._network, batches, weights)

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

    def _fit_classifiers(
        self, given: list[tuple[Any, Any, str]], X: Any, y: Any, weights: Any, seed: int
    ) -> tuple[list[Any], Any, Any, Any]:
        """Unfitted classifiers fitted on the held-in part; the part for calibration is what remains."""
        to_fit = [is_scikit(model) and not is_fitted(model) for model, _, _ in given]
        if not any(to_fit):
            return given, X, y, weights
        check_table(X, "a classifier has to be fitted")
        X, y = np.asarray(X), np.asarray(y)
        held_in, held_out = hold_out(y, self.calibration_size, seed)
        flat = X.reshape(len(X), -1)
        models = [
            (_fitted(model, flat, y, weights, held_in, label) if new else model, how, label)
            for (model, how, label), new in zip(given, to_fit, strict=True)
        ]
        return models, X[held_out], y[held_out], None if weights is None else weights[held_out]

    def _calibrate(self, network: Network, batches: Batches, weights: Any) -> CascadeSaver:
        calibrator, network = self._fresh_calibrator(weights), self._with_reader(network)
        assert isinstance(network, Row)
        models: Any = network.networks
        with evaluating(network.modules):
            example = batches.first()
            classes = self._known_classes(models, example)
            costs = network.costs(example, self.cost)
        outputs = self._recorded(network, batches, classes, costs, calibrator, "calibrating", weights)
        resizes = all(getattr(getattr(model, "preprocess", None), "resizes", False) for model in models)
        self._calibrated(network, calibrator, outputs, classes, InputSpec.of(example, resizes), labelled=True)
        self.saver_reports_ = saver_reports(calibrator.rescored(outputs))
        _warn_of_savers(self.saver_reports_, network.exit_names, costs)
        return self

    def _known_classes(self, models: list[WholeModel], x: Tensor) -> NDArray[Any]:
        """Labels in the order of the outputs, on which all models have to agree."""
        scikit = [model for model in models if isinstance(model, ScikitModel)]
        widths = {model.label: _width(model, x[:1]) for model in models}
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

    def _tabular(self, X: Any) -> bool:
        return all(is_scikit(model) for model, _, _ in self._given()) and not is_stream(X)

    # -- reporting and persistence -------------------------------------------------------------------------------------

    def job_curve(self, saver: int = 0, X: Any = None, y: Any = None) -> JobCurve:
        """TinySaver's Fig. 3 of one saver against the base, on the calibration data or on (X, y)."""
        check_is_fitted(self)
        if not isinstance(saver, Integral) or isinstance(saver, bool) or saver not in range(self.outputs_.n_exits - 1):
            raise ValueError(f"saver must be one of 0 ... {self.outputs_.n_exits - 2}; got {saver!r}.")
        outputs = self._thresholded(X, y)
        return job_curve(outputs.scores[saver], outputs.graded[saver], outputs.graded[-1], outputs.sample_weight)

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super()._get_state()
        return state | {"saver_reports": [dataclasses.asdict(report) for report in self.saver_reports_]}, tensors

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        super()._set_state(state, tensors, outputs)
        self.saver_reports_ = [SaverReport(**report) for report in state["saver_reports"]]

    def _restored_network(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> Network:
        entries, headers = self._given(), state["models"]
        if len(entries) != len(headers):
            raise ValueError(f"saver must be the {len(headers) - 1} that were saved; got {len(entries) - 1}.")
        models = [
            restore_model(*entry, headers[k], below(f"models.{k}.", tensors), self.device)
            for k, entry in enumerate(entries)
        ]
        return Row(models, [label for _, _, label in entries])


def _fitted(model: Any, X: NDArray[Any], y: NDArray[Any], weights: Any, rows: NDArray[Any], label: str) -> Any:
    """A clone of a classifier, fitted on some rows, by weight where it can be."""
    if weights is None:
        return clone(model).fit(X[rows], y[rows])
    rows = rows[weights[rows] > 0]  # as if those of weight 0 were not there, with any class that they alone have
    if has_fit_parameter(model, "sample_weight"):
        return clone(model).fit(X[rows], y[rows], sample_weight=weights[rows])
    warn(
        f"{label} is fitted without sample_weight, which {type(model).__name__}.fit does not take: only the thresholds "
        "read it. Give a classifier that is fitted, or one that takes weights.",
        CalibrationWarning,
    )
    return clone(model).fit(X[rows], y[rows])


def _width(model: WholeModel, x: Tensor) -> int:
    """Number of classes that a model answers for; it has to leave its input alone."""
    with torch.inference_mode(), unspoiled(x, model.label):
        return int(model(x).shape[-1])


def _warn_of_savers(reports: list[SaverReport], labels: list[str], costs: Costs) -> None:
    own = costs.exits
    if len(own) > 2 and (np.diff(own) <= 0).any():
        warn(f"savers are meant to come from small to large, base last; their costs are {own.tolist()}.", SaverWarning)
    for report in reports:
        if report.pays:
            continue
        if len(own) == 2 and own[0] >= own[1]:
            reason = (
                f"does not pay: it costs {own[0] / own[1]:.3g} times what the base costs. Are base and saver swapped? "
                "The base is the large model."
            )
        elif report.delta_cost == 0 and len(reports) > 1:
            reason = (
                "does not pay beside the other savers: at no loss of accuracy the cascade costs the same without it "
                "(ΔC = 0). Leave it out, or allow a drop of accuracy."
            )
        else:
            reason = (
                f"does not pay: at no loss of accuracy it changes the mean cost by {100 * report.delta_cost:+.1f}% of "
                f"the base's (ΔC >= 0; it could take {100 * report.job_ratio:.1f}% of the samples). Choose a cheaper "
                "or a more accurate one, or allow a drop of accuracy."
            )
        warn(f"{labels[report.saver]} {reason}", SaverWarning)
