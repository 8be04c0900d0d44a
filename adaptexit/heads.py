"""Heads: the small networks that answer at a cut.

A head answers in two steps, so that a frozen backbone's features can be stored once and the head trained on them for
many epochs: ``reduce`` has no parameters and keeps as little of the feature as the head needs, ``answer`` does the
rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from adaptexit.features import FeatureSpec, as_map, map_size, pooled, positions


@dataclass
class HeadOutput:
    """What a head answers to a batch.

    Parameters
    ----------
    logits : Tensor, shape (B, n_classes)
    confidence_logits : Tensor of shape (B, n_classes), optional
        The sigmoid of the predicted class's entry is the confidence. None where the head has no such output.
    state : Rows, optional
        What the next head reads, for heads that build on each other: tensors with the samples first.
    """

    logits: Tensor
    confidence_logits: Tensor | None = None
    state: Any = None


class Head(nn.Module):
    """Base of all heads; made from the spec of the feature it reads and the number of classes.

    ``forward(feature)`` equals ``answer(reduce(feature))`` up to rounding. Subclasses write ``answer``, and ``reduce``
    where less than the feature is enough.
    """

    chained: bool = False
    """Whether ``answer`` reads the state that the head before it returned."""

    def __init__(self, spec: FeatureSpec, n_classes: int) -> None:
        super().__init__()
        check_size("n_classes", n_classes)
        self.spec, self.n_classes = spec, n_classes

    def place(self, k: int) -> None:
        """Told, once all heads are made and before they are trained, that this one answers at exit k."""

    @property
    def reduction_key(self) -> str:
        """What ``reduce`` does, by the class that defines it and by all that the head was made with."""
        reduce = type(self).reduce
        made_with = {key: value for key, value in vars(self).items() if key[0] != "_" and key != "training"}
        return f"{reduce.__module__}.{reduce.__qualname__} {made_with}"

    def reduce(self, feature: Tensor) -> Tensor:
        """The smallest form of a feature (B, *spec.shape) that loses nothing for this head, samples first."""
        return feature

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """The answer to what ``reduce`` returned."""
        raise NotImplementedError

    def forward(self, feature: Tensor, state: Any = None) -> HeadOutput:
        """The answer to a feature (B, *spec.shape)."""
        return self.answer(self.reduce(feature), state)

    def confidence_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the confidence output has."""
        return []


class MLPHead(Head):
    """Mean over the positions, layer norm, and a perceptron with one hidden layer.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    hidden : int, optional
        Width of the hidden layer; the number of channels within 64 and 256 when left out, a quarter of it (at least 16)
        where the feature is a vector, whose network has layers no larger than the head's would be.
    dropout : float
        Before the output layer.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__(spec, n_classes)
        if hidden is None:
            hidden = max(16, spec.channels // 4) if spec.layout == "NC" else min(256, max(64, spec.channels))
        check_size("hidden", hidden)
        self.net = nn.Sequential(
            nn.LayerNorm(spec.channels),
            nn.Linear(spec.channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, n_classes),
        )

    def reduce(self, feature: Tensor) -> Tensor:
        """Means over the positions, (B, C)."""
        return pooled(feature, self.spec)

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """Logits from means (B, C)."""
        return HeadOutput(self.net(reduced))


class ConvHead(Head):
    """Two strided 3x3 convolutions with batch norm and ReLU, the mean of what is left, and a linear layer.

    The classifier of MSDNet on CIFAR (Huang et al., "Multi-Scale Dense Networks", ICLR 2018, section 4), whose 8x8 maps
    become 2x2 before its average pooling. Of larger maps the mean is taken too, so the linear layer stays one of
    ``channels`` inputs. A stride is left out where a side is 1 already, and a 1x1 map is convolved 1x1, as the rest of
    the kernel would meet padding alone.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    channels : int
        Width of both convolutions.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, channels: int = 128) -> None:
        super().__init__(spec, n_classes)
        check_size("channels", channels)
        rows, columns = map_size(spec)
        layers: list[nn.Module] = []
        width = spec.channels
        for _ in range(2):
            kernel = 1 if rows == columns == 1 else 3
            stride = 1 if min(rows, columns) == 1 else 2
            layers += [
                nn.Conv2d(width, channels, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            rows, columns, width = -(-rows // stride), -(-columns // stride), channels
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, n_classes)

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a contiguous map, (B, C, H, W)."""
        return as_map(feature, self.spec).contiguous()

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """Logits from a map (B, C, H, W)."""
        return HeadOutput(self.linear(self.convolutions(reduced).mean(dim=(2, 3))))


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

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """Logits of class and confidence from what ``reduce`` returned."""
        weight = self.prototypes.weight
        if not self.stores_moment:
            return self._from_responses(weight @ reduced)
        rows, columns = torch.triu_indices(weight.shape[1], weight.shape[1], device=weight.device)
        return self._from_aggregates(reduced @ (weight.T[rows] * weight.T[columns]))

    def forward(self, feature: Tensor, state: Any = None) -> HeadOutput:
        """Logits of class and confidence from a feature (B, *spec.shape)."""
        return self._from_responses(self.prototypes.weight @ positions(feature, self.spec))

    def confidence_parameters(self) -> list[nn.Parameter]:
        """Those of the confidence output; the prototypes are shared."""
        return list(self.confidence.parameters())

    def _from_responses(self, responses: Tensor) -> HeadOutput:
        return self._from_aggregates(responses.square().mean(dim=2))

    def _from_aggregates(self, aggregates: Tensor) -> HeadOutput:
        refined = self._refined(aggregates)
        return HeadOutput(self.classification(refined), self.confidence(refined))

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


class BlockHead(Head):
    """Base of the heads that read a map, pooled to a few positions, through a residual block.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    size : int
        Maps are pooled to at most this many rows and columns first.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int = 4) -> None:
        super().__init__(spec, n_classes)
        check_size("size", size)
        rows, columns = map_size(spec)
        self.size = (min(rows, size), min(columns, size))
        self.block = BasicBlock(spec.channels, spec.channels)

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a map, pooled: (B, C, rows, columns)."""
        return F.adaptive_avg_pool2d(as_map(feature, self.spec), self.size).contiguous()

    def read(self, reduced: Tensor) -> Tensor:
        """What the block makes of a pooled map, (B, C)."""
        return self.block(reduced).mean(dim=(2, 3))


class ResidualHead(BlockHead):
    """A pooled map, a residual block (He et al. 2016) and linear outputs for class and confidence.

    Unlike the prototype heads it sees where in the image something is. Parameters as for :class:`BlockHead`.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int = 4) -> None:
        super().__init__(spec, n_classes, size)
        self.classification = nn.Linear(spec.channels, n_classes)
        self.confidence = nn.Linear(spec.channels, n_classes)

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """Logits of class and confidence from a pooled map."""
        read = self.read(reduced)
        return HeadOutput(self.classification(read), self.confidence(read))

    def confidence_parameters(self) -> list[nn.Parameter]:
        """Those of the confidence output; the block is shared."""
        return list(self.confidence.parameters())


class WrappedHead(Head):
    """Any module that returns logits (B, n_classes) for a feature, as a head; it reads the feature as it is."""

    def __init__(self, spec: FeatureSpec, n_classes: int, net: nn.Module) -> None:
        super().__init__(spec, n_classes)
        self.net = net

    def answer(self, reduced: Tensor, state: Any = None) -> HeadOutput:
        """The module's logits for a feature (B, *spec.shape)."""
        logits = self.net(reduced)
        expected = (len(reduced), self.n_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"the head {type(self.net).__name__} must return logits of shape {expected} for a feature of shape "
                f"{tuple(reduced.shape)}; got {got}. Return those, or make it a subclass of adaptexit.heads.Head."
            )
        return HeadOutput(logits)


HEADS: dict[str, type[Head]] = {
    "mlp": MLPHead,
    "conv": ConvHead,
    "prototype": PrototypeHead,
    "refined_prototype": RefinedPrototypeHead,
    "residual": ResidualHead,
}
"""The heads that have a name."""


def make_head(head: str | Callable[[FeatureSpec, int], nn.Module], spec: FeatureSpec, n_classes: int) -> Head:
    """A new head for a feature.

    Parameters
    ----------
    head : {"mlp", "conv", "prototype", "refined_prototype", "residual"} or callable
        A callable gets ``spec`` and ``n_classes`` and returns a :class:`Head`, or any module that turns a feature
        (B, *spec.shape) into logits (B, n_classes).
    spec : FeatureSpec
        The feature it reads.
    n_classes : int

    Returns
    -------
    Head
        Freshly initialised from torch's random state: fork that to keep it as it is.

    Raises
    ------
    ValueError
        For a name that is not in ``HEADS``.
    TypeError
        When ``head`` is neither a name nor a factory, or a factory returns something else than a module.
    """
    if isinstance(head, str):
        if head not in HEADS:
            near = difflib.get_close_matches(head.lower(), HEADS, n=2, cutoff=0.4)
            raise ValueError(
                f"head must be one of {', '.join(HEADS)}, or a factory (spec, n_classes) -> module; got {head!r}."
                + (f" Near it: {', '.join(near)}." if near else "")
            )
        return HEADS[head](spec, n_classes)
    if isinstance(head, nn.Module) or not callable(head):
        raise TypeError(
            f"head must be one of {', '.join(HEADS)}, or a factory (spec, n_classes) -> module; got "
            f"{'the module ' if isinstance(head, nn.Module) else ''}{head!r}. Every exit needs a head of its own: pass "
            "a function that makes one."
        )
    made = head(spec, n_classes)
    if isinstance(made, Head):
        return made
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"head, called as a factory, must return an nn.Module; got {type(made).__name__}. Return a Head, or a "
            "module from a feature to logits."
        )
    return WrappedHead(spec, n_classes, made)


def check_size(name: str, value: int) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}. Give the number of them.")
