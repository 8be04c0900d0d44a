"""Run a network stage by stage, let samples leave, and go on with the survivors in full batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from adaptexit.core.answer import Answer
from adaptexit.core.policy import Policy
from adaptexit.staging.nested import Rows, join, kind, n_bytes, n_rows, take
from adaptexit.utils.validation import check_whole

MEMORY_LIMIT = 1 << 30
"""Bytes of waiting survivors above which a stage runs on a batch that is not full."""


class Staged(Protocol):
    """What the executor asks of a network (:class:`adaptexit.networks.base.Network` has it)."""

    @property
    def n_exits(self) -> int: ...
    def advance(self, carried: Rows, after: int, to: int) -> Rows:
        """Run the stages behind exit ``after`` (-1: the inputs) up to that of exit ``to``."""
        ...

    def read(self, k: int, carried: Rows, *, logits: bool, features: bool) -> tuple[Answer, Rows]:
        """What exit k says, as arrays, and what goes on from it."""
        ...

    def exit(self, k: int, carried: Rows) -> tuple[Any, Rows]:
        """The same before it is read."""
        ...

    @property
    def reader(self) -> Any: ...


class _Survivors(NamedTuple):
    """Samples on their way: their places in the input, what is carried, and what the policy left beside it."""

    samples: NDArray[np.intp]
    carried: Rows
    memory: NDArray[Any] | None

    def some(self, where: Any) -> _Survivors:
        memory = None if self.memory is None else self.memory[where]
        return _Survivors(self.samples[where], take(self.carried, where), memory)

    @staticmethod
    def together(parts: list[_Survivors]) -> _Survivors:
        if len(parts) == 1:
            return parts[0]
        samples, carried, memories = zip(*parts, strict=True)
        memory = None if memories[0] is None else np.concatenate(memories)
        return _Survivors(np.concatenate(samples), join(carried), memory)


@dataclass
class _Queue:
    """Survivors of one shape that wait for an exit's stages to run."""

    parts: list[_Survivors] = field(default_factory=list)
    count: int = 0
    n_bytes: int = 0

    def put(self, part: _Survivors) -> None:
        self.parts.append(part)
        self.count += len(part.samples)
        self.n_bytes += n_bytes(part.carried)

    def get(self, at_most: int) -> _Survivors:
        """The samples that came first, up to ``at_most``."""
        parts: list[_Survivors] = []
        room = at_most
        while self.parts and room:
            part = self.parts.pop(0)
            if len(part.samples) > room:
                self.parts.insert(0, part.some(slice(room, None)))
                part = part.some(slice(0, room))
            parts.append(part)
            room -= len(part.samples)
        self.count -= at_most - room
        self.n_bytes = sum(n_bytes(part.carried) for part in self.parts)
        return _Survivors.together(parts)


Place = tuple[int, Hashable]
"""An exit, and the shape of what waits for it."""


class _Queues:
    """Survivors that wait for exits' stages to run: before each exit, those of one shape together."""

    def __init__(self, exits: list[int]) -> None:
        self.before: dict[int, dict[Hashable, _Queue]] = {k: {} for k in exits}

    def put(self, k: int, part: _Survivors) -> None:
        self.before[k].setdefault(kind(part.carried), _Queue()).put(part)

    def get(self, place: Place, at_most: int) -> _Survivors:
        k, shape = place
        part = self.before[k][shape].get(at_most)
        if not self.before[k][shape].count:
            del self.before[k][shape]
        return part

    def deepest(self, at_least: int) -> Place | None:
        """The deepest exit for which so many samples of one shape wait."""
        for k in reversed(self.before):
            for shape, queue in self.before[k].items():
                if queue.count >= at_least:
                    return k, shape
        return None

    def fullest(self) -> Place:
        """Where most memory waits."""
        places = [(k, shape) for k, row in self.before.items() for shape in row]
        return max(places, key=lambda place: self.before[place[0]][place[1]].n_bytes)

    @property
    def n_bytes(self) -> int:
        return sum(queue.n_bytes for row in self.before.values() for queue in row.values())


def execute(
    network: Staged,
    batches: Iterable[Rows],
    policy: Policy,
    *,
    batch_size: int,
    memory_limit: int = MEMORY_LIMIT,
    merge: bool = True,
    keep_logits: bool = False,
) -> Answer:
    """Answer every sample of ``batches`` at the first exit where the policy lets it leave.

    The survivors of successive batches wait until they fill a batch of ``batch_size`` and then go on together, deepest
    exit first, so that deep stages do not run on a handful of samples; those of another shape wait apart. A single
    batch goes straight through. Exits that the policy does not run are not run. Answers do not depend on how samples
    are batched.

    Parameters
    ----------
    network : Network
    batches : iterable of rows
    policy : Policy
        Asked at every exit that it runs; at the last one everybody leaves.
    batch_size : int
        What counts as a full batch of survivors.
    memory_limit : int
        Bytes that waiting survivors may hold; beyond it the fullest queue runs although its batch is not full.
    merge : bool
        False sends the survivors of each batch on at once.
    keep_logits : bool
        Whether the answer holds logits.

    Returns
    -------
    Answer
        Predictions, the policy's scores and exits of all samples, in input order.
    """
    check_whole("memory_limit", memory_limit, 0, " (a number of bytes)")
    running = [*np.flatnonzero(policy.runs[:-1]).tolist(), network.n_exits - 1]
    last, before = running[-1], dict(zip(running, [-1, *running], strict=False))
    answers: list[tuple[NDArray[np.intp], Answer]] = []
    logits, features = policy.needs_logits or keep_logits, policy.needs_features

    def run(k: int, part: _Survivors) -> _Survivors | None:
        """Note what exit k says of those who leave there; the others, if any."""
        samples, carried, memory = part
        answer, carried = network.read(k, network.advance(carried, before[k], k), logits=logits, features=features)
        leave, answer.scores, memory = policy.decide(k, answer, memory)
        n_leaving = len(samples) if k == last else int(np.count_nonzero(leave))
        onward = None
        if n_leaving < len(samples):
            onward = _Survivors(samples, carried, memory)
            if not n_leaving:
                return onward
            leave = np.asarray(leave, dtype=bool)
            onward = onward.some(np.flatnonzero(~leave))
            samples, answer = samples[leave], answer.take(leave)
        answer.features, answer.exits = None, np.full(n_leaving, k)
        if not keep_logits:
            answer.logits = None
        answers.append((samples, answer))
        return onward

    with torch.inference_mode():
        if getattr(batches, "n_batches", None) == 1:
            limits = getattr(policy, "limits", None) if hasattr(network.reader, "score_of_one") else None
            n_samples = 0
            for x in batches:
                n_samples += n_rows(x)
                if n_samples == 1 and limits is not None:
                    return _one_sample(network, x, before, limits, keep_logits)
                _straight_through(x, n_samples, running, run)
        else:
            n_samples = _in_queues(batches, running, run, batch_size, memory_limit, merge)
    if not n_samples:
        raise ValueError("X holds no samples; give at least one.")
    if len(answers) == 1:  # one batch that left together, in its order
        return answers[0][1]
    order = np.argsort(np.concatenate([samples for samples, _ in answers]), kind="stable")
    return Answer.join([answer for _, answer in answers]).take(order)


def _one_sample(
    network: Staged, carried: Rows, before: dict[int, int], limits: list[float], keep_logits: bool
) -> Answer:
    """What the run of one batch gives for a single sample: only its score is read where it goes on.

    ``before`` has the exit that is run before each, in their order.
    """
    reader = network.reader
    for k, previous in before.items():
        output, onward = network.exit(k, network.advance(carried, previous, k))
        if k < network.n_exits - 1:
            score = reader.score_of_one(output)
            if isfinite(score) and not score > limits[k]:
                carried = onward
                continue
        answer: Answer = reader(k, output, logits=keep_logits)  # which refuses a score that is not finite
        answer.features, answer.exits = None, np.array([k])
        return answer
    raise AssertionError("everybody leaves at the last exit")


Run = Callable[[int, _Survivors], _Survivors | None]


def _straight_through(x: Rows, n: int, running: list[int], run: Run) -> None:
    """A single batch of n samples, which has nobody to wait for."""
    part = _Survivors(np.arange(n), x, None)
    for k in running:
        onward = run(k, part)
        if onward is None:
            break
        part = onward


def _in_queues(
    batches: Iterable[Rows],
    running: list[int],
    run: Run,
    batch_size: int,
    memory_limit: int,
    merge: bool,
) -> int:
    """Batch after batch, survivors waiting for others before each exit that is run; the number of samples."""
    queues = _Queues(running[1:])
    following = dict(pairwise(running))

    def go(k: int, part: _Survivors) -> None:
        if (onward := run(k, part)) is not None:
            queues.put(following[k], onward)

    n_samples = 0
    for x in batches:
        # Looked at before the next batch, not after the last: what is left then runs in any case.
        while n_samples and queues.n_bytes > memory_limit:
            place = queues.fullest()
            go(place[0], queues.get(place, batch_size))
        count = n_rows(x)
        go(running[0], _Survivors(np.arange(n_samples, n_samples + count), x, None))
        n_samples += count
        while (full := queues.deepest(batch_size if merge else 1)) is not None:
            go(full[0], queues.get(full, batch_size))
    for k in running[1:]:  # shallow first: what survives here can still fill a batch further on
        for shape in list(queues.before[k]):
            while shape in queues.before[k]:
                go(k, queues.get((k, shape), batch_size))
    return n_samples


def record(network: Staged, batches: Iterable[Rows], *, logits: bool = False, features: bool = False) -> list[Answer]:
    """Run all exits on all samples: what each of K exits says of everybody."""
    answers: list[list[Answer]] = [[] for _ in range(network.n_exits)]
    with torch.inference_mode():
        for carried in batches:
            for k, row in enumerate(answers):
                carried = network.advance(carried, k - 1, k)
                answer, carried = network.read(k, carried, logits=logits, features=features)
                row.append(answer)
    if not answers[0]:
        raise ValueError("X holds no samples; give at least one.")
    return [Answer.join(row) for row in answers]
