"""The values of a traced forward, as its Python meets them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

from torch.fx.proxy import Attribute, Proxy


class Concrete(Proxy):
    """A proxy of which Python may ask what the values beside the graph can answer."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if name in ("node", "tracer", "root", "attr"):  # not there yet, or what torch.fx raised in looking for it
            raise AttributeError(name)
        value = self.tracer.values[self.node][0]
        if not hasattr(type(value), name):
            getattr(value, name)  # hasattr is told, and the forward where it does not ask
        return ConcreteAttribute(self, name)

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """A function of NumPy, of a size for example."""
        return self.tracer.create_proxy("call_function", _of_numpy(ufunc, method), args, kwargs)

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


class ConcreteAttribute(Concrete, Attribute):
    """The same of an attribute, which becomes a node when it is used."""

    def __init__(self, root: Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)


@cache
def _of_numpy(ufunc: Any, method: str) -> Callable[..., Any]:
    """A function with a name that code can be written with."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*args, **kwargs)

    function.__name__ = f"numpy_{ufunc.__name__}"
    return function
