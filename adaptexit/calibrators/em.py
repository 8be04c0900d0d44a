"""EM routing: routers that learn which exit should answer, from exits as a latent variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Calibrator, Memory, check_outputs, check_sweep, check_weights, sweep_of
from adaptexit.core.answer import Answer
from adaptexit.core.em import Posterior, log_likelihoods
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import widened
from adaptexit.core.search import SEARCH_NAMES, SearchName, search_thresholds
from adaptexit.exceptions import warn
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.schema import check_form, whole
from adaptexit.utils.validation import check_switch, check_whole, checked_number, checked_settings, stored_array

if TYPE_CHECKING:
    from adaptexit.calibrators.em_routers import Router

Floats = NDArray[np.float64]

PriorName = Literal["amortized", "global", "per_sample"]
InputsName = Literal["auto", "features", "logits"]


class Usual(NamedTuple):
    """What counts for a prior unless given: steps, tolerance, and epochs or minibatches of a router's training."""

    n_iter: int
    tol: float
    epochs: int
    minibatches: int


PRIORS: dict[PriorName, Usual] = {
    "amortized": Usual(50, 1e-3, 2, 50),
    "global": Usual(1000, 1e-8, 20, 500),
    "per_sample": Usual(1, 0.0, 20, 500),
}

MOST_NATS = 1e6

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
        lambda: log-likelihood that the full model's cost is worth, in nats; at most 1e6.
    prior : {"amortized", "global", "per_sample"}, default="amortized"
        Of the exits. "amortized": what the routers say, learned in turns with the responsibilities; "global": one for
        all samples, by EM; "per_sample": the paper's, each sample's own last responsibilities, which sharpens with
        every step (one step is the posterior under an even prior).
    n_iter : int or None, default=None
        Steps at most, 50 for "amortized" and 1000 for "global" unless given; steps, all of which are made, 1 unless
        given, for "per_sample".
    tol : float or None, default=None
        Gain of the mean penalised log-likelihood at which "amortized" and "global" stop, in nats: 1e-3 and 1e-8 unless
        given. There is a warning where they do not.
    threshold : float, default=0.5
        Probability of leaving above which a sample leaves, at the point in use.
    hidden : int, default=32
        Width of the routers' hidden layer.
    weighted : bool, default=True
        Weight a router's loss by the probability of reaching it, the exact M-step; the paper's is unweighted.
    inputs : {"auto", "features", "logits"}, default="auto"
        What routers read at an exit: means of its features over positions, or its logits. "auto" is features where all
        outputs that ``fit`` is given have them, of every early exit.
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
    on the largest probability were better at every cost from 0.6 to 0.9 (``benchmarks/em_routing_cifar10.py``).
    """

    needs_logits = True
    needs_training = True
    reads_weights = False
    routers_: list[Router]
    posterior_: Posterior

    def __init__(
        self,
        cost_weight: float = 0.5,
        prior: PriorName = "amortized",
        *,
        n_iter: int | None = None,
        tol: float | None = None,
        threshold: float = 0.5,
        hidden: int = 32,
        weighted: bool = True,
        inputs: InputsName = "auto",
        epochs: int | Literal["auto"] = "auto",
        lr: float = 5e-3,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        search: SearchName = "auto",
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
        return not getattr(self, "_reads_logits", self.inputs == "logits")

    @property
    def _decides_on_logits(self) -> bool:
        return self._reads_logits

    @property
    def extra_costs_(self) -> Floats:
        check_is_fitted(self)
        macs = [router.macs for router in self.routers_] if self._in_macs else [0] * len(self.routers_)
        return np.array([*macs, 0], dtype=np.float64)

    # -- learning ------------------------------------------------------------------------------------------------------

    @learned_at_once
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
            For parameters outside what is allowed, or outputs without what is needed or with weights.
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
        check_weights(self, outputs.sample_weight, source.sample_weight)
        reads_logits = self._reading_logits(outputs, source)
        inputs, log_p = _router_inputs(source, reads_logits), log_likelihoods(source)
        in_macs = outputs.cost_unit == "MACs"
        costs = self._exit_costs(outputs, inputs, in_macs)
        routers, posterior = self._learned(log_p, inputs, float(self.cost_weight) * costs)
        self.routers_, self.posterior_, self._in_macs = routers, posterior, in_macs
        self._reads_logits = reads_logits
        self._fit_data = (log_p, inputs, costs, outputs)
        halting = self.rescored(outputs)
        frontier, _ = search_thresholds(halting, self.search, n_points=self.n_points, random_state=self.random_state)
        point = self._at_threshold(halting)
        self._keep([*frontier.points, point], point, outputs)
        return self

    def _at_threshold(self, outputs: ExitOutputs, **params: Any) -> OperatingPoint:
        thresholds = np.full(outputs.n_exits, float(self.threshold))
        thresholds[-1] = -np.inf
        own = {"cost_weight": float(self.cost_weight), "threshold": float(self.threshold)}
        return evaluate(outputs, thresholds, thresholds, own | params)

    def _check(self) -> None:
        _checked_weight("cost_weight", self.cost_weight)
        if self.tol is not None:
            checked_number("tol", self.tol, "a finite number, at least 0, or None", 0.0)
        check_whole("random_state", self.random_state, 0)
        checked_number("threshold", self.threshold, "a probability")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be a probability below 1; got {self.threshold!r}.")
        for name, value, allowed in (
            ("prior", self.prior, tuple(PRIORS)),
            ("inputs", self.inputs, get_args(InputsName)),
            ("search", self.search, SEARCH_NAMES),
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

    def _reading_logits(self, *sources: ExitOutputs) -> bool:
        """What routers read, decided once for all outputs."""
        if self.inputs == "logits":
            return True
        lacking = any(o.features is None or any(not f.shape[1] for f in o.features[:-1]) for o in sources)
        if lacking and self.inputs == "features":
            raise ValueError(
                "inputs='features' needs features of every early exit, but the outputs lack some. Use inputs='logits'."
            )
        return lacking

    def _exit_costs(self, outputs: ExitOutputs, inputs: Sequence[NDArray[Any]], in_macs: bool) -> Floats:
        """Relative cost of a sample that leaves at each exit, all exits and their routers on, (K,)."""
        from adaptexit.calibrators.em_routers import Router

        macs = [Router.macs_of(array.shape[1], self.hidden) if in_macs else 0 for array in inputs]
        costs = outputs.pricing.charged(np.array([*macs, 0.0]), chained=False)
        return costs.paths(np.ones(outputs.n_exits, dtype=bool)) / outputs.full_cost

    def _learned(
        self, log_p: Floats, inputs: Sequence[NDArray[Any]], penalty: Floats
    ) -> tuple[list[Router], Posterior]:
        from adaptexit.calibrators.em_routers import fit_routers

        usual = PRIORS[self.prior]
        routers, posterior = fit_routers(
            log_p, penalty, inputs,
            prior=self.prior, n_iter=self.n_iter or usual.n_iter, tol=usual.tol if self.tol is None else self.tol,
            usual_epochs=usual.epochs, usual_minibatches=usual.minibatches, hidden=self.hidden, weighted=self.weighted,
            epochs=self.epochs, lr=self.lr, weight_decay=self.weight_decay, batch_size=self.batch_size,
            random_state=self.random_state, verbose=self.verbose,
        )  # fmt: skip
        if not posterior.converged:
            gain = posterior.history[-1] - posterior.history[-2]
            warn(
                f"EM stopped after {len(posterior.history) - 1} steps without having converged; the last one changed "
                f"the mean log-likelihood by {gain:.2g} nats. Raise n_iter or tol.",
                ConvergenceWarning,
            )
        return [router.double() for router in routers], posterior

    # -- routing -------------------------------------------------------------------------------------------------------

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """Outputs with the routers' probabilities as scores, and what the routers cost."""
        check_is_fitted(self, "routers_")
        return self._scored(outputs, self.routers_)

    def _scored(self, outputs: ExitOutputs, routers: Sequence[Router]) -> ExitOutputs:
        inputs = _router_inputs(outputs, self._reads_logits)
        widths = [len(router.mean) for router in routers]
        if [array.shape[1] for array in inputs] != widths:
            raise ValueError(
                f"routers read vectors of widths {widths}; the outputs have {[array.shape[1] for array in inputs]}. "
                "Record the outputs with the model that the routers were fitted with."
            )
        from adaptexit.calibrators.em_routers import halting

        return self.charged(outputs.with_scores(halting(routers, inputs, outputs.n_samples).T))

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        if k == len(self.routers_):
            return np.ones(len(batch.predictions)), None  # at the last exit everybody leaves
        vectors = batch.logits if self._reads_logits else batch.features
        if vectors is None:
            raise ValueError(f"routers need {'logits' if self._reads_logits else 'features'}, but the batch has none.")
        from adaptexit.calibrators.small_modules import probabilities

        return probabilities(self.routers_[k], widened(vectors)), None

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
            Data to evaluate on, the calibration data unless given.
        refit : bool, default=False
            Train routers anew for every cost weight (the paper's Fig. 2 and 3), each at ``threshold``; likelihoods and
            features are those of ``fit``.
        cost_weights : sequence of float
        """
        if not refit:
            return super().pareto(outputs)
        check_sweep("cost_weights", cost_weights, self, outputs)
        weights = [_checked_weight("cost_weights", weight) for weight in cost_weights]
        log_p, inputs, costs, calibration = self._fit_data
        points = []
        for weight in weights:
            routers, _ = self._learned(log_p, inputs, weight * costs)
            point = self._at_threshold(self._scored(calibration, routers), cost_weight=weight)
            other = None
            if outputs is not None:
                other = self._at_threshold(self._scored(outputs, routers), cost_weight=weight)
            points.append((point, other))
        return sweep_of(points, calibration, outputs)

    # -- persistence ---------------------------------------------------------------------------------------------------

    def get_state(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        state, arrays = super().get_state()
        from adaptexit.calibrators.small_modules import state_arrays

        arrays |= state_arrays("router", self.routers_)
        own = {"n_routers": len(self.routers_), "in_macs": self._in_macs, "reads_logits": self._reads_logits}
        return state | own, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, Floats], outputs: ExitOutputs) -> None:
        from adaptexit.calibrators.em_routers import Router
        from adaptexit.calibrators.small_modules import restored

        early = outputs.n_exits - 1
        form = {"n_routers": whole(early, early), "in_macs": bool, "reads_logits": bool, "*": object}
        check_form(state, form, "calibrator")

        def blank(k: int) -> Router:
            hidden, width = stored_array(arrays, f"router_{k}.net.0.weight", (None, None)).shape
            return Router(width, hidden)

        self._in_macs, self._reads_logits = state["in_macs"], state["reads_logits"]
        self.routers_ = restored("router", arrays, blank, state["n_routers"])
        super().set_state(state, arrays, outputs)


def _checked_weight(name: str, value: Any) -> float:
    meaning = f"a number of nats from 0 to {MOST_NATS:g}"
    weight = checked_number(name, value, meaning, 0.0)
    if weight > MOST_NATS:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")
    return weight


def _router_inputs(outputs: ExitOutputs, reads_logits: bool) -> list[NDArray[Any]]:
    """What routers read, K - 1 arrays (N, d_k)."""
    arrays = outputs.logits if reads_logits else outputs.features
    if arrays is None:
        raise ValueError(
            f"routers need {'logits' if reads_logits else 'features'}, but the outputs have none. Record them with an "
            "estimator that has these routers."
        )
    return list(arrays[:-1])
