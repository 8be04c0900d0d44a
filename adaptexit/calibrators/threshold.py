"""One threshold an exit, searched for a budget or an allowed drop of accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.calibrators.base import ScoreCalibrator, ScoreName, check_outputs
from adaptexit.core.doubt import warn_of_doubt
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import SEARCH_NAMES, SearchName, SearchReport, search_thresholds
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.schema import check_form
from adaptexit.utils.validation import checked_number

_REPORT = {"search": SEARCH_NAMES[1:], "bagged": bool, "reason": str}
"""A search report, as JSON holds it."""


class ThresholdCalibrator(ScoreCalibrator):
    """Thresholds on one score, chosen on calibration data for every budget at once.

    Parameters
    ----------
    score : {"recorded", "max_proba", "entropy", "margin"} or callable, default="recorded"
        What is compared with the thresholds: the scores as recorded (largest probability unless the model's
        ``confidence`` says otherwise), a function of the recorded logits by name (``"entropy"`` is minus the entropy:
        with one threshold BranchyNet's rule), or a callable from logits (N, C) to scores (N,), larger = surer.
    search : {"auto", "smoothed", "exact", "coord", "shared", "geometric"}, default="auto"
        ``auto`` is ``smoothed``: for every budget a policy that spends it, found by scans exit by exit on qualities
        with the noise taken out, and moved towards MSDNet's rule where samples are few (``search_report_`` says how
        far). The others take the calibration data at their word: ``exact`` tries all thresholds (K <= 3); ``coord``
        scans exit by exit to a fixed point over many cost weights and repairs the result for every budget, averaged
        over bootstrap samples where they are few; ``shared`` puts one threshold on isotonic P(correct); ``geometric``
        is MSDNet's published rule.
    budget : float, optional
        Mean relative cost of the point in use.
    max_drop : float, optional
        Instead: the point in use is the cheapest that loses at most so much accuracy against the full model (0.01 is
        one point), on average on other data: it must keep part of its standard error's distance on these. With
        neither, 0.
    n_points : int, default=200
        Budgets for which the search is made, evenly from 0 to 1 where they can be had; predict only looks up.
    random_state : int, default=0
        Seed of the bootstrap samples.

    Attributes
    ----------
    thresholds_ : array of shape (K,)
    point_ : OperatingPoint
    frontier_ : ParetoFrontier
    search_report_ : SearchReport
        Search taken, whether bagged, and why.

    Notes
    -----
    Accuracy on the calibration data is optimistic: thresholds were chosen on it. Report accuracy on other data.
    Stored points lie on a grid of costs: a budget between two of them is served by the cheaper one. Give ``budget``
    here to have the thresholds searched for exactly that budget.
    """

    search_report_: SearchReport

    def __init__(
        self,
        score: ScoreName | Callable[[Any], Any] = "recorded",
        search: SearchName = "auto",
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        n_points: int = 200,
        random_state: int = 0,
    ) -> None:
        self.score = score
        self.search = search
        self.budget = budget
        self.max_drop = max_drop
        self.n_points = n_points
        self.random_state = random_state

    @learned_at_once
    def fit(self, outputs: ExitOutputs, y: None = None) -> ThresholdCalibrator:
        """Search the frontier on calibration outputs and choose the point in use.

        Raises
        ------
        ValueError
            For a parameter outside what is allowed, outputs without the logits that the score needs, or a budget
            below the cheapest operating point.

        Warns
        -----
        CalibrationWarning
            Where the point that keeps ``max_drop`` rests on fewer than 30 samples on which answers differ, or where it
            is the plain full model because the samples do not tell of a cheaper one.
        """
        check_outputs(outputs)
        self._search(self.rescored(outputs))
        return self

    def _search(self, outputs: ExitOutputs) -> None:
        """The frontier on outputs that have the scores to be thresholded, and the point in use."""
        if self.search not in SEARCH_NAMES:
            raise ValueError(f"search must be one of {[*SEARCH_NAMES]}; got {self.search!r}.")
        if self.budget is not None and self.max_drop is not None:
            raise ValueError(f"give budget or max_drop, not both; got budget={self.budget}, max_drop={self.max_drop}.")
        if not (isinstance(self.n_points, (int, np.integer)) and self.n_points >= 1):
            raise ValueError(f"n_points must be a positive integer; got {self.n_points!r}.")
        budget = None if self.budget is None else checked_number("budget", self.budget, "a finite relative cost")
        share = "a share of accuracy, at least 0 (0.01 is one point)"
        drop = None if self.max_drop is None else checked_number("max_drop", self.max_drop, share, least=0.0)
        frontier, report = search_thresholds(
            outputs,
            self.search,
            n_points=self.n_points,
            drops=() if drop is None else (drop,),
            budgets=() if budget is None else (budget,),
            random_state=self.random_state,
        )
        if budget is not None:
            point = frontier.at(budget=budget)
        else:
            allowed_drop = 0.0 if drop is None else drop
            point = frontier.at(max_drop=allowed_drop)
            if outputs.quality is None:  # the error counts answers that differ
                warn_of_doubt(frontier, point, allowed_drop)
        self.search_report_ = report
        self._keep(frontier.points, point, outputs)

    def get_state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        state, arrays = super().get_state()
        return state | {"search_report": dataclasses.asdict(self.search_report_)}, arrays

    def set_state(self, state: dict[str, Any], arrays: dict[str, NDArray[np.float64]], outputs: ExitOutputs) -> None:
        super().set_state(state, arrays, outputs)
        check_form(state, {"search_report": _REPORT, "*": object}, "calibrator")
        self.search_report_ = SearchReport(**state["search_report"])
