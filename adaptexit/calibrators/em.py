"""Routers that learn which exit should answer, from exits as a latent variable."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Calibrator, check_outputs
from adaptexit.core.checks import check_switch, check_whole, checked_number
from adaptexit.core.frontier import ParetoFrontier, evaluate, reference
from adaptexit.core.outputs import ExitBatch, ExitOutputs
from adaptexit.core.posteriors import (
    Posterior,
    exit_probabilities,
    expectation,
    fit_global,
    fit_per_sample,
    halting_targets,
    log_likelihoods,
    reach,
)
from adaptexit.core.scores import widened
from adaptexit.core.search import SEARCHES, search_thresholds
from adaptexit.core.undo import unchanged_on_failure
from adaptexit.training.loop import checked_settings, n_epochs
from adaptexit.training.routers import Router, halting, new_routers, train_routers

Floats = NDArray[np.float64]

PRIORS = ("global", "amortized", "per_sample")
INPUTS = ("auto", "features", "logits")

COST_WEIGHTS = tuple(float(w) for w in np.geomspace(0.01, 30.0, 20))
"""Of the sweep that :meth:`EMRouter.pareto` makes."""


class EMRouter(Calibrator):
    """A router an exit, trained on how likely that exit is the one that should answer, given what exits cost.

    Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing". The exit is a latent variable: exit k explains
    a sample's label with the probability that it gives it, times exp(-cost_weight cost_k). Responsibilities become
    probabilities of leaving at each exit once there, which small perceptrons learn from the exit's features.

    Parameters
    ----------
    cost_weight : float, default=0.5
        lambda: log-likelihood that the full model's cost is worth, in nats.
    prior : {"amortized", "global", "per_sample"}, default="amortized"
        Of the exits. "amortized": what the routers say, learned in turns with the responsibilities; "global": one for
        all samples, by EM; "per_sample": the paper's, each sample's own last responsibilities, which sharpens with
        every step (one step is the posterior under an even prior).
    n_iter : int or None, default=None
        Steps at most: 50 for "amortized", 200 for "global", 1 for "per_sample" unless given.
    tol : float, default=1e-3
        Gain of the mean penalised log-likelihood at which to stop, in nats; without it there is a warning.
    threshold : float, default=0.5
        Probability of leaving above which a sample leaves, at the point in use.
    hidden : int, default=32
        Width of the routers' hidden layer.
    weighted : bool, default=True
        Weight a router's loss by the probability of reaching it, the exact M-step; the paper's is unweighted.
    inputs : {"auto", "features", "logits"}, default="auto"
        What routers read at an exit: means of its features over positions, or its logits. "auto" is features where the
        outputs have them.
    epochs : int or "auto", default="auto"
        Of the routers' training, with "amortized" of one step of it. "auto" is 20 (2 a step), or as many as make 500
        minibatches (50 a step) where the data are few.
    lr, weight_decay, batch_size
        Of the routers' training by AdamW.
    search, n_points
        Of the thresholds on the routers' probabilities that serve budgets, as for :class:`ThresholdCalibrator`.
    random_state : int, default=0
    verbose : int, default=0

    Attributes
    ----------
    routers_ : list of K - 1 modules
    extra_costs_ : array (K,)
        MACs of the routers, where costs are MACs; else 0.
    posterior_ : Posterior
        Responsibilities on the data that routers learned from, with the history of the likelihood. Not saved.
    thresholds_, point_, frontier_
        The point in use has ``threshold`` at every exit; the frontier has it beside the searched ones.

    Notes
    -----
    Put it beside thresholds (:func:`adaptexit.compare`) before relying on it: on a frozen ResNet-56 searched thresholds
    on the largest probability were better at every cost (``benchmarks/em_routing_cifar10.py``).
    """

    needs_logits = True
    needs_training = True
    routers_: list[Router]
    posterior_: Posterior

    def __init__(
        self,
        cost_weight: float = 0.5,
        prior: str = "amortized",
        *,
        n_iter: int | None = None,
        tol: float = 1e-3,
        threshold: float = 0.5,
        hidden: int = 32,
        weighted: bool = True,
        inputs: str = "auto",
        epochs: int | str = "auto",
        lr: float = 5e-3,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        search: str = "auto",
        n_points: int = 100,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.cost_weight = cost_weight
        self.prior = prior
        self.n_iter = n_iter
        self.tol = tol
        self.threshold = threshold
        self.hidden = hidden
        self.weighted = weighted
        self.inputs = inputs
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.search = search
        self.n_points = n_points
        self.random_state = random_state
        self.verbose = verbose

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        """Whether outputs and batches are to carry features, where the model has any."""
        return self.inputs != "logits"

    @property
    def extra_costs_(self) -> Floats:
        check_is_fitted(self)
        macs = [router.macs for router in self.routers_] if self._in_macs else [0] * len(self.routers_)
        return np.array([*macs, 0], dtype=np.float64)

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(self, outputs: ExitOutputs, y: None = None, *, training: ExitOutputs | None = None) -> EMRouter:
        """Train the routers and find thresholds for every budget.

        Parameters
        ----------
        outputs : ExitOutputs
            Calibration outputs, with logits and labels (and features, for routers that read them).
        training : ExitOutputs, optional
            The same of the data that the heads learned from: routers learn there, where there are more.

        Raises
        ------
        ValueError
            For parameters outside what is allowed, or outputs without what is needed.
        """
        check_outputs(outputs)
        self._check()
        source = outputs
        if training is not None:
            check_outputs(training)
            if (training.n_exits, training.n_classes) != (outputs.n_exits, outputs.n_classes):
                raise ValueError(
                    f"training must have the {outputs.n_exits} exits and {outputs.n_classes} classes of outputs; got "
                    f"{training.n_exits} exits and {training.n_classes} classes. Record both with one model."
                )
            source = training
        inputs = self._inputs_of(source)
        in_macs = outputs.cost_unit == "MACs"
        costs = self._exit_costs(outputs, inputs, in_macs)
        routers, posterior = self._learned(log_likelihoods(source), inputs, float(self.cost_weight) * costs)
        with unchanged_on_failure(self):
            self.routers_, self.posterior_, self._in_macs = routers, posterior, in_macs
            self._reads_logits = self._reading_logits(source)
            self._kept = (log_likelihoods(source), inputs, costs)
            rescored = self.rescored(outputs)
            found, _ = search_thresholds(rescored, self.search, n_points=self.n_points, random_state=self.random_state)
            chosen = self._at_threshold(rescored)
        points = sorted([*found.points, chosen], key=lambda point: (point.cost, point.accuracy))
        self.frontier_, self.point_ = ParetoFrontier(points, *reference(outputs)), chosen
        return self

    def _at_threshold(self, rescored: ExitOutputs, **params: Any) -> Any:
        thresholds = np.full(rescored.n_exits, float(self.threshold))
        thresholds[-1] = -np.inf
        known = {"cost_weight": float(self.cost_weight), "threshold": float(self.threshold)} | params
        return evaluate(rescored, thresholds, thresholds, known)

    def _check(self) -> None:
        checked_number("cost_weight", self.cost_weight, "a finite number of nats, at least 0", 0.0)
        checked_number("tol", self.tol, "a finite number, at least 0", 0.0)
        checked_number("threshold", self.threshold, "a probability")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be a probability below 1; got {self.threshold!r}.")
        for name, value, allowed in (
            ("prior", self.prior, PRIORS),
            ("inputs", self.inputs, INPUTS),
            ("search", self.search, ("auto", *SEARCHES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}.")
        numbers: dict[str, Any] = {"hidden": self.hidden, "n_points": self.n_points}
        if self.n_iter is not None:
            numbers["n_iter"] = self.n_iter
        for name, value in numbers.items():
            check_whole(name, value)
        checked_settings(self.epochs, self.lr, self.weight_decay, self.batch_size)
        check_switch("weighted", self.weighted)

    def _reading_logits(self, outputs: ExitOutputs) -> bool:
        if self.inputs == "features" and outputs.features is None:
            raise ValueError("inputs='features' needs features, but the outputs have none. Use inputs='logits'.")
        return self.inputs == "logits" or outputs.features is None

    def _inputs_of(self, outputs: ExitOutputs) -> list[NDArray[Any]]:
        """What the routers read, K - 1 arrays (N, d_k)."""
        if not self._reading_logits(outputs):
            assert outputs.features is not None
            return list(outputs.features[:-1])
        if outputs.logits is None:
            raise ValueError("routers need logits, but the outputs have none. Record them (keep_logits=True).")
        return [widened(logits) for logits in outputs.logits[:-1]]

    def _exit_costs(self, outputs: ExitOutputs, inputs: Sequence[NDArray[Any]], in_macs: bool) -> Floats:
        """Relative cost of a sample that leaves at each exit, all exits and their routers on, (K,)."""
        macs = [(array.shape[1] + 1) * self.hidden if in_macs else 0.0 for array in inputs]
        paid = outputs.with_costs(outputs.stage_costs, outputs.exit_costs + np.array([*macs, 0.0]))
        return paid.path_costs(np.ones(outputs.n_exits, dtype=bool)) / outputs.full_cost

    def _learned(
        self, log_p: Floats, inputs: Sequence[NDArray[Any]], penalty: Floats
    ) -> tuple[list[Router], Posterior]:
        routers = new_routers(inputs, self.hidden, self.random_state)
        if self.prior == "global":
            posterior = fit_global(log_p, penalty, n_iter=self.n_iter or 200, tol=self.tol)
        elif self.prior == "per_sample":
            posterior = fit_per_sample(log_p, penalty, n_iter=self.n_iter or 1)
        else:
            posterior = self._amortized(log_p, inputs, penalty, routers)
        if self.prior != "amortized":
            self._step(routers, inputs, posterior.log_responsibilities, 0)
        if not posterior.converged:
            gain = posterior.history[-1] - posterior.history[-2] if len(posterior.history) > 1 else np.inf
            warnings.warn(
                f"EM stopped after {len(posterior.history) - 1} steps; the last one gained {gain:.2g} nats a sample, "
                f"more than tol={self.tol}. Raise n_iter or tol.",
                ConvergenceWarning,
                stacklevel=4,
            )
        return routers, posterior

    def _step(self, routers: list[Router], inputs: Sequence[NDArray[Any]], log_r: Floats, step: int) -> None:
        """M-step: routers learn the probability of leaving once there."""
        if not routers:
            return
        usual = (2, 50) if self.prior == "amortized" else (20, 500)
        train_routers(
            routers, inputs, halting_targets(log_r)[:, :-1], reach(log_r)[:, :-1] if self.weighted else None,
            epochs=n_epochs(self.epochs, len(log_r), self.batch_size, *usual), lr=self.lr,
            weight_decay=self.weight_decay, batch_size=self.batch_size,
            random_state=self.random_state + step, verbose=self.verbose,
        )  # fmt: skip

    def _amortized(
        self, log_p: Floats, inputs: Sequence[NDArray[Any]], penalty: Floats, routers: list[Router]
    ) -> Posterior:
        """Responsibilities under the routers' own prior, and routers on those, in turns."""
        prior = np.full(log_p.shape, 1.0 / log_p.shape[1])
        log_r, likelihood = expectation(log_p, prior, penalty)
        history = [likelihood]
        for step in range(self.n_iter or 50):
            self._step(routers, inputs, log_r, step)
            prior = exit_probabilities(self._halting(routers, inputs))
            log_r, likelihood = expectation(log_p, prior, penalty)
            history.append(likelihood)
            if step and history[-1] - history[-2] < self.tol:
                return Posterior(log_r, prior, history, True)
        return Posterior(log_r, prior, history, False)

    @staticmethod
    def _halting(routers: Sequence[Router], inputs: Sequence[NDArray[Any]]) -> Floats:
        """Probability of leaving at each exit once there, (N, K); 1 at the last."""
        columns = [halting(router, array) for router, array in zip(routers, inputs, strict=True)]
        return np.stack([*columns, np.ones(len(columns[0]))], axis=1)

    # -- routing -------------------------------------------------------------------------------------------------------

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """Outputs with the routers' probabilities as scores, and what the routers cost."""
        check_is_fitted(self, "routers_")
        return self._scored(outputs, self.routers_)

    def _scored(self, outputs: ExitOutputs, routers: Sequence[Router]) -> ExitOutputs:
        inputs = self._inputs_of(outputs)
        widths = [len(router.mean) for router in routers]
        if [array.shape[1] for array in inputs] != widths:
            raise ValueError(
                f"routers read vectors of widths {widths}; the outputs have {[array.shape[1] for array in inputs]}. "
                "Record the outputs with the model that the routers were fitted with."
            )
        scores = self._halting(routers, inputs).T if routers else np.ones_like(outputs.scores)
        return self.charged(outputs.with_scores(scores))

    def rescored_batch(self, k: int, batch: ExitBatch) -> ExitBatch:
        if k == len(self.routers_):
            return batch  # at the last exit everybody leaves
        read = batch.logits if self._reads_logits else batch.features
        if read is None:
            raise ValueError(f"routers need {'logits' if self._reads_logits else 'features'}, but the batch has none.")
        return dataclasses.replace(batch, scores=halting(self.routers_[k], widened(read)))

    def pareto(
        self,
        outputs: ExitOutputs | None = None,
        *,
        refit: bool = False,
        cost_weights: Sequence[float] = COST_WEIGHTS,
    ) -> ParetoFrontier:
        """The frontier of one fitted router's probabilities, or the sweep over cost weights.

        Parameters
        ----------
        outputs : ExitOutputs, optional
            Data to evaluate on, the calibration data unless given; needed for ``refit``.
        refit : bool, default=False
            Train routers anew for every cost weight (the paper's Fig. 2 and 3), each at ``threshold``; likelihoods and
            features are those of ``fit``.
        cost_weights : sequence of float
        """
        if not refit:
            return super().pareto(outputs)
        check_is_fitted(self, "routers_")
        if outputs is None or not hasattr(self, "_kept"):
            raise ValueError(
                "refit=True needs outputs to evaluate on, and a router that was fitted, not loaded. Fit it anew."
            )
        log_p, inputs, costs = self._kept
        points = []
        for weight in cost_weights:
            routers, _ = self._learned(log_p, inputs, checked_number("cost_weights", weight, "at least 0", 0.0) * costs)
            points.append(self._at_threshold(self._scored(outputs, routers), cost_weight=float(weight)))
        points.sort(key=lambda point: (point.cost, point.accuracy))
        return ParetoFrontier(points, *reference(outputs))

    # -- persistence ---------------------------------------------------------------------------------------------------

    def get_state(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        state, arrays = super().get_state()
        for k, router in enumerate(self.routers_):
            arrays |= {f"router_{k}.{name}": t.double().numpy() for name, t in router.state_dict().items()}
        widths = [len(router.mean) for router in self.routers_]
        return state | {"widths": widths, "in_macs": self._in_macs, "reads_logits": self._reads_logits}, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, Floats]) -> None:
        super().set_state(state, arrays)
        self._in_macs, self._reads_logits = state["in_macs"], state["reads_logits"]
        self.routers_ = []
        for k, width in enumerate(state["widths"]):
            with torch.random.fork_rng(devices=[]):
                router = Router(width, self.hidden)
            names = router.state_dict()
            router.load_state_dict({name: torch.from_numpy(arrays[f"router_{k}.{name}"]).float() for name in names})
            self.routers_.append(router.eval())
