"""What an exit says: one record, from the head to the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(slots=True)
class Answer:
    """What an exit says of B samples, samples first everywhere.

    It is filled in on its way. A head gives ``logits`` and, where it has them, ``confidence_logits`` and ``state``
    (tensors). The network's reader makes ``predictions`` and ``scores`` of them (arrays from there on). A policy
    decides on those, and puts the scores that it compared in their place. The executor adds ``exits``.

    Attributes
    ----------
    logits : (B, C) or None
    confidence_logits : (B, C) or None
        The sigmoid of the predicted class's entry is the confidence, for heads that learn one.
    state : nested tensors or None
        What later heads read, for heads that build on each other.
    predictions : (B,)
        Class indices, or whatever the reader takes for an answer.
    scores : (B,)
        How sure the exit is, larger = surer.
    features : (B, d) or None
        A vector of what the exit has seen, for policies that read one.
    exits : (B,) or None
        Where each sample left.
    """

    logits: Any = None
    confidence_logits: Any = None
    state: Any = None
    predictions: Any = None
    scores: Any = None
    features: Any = None
    exits: Any = None

    def take(self, samples: Any) -> Answer:
        """What is said of some samples (indices, a mask or a slice), once it has been read."""
        return Answer(
            logits=None if self.logits is None else self.logits[samples],
            predictions=self.predictions[samples],
            scores=self.scores[samples],
            features=None if self.features is None else self.features[samples],
            exits=None if self.exits is None else self.exits[samples],
        )

    @classmethod
    def join(cls, parts: Sequence[Answer]) -> Answer:
        """What is said of the samples of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        return cls(**{name: joined(name) for name in ("logits", "predictions", "scores", "features", "exits")})
