"""Traces of a forward that computes with its number of samples in Python, where torch.fx sees but numbers.

Such a forward is traced twice, once with the numbers of each batch. Where the same graph comes out, numbers in it that
differ follow the number of samples; the graph gets an expression in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

Pair = tuple[Any, Any]
Values = dict[fx.Node, Pair]

SIZES = (2, 3)
"""Samples in the batches that a forward is traced on."""


class _Differs(Exception):
    """Two traces are not of one graph."""


def follow_batch_size(graph: fx.Graph, values: Values, other: fx.Graph, other_values: Values) -> bool:
    """Let numbers of a graph, traced on the first batch, follow the number of samples, as another on the second tells.

    The values get those of the second batch from the other graph. Returns False where the two are not of one graph.
    """
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    if len(graph.nodes) != len(other.nodes):
        return False
    twins = {twin: node for node, twin in pairs}
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        count = graph.call_function(len, (first,))
    values[count] = SIZES
    try:
        for node, twin in pairs:
            if node.op != twin.op or not _same_target(node.target, twin.target):
                raise _Differs
            values[node] = (values[node][0], other_values[twin][1])
            place = _Place(graph, node, count, values)
            node.args = _merged(node.args, twin.args, twins, place)
            node.kwargs = _merged(node.kwargs, twin.kwargs, twins, place)
    except _Differs:
        return False
    return True


def linear(count: int, slope: int, offset: int) -> int:
    """A number that follows the number of samples."""
    return slope * count + offset


class _Place:
    """Where in a graph a number stands that follows the number of samples."""

    def __init__(self, graph: fx.Graph, node: fx.Node, count: fx.Node, values: Values) -> None:
        self.graph, self.node, self.count, self.values = graph, node, count, values

    def expression(self, first: int, second: int) -> fx.Node:
        slope = second - first
        offset = first - slope * SIZES[0]
        if (slope, offset) == (1, 0):
            return self.count
        with self.graph.inserting_before(self.node):
            node = self.graph.call_function(linear, (self.count, slope, offset))
        self.values[node] = (first, second)
        return node


def _same_target(one: Any, other: Any) -> bool:
    tensors: list[Any] = [getattr(target, "value", None) for target in (one, other)]
    if all(isinstance(tensor, Tensor) for tensor in tensors):  # made while tracing
        return tensors[0].shape == tensors[1].shape and torch.equal(*tensors)
    return bool(one == other)


def _merged(one: Any, other: Any, twins: dict[fx.Node, fx.Node], place: _Place) -> Any:
    """Nested arguments of the first graph, with expressions for numbers that differ."""
    if isinstance(one, fx.Node):
        if not isinstance(other, fx.Node) or twins[other] is not one:
            raise _Differs
        return one
    if type(one) is not type(other):
        raise _Differs
    if isinstance(one, slice):
        parts = [(getattr(one, end), getattr(other, end)) for end in ("start", "stop", "step")]
        return slice(*(_merged(*part, twins, place) for part in parts))
    if isinstance(one, dict):
        if list(one) != list(other):
            raise _Differs
        return {key: _merged(one[key], other[key], twins, place) for key in one}
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            raise _Differs
        merged = [_merged(*pair, twins, place) for pair in zip(one, other, strict=True)]
        return merged if isinstance(one, list) else type(one)(*merged) if hasattr(one, "_fields") else tuple(merged)
    if one is other or one == other:
        return one
    if type(one) is not int:
        raise _Differs
    return place.expression(one, other)
