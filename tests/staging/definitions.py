"""Multiply-accumulates by definition: another way to count than the library's, to compare it with.

Calls are seen where Python makes them (functions and recurrent modules), not where torch dispatches operators, and the
formulas are those of textbooks.
"""

from math import prod

import torch
from torch import nn
from torch.backends import mha
from torch.overrides import TorchFunctionMode


def linear(y, x, weight, *_, **__):
    return y.numel() * x.shape[-1]


def convolution(y, x, weight, *_, **__):
    return y.numel() * weight[0].numel()


def transposed(y, x, weight, *_, **__):
    return x.numel() * weight[0].numel()


def product(y, a, b, *_, **__):
    return y.numel() * a.shape[-1]


def added_product(y, start, a, b, *_, **__):
    return y.numel() * a.shape[-1]


def einsum(y, equation, *operands, **__):
    operands = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    sizes = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        named = letters.replace("...", "")
        shape = operand.shape[-len(named) :] if letters.startswith("...") else operand.shape
        sizes |= dict(zip(named, shape, strict=True))
        if letters.startswith("..."):
            sizes["..."] = max(sizes.get("...", 1), prod(operand.shape[: -len(named)]))
    return prod(sizes.values())


def attention(y, q, k, v, *_, **__):
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def multi_head_attention(y, q, k, v, *_, **__):
    (length, batch, width), seen = q.shape, k.shape[0]
    return batch * width * (2 * width * (length + seen) + 2 * length * seen)


def bilinear(y, a, b, weight, *_, **__):
    return a[..., 0].numel() * weight.numel()


DEFINITIONS = {
    "linear": linear, "conv1d": convolution, "conv2d": convolution, "conv3d": convolution,
    "conv_transpose1d": transposed, "conv_transpose2d": transposed, "matmul": product, "__matmul__": product,
    "bmm": product, "mm": product, "mv": product, "baddbmm": added_product, "addmm": added_product, "einsum": einsum,
    "scaled_dot_product_attention": attention, "multi_head_attention_forward": multi_head_attention,
    "bilinear": bilinear,
}  # fmt: skip


class Definitions(TorchFunctionMode):
    """Sums up what the calls within it take."""

    macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if formula := DEFINITIONS.get(getattr(func, "__name__", None)):
            self.macs += formula(y, *args, **(kwargs or {}))
        return y


def macs_by_definition(model, x):
    """Of a sample of a batch x (B, ...)."""
    definitions = Definitions()

    def recurrent(module, inputs, output):
        steps = inputs[0][..., 0].numel()
        definitions.macs += steps * sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)

    def deformable(module, inputs, output):
        definitions.macs += output.numel() * module.weight[0].numel()

    hooks = [
        *(part.register_forward_hook(recurrent) for part in model.modules() if isinstance(part, nn.RNNBase)),
        *(part.register_forward_hook(deformable) for part in model.modules() if type(part).__name__ == "DeformConv2d"),
    ]
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # it calls one function for a whole block
    try:
        with torch.no_grad(), definitions:
            model(x)
    finally:
        mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return definitions.macs / len(x)
