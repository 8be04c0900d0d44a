"""What recipes are made of: heads that learn classes, then confidence, from cached features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.staging.nested import mapped
from adaptexit.training.feature_cache import FeatureCache
from adaptexit.training.loop import minimise, n_epochs

if TYPE_CHECKING:
    from adaptexit.heads.base import Head


CHUNK = 2048
"""Rows at a time where heads are only asked."""


@dataclass
class HeadBatch:
    """A minibatch as one head meets it: what it says, and what it should say.

    Attributes
    ----------
    exit : int
    output : Answer
    target : class indices (B,)
    teacher : the full model's logits (B, C)
    """

    exit: int
    output: Answer
    target: Tensor
    teacher: Tensor


Loss = Callable[[HeadBatch], Tensor]
JointLoss = Callable[[list[HeadBatch]], Tensor]
"""From the answers of E heads to their losses (E,)."""


@dataclass
class Lesson:
    """Heads, the samples of a cache that they learn from, and the classes that they are to answer.

    Attributes
    ----------
    heads : sequence of K - 1 Heads
    cache : FeatureCache
    rows : integer array (n,)
    target : tensor of class indices (n,)
    loop : dict
        What :func:`minimise` is to be told in every phase: rates, batch size, random state, verbosity.
    """

    heads: Sequence[Head]
    cache: FeatureCache
    rows: NDArray[Any]
    target: Tensor
    loop: dict[str, Any]

    @property
    def n_samples(self) -> int:
        return len(self.rows)

    @property
    def everyone(self) -> list[int]:
        """All exits with a head."""
        return list(range(len(self.heads)))

    def subset(self, samples: NDArray[Any]) -> Lesson:
        """The same on some of the samples (indices)."""
        return dataclasses.replace(self, rows=self.rows[samples], target=self.target[torch.from_numpy(samples)])

    def epochs(self, epochs: int | str, usual: int, batch_size: int | None = None) -> int:
        """The number asked for; for "auto" the usual one, or as many as make 500 minibatches."""
        return n_epochs(epochs, self.n_samples, batch_size or self.loop["batch_size"], usual)

    def learn_classes(self, loss: Loss, exits: Sequence[int], **options: Any) -> list[list[float]]:
        """Train all but the confidence outputs of some heads; mean losses by exit and epoch."""
        learning = [p for k in exits for p in self.class_parameters(k)]
        return self.learn(loss, exits, learning, description="training heads", **options)

    def learn_confidence(self, exits: Sequence[int], clamp: float, **options: Any) -> list[list[float]]:
        """Train the confidence outputs of those of the heads that have one on whether their answer is right."""
        having = [k for k in exits if self.confidence_parameters(k)]
        learning = [p for k in having for p in self.confidence_parameters(k)]
        loss = partial(confidence_loss, clamp=clamp)
        return self.learn(loss, having, learning, training=False, description="training confidence", **options)

    def learn(
        self, loss: Loss, exits: Sequence[int], parameters: Sequence[nn.Parameter], **options: Any
    ) -> list[list[float]]:
        """Minimise a loss of each of some heads' answers; mean losses by exit and epoch, empty for the other exits."""
        return self.learn_jointly(
            lambda answers: torch.stack([loss(answer) for answer in answers]), exits, parameters, **options
        )

    def learn_jointly(
        self, loss: JointLoss, exits: Sequence[int], parameters: Sequence[nn.Parameter], **options: Any
    ) -> list[list[float]]:
        """The same where a head's loss depends on what the other heads answer."""
        history: list[list[float]] = [[] for _ in self.heads]
        if parameters:
            terms = minimise(
                lambda batch: loss(self.answers(batch, exits)),
                [self.heads[k] for k in exits],
                self.n_samples,
                parameters=parameters,
                **(self.loop | options),
            )
            for k, losses in zip(exits, zip(*terms, strict=True), strict=True):
                history[k] = list(losses)
        return history

    def class_parameters(self, k: int) -> list[nn.Parameter]:
        """What head k has besides its confidence output."""
        sure = {id(parameter) for parameter in self.heads[k].confidence_parameters()}
        return [p for p in self.heads[k].parameters() if p.requires_grad and id(p) not in sure]

    def confidence_parameters(self, k: int) -> list[nn.Parameter]:
        """Those that only the confidence output of head k has."""
        return [p for p in self.heads[k].confidence_parameters() if p.requires_grad]

    def answers(self, batch: Tensor, exits: Sequence[int]) -> list[HeadBatch]:
        """What some heads say to rows (B,) of the lesson, each in its own type and on its device.

        A chained head reads what the one before it left, without a gradient; those before it are run for that.
        """
        rows, target = self.rows[batch.numpy()], self.target[batch]
        teacher = torch.from_numpy(self.cache.logits[rows])
        minibatches: list[HeadBatch] = []
        state = None
        for k in self._run_for(exits):
            head = self.heads[k]
            like = next(head.parameters(), torch.empty(0))
            feature = self.cache.rows(k, rows).to(like.device, like.dtype)
            output = head.answer(feature, mapped(state, _detached) if head.chained else None)
            state = state if output.state is None else output.state
            if output.logits.shape != teacher.shape:
                raise ValueError(
                    f"head {k} must answer with logits of shape (B, C) = {tuple(teacher.shape)}, C being the classes "
                    f"of the full model; got shape {tuple(output.logits.shape)}."
                )
            if k in exits:
                minibatches.append(HeadBatch(k, output, target.to(like.device), teacher.to(like.device, like.dtype)))
        return minibatches

    def _run_for(self, exits: Sequence[int]) -> list[int]:
        """Heads that are run so that those of ``exits`` can answer."""
        free = np.zeros(len(self.heads) + 1)  # which exits are run does not depend on what they cost
        costs = Costs(free, free, chained=any(head.chained for head in self.heads))
        return np.flatnonzero(costs.runs(np.isin(np.arange(len(free)), exits))[:-1]).tolist()

    def observed(self, k: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """What head k answers to every sample, and how sure it is, both (n,)."""
        predictions, confidences = [], []
        with torch.inference_mode():
            for batch in torch.arange(self.n_samples).split(CHUNK):
                (answer,) = self.answers(batch, [k])
                predictions.append(answer.output.logits.argmax(1))
                confidences.append(confidence_of(answer.output))
        return torch.cat(predictions).cpu().numpy(), torch.cat(confidences).double().cpu().numpy()


def class_loss(answer: HeadBatch) -> Tensor:
    """Cross-entropy with the class that is to be answered."""
    return F.cross_entropy(answer.output.logits, answer.target)


def distillation_loss(answer: HeadBatch, temperature: float) -> Tensor:
    """T^2 KL between the softened probabilities of the full model and of the head (Hinton et al. 2015)."""
    head = F.log_softmax(answer.output.logits / temperature, dim=1)
    teacher = F.log_softmax(answer.teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(head, teacher, reduction="batchmean", log_target=True)


def confidence_loss(answer: HeadBatch, clamp: float) -> Tensor:
    """Binary cross-entropy of the predicted class's entry against whether that class is right.

    Confidence counts as no nearer to 0 and 1 than ``clamp``.
    """
    entry, answer_class = _entry(answer.output)
    entry = clamped(entry, clamp)
    return F.binary_cross_entropy_with_logits(entry, (answer_class == answer.target).to(entry.dtype))


def clamped(entry: Tensor, clamp: float) -> Tensor:
    """Confidence logits whose sigmoid is no nearer to 0 and 1 than ``clamp``."""
    most = math.log((1 - clamp) / clamp) if clamp > 0 else math.inf
    return entry.clamp(-most, most)


def confidence_of(output: Answer) -> Tensor:
    """How sure a head is of its answer, (B,): by its confidence output, or its largest probability without one."""
    if output.confidence_logits is None:
        return output.logits.softmax(1).amax(1)
    return _entry(output)[0].sigmoid()


def _entry(output: Answer) -> tuple[Tensor, Tensor]:
    """The confidence logit of the predicted class, and that class, both (B,)."""
    if output.confidence_logits is None:
        raise ValueError("a head with confidence_parameters must give confidence_logits in its answer; got None.")
    answer_class = output.logits.argmax(1, keepdim=True)
    return output.confidence_logits.gather(1, answer_class).squeeze(1), answer_class.squeeze(1)


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def checked_rows(rows: ArrayLike, targets: ArrayLike, cache: FeatureCache) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Samples of the cache and a class for each of them, or a ValueError."""
    samples, classes = np.asarray(rows), np.asarray(targets)
    if samples.ndim != 1 or samples.dtype.kind not in "iu" or not len(samples):
        raise ValueError(
            f"rows must be an integer array (n,) of at least one sample; got {samples.dtype} of shape {samples.shape}."
        )
    if samples.min() < 0 or samples.max() >= cache.n_samples:
        raise ValueError(
            f"rows must lie in 0 ... {cache.n_samples - 1}, the samples of the cache; got values from {samples.min()} "
            f"to {samples.max()}."
        )
    if classes.shape != samples.shape or classes.dtype.kind not in "iu":
        raise ValueError(
            f"targets must be an integer array of shape {samples.shape}, one class index a row; got {classes.dtype} of "
            f"shape {classes.shape}."
        )
    n_classes = cache.logits.shape[1]
    if classes.min() < 0 or classes.max() >= n_classes:
        raise ValueError(
            f"targets must lie in 0 ... {n_classes - 1}; got values from {classes.min()} to {classes.max()}. "
            "Map other label values to indices first."
        )
    return samples, classes.astype(np.int64)
