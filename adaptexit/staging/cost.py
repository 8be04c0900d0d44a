"""What a model costs a sample: multiply-accumulates counted, or seconds measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from adaptexit.exceptions import CostWarning, warn
from adaptexit.staging.contexts import unfused_attention
from adaptexit.staging.formulas import flop_counter
from adaptexit.staging.nested import Rows, n_rows
from adaptexit.staging.uncounted import Finding, UncountedWeights
from adaptexit.utils.frames import as_frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StageLatencies:
    """Seconds that stages and exits take on a batch, by its size.

    Attributes
    ----------
    exit_names : K names
    batch_sizes : integer array (B,)
    stage_s, exit_s : arrays (K, B)
        Median seconds a batch of stage k, and of exit k's own work.
    """

    exit_names: list[str]
    batch_sizes: NDArray[np.int64]
    stage_s: NDArray[np.float64]
    exit_s: NDArray[np.float64]

    def to_frame(self) -> pandas.DataFrame:
        """A row for every exit and batch size: exit, batch_size, stage_s, exit_s."""
        k, b = np.indices(self.stage_s.shape).reshape(2, -1)
        return as_frame(
            {
                "exit": [self.exit_names[i] for i in k],
                "batch_size": self.batch_sizes[b],
                "stage_s": self.stage_s[k, b],
                "exit_s": self.exit_s[k, b],
            }
        )


def count_macs(function: Callable[[Rows], Any], rows: Rows, *, roots: Iterable[nn.Module] = ()) -> float:
    """Multiply-accumulates a sample of ``function(rows)``, by torch's FlopCounterMode (it counts two a MAC).

    Counted outside inference mode and with the fused attention path off: inside that path nothing would be counted.
    Element-wise work, pooling and normalisation are not MACs. A module whose weights go where the counter cannot follow
    leads to a warning, which names it as it is called in ``roots``.
    """
    macs, findings = counted_macs(function, rows)
    if findings:
        names = {part: name for root in roots for name, part in root.named_modules()}
        warn(
            f"the multiply-accumulates of {', '.join(_described(*finding, names) for finding in findings)} cannot be "
            "counted and are left out of the cost. Use cost='latency' or give the costs.",
            CostWarning,
        )
    return macs


def _described(module: nn.Module | None, operator: str | None, names: dict[nn.Module, str]) -> str:
    """A module whose work is not counted, and the operator that does it where that is known."""
    if module is None:
        return str(operator)
    name, kind = names.get(module), type(module).__name__
    return (f"{name} ({kind})" if name else kind) + (f" in {operator}" if operator else "")


def counted_macs(function: Callable[[Rows], Any], rows: Rows) -> tuple[float, list[Finding]]:
    """As :func:`count_macs`, and the modules and operators that are left out, without a warning."""
    with unfused_attention:
        try:
            flops, findings = _counted_flops(function, rows, gradients=False)
        except AssertionError:  # the counter follows modules by gradients where one is given a view of a parameter
            flops, findings = _counted_flops(function, rows, gradients=True)
    return flops / 2 / n_rows(rows), findings


def _counted_flops(function: Callable[[Rows], Any], rows: Rows, gradients: bool) -> tuple[int, list[Finding]]:
    counter = flop_counter()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), UncountedWeights(counter) as watch, counter:
        function(rows)
    return int(counter.get_total_flops()), list(watch.findings)


def measure_latency(function: Callable[[Rows], Any], rows: Rows, *, min_seconds: float = 0.2) -> float:
    """Median seconds a sample of ``function(rows)`` at this batch size, by torch.utils.benchmark (warmed up)."""
    from torch.utils.benchmark import Timer  # imports torch's compiler tooling, so only where it is used

    def call() -> None:
        with torch.inference_mode():
            function(rows)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_seconds).median) / n_rows(rows)
