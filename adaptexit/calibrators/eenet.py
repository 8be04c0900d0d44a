"""EENet's scheduler: learned scores an exit, and thresholds that spend a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Calibrator, Memory, check_outputs, check_sweep, check_weights, sweep_of
from adaptexit.core.answer import Answer
from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import largest_of
from adaptexit.core.search.shares import frontier_of_shares
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.schema import check_form, whole
from adaptexit.utils.validation import check_whole, checked_number, checked_settings, stored_array

if TYPE_CHECKING:
    from adaptexit.calibrators.eenet_scorers import Scorer

Floats = NDArray[np.float64]

FEWEST_EPOCHS, FEWEST_MINIBATCHES = 20, 1000


class EENetScheduler(Calibrator):
    """A learned score an exit, and the share of the samples that each exit answers, learned for a budget.

    Ilhan et al., "Adaptive Deep Neural Network Inference Optimization with EENet". An exit's score is how likely it is
    right, by logistic regression on its probabilities, the largest of them, its entropy and the scores of the exits
    before it. Which share of the samples each exit should take is learned beside it; thresholds are where those shares
    of the samples that reach an exit, surest first, end.

    Parameters
    ----------
    budget : float, optional
        Mean relative cost to learn for, and of the point in use. Half way between the first exit's cost and 1 unless
        given.
    kl_weight, budget_weight : float, default=1e-3 and 1e-2
        Of the divergence between shares and scores, and of the distance from the budget, in the loss.
    hidden : int, default=32
        Width of the hidden layer of what learns the shares. It is not run where samples are answered.
    epochs : int or "auto", default="auto"
        20, or as many as make 1000 minibatches.
    lr, weight_decay, batch_size
        Of training by AdamW.
    n_points : int, default=100
        Budgets that the learned shares are tilted to fit (:func:`adaptexit.core.search.shares.matched_shares`). Points
        that another one beats are not kept.
    random_state : int, default=0
    verbose : int, default=0

    Attributes
    ----------
    scorers_ : list of K - 1 modules
    shares_ : array (K,)
        As learned for ``budget``, before they are made to fit it.
    history_ : list of lists of 3 floats
        The terms of the loss by epoch. Not saved.
    extra_costs_ : array (K,)
        MACs of the scorers, where costs are MACs; else 0.
    thresholds_, point_, frontier_

    Notes
    -----
    Scores read earlier scores, so all exits up to the deepest one in use are run. In the authors' code scores are
    linear and cut off at 0 and 1, and shares a softmax of numbers between 0 and 1, which cannot leave an exit with less
    than about 1/(eK); here scores are logistic, and nothing bounds what the shares are a softmax of. The published
    schedule keeps its budget only as far as its loss says; here the shares are tilted to fit it.
    """

    needs_logits = True
    reads_weights = False
    remembers = True
    scorers_: list[Scorer]
    shares_: Floats
    history_: list[list[float]]

    def __init__(
        self,
        budget: float | None = None,
        *,
        kl_weight: float = 1e-3,
        budget_weight: float = 1e-2,
        hidden: int = 32,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        n_points: int = 100,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.budget = budget
        self.kl_weight = kl_weight
        self.budget_weight = budget_weight
        self.hidden = hidden
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.n_points = n_points
        self.random_state = random_state
        self.verbose = verbose

    @property
    def extra_costs_(self) -> Floats:
        check_is_fitted(self)
        macs = [scorer.macs if self._in_macs else 0 for scorer in self.scorers_]
        return np.array([*macs, 0], dtype=np.float64)

    # -- learning ------------------------------------------------------------------------------------------------------

    @learned_at_once
    def fit(self, outputs: ExitOutputs, y: None = None) -> EENetScheduler:
        """Learn scores and shares on calibration outputs, which need logits, and find thresholds for every budget.

        Raises
        ------
        ValueError
            For parameters outside what is allowed, a budget below the first exit's cost, or outputs without what is
            needed or with weights.
        """
        check_outputs(outputs)
        check_weights(self, outputs.sample_weight)
        self._check(outputs)
        budget = self._reachable(outputs, self.budget)
        schedule = self._learned(outputs, budget)
        self._take(outputs, schedule)
        self.history_ = schedule[2]
        budgets = np.linspace(self._least(outputs), 1.0, self.n_points)
        frontier, point = frontier_of_shares(self.rescored(outputs), self.shares_, budgets.tolist(), budget)
        self._keep(frontier.points, point, outputs)
        return self

    def _take(self, outputs: ExitOutputs, schedule: tuple[list[Scorer], Floats, Any]) -> None:
        scorers, self.shares_, _ = schedule
        # Everybody who reaches the last exit leaves there: its score trains the shares and is never asked again.
        self.scorers_, self._in_macs = scorers[:-1], outputs.cost_unit == "MACs"
        self._fit_data = outputs

    def _check(self, outputs: ExitOutputs) -> None:
        checked_number("kl_weight", self.kl_weight, "a finite number, at least 0", 0.0)
        checked_number("budget_weight", self.budget_weight, "a finite number, at least 0", 0.0)
        for name in ("hidden", "n_points"):
            check_whole(name, getattr(self, name))
        check_whole("random_state", self.random_state, 0)
        checked_settings(self.epochs, self.lr, self.weight_decay, self.batch_size)
        if outputs.logits is None or outputs.labels is None:
            gap = "logits (record them with keep_logits=True)" if outputs.logits is None else "labels"
            raise ValueError(f"a schedule learns which answers are right; the outputs lack {gap}.")

    @staticmethod
    def _least(outputs: ExitOutputs) -> float:
        """Relative cost of the first exit, its score included."""
        from adaptexit.calibrators.eenet_scorers import Scorer

        assert outputs.logits is not None
        own = Scorer.macs_of(outputs.logits.shape[2], 0) if outputs.cost_unit == "MACs" and outputs.n_exits > 1 else 0
        return float((outputs.stage_costs[0] + outputs.exit_costs[0] + own) / outputs.full_cost)

    def _reachable(self, outputs: ExitOutputs, budget: float | None) -> float:
        """The budget, or half way between the first exit's cost and the full model's."""
        least = min(self._least(outputs), 1.0)
        if budget is None:
            return (least + 1.0) / 2
        budget = checked_number("budget", budget, "a finite relative cost (0.4 is 40% of the full model)")
        if budget < least:
            raise ValueError(
                f"budget must be at least {least:.4g}, the relative cost of the first exit; got {budget:.4g}. Raise "
                "the budget or use a cheaper first exit."
            )
        return budget

    def _learned(self, outputs: ExitOutputs, budget: float) -> tuple[list[Scorer], Floats, list[list[float]]]:
        from adaptexit.calibrators.eenet_scorers import train_schedule
        from adaptexit.training.loop import n_epochs

        assert outputs.logits is not None
        assert outputs.labels is not None
        epochs = n_epochs(self.epochs, outputs.n_samples, self.batch_size, FEWEST_EPOCHS, FEWEST_MINIBATCHES)
        costs = outputs.path_costs(np.ones(outputs.n_exits, dtype=bool)) / outputs.full_cost
        correct = np.stack([largest_of(logits) == outputs.labels for logits in outputs.logits])
        return train_schedule(
            outputs.logits, correct, costs, budget,
            hidden=self.hidden, kl_weight=self.kl_weight, budget_weight=self.budget_weight, epochs=epochs, lr=self.lr,
            weight_decay=self.weight_decay, batch_size=self.batch_size, random_state=self.random_state,
            verbose=self.verbose,
        )  # fmt: skip

    # -- answering -----------------------------------------------------------------------------------------------------

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """Outputs with the learned probabilities as scores, what they cost, and exits that are chained."""
        check_is_fitted(self, "scorers_")
        self._check_logits(outputs)
        from adaptexit.calibrators.small_modules import probabilities

        assert outputs.logits is not None
        earlier = np.empty((outputs.n_samples, 0))
        for scorer, logits in zip(self.scorers_, outputs.logits, strict=False):
            earlier = np.column_stack([earlier, probabilities(scorer, logits, earlier)])
        scores = np.vstack([earlier.T, np.ones((1, outputs.n_samples))])
        return self.charged(outputs.with_scores(scores))

    def _check_logits(self, outputs: ExitOutputs) -> None:
        if outputs.logits is None:
            raise ValueError("a schedule needs logits, but the outputs have none. Record them (keep_logits=True).")
        n_exits, _, n_classes = outputs.logits.shape
        own = (len(self.shares_), self.scorers_[0].n_classes if self.scorers_ else n_classes)
        if (n_exits, n_classes) != own:
            raise ValueError(
                f"the schedule was learned for {own[0]} exits and {own[1]} classes; the outputs have {n_exits} and "
                f"{n_classes}. Record them with the model that it was fitted with."
            )

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        if k == len(self.scorers_):
            return np.ones(len(batch.predictions)), None  # at the last exit everybody leaves
        if batch.logits is None:
            raise ValueError("a schedule needs logits, but the batch has none.")
        earlier = np.empty((len(batch.logits), 0)) if memory is None else memory
        if earlier.shape[1] != k:
            raise ValueError(
                f"exit {k} reads the scores of the {k} exits before it; the memory brings {earlier.shape[1]}. Ask "
                "every exit in turn, and give each the memory that decide returned at the one before."
            )
        from adaptexit.calibrators.small_modules import probabilities

        scores = probabilities(self.scorers_[k], batch.logits, earlier)
        return scores, np.column_stack([earlier, scores])

    def pareto(
        self, outputs: ExitOutputs | None = None, *, refit: bool = False, budgets: Sequence[float] | None = None
    ) -> ParetoFrontier:
        """The frontier of one fitted schedule, or one schedule after another, each learned for its own budget.

        Parameters
        ----------
        outputs : ExitOutputs, optional
            Data to evaluate on, the calibration data unless given.
        refit : bool, default=False
            Learn scores and shares anew for every budget, as published, on the data of ``fit``.
        budgets : sequence of float, optional
            For ``refit``; 10 in even steps unless given.
        """
        if not refit:
            return super().pareto(outputs)
        check_sweep("budgets", [1.0] if budgets is None else budgets, self, outputs)
        calibration, points = self._fit_data, []
        least = min(self._least(calibration), 1.0)
        for budget in np.linspace(least, 1.0, 11)[1:].tolist() if budgets is None else budgets:
            other = clone(self)
            other._take(calibration, self._learned(calibration, self._reachable(calibration, budget)))
            point = frontier_of_shares(other.rescored(calibration), other.shares_, (), budget)[1]
            on_outputs = None
            if outputs is not None:
                on_outputs = evaluate(other.rescored(outputs), point.thresholds, point.cutoffs, point.params)
            points.append((point, on_outputs))
        return sweep_of(points, calibration, outputs)

    # -- persistence ---------------------------------------------------------------------------------------------------

    def get_state(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        state, arrays = super().get_state()
        from adaptexit.calibrators.small_modules import state_arrays

        arrays |= {"shares": self.shares_} | state_arrays("scorer", self.scorers_)
        state |= {"n_scorers": len(self.scorers_), "in_macs": self._in_macs}
        return state | {"n_classes": self.scorers_[0].n_classes if self.scorers_ else None}, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, Floats], outputs: ExitOutputs) -> None:
        from adaptexit.calibrators.eenet_scorers import Scorer
        from adaptexit.calibrators.small_modules import restored

        early = outputs.n_exits - 1
        classes = whole(outputs.n_classes or 1, outputs.n_classes) if early else None
        form = {"n_scorers": whole(early, early), "in_macs": bool, "n_classes": classes, "*": object}
        check_form(state, form, "calibrator")

        def blank(k: int) -> Scorer:
            stored_array(arrays, f"scorer_{k}.net.weight", (1, Scorer.macs_of(state["n_classes"], k)))
            return Scorer(state["n_classes"], k)

        self._in_macs, self.shares_ = state["in_macs"], stored_array(arrays, "shares", (outputs.n_exits,))
        self.scorers_ = restored("scorer", arrays, blank, state["n_scorers"])
        super().set_state(state, arrays, outputs)
