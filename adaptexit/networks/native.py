"""Networks that were built with their exits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.exceptions import SplitError
from adaptexit.networks.base import Network, State
from adaptexit.networks.models import TorchModel
from adaptexit.networks.penultimate import with_penultimate
from adaptexit.networks.readers import logits_in
from adaptexit.staging.cuts import unwrapped
from adaptexit.staging.nested import Rows


class NativeNetwork(Network):
    """A module with K ``stages`` and K ``heads`` (ModuleLists of equal length), behind its preprocessing."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        module: Any = unwrapped(model.module)
        self.stages, self.heads = module.stages, module.heads
        self.exit_names = [*(f"exit {k}" for k in range(len(self.heads) - 1)), "full model"]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model.module]

    def prepare(self, x: Any) -> Any:
        return self.model.prepare(x)

    def stage(self, k: int, carried: Rows) -> Rows:
        return self.stages[k](carried)

    def exit(self, k: int, carried: Rows, features: bool = False) -> tuple[Any, Rows]:
        if not features:
            return self.heads[k](carried), carried
        output, vector = with_penultimate(self.heads[k], carried)
        return Answer(logits_in(output), features=vector), carried

    def verify(self, x: Tensor) -> None:
        """Compare stages and heads with the network's own forward, on a batch and on part of it."""
        inputs = self.prepare(x)
        logits = self.model.module(inputs.clone())
        if not isinstance(logits, (list, tuple)) or len(logits) != self.n_exits:
            count = len(logits) if isinstance(logits, (list, tuple)) else type(logits).__name__
            raise ValueError(
                f"a network with {self.n_exits} exits must return a list of as many logits; got {count}. Let "
                "forward answer with the output of every head."
            )
        for rows in (slice(None), slice(1, None, 2)):
            carried: Any = inputs[rows].clone()
            for k in range(self.n_exits):
                carried = self.stage(k, carried)
                answer, right = logits_in(self.heads[k](carried)), logits_in(logits[k])[rows]
                tolerance = 1e-4 * float(right.abs().max())
                if answer.shape != right.shape or not torch.allclose(answer, right, rtol=1e-3, atol=tolerance):
                    raise SplitError(
                        f"exit {k} of the network answers otherwise through its stages and heads than through its "
                        "forward, which must be stage, head, stage, head and nothing else, every sample alone."
                    )

    def get_state(self) -> State:
        header, weights = self.model.get_state()
        return {"backbone": header}, {f"backbone.{key}": tensor for key, tensor in weights.items()}


def is_native(module: Any) -> bool:
    """Whether a module was built with exits: ``stages`` and ``heads``, ModuleLists of equal length."""
    module = module.module if isinstance(module, nn.DataParallel) else module
    stages, heads = getattr(module, "stages", None), getattr(module, "heads", None)
    return isinstance(stages, nn.ModuleList) and isinstance(heads, nn.ModuleList) and len(stages) == len(heads) > 0


MEANINGLESS_FOR_NATIVE = {
    "exits": "auto", "head": "auto", "layout": None, "cache_dir": None, "cache_half": False,
}  # fmt: skip
"""Parameters that say how exits are made, with their defaults: a network built with exits has its own."""


def native_network(model: TorchModel, example: Tensor, params: dict[str, Any]) -> NativeNetwork:
    """The network of a module with exits, compared with its own forward on raw inputs ``example``.

    ``params`` are the estimator's: those that mean nothing here are refused unless they have their defaults.
    """
    for name, default in MEANINGLESS_FOR_NATIVE.items():
        value = params[name]
        if not (value is default or (isinstance(value, str) and value == default)):
            raise ValueError(
                f"{name} must be left at {default!r} for a network built with exits, whose heads are its own; "
                f"got {value!r}. Leave it out, or give the backbone without its exits."
            )
    network = NativeNetwork(model)
    # That samples are alone shows where there are two, so one comes with another that differs from it.
    network.verify(example[:6] if len(example) > 1 else torch.cat([example, example.flip(-1)]))
    return network
