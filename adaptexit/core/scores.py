"""Scores: one number per sample that says how sure a classifier is, larger = surer.

Every function takes logits whose last axis is the classes, and works on NumPy arrays or on any namespace
that offers the same functions under the same names (``xp=torch`` does), so that recording, offline routing and
the executor share one formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # an array of the namespace ``xp``


def widened(logits: Array) -> Array:
    """NumPy logits in single precision at least, so that scores do not depend on how logits were stored."""
    array = np.asanyarray(logits)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def in_double(logits: Array) -> Array:
    """NumPy logits in double precision."""
    return np.asarray(logits, dtype=np.float64)


def true_logits(logits: Array, labels: Array) -> Array:
    """The logit of each sample's label, (N,) in double precision."""
    return in_double(np.take_along_axis(logits, np.asarray(labels, dtype=np.intp)[:, None], axis=1)[:, 0])


CELLS = 2**21
"""Logits worked on at once where samples are many: 16 MB in double precision, a few times that on the way."""


def row_blocks(array: Array) -> list[slice]:
    """The samples of an array (N, ...) in runs of so few that what is made of them takes little memory."""
    n_samples, *rest = array.shape
    size = max(1, CELLS // max(int(np.prod(rest)), 1))
    return [slice(start, start + size) for start in range(0, max(n_samples, 1), size)]


def scores_of(logits: Array, formula: Callable[[Array], Array]) -> Array:
    """What a formula from logits to scores gives for logits (N, C): (N,), made in blocks of rows."""
    blocks = [np.asarray(formula(widened(logits[rows]))) for rows in row_blocks(logits)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def largest_of(logits: Array) -> Array:
    """The class of the largest logit, (N,), in blocks of rows: NumPy copies read-only arrays to find it."""
    return np.concatenate([logits[rows].argmax(axis=1) for rows in row_blocks(logits)])


def softmax(logits: Array, xp: Any = np) -> Array:
    """Class probabilities, shape of ``logits``."""
    shifted = xp.exp(logits - xp.amax(logits, axis=-1, keepdims=True))
    return shifted / xp.sum(shifted, axis=-1, keepdims=True)


def max_proba(logits: Array, xp: Any = np) -> Array:
    """Largest class probability, in (0, 1]: the confidence of TinySaver (eq. 7) and of MSDNet."""
    if xp is not np:
        return xp.amax(xp.softmax(logits, -1), -1)  # two operations instead of five, which tells for small batches
    return 1.0 / xp.sum(xp.exp(logits - xp.amax(logits, axis=-1, keepdims=True)), axis=-1)


def negative_entropy(logits: Array, xp: Any = np) -> Array:
    """Minus the entropy of the class probabilities in nats, in [-log C, 0]: BranchyNet's rule, sign turned."""
    shifted = logits - xp.amax(logits, axis=-1, keepdims=True)
    weights = xp.exp(shifted)
    total = xp.sum(weights, axis=-1)
    return xp.sum(weights * shifted, axis=-1) / total - xp.log(total)


def margin(logits: Array, xp: Any = np) -> Array:
    """Largest class probability minus the second largest, in [0, 1]."""
    top = xp.amax(logits, axis=-1, keepdims=True)
    at_top = logits == top
    others = xp.amax(xp.where(at_top, -xp.inf, logits), axis=-1, keepdims=True)
    second = xp.where(xp.sum(at_top, axis=-1, keepdims=True) > 1, top, others)
    total = xp.sum(xp.exp(logits - top), axis=-1)
    return (1.0 - xp.exp(second - top))[..., 0] / total


SCORES: dict[str, Callable[..., Array]] = {
    "max_proba": max_proba,
    "entropy": negative_entropy,
    "margin": margin,
}


def resolve_score(
    score: str | Callable[[Array], Array], argument: str, xp: Any = np, also: tuple[str, ...] = ()
) -> Callable[[Array], Array]:
    """The function from logits to scores behind a name or a callable.

    The error names ``argument``, and the names in ``also`` that the caller knows besides.
    """
    if callable(score):
        return score
    if isinstance(score, str) and score in SCORES:
        formula = SCORES[score]
        return lambda logits: formula(logits, xp)
    raise ValueError(
        f"{argument} must be one of {[*also, *sorted(SCORES)]} or a callable from logits (N, C) to scores (N,); "
        f"got {score!r}."
    )
