"""Whether models fit their labels at all: a model that only guesses was asked wrongly, or graded wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from adaptexit.core.outputs import ExitOutputs
from adaptexit.exceptions import LabelWarning, warn

MANY_LABELS = 50
"""Samples from which on a model that is no better than guessing is remarked on."""

MOST_CLASSES = 2000
"""Up to which another order of the classes is looked for."""

_STANDARD_ERRORS = 2.0
"""By which a model that has learned its task is better than guessing."""

_CERTAIN_ERRORS = 4.0
"""By which it is under other names, where these are the cause."""


def chance_level(predictions: NDArray[Any], labels: NDArray[Any], n_classes: int) -> tuple[float, float]:
    """Accuracy of the same answers given to samples at random, and its standard error.

    Unlike the share of the commonest label, this tells a model of a rare class, which may be right less often than
    that, from one that guesses. Both are those of Cohen's kappa without association (Fleiss, Cohen and Everitt, "Large
    sample standard errors of kappa and weighted kappa", Psychological Bulletin 1969), before it is scaled.

    Parameters
    ----------
    predictions, labels : integer arrays (N,)
    n_classes : int
    """
    answered = np.bincount(predictions, minlength=n_classes) / len(labels)
    true = np.bincount(labels, minlength=n_classes) / len(labels)
    both = answered * true
    level = float(both.sum())
    variance = level + level**2 - float(both @ (answered + true))
    return level, float(np.sqrt(max(variance, 0.0) / len(labels)))


def renamed_accuracy(predictions: NDArray[Any], labels: NDArray[Any], n_classes: int) -> float:
    """Accuracy on one half of the samples once classes are renamed, one to one, as suits the other half best."""
    halves = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
    table = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(table, (predictions[halves[0]], labels[halves[0]]), 1)
    _, names = linear_sum_assignment(table, maximize=True)
    return float(np.mean(names[predictions[halves[1]]] == labels[halves[1]]))


def warn_of_chance(outputs: ExitOutputs) -> None:
    """One :class:`LabelWarning` where the full model is not clearly better than guessing, or answers under other names.

    An early exit may be as weak as it likes: it is remarked on only where it seems to guess, but would come half way
    up to the full model under other names, so that it has its classes in another order. Nothing is said of fewer than
    ``MANY_LABELS`` samples, of a single class, and of outputs graded by ``quality``. Samples count alike whatever their
    weights, as labels fit or do not fit in any mix; those of weight 0 are not looked at.
    """
    outputs = outputs.counted()
    labels, n_classes = outputs.labels, outputs.n_classes
    if outputs.quality is not None or outputs.predictions is None or labels is None or n_classes is None:
        return
    if outputs.n_samples < MANY_LABELS or (labels == labels[0]).all():
        return
    remarks, full_accuracy = [], float(np.mean(outputs.predictions[-1] == labels))
    for k, predictions in enumerate(outputs.predictions):
        accuracy = float(np.mean(predictions == labels))
        level, error = chance_level(predictions, labels, n_classes)
        if accuracy > level + _STANDARD_ERRORS * error + 1e-9:
            continue
        renamed = renamed_accuracy(predictions, labels, n_classes) if n_classes <= MOST_CLASSES else 0.0
        half_error = float(np.sqrt(level * (1 - level) / (outputs.n_samples // 2)))
        best = full_accuracy if full_accuracy > level + _CERTAIN_ERRORS * half_error else 1.0
        misnamed = renamed > max(level + _CERTAIN_ERRORS * half_error, (level + best) / 2)
        is_full = k == outputs.n_exits - 1
        if is_full or misnamed:
            name = "the full model" if is_full else f"exit {k}"
            better = f"; about {100 * renamed:.0f}% with its classes in another order" if misnamed else ""
            remarks.append(f"{name} is right on {100 * accuracy:.1f}% of them (guessing: {100 * level:.1f}%{better})")
    if remarks:
        warn(
            f"hardly better than guessing on the {outputs.n_samples} calibration samples: {', '.join(remarks)}. Are "
            "labels in the order of the model's classes (classes=), and inputs prepared as those it was trained on? "
            "Otherwise it has not learned this task.",
            LabelWarning,
        )
