"""All exits of a network in one pass, with gradients: what joint training minimises the losses of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.networks.branched import BranchedNetwork, sole_tensor
from adaptexit.networks.native import NativeNetwork
from adaptexit.networks.readers import logits_in
from adaptexit.staging.carried import writes_into
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.nested import mapped
from adaptexit.staging.pieces import Chain


class AllExits(nn.Module):
    """Prepared inputs (B, ...) -> logits (B, C) of each of K exits.

    Parameters
    ----------
    network : BranchedNetwork or NativeNetwork
    rescale : bool
        Whether gradients are rescaled where exits branch off, as "gradient equilibrium" does (Li et al., "Improved
        Techniques for Training Adaptive Deep Networks", ICCV 2019, section 3.1): of K - k exits from exit k on, that
        exit's own part counts 1 / (K - k) and what comes back from deeper ones (K - k - 1) / (K - k). Sums of many
        losses then do not outweigh each other in the shared layers.
    """

    def __init__(self, network: BranchedNetwork | NativeNetwork, rescale: bool = False) -> None:
        super().__init__()
        self.n_exits, self.rescale = network.n_exits, rescale
        self.model = network.model.module
        self.heads = nn.ModuleList([] if isinstance(network, NativeNetwork) else network.early)

    @property
    def head_modules(self) -> list[Any]:
        """What answers at the exits, but for the last one of a model that heads were put on."""
        return list(self.heads)

    def own(self, k: int) -> float:
        """What the gradient of exit k counts in the layers before it."""
        return 1.0 / (self.n_exits - k)

    def at_branch(self, k: int, feature: Any) -> tuple[Any, Any]:
        """What the head at branch k reads and what goes on, each with its share of the gradient."""
        if not self.rescale:
            return feature, feature
        return _with_gradient_times(feature, self.own(k)), _with_gradient_times(feature, 1.0 - self.own(k))


class NativeExits(AllExits):
    """Of a network built with exits: stage, head, stage, head."""

    @property
    def head_modules(self) -> list[Any]:
        module: Any = self.model
        return list(module.heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        answers = []
        module: Any = self.model
        carried: Any = x
        last = self.n_exits - 1
        for k, (stage, head) in enumerate(zip(module.stages, module.heads, strict=True)):
            own = carried = stage(carried)
            if k < last:
                own, carried = self.at_branch(k, carried)
            answers.append(logits_in(head(own)))
        return answers


class BranchedExits(AllExits):
    """Of a model with heads at its cuts.

    The model's own forward runs, since its stages were traced in evaluation mode, and heads read the features as they
    pass: what is random or counted in training (dropout, batch statistics) is what the model itself would do.
    """

    def __init__(self, network: BranchedNetwork, rescale: bool = False) -> None:
        super().__init__(network, rescale)
        self.cuts = network.split.cuts
        self.as_stages = isinstance(network.split._source, Chain)
        self._copied = self._overwritten(network)

    def forward(self, x: Tensor) -> list[Tensor]:
        answers: list[Tensor] = []
        state: Any = None

        def branch(feature: Any) -> Any:
            nonlocal state
            k = len(answers)
            if k == len(self.cuts):
                raise self._not_passed_once(k + 1)
            own, onward = self.at_branch(k, feature)
            own = sole_tensor(own)
            head: Any = self.heads[k]
            like = next((p for p in head.parameters() if p.is_floating_point()), own)
            if own.dtype != like.dtype and not torch.is_autocast_enabled(own.device.type):
                own = own.to(like.dtype)  # heads of a network in half precision are in single
            elif self._copied[k]:
                own = own.clone()
            answer = head(own, mapped(state, _detached)) if head.chained else head(own)
            state = state if answer.state is None else answer.state
            answers.append(answer.logits)
            return onward if self.rescale else None

        last = logits_in(self._run(x, branch), "backbone")
        if len(answers) != len(self.cuts):
            raise self._not_passed_once(len(answers))
        return [*answers, last]

    def _not_passed_once(self, count: int) -> ValueError:
        return ValueError(
            f"the model must pass each of its {len(self.cuts)} cuts once in training mode, too; it passed {count}. "
            f"Turn off what skips or repeats layers in training, or cut elsewhere than after {', '.join(self.cuts)}."
        )

    def _run(self, x: Any, branch: Any) -> Any:
        """The model's answer; ``branch`` is called with what each cut returns and may put something in its place."""
        if self.as_stages:
            stages: Any = self.model  # a Sequential
            for k, stage in enumerate(stages):
                x = stage(x)
                onward = branch(x) if k < len(self.cuts) else None
                x = x if onward is None else onward
            return x
        with _hooked(self.model, self.cuts, branch):
            return self.model(x)

    def _overwritten(self, network: BranchedNetwork) -> list[bool]:
        """Whether a feature is written into, by its head or by the layers behind it: the head then gets a copy."""
        features: list[tuple[Tensor, Any]] = []

        def look(feature: Any) -> None:
            tensor = sole_tensor(feature)
            features.append((tensor, writes_into(tensor)))

        with evaluating(network.modules), torch.inference_mode(False), torch.no_grad():
            self._run(network.split.example[:2].clone().to(network.model.device), look)
        behind = [writes_into(feature) != writes for feature, writes in features]
        return [a or b for a, b in zip(behind, network.heads_that_overwrite, strict=True)]


def all_exits(network: Any, rescale: bool = False) -> AllExits:
    """The pass over all exits of a network."""
    kind = NativeExits if isinstance(network, NativeNetwork) else BranchedExits
    return kind(network, rescale)


@contextmanager
def _hooked(model: nn.Module, cuts: tuple[str, ...], branch: Any) -> Iterator[None]:
    handles = [
        model.get_submodule(cut).register_forward_hook(lambda module, args, output: branch(output)) for cut in cuts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_gradient_times(feature: Any, factor: float) -> Any:
    """The same values, whose gradient is multiplied by a factor on its way back."""

    def scaled(part: Any) -> Any:
        if not (isinstance(part, Tensor) and part.requires_grad):
            return part
        # A copy: what is written into a view would pass its gradient by the hook.
        copy = part.clone()
        copy.register_hook(lambda gradient: gradient * factor)
        return copy

    return mapped(feature, scaled)


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part
