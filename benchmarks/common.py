"""What every benchmark shares: the machine, interleaved timing, result files and Markdown tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "torchvision", "timm")


STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def restart_with_steady_allocator(threads: int) -> None:
    """Run this program anew where freed memory is kept for the next tensor; call it before anything else is done.

    Left alone, glibc's malloc hands large blocks back to the system and fetches them again, page by page, for the next
    tensor. That can double a model's time, and it hits a model in one piece and the same in stages differently. Nothing
    happens where the environment is that already, or on other systems than Linux.
    """
    settings = STEADY_ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads allowed, system, versions and date: what a timing means nothing without."""
    cores = os.cpu_count() or 1
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS", cores)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, dict[str, Any]]:
    """Seconds of several functions, timed in turns so that a slow spell of the machine hits all of them.

    Parameters
    ----------
    functions : dict of callables without arguments
    repeats : int
        Rounds that count. Every round calls each function once and starts with another one.
    warmup : int, default=1
        Rounds thrown away first.

    Returns
    -------
    dict
        For each name ``median``, ``q1``, ``q3``, ``seconds`` (wall-clock, all of them), ``cpu_median`` (this process's
        processor seconds: well below ``median`` where other work held the cores), ``n`` and ``warmup``.
    """
    names = list(functions)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wall_s, cpu_s = timed(functions[name])
            if turn >= warmup:
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
    return {
        name: summarised(wall[name])
        | {"cpu_median": float(np.median(cpu[name])), "warmup": warmup, "seconds": wall[name]}
        for name in names
    }


def ratio(timings: dict[str, dict[str, Any]], above: str, below: str) -> float:
    """Median over the rounds of one function's seconds divided by another's in the same round."""
    return ratios(timings, above, below)["median"]


def ratios(timings: dict[str, dict[str, Any]], above: str, below: str) -> dict[str, float]:
    """Median and quartiles over the rounds of one function's seconds divided by another's in the same round."""
    return summarised(np.divide(timings[above]["seconds"], timings[below]["seconds"]))


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall_start, time.process_time() - cpu_start


def summarised(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of repeated measurements."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "n": len(values)}


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and number of independent runs."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "n": len(values)}


def quartiles(summary: dict[str, float], form: str = ".3f") -> str:
    """Quartiles of :func:`summarised`, as a table shows them."""
    return f"{summary['q1']:{form}} to {summary['q3']:{form}}"


def middle(summary: dict[str, float], form: str = ".3g", unit: float = 1) -> str:
    """Median and quartiles of :func:`summarised`, multiplied by a unit."""
    median, q1, q3 = (unit * summary[name] for name in ("median", "q1", "q3"))
    return f"{median:{form}} ({q1:{form}} to {q3:{form}})"


def spread(values: Any, digits: int = 2) -> str:
    """Mean and standard deviation; a dash where a seed has no value."""
    if not np.isfinite(values).all():
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    runs = mean_and_sd(values)
    return f"{runs['mean']:.{digits}f} ({runs['sd']:.{digits}f})"


def require_one_thread(parser: argparse.ArgumentParser) -> None:
    """Stop unless the environment allows one thread only, and say what machine it is."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: every figure is for one thread.")
    machine = describe_machine()
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread, Python {machine['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in machine['versions'].items())}, {machine['date']}"
    )


def write_result(name: str, payload: dict[str, Any]) -> Path:
    """Write figures, with the machine they were measured on, to ``benchmarks/results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), **payload}, indent=1, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"JSON cannot hold a {type(value).__name__}.")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table under a heading; floats are rounded to four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    print(f"\n### {title}\n")
    for line in (header, ["---"] * len(header), *cells):
        print(f"| {' | '.join(line)} |")
