"""A module's weights as plain tensors, also where torch keeps them elsewhere: quantised, packed or frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as tensors that any file can hold.

    That of an ordinary module is its ``state_dict``. A quantised tensor becomes its integers, scales and zero points,
    what is packed its parts, numbers and types become tensors; a TorchScript module without a state, as freezing leaves
    one, has the constants of its code.

    Raises
    ------
    TypeError
        Where something is none of these.
    """
    weights = weights_in(module)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of a module must be tensors, numbers, strings and what torch quantises or packs; got {name}"
                f", a {type(value).__name__}. Return plain tensors from get_extra_state, or leave it out."
            )
    return weights


def weights_in(module: nn.Module) -> dict[str, Any]:
    """The same, with what cannot be written as it is."""
    pieces = [piece for name, value in module.state_dict().items() for piece in _pieces(name, value)]
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and not part.state_dict():
            _, constants = getattr(part, "code_with_constants", ("", None))
            for key, constant in getattr(constants, "const_mapping", {}).items():
                pieces += _pieces(f"{name}.constants.{key}" if name else f"constants.{key}", constant)
    return dict(pieces)


def can_be_set(module: nn.Module) -> bool:
    """Whether the module takes :func:`plain_weights` back by ``load_state_dict``."""
    state = module.state_dict()
    return state.keys() == weights_in(module).keys() and all(_is_plain(value) for value in state.values())


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized


def _pieces(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if _is_plain(value):
        yield name, value
    elif isinstance(value, Tensor):
        yield f"{name}.integers", value.int_repr()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            parts: dict[str, Any] = {"scale": value.q_scale(), "zero_point": value.q_zero_point()}
        else:
            parts = {"scale": value.q_per_channel_scales(), "zero_point": value.q_per_channel_zero_points()}
        yield from _pieces(name, parts)
    elif isinstance(value, torch.ScriptObject):
        yield from _pieces(name, value.__getstate__())
    elif isinstance(value, (tuple, list, dict)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from _pieces(f"{name}.{key}", entry)
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    elif value is None or isinstance(value, (str, torch.dtype)):
        yield name, torch.tensor(list(str(value).encode()), dtype=torch.uint8)
    else:
        yield name, value
