"""A fitted estimator at one operating point, prepared once: what a server keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adaptexit.core.answer import Answer
from adaptexit.core.policy import Policy
from adaptexit.core.scores import softmax
from adaptexit.core.trace import ExitTrace
from adaptexit.data.batches import Batches
from adaptexit.networks.base import Network
from adaptexit.staging.contexts import evaluating_parts, parts_of
from adaptexit.staging.executor import execute


class Predictor:
    """A policy bound to a network; ``model.at(budget=0.4)`` makes one, and looks up and checks everything once.

    It stays as it is when the estimator is calibrated anew.

    Attributes
    ----------
    network : Network
    policy : Policy
    classes : array (C,)
    """

    def __init__(
        self,
        network: Network,
        policy: Policy,
        classes: NDArray[Any],
        batches: Callable[[Any], Batches],
        *,
        memory_limit: int,
        verbose: int = 0,
    ) -> None:
        self.network, self.policy, self.classes = network, policy, classes
        self._batches, self._memory_limit, self._verbose = batches, memory_limit, verbose
        self._parts = parts_of(network.modules)

    def predict(self, X: Any) -> NDArray[Any]:
        """Labels (N,), every sample leaving as early as the policy allows."""
        return self.classes[self.answer(X).predictions]

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Class probabilities (N, C) of the exit that answered each sample."""
        return np.asarray(softmax(self.answer(X, keep_logits=True).logits))

    def trace(self, X: Any) -> ExitTrace:
        """Label, exit, cost and score of every sample."""
        answer = self.answer(X)
        return ExitTrace(
            labels=self.classes[answer.predictions],
            exits=answer.exits,
            costs=self.policy.path_costs[answer.exits],
            scores=answer.scores,
            full_cost=self.policy.full_cost,
        )

    def answer(self, X: Any, keep_logits: bool = False) -> Answer:
        """What was said of every sample where it left, in the order of X; ``predictions`` are class indices."""
        batches = X if isinstance(X, Batches) else self._batches(X)
        source: Iterable[Any] = batches
        if self._verbose >= 1:
            source = tqdm(batches, total=batches.n_batches, desc="predicting")
        with evaluating_parts(self._parts, keep_random_state=batches.from_loader):
            return execute(
                self.network,
                source,
                self.policy,
                batch_size=batches.batch_size,
                memory_limit=self._memory_limit,
                keep_logits=keep_logits,
            )

    def __repr__(self) -> str:
        runs = [name for name, run in zip(self.network.exit_names, self.policy.runs, strict=True) if run]
        point = getattr(self.policy, "point", None)
        figures = f", cost {point.cost:.3f}, accuracy {point.accuracy:.4f} on the calibration data" if point else ""
        return f"Predictor({' → '.join(runs)}{figures})"
