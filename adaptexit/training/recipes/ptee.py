"""PTEEnet: heads on a frozen backbone that learn its answers, each by its own loss or all by a joint one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adaptexit.heads.wrapping import ScalarConfidenceHead
from adaptexit.training.head_trainer import HeadBatch, Lesson, clamped
from adaptexit.training.recipes.base import History, LearnFrom, MarginRecipe
from adaptexit.utils.validation import checked_number, real_array

if TYPE_CHECKING:
    from adaptexit.heads.base import Head

PTEELoss = Literal["separate", "cumulative"]
LOSSES = get_args(PTEELoss)


class PTEERecipe(MarginRecipe):
    """Heads learn what the full model answers: each alone and then its confidence, or all at once by a joint loss.

    Lahiany and Aperstein, "PTEENet: Post-Trained Early-Exit Neural Networks Augmentation for Inference Cost
    Optimization" (2022), as CalexNet (2026), section 3.4.4 and appendix A.4, sets it up beside its own recipe: basic
    prototype heads, thresholds by class precision margins on all calibration data.

    Parameters
    ----------
    loss : {"separate", "cumulative"}, default="separate"
        "separate" is CalexNet's reading: cross-entropy summed over the exits, then confidence on correctness. On a
        frozen backbone the sum ties nothing together: every head learns as it would alone. "cumulative" is the loss of
        PTEEnet's public code (its v2): with p_k the class probabilities of exit k, s_k how sure it is, c_k its cost,
        and the frozen full model last,

            P_k = s_k p_k + (1 - s_k) P_(k+1),    C_k = s_k c_k + (1 - s_k) C_(k+1),

        it minimises sum_k NLL(P_k) + cost_weight C_k over the early exits. A head then has one confidence for whatever
        it answers (:class:`adaptexit.heads.ScalarConfidenceHead` around the head chosen), and classes and confidence
        learn together.
    epochs : int or "auto", default="auto"
        "auto" is 200, or as many as make 500 minibatches where the data are few.
    lr : float, default=1e-3
        Learning rate at the start; it falls to 0 along a half cosine.
    weight_decay : float, default=0.0
    batch_size : int, default=2048
    confidence_epochs : int or None, default=None
        None takes ``epochs``. The cumulative loss has no second phase: None there.
    learn_from : {"backbone", "labels"}, default="backbone"
        What the heads are to answer: what the full model answers, or the labels.
    clamp : float, default=1e-7
        Confidence counts as no nearer to 0 and 1 than this in its loss.
    cost_weight : float, default=0.9
        What a full model's cost counts beside the likelihood, in nats (the public code's ``lambda_coef``).
    costs : sequence of K - 1 floats, optional
        Relative cumulative cost of each early exit, 1 being the full model's, for the cumulative loss alone. A recipe
        sees cached features and no backbone, so where they are left out exit k of K counts as k / K (ours). The public
        code counts the MACs up to an exit; :func:`adaptexit.list_cuts` does.

    Notes
    -----
    The public code divides the sum by the number of exits, which Adam divides out again, and adds the full model's own
    term, a constant on a frozen backbone. It trains heads of two convolutions, 30 epochs in batches of 128 at a rate of
    5e-4. Epochs, batches, rate and heads here are those of CalexNet's comparison for either loss.
    """

    usual_epochs = 200
    own_head = "prototype"

    def __init__(
        self,
        epochs: int | Literal["auto"] = "auto",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 2048,
        confidence_epochs: int | None = None,
        learn_from: LearnFrom = "backbone",
        clamp: float = 1e-7,
        *,
        loss: PTEELoss = "separate",
        cost_weight: float = 0.9,
        costs: Sequence[float] | None = None,
    ) -> None:
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.confidence_epochs = confidence_epochs
        self.learn_from = learn_from
        self.clamp = clamp
        self.loss = loss
        self.cost_weight = cost_weight
        self.costs = costs

    def head_for(self, head: Any) -> Any:
        inner = super().head_for(head)
        return partial(ScalarConfidenceHead, head=inner) if self.loss == "cumulative" else inner

    def check_heads(self, heads: Sequence[Head]) -> None:
        if self.loss != "cumulative":
            return
        if not all(isinstance(head, ScalarConfidenceHead) for head in heads):
            raise ValueError(
                "heads must be ScalarConfidenceHeads for loss='cumulative', which weighs answers by one confidence a "
                f"sample; got {sorted({type(head).__name__ for head in heads})}. Make them with recipe.head_for(head)."
            )
        if self.costs is not None and len(self.costs) != len(heads):
            raise ValueError(
                f"costs must be one for each of the {len(heads)} early exits; got {len(self.costs)}. Give their "
                "relative cumulative costs, the full model's left out."
            )

    def check(self) -> dict[str, Any]:
        """Refuse settings that cannot be; those that the loop takes."""
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {list(LOSSES)}; got {self.loss!r}.")
        checked_number("cost_weight", self.cost_weight, "a finite number, at least 0", 0.0)
        if self.loss == "separate" and self.costs is not None:
            raise ValueError(f"costs must be None for loss='separate', which has none; got {self.costs!r}.")
        if self.loss == "cumulative" and self.confidence_epochs is not None:
            raise ValueError(
                "confidence_epochs must be None for loss='cumulative', which learns classes and confidence together; "
                f"got {self.confidence_epochs!r}. Give epochs."
            )
        if self.costs is not None:
            costs = real_array("costs", self.costs)
            if costs.ndim != 1 or not np.isfinite(costs).all() or (costs < 0).any():
                raise ValueError(
                    "costs must be finite relative costs, at least 0, one for each early exit (1 is the full model's); "
                    f"got {self.costs!r}."
                )
        return super().check()

    def _taught(self, lesson: Lesson) -> History:
        if self.loss == "separate":
            return super()._taught(lesson)
        n_early = len(lesson.heads)
        even = np.arange(1, n_early + 1) / (n_early + 1)
        costs: NDArray[np.float64] = even if self.costs is None else np.asarray(self.costs, dtype=np.float64)
        learning = [p for k in lesson.everyone for p in (*lesson.class_parameters(k), *lesson.confidence_parameters(k))]
        loss = lesson.learn_jointly(
            partial(_cumulative_losses, costs=costs.tolist(), cost_weight=self.cost_weight, clamp=self.clamp),
            lesson.everyone,
            learning,
            description="training heads",
            epochs=lesson.epochs(self.epochs, self.usual_epochs),
        )
        return {"loss": loss, "confidence_loss": [[] for _ in lesson.heads]}


def _cumulative_losses(answers: list[HeadBatch], costs: list[float], cost_weight: float, clamp: float) -> Tensor:
    """NLL(P_k) + cost_weight C_k of every early exit, (K - 1,), of which only the target's probability is mixed."""
    losses: list[Tensor] = []
    full = answers[-1]
    log_mixture = _log_probability(full.teacher, full.target)  # (B,), of the full model
    expected_cost = torch.ones_like(log_mixture)
    for answer, cost in zip(reversed(answers), reversed(costs), strict=True):
        own = _log_probability(answer.output.logits, answer.target)
        sure = clamped(answer.output.confidence_logits[:, 0], clamp)
        log_leaves, log_stays = F.logsigmoid(sure), F.logsigmoid(-sure)
        log_mixture = torch.logaddexp(log_leaves + own, log_stays + log_mixture.to(own))
        expected_cost = log_leaves.exp() * cost + log_stays.exp() * expected_cost.to(own)
        losses.append(cost_weight * expected_cost.mean() - log_mixture.mean())
    return torch.stack(losses[::-1])


def _log_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Of the class that is to be answered, (B,)."""
    return -F.cross_entropy(logits, target, reduction="none")
