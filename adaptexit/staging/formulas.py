"""Multiply-accumulates of operators that torch's counter does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]

# Each takes what the operator takes, tensors as their shapes, and gives two FLOPs a multiply-accumulate.


def _mv(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _addmv(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _addbmm(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(left) * right[-1]


def _matrices(left: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * left[-1]


def _trilinear(first: Shape, second: Shape, third: Shape, *expanded_and_summed: Any, **_: Any) -> int:
    """Every element of the joint shape is one multiplication by the weight (bilinear layers: B x out x in1 x in2)."""
    shapes = [list(shape) for shape in (first, second, third)]
    for shape, axes in zip(shapes, expanded_and_summed[:3], strict=True):
        for axis in sorted(axes):
            shape.insert(axis, 1)
    return 2 * prod(map(max, zip(*shapes, strict=True)))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Queries (..., L, d) with keys (..., S, d), and the mixture of values (..., S, e) by that."""
    pairs = prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def _deformable(_: Shape, weight: Shape, *__: Any, out_shape: Shape, **___: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _recurrent(inputs: Shape, weights: Sequence[Shape]) -> int:
    """Of a recurrent layer every matrix multiplies every step of every sample."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _mkldnn_rnn(inputs: Shape, *weights: Any, **_: Any) -> int:
    return _recurrent(inputs, weights[:4])


def _cudnn_rnn(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _recurrent(inputs, weights)


def _mps_lstm(inputs: Shape, _: Any, weights: Sequence[Shape], *__: Any, **___: Any) -> int:
    return _recurrent(inputs, weights)


def _gated(n_gates: int) -> Callable[..., int]:
    """Of packed layers: (input, [batch sizes,] hidden state, packed, biases, layers, dropout, train, both ways)."""

    def formula(inputs: Shape, *others: Any, **_: Any) -> int:
        place = next(i for i, value in enumerate(others) if is_packed(value))
        state, n_layers, n_directions = others[place - 1], others[place + 2], 1 + others[place + 5]
        hidden = (state if isinstance(state[0], int) else state[0])[-1]
        widths = [inputs[-1], *[n_directions * hidden] * (n_layers - 1)]
        weights = [(n_gates * hidden, width + hidden) for width in widths]
        return n_directions * _recurrent(inputs, weights)

    return formula


def _cell(n_gates: int) -> Callable[..., int]:
    def formula(inputs: Shape, state: Any, *_: Any, **__: Any) -> int:
        hidden = (state if isinstance(state[0], int) else state[0])[-1]
        return _recurrent(inputs, [(n_gates * hidden, inputs[-1] + hidden)])

    return formula


def _packed_convolution(*values: Any, out_shape: Shape, **_: Any) -> int:
    weight = next(value for value in values if is_packed(value)).unpack()[0]
    return 2 * prod(out_shape) * prod(weight.shape[1:])


def is_packed(value: Any) -> bool:
    """Quantised weights are objects of C++, or lists of them."""
    return isinstance(value[0] if isinstance(value, (list, tuple)) and value else value, torch.ScriptObject)


_FORMULAS: dict[str, dict[str, Callable[..., int]]] = {
    "aten": {
        "mv": _mv, "addmv": _addmv, "dot": _mv, "vdot": _mv, "addbmm": _addbmm, "_int_mm": _matrices,
        "_weight_int8pack_mm": _matrices, "_trilinear": _trilinear, "mkldnn_rnn_layer": _mkldnn_rnn,
        "_cudnn_rnn": _cudnn_rnn, "miopen_rnn": _cudnn_rnn, "_lstm_mps": _mps_lstm,
        "quantized_lstm": _gated(4), "quantized_gru": _gated(3),
        "_scaled_dot_product_flash_attention_for_cpu": _attention,  # some releases know the GPU's alone
    },
    "torchvision": {"deform_conv2d": _deformable},
    "quantized": {
        **dict.fromkeys(
            ["linear", "linear_relu", "linear_leaky_relu", "linear_tanh", "linear_dynamic", "linear_relu_dynamic",
             "linear_dynamic_fp16", "linear_relu_dynamic_fp16"],
            _matrices,
        ),
        **dict.fromkeys(
            ["conv1d", "conv1d_relu", "conv1d_dynamic", "conv2d", "conv2d_relu", "conv2d_add", "conv2d_add_relu",
             "conv2d_dynamic", "conv3d", "conv3d_relu", "conv3d_dynamic"],
            _packed_convolution,
        ),
        "quantized_lstm_cell_dynamic": _cell(4), "quantized_gru_cell_dynamic": _cell(3),
        "quantized_rnn_relu_cell_dynamic": _cell(1), "quantized_rnn_tanh_cell_dynamic": _cell(1),
    },
}  # fmt: skip


def flop_counter() -> FlopCounterMode:
    """torch's counter with the formulas it lacks, of those operators that this build of torch has."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            getattr(getattr(torch.ops, library), name): formula
            for library, formulas in _FORMULAS.items()
            for name, formula in formulas.items()
            if hasattr(getattr(torch.ops, library), name)
        },
    )
