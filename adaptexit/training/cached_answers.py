"""A branched network on features that were recorded once: what is kept for its heads, and what they say to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptexit.core.answer import Answer
from adaptexit.heads.layout import pooled
from adaptexit.staging.contexts import autocast_in_use
from adaptexit.training.feature_cache import FeatureCache, Reducer, Run, collect
from adaptexit.training.feature_store import cache_key

if TYPE_CHECKING:
    from adaptexit.networks.branched import BranchedNetwork


def what_to_keep(network: BranchedNetwork, with_vectors: bool) -> tuple[Run, list[Reducer], list[str]]:
    """How a cache is filled: the run, what is kept of the feature at every cut, and that in words.

    ``with_vectors`` keeps means of all features as well, behind what the heads read.
    """
    reducers: list[Reducer] = [head.reduce for head in network.early]
    words = [head.reduction_key for head in network.early]
    if not with_vectors:
        return network.look, reducers, words
    poolings = [partial(pooled, spec=head.spec) for head in network.early]

    def run(x: Tensor, look: Callable[[int, Tensor], None]) -> Tensor:
        def twice(k: int, feature: Any) -> None:
            look(k, feature)
            look(len(reducers) + k, feature)

        return network.look(x, twice)

    return run, [*reducers, *poolings], [*words, "and their means"]


def record_features(
    network: BranchedNetwork,
    batches: Iterable[Tensor],
    with_vectors: bool,
    *,
    half: bool,
    memory_limit: int,
    folder: str | os.PathLike[str] | None,
) -> FeatureCache:
    """One pass of the model over raw inputs: what :func:`what_to_keep` says, as :func:`collect` keeps it."""
    run, reducers, words = what_to_keep(network, with_vectors)
    key = None
    if folder is not None:
        key = cache_key(
            network.split.module, network.split.cuts, words,
            preprocess=network.model.preprocess, autocast=autocast_in_use(network.model.device),
        )  # fmt: skip
    return collect(batches, run, reducers, half=half, memory_limit=memory_limit, folder=folder, key=key)


def answers_on(
    network: BranchedNetwork,
    cache: FeatureCache,
    rows: NDArray[Any],
    vectors: FeatureCache | None = None,
    *,
    logits: bool,
    batch_size: int,
) -> list[Answer]:
    """What every exit says of samples (rows) of a cache: head after head, nothing of the model is run.

    ``vectors`` are the pooled features of the same samples, where answers are to have them.
    """
    answers: list[list[Answer]] = [[] for _ in network.heads]
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch, state = rows[start : start + batch_size], None
            for k, head in enumerate(network.early):
                like = next(head.parameters(), torch.empty(0))
                feature = cache.rows(k, batch).to(like.device)
                answer = head.answer(feature, state) if head.chained else head.answer(feature)
                state = state if answer.state is None else answer.state
                answer.features = None if vectors is None else vectors.rows(k, batch)
                answers[k].append(network.reader(k, answer, logits=logits))
            full = Answer(torch.from_numpy(cache.logits[batch]))
            answers[-1].append(network.reader(len(network.early), full, logits=logits))
    return [Answer.join(parts) for parts in answers]
