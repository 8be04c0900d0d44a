"""Temperature scaling: one number an exit that makes its probabilities as honest as one number can."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from adaptexit.core.scores import in_double, row_blocks, true_logits

RANGE = (0.01, 100.0)
"""Temperatures looked at; perfectly separated logits would ask for 0."""


def fit_temperature(
    logits: NDArray[Any], labels: NDArray[Any], sample_weight: NDArray[np.float64] | None = None
) -> float:
    """The T with the least negative log-likelihood of ``softmax(logits / T)``, within ``RANGE``.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 4.2. The loss is convex in 1/T, so it
    has one minimum along log T, which is where it is looked for.

    Parameters
    ----------
    logits : array (N, C)
    labels : integer array (N,)
    sample_weight : array (N,), optional
        How much each sample's log-likelihood counts.
    """
    mean_true = float(np.average(true_logits(logits, labels), weights=sample_weight))
    evidence = np.empty(len(logits))

    def loss(log_temperature: float) -> float:
        sharpness = float(np.exp(-log_temperature))
        for rows in row_blocks(logits):
            evidence[rows] = logsumexp(sharpness * in_double(logits[rows]), axis=1)
        return float(np.average(evidence, weights=sample_weight)) - sharpness * mean_true

    low, high = np.log(RANGE)
    minimum = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(minimum.x))
