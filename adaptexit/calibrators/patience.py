"""Leaving once exits agree: no scores, nothing to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Calibrator, Memory, check_outputs
from adaptexit.core.answer import Answer
from adaptexit.core.baselines import confirmations
from adaptexit.core.frontier import OperatingPoint, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.validation import check_whole


class PatienceCalibrator(Calibrator):
    """A sample leaves at the first exit that answers as each of so many exits before it.

    PABEE: Zhou et al., "BERT Loses Patience: Fast and Robust Inference with Early Exit", NeurIPS 2020. Calibration data
    say what every patience gives and so which of them serves a budget.

    Parameters
    ----------
    patience : int, default=1
        Of the point in use: exits that must have confirmed an answer. With K - 1 or more nobody leaves early, and early
        exits are switched off.

    Attributes
    ----------
    thresholds_, point_, frontier_
        The score is how many exits confirmed the answer. The frontier has every patience from 1 to K - 1, dominated or
        not, that of the point in use and the plain full model.
    """

    remembers = True

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience

    @learned_at_once
    def fit(self, outputs: ExitOutputs, y: None = None) -> PatienceCalibrator:
        """See what every patience gives on calibration outputs.

        Raises
        ------
        ValueError
            For a patience below 1, or outputs without predictions.
        """
        check_outputs(outputs)
        check_whole("patience", self.patience)
        with_counts = self._scored(outputs)
        sweep = sorted({*range(1, outputs.n_exits), int(self.patience)})
        points = {patience: _point(with_counts, patience) for patience in sweep}
        never = np.array([*[np.inf] * (outputs.n_exits - 1), -np.inf])
        plain = evaluate(with_counts, never, never)
        self._keep([*points.values(), plain], points[int(self.patience)], outputs)
        return self

    def rescored(self, outputs: ExitOutputs) -> ExitOutputs:
        """Outputs with the numbers of exits that confirmed an answer as scores, and exits that are chained."""
        check_is_fitted(self, "point_")
        return self._scored(outputs)

    @staticmethod
    def _scored(outputs: ExitOutputs) -> ExitOutputs:
        if outputs.predictions is None:
            raise ValueError("patience compares predictions, but the outputs have none: they were graded by quality.")
        scores = confirmations(outputs.predictions).astype(np.float32)
        return outputs.with_scores(scores).with_costs(outputs.stage_costs, outputs.exit_costs, chained=True)

    def scores(self, k: int, batch: Answer, memory: Memory = None) -> tuple[NDArray[Any], Memory]:
        counts = np.zeros(len(batch.predictions), dtype=np.int64)
        if memory is not None:
            answers, so_far = memory.T
            counts = np.where(batch.predictions == answers, so_far + 1, 0)
        elif 0 < k < len(self.point_.cutoffs) - 1:  # the last exit may be the only one that is run
            raise ValueError(
                f"patience at exit {k} reads what was answered before it, which the memory does not bring. Ask "
                "every exit in turn, and give each the memory that decide returned at the one before."
            )
        return counts.astype(np.float32), np.column_stack([batch.predictions, counts])


def _point(outputs: ExitOutputs, patience: int) -> OperatingPoint:
    """Everybody confirmed so often leaves. An exit after fewer others is off, though run."""
    exits = np.arange(outputs.n_exits)
    thresholds = np.where(exits < patience, np.inf, patience - 1.0)
    cutoffs = np.where(exits < patience, np.inf, patience - 0.5)
    thresholds[-1] = cutoffs[-1] = -np.inf
    return evaluate(outputs, thresholds, cutoffs, {"patience": patience})
