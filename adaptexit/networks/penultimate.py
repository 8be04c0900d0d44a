"""What a classifier has seen of a sample before it answers: the vector that its last linear layer reads.

The layer is watched from outside, by torch's own dispatch, which is a matter of one thread: no hook is put into the
user's module, and no other thread sees anything of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adaptexit.staging.nested import Rows, n_rows


class _Watch(TorchFunctionMode):
    """Keeps the input of the last linear layer that read one vector for each of ``n`` samples."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.vector: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            read = args[0] if args else kwargs["input"]
            if read.ndim == 2 and len(read) == self.n:
                self.vector = read
        return func(*args, **kwargs)


def with_penultimate(run: Callable[[Any], Any], x: Rows) -> tuple[Any, Tensor | None]:
    """What ``run(x)`` returns, and the vectors (B, d) that the last linear layer in it read; None without one."""
    with _Watch(n_rows(x)) as watch:
        output = run(x)
    return output, watch.vector
