"""What the estimators take: arrays, tables, data sets and loaders, validated and in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from adaptexit.data.batches import Batches, as_batches
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import check_source, is_stream, split_pair
from adaptexit.utils.validation import checked_weights


class TakesData(ABC):
    """Of the estimators: X and y as users give them, once a fit has said what inputs look like."""

    batch_size: int
    _inputs: InputSpec

    @abstractmethod
    def _tabular(self, X: Any) -> bool:
        """Whether X is a table, validated as scikit-learn does."""

    def _labelled_batches(self, X: Any, y: Any, *, needed: bool, ordered: bool = False, reset: bool = False) -> Batches:
        """Batches of (X, y); labels are needed, or taken where there are any."""
        X, y = split_pair(X, y)
        check_source(X)
        if needed or y is not None:
            X, y = self._validated(X, y, reset=reset)
        else:
            X = self._validated_inputs(X)
        like = None if reset or not hasattr(self, "_inputs") else self._inputs
        return as_batches(X, y, batch_size=self.batch_size, labels=needed or None, ordered=ordered, like=like)

    def _checked_weights(self, X: Any, sample_weight: Any) -> NDArray[np.float64] | None:
        """Weights of the samples of X, (N,), refused before anything runs where it is known that they do not fit."""
        if sample_weight is None:
            return None
        X, _ = split_pair(X, None)
        shape = None if is_stream(X) else getattr(X, "shape", None)
        return checked_weights(sample_weight, shape[0] if shape else None)

    def _input_batches(self, X: Any) -> Batches:
        """Batches of inputs alone."""
        return as_batches(self._validated_inputs(X), batch_size=self.batch_size, like=self._inputs)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Any, Any]:
        if is_stream(X):
            return X, y
        if y is None:
            raise ValueError(
                "requires y to be passed, but the target y is None: give y, a pair (X, y), or a Dataset or DataLoader "
                "of (x, y)."
            )
        if self._tabular(X):
            X, y = validate_data(self, X, y, reset=reset)
            check_classification_targets(y)
        return X, y

    def _validated_inputs(self, X: Any) -> Any:
        if isinstance(X, tuple) and len(X) == 2 and np.ndim(X[1]) == 1 and np.ndim(X[0]) > 1:
            raise ValueError("X must be inputs alone here; got a pair, which looks like (X, y). Pass X only.")
        check_source(X)
        return validate_data(self, X, reset=False) if self._tabular(X) else X
