"""Leaving once exits agree: no scores, nothing to learn."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators.base import Calibrator, check_outputs
from adaptexit.core.baselines import confirmations
from adaptexit.core.checks import check_whole
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, evaluate, reference
from adaptexit.core.outputs import ExitBatch, ExitOutputs


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

    def fit(self, outputs: ExitOutputs, y: None = None) -> PatienceCalibrator:
        """See what every patience gives on calibration outputs.

        Raises
        ------
        ValueError
            For a patience below 1, or outputs without predictions.
        """
        check_outputs(outputs)
        check_whole("patience", self.patience)
        rescored = self._scored(outputs)
        swept = sorted({*range(1, outputs.n_exits), int(self.patience)})
        points = {patience: _point(rescored, patience) for patience in swept}
        never = np.array([*[np.inf] * (outputs.n_exits - 1), -np.inf])
        ordered = sorted([*points.values(), evaluate(rescored, never, never)], key=lambda p: (p.cost, p.accuracy))
        self.frontier_, self.point_ = ParetoFrontier(ordered, *reference(outputs)), points[int(self.patience)]
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

    def rescored_batch(self, k: int, batch: ExitBatch) -> ExitBatch:
        confirmed = np.zeros(len(batch.predictions), dtype=np.int64)
        if k:
            if batch.earlier is None:
                raise ValueError(
                    f"patience at exit {k} reads what was answered before it, which the batch does not bring. Ask "
                    "every exit in turn, and give each what decide returned at the one before."
                )
            answered, so_far = batch.earlier.T
            confirmed = np.where(batch.predictions == answered, so_far + 1, 0)
        return dataclasses.replace(
            batch, scores=confirmed.astype(np.float32), earlier=np.column_stack([batch.predictions, confirmed])
        )


def _point(rescored: ExitOutputs, patience: int) -> OperatingPoint:
    """Everybody confirmed so often leaves. An exit after fewer others is off, though run."""
    exits = np.arange(rescored.n_exits)
    thresholds = np.where(exits < patience, np.inf, patience - 1.0)
    cutoffs = np.where(exits < patience, np.inf, patience - 0.5)
    thresholds[-1] = cutoffs[-1] = -np.inf
    return evaluate(rescored, thresholds, cutoffs, {"patience": patience})
