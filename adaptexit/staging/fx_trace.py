"""The flat graph of a module's forward, traced through the ancestors of its cuts and no further.

torch.fx records the calls of all other modules as single nodes. Beside the graph every node carries the values that it
has on two small batches, one of 2 and one of 3 samples. Where Python has to decide something (``if``, ``int``, ``len``,
iteration) it decides by these values if both agree, and the graph gets a guard that looks whether they still hold; if
they differ, the decision hangs on the batch or on the data, and the module cannot be traced.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Attribute, Proxy

from adaptexit.exceptions import SplitError
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.model_state import state_restored

Pair = tuple[Any, Any]

TRACING = threading.RLock()
"""Held by the one thread that traces: torch.fx redirects the calls of all modules in the process meanwhile."""


@dataclass
class CutCall:
    """A call of a cut module: what it returned, as nodes of the graph, and the last node recorded by then."""

    output: Any
    last: fx.Node


@dataclass
class Traced:
    """A traced module.

    Attributes
    ----------
    graph : fx.Graph
    values : dict of node -> (value at batch 2, value at batch 3)
    cut_calls : dict of cut -> its calls
    called : names of the modules called in one piece, in order
    """

    graph: fx.Graph
    values: dict[fx.Node, Pair]
    cut_calls: dict[str, list[CutCall]]
    called: list[str] = field(default_factory=list)

    def pair_of(self, output: Any) -> Pair:
        """The values of nested nodes, at batch 2 and at batch 3."""
        return _with_values(output, self.values, 0), _with_values(output, self.values, 1)


def trace(module: nn.Module, cuts: Iterable[str], batches: tuple[Tensor, Tensor]) -> Traced:
    """Trace the evaluation forward of ``module`` through the ancestors of ``cuts``.

    Parameters
    ----------
    module : nn.Module
    cuts : canonical names of submodules
    batches : inputs of 2 and of 3 samples

    Raises
    ------
    SplitError
        If the forward cannot be traced.
    """
    tracer = _Tracer(set(cuts), batches)
    with TRACING, evaluating([module]), torch.no_grad(), state_restored(module):
        call, getattribute = tracer.plain_call, tracer.plain_getattr
        try:
            graph = tracer.trace(module)
        except SplitError:
            raise
        except Exception as error:
            raise SplitError(
                f"the forward of {type(module).__name__} cannot be traced through the ancestors of the cuts: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Cut at modules that lie less deep, or give the "
                "stages explicitly."
            ) from error
        finally:
            # Also where a Ctrl-C kept torch.fx from it; no function is called here, so that no other can come between.
            nn.Module.__call__ = call  # type: ignore[method-assign]
            nn.Module.__getattr__ = getattribute  # type: ignore[method-assign]
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    return Traced(graph, tracer.values, tracer.cut_calls, called)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "len": len, "list": list,
}  # fmt: skip


def _unpatched(method: Any) -> Any:
    """A method of nn.Module as it is when nobody traces: another trace may have left its own in place."""
    while getattr(getattr(method, "__code__", None), "co_filename", None) == _symbolic_trace.__file__:
        method = method.__wrapped__
    return method


def check_unchanged(value: Any, expected: Any, conversion: str) -> None:
    """Guard: a decision taken while tracing must hold for the batch at hand."""
    if (now := _CONVERSIONS[conversion](value)) != expected:
        raise SplitError(
            f"the model's forward decides on a value that was {expected!r} when it was split and is {now!r} on this "
            "batch (input size and dtype often decide). Split it anew with an example like this batch."
        )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, cuts: set[str], batches: tuple[Tensor, Tensor]) -> None:
        super().__init__(param_shapes_constant=False)
        self.cuts = cuts
        self.ancestors = {cut[:i] for cut in cuts for i, letter in enumerate(cut) if letter == "."}
        self.batches = batches
        self.values: dict[fx.Node, Pair] = {}
        self.cut_calls: dict[str, list[CutCall]] = {cut: [] for cut in cuts}
        self.thread = threading.get_ident()
        self.computing = False
        self.plain_call = _unpatched(nn.Module.__call__)
        self.plain_getattr = _unpatched(nn.Module.__getattr__)

    # -- what is recorded ----------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        def forward(x: Any) -> Any:
            self._let_others_through()
            return self.root.forward(x)  # of the instance, other arguments at their defaults

        return forward, [self.create_proxy("placeholder", "input", (), {})]

    @property
    def recording(self) -> bool:
        """Whether a call is the traced forward's: not another thread's, nor of a module that is run for its values."""
        return not self.computing and threading.get_ident() == self.thread

    def _let_others_through(self) -> None:
        """Calls that are not recorded go where they went before torch.fx patched nn.Module (it undoes this, too)."""
        fx_call, fx_getattr = nn.Module.__call__, nn.Module.__getattr__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (fx_call if self.recording else self.plain_call)(module, *args, **kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            return (fx_getattr if self.recording else self.plain_getattr)(module, name)

        nn.Module.__call__, nn.Module.__getattr__ = call, getattribute  # type: ignore[method-assign, assignment]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.ancestors

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.recording:  # another thread, before it was let through
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        output = super().call_module(m, m.forward, args, kwargs)  # of the ancestors; their hooks are no computation
        if name in self.cuts:
            # Unused entries of a returned tuple may become nodes only later, so the output is lowered here.
            nodes = self.create_arg(output)
            self.cut_calls[name].append(CutCall(nodes, next(reversed(self.graph.nodes))))
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.recording else attr_val

    def create_arg(self, a: Any) -> Any:
        # type(a), as isinstance asks the class that a proxy of a tuple pretends to be (_Concrete.__class__), and before
        # torch.fx asks that.
        if issubclass(type(a), Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            return self.create_node("call_function", _constant(a), (), {})
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())

    def proxy(self, node: fx.Node) -> Proxy:
        return _Concrete(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        self.computing = True
        try:
            self.values[node] = (self._value(node, 0), self._value(node, 1))
        finally:
            self.computing = False
        return node

    # -- the values beside it ------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node, which: int) -> Any:
        args, kwargs = (_with_values(nodes, self.values, which) for nodes in (node.args, node.kwargs))
        target: Any = node.target
        if node.op == "placeholder":
            return self.batches[which].clone()
        if node.op == "get_attr":
            return operator.attrgetter(target)(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return args[0] if node.op == "output" else target(*args, **kwargs)

    def decided(self, proxy: Proxy, conversion: str) -> Any:
        """What Python is told about a value: the same on both batches, or nothing."""
        first, second = (_CONVERSIONS[conversion](value) for value in self.values[proxy.node])
        if first != second:
            raise SplitError(
                f"the model's forward takes {conversion}() of {proxy.node.name}, which is {first!r} for 2 samples "
                f"and {second!r} for 3: it decides by the number of samples or by their content, so that samples could "
                "not leave independently. Cut at modules that lie less deep, or give the stages explicitly."
            )
        # Nobody uses what the guard returns; torch.fx keeps the node, since no dead code is taken out.
        self.create_node("call_function", check_unchanged, (proxy.node, first, conversion), {})
        return first

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.decided(obj, "bool"))

    def iter(self, obj: Proxy) -> Iterator[Proxy]:
        value = self.values[obj.node][0]
        if isinstance(value, (dict, KeysView)):
            return iter(self.decided(obj, "list"))
        if isinstance(value, (ValuesView, ItemsView)):
            obj = self.create_proxy("call_function", list, (obj,), {})
        length = self.decided(obj, "len")
        return iter([operator.getitem(obj, i) for i in range(length)])

    def keys(self, obj: Proxy) -> Any:
        return self.decided(obj, "list")


def _with_values(nested: Any, values: dict[fx.Node, Pair], which: int) -> Any:
    """Nested arguments with values for nodes, in lists that can be written to, as the compiled stages get them."""
    if isinstance(nested, fx.Node):
        return values[nested][which]
    if isinstance(nested, slice):
        return slice(*(_with_values(part, values, which) for part in (nested.start, nested.stop, nested.step)))
    if isinstance(nested, dict):
        return {key: _with_values(value, values, which) for key, value in nested.items()}
    if isinstance(nested, list):
        return [_with_values(entry, values, which) for entry in nested]
    if isinstance(nested, tuple):
        entries = [_with_values(entry, values, which) for entry in nested]
        return type(nested)(*entries) if hasattr(nested, "_fields") else tuple(entries)
    return nested


class _Concrete(Proxy):
    """A proxy of which Python may ask what the values beside the graph can answer."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        return _ConcreteAttribute(self, name)

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __len__(self) -> int:
        return int(self.tracer.decided(self, "len"))

    def __int__(self) -> int:
        return int(self.tracer.decided(self, "int"))

    def __index__(self) -> int:
        return int(self.tracer.decided(self, "index"))

    def __float__(self) -> float:
        return float(self.tracer.decided(self, "float"))

    def __iter__(self) -> Any:
        return self.tracer.iter(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance is told: a proxy of a list, tuple or dict is one, as the model's forward may ask."""
        value = self.tracer.values[self.node][0]
        return type(value) if isinstance(value, (list, tuple, dict)) else type(self)


class _ConcreteAttribute(_Concrete, Attribute):
    """The same of an attribute, which becomes a node when it is used."""

    def __init__(self, root: Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)


def _constant(value: Tensor) -> Callable[[], Tensor]:
    """A tensor made while tracing, which no input had a part in."""

    def constant() -> Tensor:
        return value.clone()  # what is made in every run may be written to

    return constant
