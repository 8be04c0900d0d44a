"""CalexNet's heads: squared responses of learned prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head, check_size
from adaptexit.heads.layout import FeatureSpec, positions


class _QuadraticHead(Head):
    """Responses of K prototypes, squared and averaged over the positions; both outputs read them.

    The mean of (w.x)^2 over the positions is w'Sw with S the mean of x x'. So S is all that training needs, stored as
    its upper triangle with the off-diagonal entries doubled: w'Sw is then one product with the w_i w_j. It is used
    where it is smaller than the feature itself. ``forward`` computes the responses, cheaper for a single pass.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, n_prototypes: int) -> None:
        super().__init__(spec, n_classes)
        check_size("n_prototypes", n_prototypes)
        self.prototypes = nn.Linear(spec.channels, n_prototypes, bias=False)
        self.classification = nn.Linear(n_prototypes, n_classes)
        self.confidence = nn.Linear(n_prototypes, n_classes)
        self.stores_moment = (spec.channels + 1) / 2 < spec.n_positions

    def reduce(self, feature: Tensor) -> Tensor:
        """The second moment (B, C (C + 1) / 2), or the positions (B, C, L) where they are no more."""
        vectors = positions(feature, self.spec)
        if not self.stores_moment:
            return vectors
        moment = vectors @ vectors.transpose(1, 2) / vectors.shape[2]
        rows, columns = torch.triu_indices(*moment.shape[1:], device=feature.device)
        return moment[:, rows, columns] * torch.where(rows == columns, 1, 2).to(moment.dtype)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits of class and confidence from what ``reduce`` returned."""
        weight = self.prototypes.weight
        if not self.stores_moment:
            return self._from_responses(weight @ reduced)
        rows, columns = torch.triu_indices(weight.shape[1], weight.shape[1], device=weight.device)
        return self._from_aggregates(reduced @ (weight.T[rows] * weight.T[columns]))

    def forward(self, feature: Tensor, state: Any = None) -> Answer:
        """Logits of class and confidence from a feature (B, *spec.shape)."""
        return self._from_responses(self.prototypes.weight @ positions(feature, self.spec))

    def confidence_parameters(self) -> list[nn.Parameter]:
        """Those of the confidence output; the prototypes are shared."""
        return list(self.confidence.parameters())

    def _from_responses(self, responses: Tensor) -> Answer:
        return self._from_aggregates(responses.square().mean(dim=2))

    def _from_aggregates(self, aggregates: Tensor) -> Answer:
        vectors = self._refined(aggregates)
        return Answer(self.classification(vectors), self.confidence(vectors))

    def _refined(self, aggregates: Tensor) -> Tensor:
        return aggregates


class PrototypeHead(_QuadraticHead):
    """Squared responses of learned prototypes, averaged over the positions; linear outputs for class and confidence.

    Equations 1-4 of CalexNet (2026), which sums over the positions; the mean (ours) only rescales the linear outputs'
    weights by the number of positions, and lets one learning rate serve maps of every size. Both outputs start at zero
    (ours too): all classes equally likely and all confidences 1/2, however large the features are.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    n_prototypes : int
        K; the paper finds no gain beyond 64.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, n_prototypes: int = 64) -> None:
        super().__init__(spec, n_classes, n_prototypes)
        for output in (self.classification, self.confidence):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)


class RefinedPrototypeHead(_QuadraticHead):
    """A prototype head whose responses pass layer norm and a perceptron K-2K-K first (CalexNet 2026, equation 5).

    The layer norm takes the scale of the responses out again, whether they are summed (the paper) or averaged (here).
    Its epsilon is tiny, as the responses have the features' scale squared.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    n_prototypes : int
        K.
    dropout : float
        In the perceptron.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, n_prototypes: int = 64, dropout: float = 0.1) -> None:
        super().__init__(spec, n_classes, n_prototypes)
        self.refine = nn.Sequential(
            nn.LayerNorm(n_prototypes, eps=1e-10),
            nn.Linear(n_prototypes, 2 * n_prototypes),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * n_prototypes, n_prototypes),
        )

    def _refined(self, aggregates: Tensor) -> Tensor:
        return self.refine(aggregates)
