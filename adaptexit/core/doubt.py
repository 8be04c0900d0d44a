"""When a choice rests on too little: said where it is made, with the standard error that it has."""

from __future__ import annotations

import numpy as np

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
from adaptexit.exceptions import CalibrationWarning, warn

FEW_DISAGREEMENTS = 30
"""Samples on which a point's answers are graded otherwise than the full model's, below which little is known of it."""

CERTAIN = 5e-4
"""Standard error of a loss, 0.05 points, below which it is known well enough however few disagreements there are."""

_NEXT_STEP = "Calibrate on more samples, allow a larger max_drop, or give a budget"


def warn_of_doubt(frontier: ParetoFrontier, point: OperatingPoint, max_drop: float) -> None:
    """One :class:`CalibrationWarning` where the point that keeps a drop is known by few disagreements.

    Either the drop is that of a point on which hardly any sample decides, or it is the plain full model's because none
    of the cheaper points, some of which seem to keep the drop, is known to.

    Parameters
    ----------
    frontier : ParetoFrontier
        Of right and wrong answers on calibration data.
    point : OperatingPoint
        The one chosen for ``max_drop``.
    max_drop : float
    """
    size = frontier.effective_size or frontier.n_samples  # of samples with weights, as many as say as much
    n = f"{size:.0f}" if frontier.effective_size is None else f"{size:.0f} (by weight)"
    if point.on[:-1].any():
        # drop_se counts one disagreement more than there are
        number = max(round((point.drop_se * size) ** 2) - 1, 0)
        if point.drop_se > CERTAIN and number < FEW_DISAGREEMENTS:
            warn(
                f"max_drop={max_drop:g} was chosen for by {_samples(number)} of {n} on which the chosen point and the "
                f"full model are not both right or both wrong: it loses {_loss(frontier, point)}. {_NEXT_STEP}.",
                CalibrationWarning,
            )
        return
    seeming = np.flatnonzero(~frontier.plain & (frontier.full_accuracy - frontier.accuracy <= max_drop))
    if len(seeming):
        cheapest = frontier.points[seeming[np.argmin(frontier.cost[seeming])]]
        warn(
            f"max_drop={max_drop:g} is kept by the plain full model only, which saves nothing: of cheaper points {n} "
            f"samples do not tell. The cheapest that seems to keep it, at a cost of {cheapest.cost:.2g}, loses "
            f"{_loss(frontier, cheapest)}. {_NEXT_STEP}.",
            CalibrationWarning,
        )


def _loss(frontier: ParetoFrontier, point: OperatingPoint) -> str:
    lost = frontier.full_accuracy - point.accuracy
    return f"{100 * lost:.2g} ± {100 * point.drop_se:.2g} points of accuracy here (standard error)"


def _samples(number: int) -> str:
    return "1 sample" if number == 1 else f"{number} samples"
