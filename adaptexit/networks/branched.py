"""A frozen model in stages, with a head at every cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head
from adaptexit.heads.layout import pooled
from adaptexit.networks.base import Network, State, named_tensors
from adaptexit.networks.models import TorchModel
from adaptexit.networks.readers import logits_in
from adaptexit.staging.carried import Carried, writes_into
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.nested import Rows, tensors_in
from adaptexit.staging.splitting import Split


class BranchedNetwork(Network):
    """A frozen model in K stages with a head at each of its K - 1 cuts; the model itself is the last exit.

    Parameters
    ----------
    model : TorchModel
        The model behind its preprocessing.
    split : Split
        The same in stages.
    heads : sequence of K - 1 Heads
    """

    def __init__(self, model: TorchModel, split: Split, heads: Sequence[Head]) -> None:
        self.model, self.split = model, split
        self.stages = split.stages
        self.heads = nn.ModuleList([*heads, nn.Identity()])
        self.exit_names = [*split.cuts, "full model"]
        self.chained = any(head.chained for head in heads)
        self._early = tuple(heads)  # indexing a ModuleList is slow beside a small head
        # Asked for device and precision when they run, as the user may move them at any time.
        self._likes = [next((p for p in head.parameters() if p.is_floating_point()), None) for head in heads]
        self.heads_that_overwrite = self._tried_heads()

    @property
    def early(self) -> list[Head]:
        """The K - 1 heads at the cuts."""
        return list(self._early)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.split.module, *self.heads]

    def prepare(self, x: Any) -> Any:
        inputs = self.model.prepare(x)
        if inputs.ndim != self.split.example.ndim:
            shape = ", ".join(map(str, self.split.example.shape[1:]))
            raise ValueError(
                f"X must have the shape (N, {shape}) of the inputs that the model was fitted on; got {tuple(x.shape)}. "
                "Give a single input its axis for the samples: x[None]."
            )
        return inputs

    def stage(self, k: int, carried: Rows) -> Rows:
        return self.split.run(k, carried, checked=False)

    def exit(self, k: int, carried: Carried, features: bool = False) -> tuple[Any, Rows]:
        if k == len(self._early):
            return Answer(logits_in(carried.feature, "backbone")), None
        head = self._early[k]
        feature = sole_tensor(carried.feature)
        vector = pooled(feature, head.spec) if features else None  # before the head, which may write into the feature
        like = self._likes[k]
        if like is not None and (feature.dtype != like.dtype or feature.device != like.device):
            feature = feature.to(like)
        elif self.heads_that_overwrite[k]:
            feature = feature.clone()
        answer = head(feature, carried.state) if head.chained else head(feature)
        answer.features = vector
        state = carried.state if answer.state is None else answer.state
        return answer, Carried(carried.live, None, state)

    def look(self, x: Tensor, look: Callable[[int, Tensor], None]) -> Tensor:
        """Run the model on raw inputs and show the feature at every cut, in the heads' precision; the logits."""
        return logits_in(self._look(self.prepare(x), look), "backbone")

    def _tried_heads(self) -> list[bool]:
        """Whether each head writes into its feature, which the stages behind it may still need; it then gets a copy."""
        overwrites: list[bool] = []
        state: Any = None

        def try_head(k: int, feature: Tensor) -> None:
            nonlocal state
            feature, head = feature.clone(), self.early[k]
            writes = writes_into(feature)
            output = head(feature, state) if head.chained else head(feature)
            state = state if output.state is None else output.state
            overwrites.append(writes_into(feature) != writes)

        with evaluating(self.modules), torch.inference_mode(False), torch.no_grad():
            self._look(self.split.example[:2].clone(), try_head)
        return overwrites

    def _look(self, prepared: Tensor, look: Callable[[int, Tensor], None]) -> Any:
        """Run the stages and show each head's feature, in its precision; the model's output."""

        def cast(k: int, feature: Any) -> None:
            tensor = sole_tensor(feature)
            look(k, tensor if self._likes[k] is None else tensor.to(self._likes[k]))

        return self.split.visit(prepared, cast)

    # -- persistence ---------------------------------------------------------------------------------------------------

    def get_state(self) -> State:
        header, weights = self.model.get_state()
        state = {
            "backbone": header,
            "cuts": list(self.split.cuts),
            "features": [dataclasses.asdict(head.spec) for head in self.early],
        }
        tensors = {f"backbone.{key}": tensor for key, tensor in weights.items()} | {"example": self.split.example}
        for k, head in enumerate(self.early):
            tensors |= named_tensors(f"heads.{k}", head)
        return state, tensors


def sole_tensor(feature: Any) -> Any:
    """The one tensor in what a cut returns, where numbers stand beside it; anything else as it is.

    A quantised one becomes an ordinary one, as heads read it.
    """
    if isinstance(feature, Tensor):
        return feature.dequantize() if feature.is_quantized else feature
    tensors = list(tensors_in(feature))
    return tensors[0] if len(tensors) == 1 else feature
