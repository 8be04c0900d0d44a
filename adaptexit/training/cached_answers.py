"""A branched network on features that were recorded once: what is kept for its heads, and what they say to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
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
    from adaptexit.heads.base import Head
    from adaptexit.networks.branched import BranchedNetwork


def columns_of(networks: Sequence[BranchedNetwork]) -> tuple[list[list[int]], list[tuple[int, Head]]]:
    """What a cache holds for networks on one model that differ in their heads.

    Returns
    -------
    columns : list of lists of K - 1 int
        For each network, where its heads find what they read; heads that keep the same of a feature share a column.
    sources : list of (int, Head)
        For each column the cut, and a head whose ``reduce`` fills it.
    """
    places: dict[tuple[int, str], int] = {}
    sources: list[tuple[int, Head]] = []
    columns: list[list[int]] = []
    for network in networks:
        keys = [(k, head.reduction_key) for k, head in enumerate(network.early)]
        for key, head in zip(keys, network.early, strict=True):
            if key not in places:
                places[key] = len(sources)
                sources.append((key[0], head))
        columns.append([places[key] for key in keys])
    return columns, sources


def what_to_keep(networks: Sequence[BranchedNetwork], with_vectors: bool) -> tuple[Run, list[Reducer], list[str]]:
    """How a cache is filled for networks on one model: the run, what is kept, column by column, and that in words.

    ``with_vectors`` keeps means of all features as well, behind what the heads read.
    """
    network = networks[0]
    _, sources = columns_of(networks)
    cuts = [k for k, _ in sources]
    reducers: list[Reducer] = [head.reduce for _, head in sources]
    n_early = len(network.early)
    words = [
        key if place < n_early else f"cut {k}: {key}"
        for place, (k, key) in enumerate((k, head.reduction_key) for k, head in sources)
    ]
    if with_vectors:
        cuts += range(len(network.early))
        reducers += [partial(pooled, spec=head.spec) for head in network.early]
        words.append("and their means")
    columns_at = [[place for place, cut in enumerate(cuts) if cut == k] for k in range(len(network.early))]

    def run(x: Tensor, look: Callable[[int, Tensor], None]) -> Tensor:
        def every_column(k: int, feature: Any) -> None:
            for place in columns_at[k]:
                look(place, feature)

        return network.look(x, every_column)

    return run, reducers, words


def record_features(
    network: BranchedNetwork,
    batches: Iterable[Tensor],
    with_vectors: bool,
    *,
    half: bool,
    memory_limit: int,
    folder: str | os.PathLike[str] | None,
    rivals: Sequence[BranchedNetwork] = (),
) -> FeatureCache:
    """One pass of the model over raw inputs: what :func:`what_to_keep` says, as :func:`collect` keeps it.

    ``rivals`` are networks on the same model with other heads, which are to learn from the same pass.
    """
    run, reducers, words = what_to_keep([network, *rivals], with_vectors)
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
