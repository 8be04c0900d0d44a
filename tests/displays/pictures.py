"""What tests of pictures share."""

from functools import cache

import numpy as np

from adaptexit import CascadeSaver, ThresholdCalibrator
from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from tests.nets import digits, large_trained, small_trained


@cache
def cascade_by_margin():
    """Another score is thresholded than the one that was recorded."""
    calibrator = ThresholdCalibrator(score="margin", max_drop=0.02)
    return CascadeSaver(large_trained(), small_trained(), calibrator=calibrator).fit(*digits()[1])


def margins_of(outputs):
    """Largest probability less the next one, at the first exit."""
    weights = np.exp(outputs.logits[0].astype(float))
    falling = np.sort(weights / weights.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    return falling[:, 0] - falling[:, 1]


def three_exits():
    """Outputs of three exits on five samples and a point at which nobody leaves the second."""
    outputs = ExitOutputs(
        scores=np.array([[0.55, 0.9, 0.95, 0.1, 0.2], [0.5] * 5, [0.3, 0.3, 0.3, 0.25, 0.75]]),
        predictions=np.zeros((3, 5), dtype=int), labels=np.array([1, 0, 0, 0, 1]), n_classes=2, costs=[1, 2, 3],
    )  # fmt: skip
    thresholds = np.array([0.5, np.inf, -np.inf])
    return outputs, evaluate(outputs, thresholds, thresholds)


def labels_of(display):
    """What the legend lists."""
    return [text.get_text() for text in display.ax_.get_legend().get_texts()]
