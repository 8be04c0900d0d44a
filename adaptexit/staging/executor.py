"""Run a model stage by stage, let samples leave, and go on with the survivors in full batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptexit.core.outputs import ExitBatch
from adaptexit.staging.live import Carried
from adaptexit.staging.rows import Rows, join, n_bytes, n_rows, take

MEMORY_LIMIT = 1 << 30
"""Bytes of waiting survivors above which a stage runs on a batch that is not full."""


class Accept(Protocol):
    """Who of a batch leaves at exit k, shape (B,); beside it, of a rule that looks back, what goes on as
    ``batch.earlier`` with those who stay, (B, m) or None.
    """

    def __call__(
        self, k: int, batch: ExitBatch, /
    ) -> NDArray[np.bool_] | tuple[NDArray[np.bool_], NDArray[Any] | None]: ...


@dataclass(slots=True)
class ExitAnswer:
    """What an exit says where it says more than logits.

    Attributes
    ----------
    logits : tensor (B, C)
    scores : tensor (B,) or None
        How sure it is; the model's confidence of the logits unless given.
    carried : rows or None
        What goes on instead of what the exit was given: less, or with what later exits read.
    features : tensor (B, d) or None
        What a rule may read besides.
    """

    logits: Tensor
    scores: Tensor | None = None
    carried: Rows = None
    features: Tensor | None = None


@dataclass(frozen=True)
class StagedModel:
    """K stages with an exit after each; the last exit is the full model.

    Attributes
    ----------
    stages : sequence of K callables or None
        From what was carried so far to what is carried on; None passes it on as it is.
    exits : sequence of K callables
        From what is carried to logits (B, C), or to an :class:`ExitAnswer`; run only where the exit is switched on. The
        largest logit is the answer.
    confidence : callable
        From an exit's logits of B samples to their scores, shape (B,).
    chained : bool, default=False
        Exits read what earlier exits left in what is carried: all up to the deepest early one switched on are run.
    """

    stages: Sequence[Callable[[Rows], Rows] | None]
    exits: Sequence[Callable[[Rows], Tensor | ExitAnswer]]
    confidence: Callable[[Tensor], Tensor]
    chained: bool = False

    @property
    def n_exits(self) -> int:
        """Number of exits K."""
        return len(self.exits)

    def advance(self, carried: Rows, after: int, to: int, deepest: int = -1) -> Rows:
        """Run the stages behind exit ``after`` up to that of exit ``to``.

        Of a chained model the exits on the way are run for what they leave, as far as ``deepest``.
        """
        for k in range(after + 1, to + 1):
            stage = self.stages[k]
            if stage is not None:
                carried = stage(carried)
            if self.chained and k < to and k < deepest:
                carried = self.answer(k, carried)[1]
        return carried

    def answer(self, k: int, carried: Rows) -> tuple[ExitAnswer, Rows]:
        """What exit k answers, and what goes on from it."""
        output = self.exits[k](carried)
        answer = output if isinstance(output, ExitAnswer) else ExitAnswer(output)
        if answer.carried is not None:
            return answer, answer.carried
        return answer, carried.without_feature() if isinstance(carried, Carried) else carried

    def observe(self, k: int, carried: Rows, keep_logits: bool) -> tuple[ExitBatch, Rows]:
        """Run exit k and read its answers and scores; beside them what goes on."""
        answer, onward = self.answer(k, carried)
        logits = _widened(answer.logits)
        if logits.ndim != 2:
            raise ValueError(
                f"the model of exit {k} must answer with logits of shape (B, C); got shape {tuple(logits.shape)}. "
                "If the model is fine, look whether X has an axis for the samples."
            )
        scores = _widened(torch.as_tensor(self.confidence(logits) if answer.scores is None else answer.scores))
        if scores.shape != logits.shape[:1]:
            whose = "confidence" if answer.scores is None else f"the scores of exit {k}"
            raise ValueError(
                f"{whose} must turn an output of B samples into B numbers, one a sample: expected shape "
                f"{tuple(logits.shape[:1])}, got {tuple(scores.shape)}."
            )
        batch = ExitBatch(
            predictions=_array(logits.argmax(dim=1)),
            scores=_array(scores),
            logits=_array(logits) if keep_logits else None,
            features=None if answer.features is None else _array(_widened(answer.features)),
        )
        if not _all_finite(batch.scores):
            raise ValueError(
                f"exit {k} gave a score that is NaN or infinite. Look for NaN or inf in the weights of that model, for "
                "an overflow in half precision, or for a confidence that is undefined on some outputs."
            )
        return batch, onward


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor.cpu().numpy()


def _all_finite(scores: NDArray[Any]) -> bool:
    """Whether all are; Python is quicker than NumPy for a few."""
    return all(map(math.isfinite, scores.tolist())) if len(scores) <= 16 else bool(np.isfinite(scores).all())


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass
class Answers:
    """One answer a sample, in input order.

    Attributes
    ----------
    predictions : class indices (N,)
    exits : where each sample left (N,)
    scores : its score there (N,)
    logits : (N, C) or None
    """

    predictions: NDArray[Any]
    exits: NDArray[np.intp]
    scores: NDArray[Any]
    logits: NDArray[Any] | None


@dataclass
class _Collected:
    keep_logits: bool
    rows: list[tuple[NDArray[Any], int, ExitBatch]] = field(default_factory=list)

    def add(self, samples: NDArray[Any], k: int, batch: ExitBatch, leave: NDArray[np.bool_] | slice) -> None:
        part = ExitBatch(
            predictions=batch.predictions[leave],
            scores=batch.scores[leave],
            logits=batch.logits[leave] if self.keep_logits and batch.logits is not None else None,
        )
        self.rows.append((samples[leave], k, part))

    def in_order(self) -> Answers:
        if len(self.rows) == 1:  # one batch that left together, in its order
            samples, k, batch = self.rows[0]
            return Answers(batch.predictions, np.full(len(samples), k), batch.scores, batch.logits)
        samples = np.concatenate([samples for samples, _, _ in self.rows])
        place = np.argsort(samples, kind="stable")
        return Answers(
            predictions=np.concatenate([batch.predictions for _, _, batch in self.rows])[place],
            exits=np.concatenate([np.full(len(samples), k) for samples, k, _ in self.rows])[place],
            scores=np.concatenate([batch.scores for _, _, batch in self.rows])[place],
            logits=np.concatenate([batch.logits for _, _, batch in self.rows])[place] if self.keep_logits else None,
        )


class _Remembered(NamedTuple):
    """What is carried, and what the rule left beside it."""

    carried: Rows
    earlier: NDArray[Any]


@dataclass
class _Waiting:
    """Survivors that wait for an exit's stages to run."""

    parts: list[tuple[NDArray[Any], Rows]] = field(default_factory=list)
    count: int = 0
    bytes: int = 0

    def put(self, samples: NDArray[Any], carried: Rows) -> None:
        self.parts.append((samples, carried))
        self.count += len(samples)
        self.bytes += n_bytes(carried)

    def get(self, at_most: int) -> tuple[NDArray[Any], Rows]:
        """The samples that came first, up to ``at_most``."""
        chosen: list[tuple[NDArray[Any], Rows]] = []
        room = at_most
        while self.parts and room:
            samples, carried = self.parts.pop(0)
            self.bytes -= n_bytes(carried)
            if len(samples) > room:
                rest = take(carried, slice(room, None))
                self.parts.insert(0, (samples[room:], rest))
                self.bytes += n_bytes(rest)
                samples, carried = samples[:room], take(carried, slice(0, room))
            chosen.append((samples, carried))
            room -= len(samples)
        self.count -= at_most - room
        if len(chosen) == 1:
            return chosen[0]
        return np.concatenate([samples for samples, _ in chosen]), join([carried for _, carried in chosen])


def execute(
    model: StagedModel,
    batches: Iterable[Rows],
    accept: Accept,
    on: NDArray[np.bool_],
    *,
    batch_size: int,
    memory_limit: int = MEMORY_LIMIT,
    merge: bool = True,
    needs_logits: bool = False,
    keep_logits: bool = False,
) -> Answers:
    """Answer every sample of ``batches`` at the first exit that accepts it.

    The survivors of successive batches wait until they fill a batch of ``batch_size`` and then go on together, deepest
    exit first, so that deep stages do not run on a handful of samples; a single batch goes straight through. Exits that
    are not ``on`` are not run. Answers come in input order and do not depend on how samples are batched.

    Parameters
    ----------
    model : StagedModel
    batches : iterable of rows
    accept : callable (k, ExitBatch) -> booleans (B,)
        Asked at every early exit that is on; at the last exit everybody leaves.
    on : boolean array (K,)
    batch_size : int
        What counts as a full batch of survivors.
    memory_limit : int
        Bytes that waiting survivors may hold; beyond it the fullest queue runs although its batch is not full.
    merge : bool
        False sends the survivors of each batch on at once.
    needs_logits, keep_logits : bool
        Whether ``accept`` reads logits, and whether the answers hold them.
    """
    if not isinstance(memory_limit, (int, np.integer)) or memory_limit < 0:
        raise ValueError(f"memory_limit must be a number of bytes; got {memory_limit!r}.")
    running = [*(k for k, is_on in enumerate(np.asarray(on)[:-1].tolist()) if is_on), model.n_exits - 1]
    waiting = {k: _Waiting() for k in running[1:]}
    following = dict(pairwise(running))
    preceding = {after: before for before, after in following.items()}
    deepest = running[-2] if len(running) > 1 else -1
    collected = _Collected(keep_logits)

    def run(k: int, samples: NDArray[Any], carried: Rows) -> None:
        earlier = None
        if isinstance(carried, _Remembered):
            carried, earlier = carried
        carried = model.advance(carried, preceding.get(k, -1), k, deepest)
        batch, carried = model.observe(k, carried, needs_logits or keep_logits)
        leave = None
        if k in following:
            decided = accept(k, batch if earlier is None else dataclasses.replace(batch, earlier=earlier))
            leave, earlier = decided if isinstance(decided, tuple) else (decided, None)
            if earlier is not None:
                carried = _Remembered(carried, earlier)
        leaving = len(samples) if leave is None else int(np.count_nonzero(leave))
        if leave is None or leaving == len(samples):
            collected.add(samples, k, batch, slice(None))
        elif not leaving:
            waiting[following[k]].put(samples, carried)
        else:
            collected.add(samples, k, batch, leave)
            stay = np.flatnonzero(~leave)
            waiting[following[k]].put(samples[stay], take(carried, stay))

    def drain(full: int) -> None:
        """Run, deepest first, every exit for which at least ``full`` samples wait."""
        while ready := [k for k in reversed(running[1:]) if waiting[k].count >= full]:
            run(ready[0], *waiting[ready[0]].get(batch_size))

    seen = 0
    with torch.inference_mode():
        for x in batches:
            count = n_rows(x)
            run(running[0], np.arange(seen, seen + count), x)
            seen += count
            drain(batch_size if merge else 1)
            while sum(queue.bytes for queue in waiting.values()) > memory_limit:
                fullest = max(waiting, key=lambda k: waiting[k].bytes)
                run(fullest, *waiting[fullest].get(batch_size))
        for k in running[1:]:  # shallow first: what survives here can still fill a batch further on
            while waiting[k].count:
                run(k, *waiting[k].get(batch_size))
    if not seen:
        raise ValueError("X holds no samples; give at least one.")
    return collected.in_order()


class Recorded(NamedTuple):
    """Every exit's answers on every sample.

    ``predictions`` and ``scores`` (K, N); ``logits`` (K, N, C) where kept; ``features``, K arrays (N, d_k), where some
    exit gives any (d_k is 0 where it gives none).
    """

    predictions: NDArray[Any]
    scores: NDArray[Any]
    logits: NDArray[Any] | None
    features: list[NDArray[Any]] | None


def record(model: StagedModel, batches: Iterable[Rows], *, keep_logits: bool = False) -> Recorded:
    """Run all exits on all samples."""
    kept: list[list[ExitBatch]] = [[] for _ in range(model.n_exits)]
    with torch.inference_mode():
        for carried in batches:
            for k in range(model.n_exits):
                carried = model.advance(carried, k - 1, k)
                batch, carried = model.observe(k, carried, keep_logits)
                kept[k].append(batch)
    if not kept[0]:
        raise ValueError("X holds no samples; give at least one.")
    widths = {batch.logits.shape[1] for row in kept for batch in row if batch.logits is not None}
    if len(widths) > 1:
        raise ValueError(f"all exits must answer for the same number of classes; got {sorted(widths)}.")
    return Recorded(
        np.stack([np.concatenate([batch.predictions for batch in row]) for row in kept]),
        np.stack([np.concatenate([batch.scores for batch in row]) for row in kept]),
        np.stack([np.concatenate([batch.logits for batch in row]) for row in kept]) if keep_logits else None,
        _features(kept),
    )


def _features(kept: list[list[ExitBatch]]) -> list[NDArray[Any]] | None:
    if all(row[0].features is None for row in kept):
        return None
    empty = np.empty((sum(len(batch.scores) for batch in kept[0]), 0), dtype=np.float32)
    given = [[batch.features for batch in row if batch.features is not None] for row in kept]
    return [np.concatenate(parts) if parts else empty for parts in given]
