"""What every adaptive estimator does: calibrate what its network answers, answer at a budget, report, save."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from tqdm import tqdm

from adaptexit.calibrators.base import Calibrator, check_weights
from adaptexit.calibrators.threshold import ThresholdCalibrator
from adaptexit.core.costs import Costs
from adaptexit.core.frontier import TOLERANCE
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.policy import ExitAlone, Policy
from adaptexit.core.trace import ExitTrace
from adaptexit.data.batches import Batches, as_batches
from adaptexit.data.classes import accuracy_of
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import is_stream, split_pair
from adaptexit.networks.base import Network, below
from adaptexit.networks.models import check_device
from adaptexit.networks.readers import LogitsReader
from adaptexit.persistence import load, save
from adaptexit.predictor import Predictor
from adaptexit.reporting import ExitReports
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.executor import record
from adaptexit.utils.learning import twin_of
from adaptexit.utils.validation import check_whole, checked_relative_cost

CostName = Literal["auto", "macs", "latency"]
ConfidenceName = Literal["auto", "max_proba", "entropy", "margin"]

_TABLE_ATTRIBUTES = ("n_features_in_", "feature_names_in_")


class AdaptiveClassifier(ExitReports, ClassifierMixin, BaseEstimator):
    """Base of the estimators: everything behind the network, which a subclass builds.

    A subclass has the parameters ``calibrator``, ``confidence``, ``cost``, ``budget``, ``batch_size``,
    ``memory_limit`` and ``verbose``; its ``fit`` makes a network and passes it to :meth:`_calibrated`.

    Attributes
    ----------
    classes_ : array (C,)
    calibrator_ : the fitted calibrator
    outputs_ : ExitOutputs
        What every exit answered on the calibration data.
    stages_, heads_ : nn.ModuleList of length K
        What the network is made of: the computation up to each exit, and what answers there.
    cost_unit_ : "MACs", "seconds" or "given"
    labelled_ : bool
        Whether the calibration data had labels; otherwise accuracy is agreement with the full model, and so ``record``
        and ``pareto`` take data without labels.
    """

    calibrator: Calibrator | None
    confidence: ConfidenceName | Callable[[Any], Any]
    cost: CostName | Sequence[float]
    budget: float | None
    calibration_size: float
    device: str | None
    memory_limit: int
    verbose: int
    classes_: NDArray[Any]
    calibrator_: Calibrator
    outputs_: ExitOutputs
    labelled_: bool
    _network: Network
    _prepared: dict[str, Predictor]
    _confidence: Any

    # -- what a subclass provides --------------------------------------------------------------------------------------

    @abstractmethod
    def _restored_network(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> Network:
        """The network from what was saved of it and what the user gave again."""

    def _remark(self) -> None:
        """Nothing, unless a subclass has something to say."""

    def _check_parameters(self) -> None:
        """Refuse at once what would be met only after models have run."""
        check_device(self.device)
        check_whole("batch_size", self.batch_size)
        if self.calibrator is not None and not isinstance(self.calibrator, Calibrator):
            raise TypeError(f"calibrator must be a Calibrator, as ThresholdCalibrator(); got {self.calibrator!r}.")
        LogitsReader(self.confidence)
        check_whole("memory_limit", self.memory_limit, 0, " (a number of bytes)")
        if not (isinstance(self.calibration_size, Real) and 0 < self.calibration_size < 1):
            raise ValueError(f"calibration_size must lie between 0 and 1; got {self.calibration_size!r}.")
        if self.budget is not None:
            checked_relative_cost("budget", self.budget, dearest=10.0)  # as far as is known before anything ran
        if not isinstance(self.verbose, Integral):
            raise ValueError(f"verbose must be an integer; got {self.verbose!r}.")

    # -- the network ---------------------------------------------------------------------------------------------------

    @property
    def exit_names(self) -> list[str]:
        """How pictures and tables name the exits, from shallow to deep."""
        check_is_fitted(self)
        return list(self._network.exit_names)

    @property
    def stages_(self) -> nn.ModuleList:
        """The computation up to each exit from the one before it."""
        check_is_fitted(self)
        return self._network.stages

    @property
    def heads_(self) -> nn.ModuleList:
        """What answers at each exit."""
        check_is_fitted(self)
        return self._network.heads

    @property
    def cost_unit_(self) -> str | None:
        """Unit of the costs: "MACs", "seconds" or "given"."""
        return self.outputs_.cost_unit

    def to(self, device: str | torch.device) -> Self:
        """Move models and heads to a device ("cpu", "cuda:1"), the user's modules with them; data follow."""
        check_is_fitted(self)
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device must be a torch device or its name, as 'cpu' or 'cuda:0'; got {device!r}."
            ) from error
        for module in self._network.modules:
            module.to(place)
        return self

    # -- answering -----------------------------------------------------------------------------------------------------

    def at(
        self, *, budget: float | None = None, max_drop: float | None = None, policy: Policy | None = None
    ) -> Predictor:
        """One operating point, prepared: ``predict``, ``predict_proba`` and ``trace`` without look-ups and checks.

        Parameters
        ----------
        budget : float, optional
            Mean relative cost to keep to (1 is the plain full model): the stored point of best calibrated accuracy
            within it.
        max_drop : float, optional
            Instead: the cheapest stored point that loses at most so much calibrated accuracy (0.01 is one point).
        policy : Policy, optional
            Instead: any other rule, as ``calibrator_.policy(point=...)`` makes one. With none of the three, the
            constructor's budget counts, and without that the calibrator's own point: no calibrated loss of accuracy,
            or its own setting (CPM's margin).

        Raises
        ------
        ValueError
            For a budget below the cheapest operating point, or more than one of the three.
        """
        check_is_fitted(self)
        self._remark()
        self._check_confidence()
        if policy is not None:
            if budget is not None or max_drop is not None:
                raise ValueError(f"give at most one of budget, max_drop and policy; got {budget=}, {max_drop=} too.")
            return twin_of(self)._predictor(policy)
        key = repr((budget, max_drop, self.budget, self.batch_size, self.memory_limit, self.verbose))
        predictor = self._prepared.get(key)
        if predictor is None:
            own = twin_of(self)  # calibrate may run in another thread
            if budget is None and max_drop is None:
                budget = own.budget
            predictor = own._predictor(own.calibrator_.policy(budget=budget, max_drop=max_drop))
            if len(own._prepared) >= 64:  # budgets come and go where a load changes
                own._prepared.clear()
            own._prepared[key] = predictor
        return predictor

    def predict(self, X: Any, budget: float | None = None, max_drop: float | None = None) -> NDArray[Any]:
        """Labels (N,), every sample leaving as early as the operating point allows.

        Parameters
        ----------
        X : array (N, ...), Dataset or DataLoader (not shuffling)
        budget, max_drop : float, optional
            As for :meth:`at`.
        """
        return self.at(budget=budget, max_drop=max_drop).predict(X)

    def predict_proba(self, X: Any, budget: float | None = None, max_drop: float | None = None) -> NDArray[Any]:
        """Class probabilities (N, C) of the exit that answered each sample; arguments as for :meth:`predict`."""
        return self.at(budget=budget, max_drop=max_drop).predict_proba(X)

    def trace(self, X: Any, budget: float | None = None, max_drop: float | None = None) -> ExitTrace:
        """Label, exit, cost and thresholded score of every sample; arguments as for :meth:`predict`."""
        return self.at(budget=budget, max_drop=max_drop).trace(X)

    def predict_anytime(self, X: Any, limit: float) -> NDArray[Any]:
        """Labels (N,) when nobody may spend more than ``limit`` (relative cost): the deepest exit within it answers.

        Raises
        ------
        ValueError
            For a limit below the cheapest exit.
        """
        check_is_fitted(self)
        own = twin_of(self)
        costs = own.outputs_.pricing
        alone = costs.alone() / costs.full
        limit = checked_relative_cost("limit", limit, float(alone.max()), TOLERANCE)
        within = np.flatnonzero(alone <= limit + TOLERANCE)
        if not len(within):
            raise ValueError(
                f"limit must be at least {alone.min():.4g}, the relative cost of the cheapest exit; got {limit:.4g}."
            )
        return own._predictor(ExitAlone.of(int(within[-1]), costs)).predict(X)

    def score(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
    ) -> float:
        """Accuracy on (X, y), where X may be a Dataset or DataLoader of (x, y); budget as for :meth:`predict`."""
        predictor = self.at(budget=budget, max_drop=max_drop)
        X, y = split_pair(X, y)
        if is_stream(X):
            X = as_batches(X, y, batch_size=self.batch_size, labels=True, ordered=False, like=self._inputs)
        elif y is None:
            raise ValueError(
                "labels are needed: give y, a pair (X, y), or a Dataset or DataLoader of (x, y); got y=None."
            )
        answers = predictor.predict(X)
        return accuracy_of(answers, X.labels if isinstance(X, Batches) else y, self.classes_, sample_weight)

    def _predictor(self, policy: Policy) -> Predictor:
        """A policy bound to what this has learned; of a twin, so that it stays when this is calibrated anew."""
        return Predictor(
            self._network,
            policy,
            self.classes_,
            self._input_batches,
            memory_limit=self.memory_limit,
            verbose=self.verbose,
        )

    # -- recording and calibrating -----------------------------------------------------------------------------------

    def record(self, X: Any, y: Any = None, sample_weight: Any = None) -> ExitOutputs:
        """What every exit answers on (X, y), as :class:`ExitOutputs` for calibrators, metrics and pictures.

        ``sample_weight`` (N,) says how often each sample counts, in the order of X: a loader must not shuffle then.
        """
        return self._record(X, y, sample_weight is not None, sample_weight)

    def _record(self, X: Any, y: Any, ordered: bool, sample_weight: Any = None) -> ExitOutputs:
        check_is_fitted(self)
        self._check_confidence()
        own, weights = twin_of(self), self._checked_weights(X, sample_weight)
        batches = own._labelled_batches(X, y, needed=own.labelled_, ordered=ordered)
        costs, calibrator = own.outputs_.pricing, own.calibrator_
        return own._recorded(own._network, batches, own.classes_, costs, calibrator, "recording", weights)

    def _fresh_calibrator(self, weights: Any = None) -> Calibrator:
        calibrator = ThresholdCalibrator() if self.calibrator is None else clone(self.calibrator)
        check_weights(calibrator, weights)
        return calibrator

    def _recorded(
        self,
        network: Network,
        batches: Batches,
        classes: NDArray[Any],
        costs: Costs,
        calibrator: Calibrator,
        doing: str,
        weights: NDArray[np.float64] | None = None,
    ) -> ExitOutputs:
        """What every exit answers; batches without labels are graded by the full model's answers."""
        with evaluating(network.modules), self._progress(batches, doing) as progress:
            answers = record(network, progress, logits=calibrator.needs_logits, features=calibrator.needs_features)
        full = answers[-1].predictions
        labels = batches.indices(classes, len(full)) if batches.labelled else full
        return ExitOutputs.from_answers(
            answers, labels, len(classes), costs, chained=network.chained, sample_weight=weights
        )

    def _calibrated(
        self,
        network: Network,
        calibrator: Calibrator,
        outputs: ExitOutputs,
        classes: NDArray[Any],
        inputs: InputSpec,
        *,
        labelled: bool,
        training: ExitOutputs | None = None,
    ) -> None:
        """Fit the calibrator, and keep all that was learned."""
        with torch.inference_mode(False):  # a calibrator may train something
            calibrator.fit(outputs, **({"training": training} if calibrator.needs_training else {}))
        if self.budget is not None:
            calibrator.policy(budget=self.budget)
        self.__dict__.update(
            _network=network, _inputs=inputs, _prepared={}, classes_=classes, calibrator_=calibrator, outputs_=outputs,
            labelled_=labelled, _confidence=self.confidence,
        )  # fmt: skip

    def _check_confidence(self) -> None:
        if self.confidence is not self._confidence and self.confidence != self._confidence:
            raise ValueError(
                f"confidence was {self._confidence!r} when the thresholds were found; got {self.confidence!r} since. "
                "Call calibrate, which finds thresholds for it."
            )

    def _with_reader(self, network: Network) -> Network:
        """The network under the confidence asked for; the one in use elsewhere stays as it is."""
        reading = copy.copy(network)
        reading.reader = LogitsReader(self.confidence)
        return reading

    @contextmanager
    def _progress(self, batches: Batches, doing: str) -> Iterator[Iterable[Any]]:
        with tqdm(batches, total=batches.n_batches, desc=doing, disable=self.verbose < 1) as progress:
            yield progress

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
        estimator = load(folder, **given)
        if not isinstance(estimator, cls):
            raise ValueError(f"folder must hold a {cls.__name__}; {folder} holds a {type(estimator).__name__}.")
        return estimator

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was learned, as a JSON value and tensors; a subclass adds its own."""
        calibrator, arrays = self.calibrator_.get_state()
        network, tensors = self._network.get_state()
        state = network | {
            "calibrator": calibrator,
            "classes": self.classes_,
            "classes_dtype": self.classes_.dtype.str,
            "inputs": {"shape": self._inputs.shape, "resizes": self._inputs.resizes},
            "labelled": self.labelled_,
            "table": {name: getattr(self, name) for name in _TABLE_ATTRIBUTES if hasattr(self, name)},
        }
        learned_arrays = {f"calibrator.{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return state, tensors | learned_arrays

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        arrays = {name: tensor.numpy() for name, tensor in below("calibrator.", tensors).items()}
        calibrator = self._fresh_calibrator()
        calibrator.set_state(state["calibrator"], arrays, outputs)
        self.classes_ = np.array(state["classes"], dtype=state["classes_dtype"])
        self._network = self._with_reader(self._restored_network(state, tensors))
        self._inputs = InputSpec(tuple(state["inputs"]["shape"]), state["inputs"]["resizes"])
        self._prepared, self.labelled_, self._confidence = {}, state["labelled"], self.confidence
        self.calibrator_, self.outputs_ = calibrator, outputs
        for name, value in state["table"].items():
            setattr(self, name, np.array(value, dtype=object) if isinstance(value, list) else value)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | ({"_prepared": {}} if "_prepared" in self.__dict__ else {})

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibrator_")
