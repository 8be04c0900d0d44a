"""Heads that build on the heads before them: boosted ones add up, ZTW's read the last answer and pool all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.layout import FeatureSpec
from adaptexit.heads.residual import BlockHead
from adaptexit.heads.wrapping import WrappingHead


class BoostedHead(WrappingHead):
    """Any head whose logits are added to a part of what the heads before it add up to.

    P_n = out_n + w P_(n-1): inference of BoostNet (Yu et al., "Boosted Dynamic Neural Networks", AAAI 2023) with its
    prediction reweighting. The confidence output, where the head has one, is its own.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    head : str or callable, default="prototype"
        The head whose logits are added, as for :func:`adaptexit.heads.make_head`; none that is chained itself.
    weight : float, default=0.5
        w, what earlier answers count.
    """

    chained = True
    purpose = "boosted"

    def __init__(
        self,
        spec: FeatureSpec,
        n_classes: int,
        head: str | Callable[[FeatureSpec, int], nn.Module] = "prototype",
        weight: float = 0.5,
    ) -> None:
        super().__init__(spec, n_classes, head)
        self.weight = weight

    def revised(self, output: Answer, state: Tensor | None) -> Answer:
        """The sum so far; the sum before it is the state."""
        total = output.logits if state is None else output.logits + self.weight * state
        return Answer(total, output.confidence_logits, total)


class ZTWHead(BlockHead):
    """A residual block and a linear layer that also reads the last head's logits; all heads so far answer together.

    Zero Time Waste (Wołczyk et al., NeurIPS 2021): cascade connections (section 3.1) and geometric ensembling
    (section 3.2). Its logits are mean_j(exp(w_j) log p_j) + b over the heads up to this one. Parameters as for
    :class:`adaptexit.heads.residual.BlockHead`.

    Notes
    -----
    The state holds the last head's own logits (B, C) and the log-probabilities of all heads so far (B, n, C). The first
    head reads zeros. Weights and bias of the ensemble start at 0, the plain geometric mean.
    """

    chained = True

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4) -> None:
        super().__init__(spec, n_classes, size)
        self.norm = nn.LayerNorm(n_classes)
        self.linear = nn.Linear(spec.channels + n_classes, n_classes)
        self.place(0)

    def place(self, k: int) -> None:
        """Make room for the weights of k earlier heads and its own."""
        self.ensemble_weight = nn.Parameter(torch.zeros(k + 1))
        self.ensemble_bias = nn.Parameter(torch.zeros(self.n_classes))

    @property
    def ensemble_parameters(self) -> list[nn.Parameter]:
        """Weights and bias of the ensemble."""
        return [self.ensemble_weight, self.ensemble_bias]

    def answer(self, reduced: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Answer:
        """The ensemble's logits from what ``reduce`` returned; the state is described above."""
        vectors = self.read(reduced)
        last = vectors.new_zeros(len(vectors), self.n_classes) if state is None else self.norm(state[0])
        own = self.linear(torch.cat([vectors, last], dim=1))
        together = own.log_softmax(1)[:, None]
        if state is not None:
            together = torch.cat([state[1], together], dim=1)
        return Answer(self.ensemble(together), state=(own, together))

    def ensemble(self, together: Tensor) -> Tensor:
        """Logits (B, C) from the log-probabilities (B, n, C) of the heads up to this one."""
        return (together * self.ensemble_weight.exp()[:, None]).mean(dim=1) + self.ensemble_bias
