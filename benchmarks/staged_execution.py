"""What running a model in stages costs, and what it gains when half the samples leave at the first cut.

ResNet-18, ViT-tiny and MobileNetV3-large (timm, 224 pixels, random weights, noise as images: neither changes how long
they take) and the CIFAR ResNet-56 (32 pixels, with the weights and images given), each cut in three places, those that
``exits="auto"`` takes. At every cut the mean over the positions and one linear layer, so that what is measured is the
staging and not a heavy head. float32, on the processor:

- **nobody leaves**: the staged model through the executor against ``module(x)``, with the three early exits switched on
  under a rule that accepts nobody, and with them off; beside them the share of the heads and their confidences, timed
  within the run, where caches are cold;
- **half leave**: a prescribed half of every batch leaves at the first cut and the rest go to the end, merged into full
  batches; the other two exits are off, so that only one head is paid for. Ideal is the first stage and its head on
  all samples plus the other stages on half of them, both in full batches, each timed by itself: what picking survivors
  out and merging them costs is the difference. Beside it two ways without picking: a batch that stops only when all of
  it is sure, and one sample at a time. The answers of those who stay are compared with the model's own.

Medians and quartiles over interleaved rounds, the first thrown away; ratios are taken within a round. A second,
identical timing of the plain model shows the noise. Without ``--weights`` and ``--data`` ResNet-56, too, has random
weights and gets noise. About half an hour on two cores::

    python -m benchmarks.staged_execution --weights DIR --data DIR --threads 2
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.core.scores import max_proba
from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.build import feature_specs, new_heads
from adaptexit.networks.models import build_model
from adaptexit.networks.readers import LogitsReader
from adaptexit.staging.executor import execute
from adaptexit.staging.splitting import split
from benchmarks.cifar import tensors
from benchmarks.common import (
    STEADY_ALLOCATOR,
    describe_machine,
    interleaved,
    middle,
    print_table,
    quartiles,
    ratios,
    restart_with_steady_allocator,
    summarised,
    timed,
    write_result,
)
from benchmarks.staging import CUTS, FunctionPolicy, LinearHead, new_model, noise_images
from examples.cifar import pretrained

ROUNDS_NOBODY = {1: 21, 32: 9, 256: 3}
"""Batch sizes and rounds that count."""
ROUNDS_HALF = 7
SAMPLES_HALF = {"resnet56_cifar": {32: 256, 256: 512}}
SAMPLES_HALF_OTHERS = {32: 128}
"""Batch sizes and numbers of samples: two batches at least, so that survivors can fill one."""

LONGEST_PLAIN_S = 60.0
"""A batch size at which one plain run takes longer is left out."""

TOLERANCE = 1e-4
"""Of the logits of those who stay, relative to the model's largest."""


def branched(name: str, weights: Path | None) -> BranchedNetwork:
    """A model in four stages, with a linear head at each cut."""
    module = pretrained(56, weights) if weights and name == "resnet56_cifar" else new_model(name)
    example = noise_images(name, 6)
    model = build_model(module, None, name)
    parts = split(module, CUTS[name], example)
    n_classes = plain(module, [example])[0].shape[1]
    heads = new_heads(LinearHead, feature_specs(parts), model, n_classes, 0)
    return BranchedNetwork(model, parts, [head.eval() for head in heads])


@torch.inference_mode()
def plain(module: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """The model as it is."""
    return [module(x) for x in batches]


# -- nobody leaves -----------------------------------------------------------------------------------------------------


def nobody(k: int, batch: Answer) -> NDArray[np.bool_]:
    """Everybody goes on."""
    return np.zeros(len(batch.scores), dtype=bool)


class HeadClock:
    """Seconds that a network spends in its heads and their confidences, run by run."""

    def __init__(self) -> None:
        self.runs: list[float] = []

    def around(self, network: BranchedNetwork) -> BranchedNetwork:
        """A copy of the network with its heads timed where they are run: between stages, with cold caches."""
        timed_copy: Any = copy.copy(network)
        timed_copy.exit = self._timed(network.exit)
        timed_copy.reader = LogitsReader(self._timed(partial(max_proba, xp=torch)))
        return timed_copy

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            output = function(*args)
            self.runs[-1] += time.perf_counter() - start
            return output

        return run


def nobody_leaves(name: str, network: BranchedNetwork, images: Tensor, size: int, rounds: int) -> dict[str, Any]:
    """Staged against plain, one batch a call; of tiny batches several calls are timed together."""
    module = network.split.module
    calls = max(1, 8 // size)
    batches = list(images[: calls * size].split(size))
    if (plain_s := timed(lambda: plain(module, batches))[0]) > LONGEST_PLAIN_S:
        return left_out(name, size, plain_s)
    clock = HeadClock()
    timed_copy = clock.around(network)
    all_on = FunctionPolicy(nobody, np.ones(network.n_exits, dtype=bool))
    all_off = FunctionPolicy(nobody, np.arange(network.n_exits) == network.n_exits - 1)

    def run_on() -> None:
        clock.runs.append(0.0)
        for x in batches:
            execute(timed_copy, [x], all_on, batch_size=size)

    timings = interleaved(
        {
            "plain": lambda: plain(module, batches),
            "plain again (noise)": lambda: plain(module, batches),
            "staged, exits off": lambda: [execute(network, [x], all_off, batch_size=size) for x in batches],
            "staged, exits on": run_on,
        },
        rounds,
    )
    over_plain = {what: ratios(timings, what, "plain") for what in timings if what != "plain"}
    seconds = {what: np.array(t["seconds"]) for what, t in timings.items()}
    heads = np.array(clock.runs[-rounds:])
    over_plain["of which heads"] = summarised(heads / seconds["plain"])
    over_plain["staged, exits on, less heads"] = summarised((seconds["staged, exits on"] - heads) / seconds["plain"])
    return {"model": name, "batch": size, "calls": calls, "timings": timings, "over plain": over_plain}


def nobody_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """Lines of the table: one a variant."""
    start = [figures["model"], figures["batch"]]
    if "skipped" in figures:
        return [[*start, figures["skipped"], "", "", ""]]
    rows = [[*start, "plain", 1e3 * figures["timings"]["plain"]["median"] / figures["calls"], 1.0, ""]]
    for what, summary in figures["over plain"].items():
        timing = figures["timings"].get(what)
        call_ms = 1e3 * timing["median"] / figures["calls"] if timing else ""
        rows.append([*start, what, call_ms, f"{summary['median']:.3f}", quartiles(summary)])
    return rows


# -- half leave --------------------------------------------------------------------------------------------------------


class Prescribed:
    """Who leaves at the one early exit, given for every sample in the order in which they come."""

    def __init__(self, leave: NDArray[np.bool_], whole_batches: bool = False) -> None:
        self.leave, self.whole_batches, self.n_seen = leave, whole_batches, 0

    def __call__(self, k: int, batch: Answer) -> NDArray[np.bool_]:
        n = len(batch.scores)
        sure = self.leave[self.n_seen : self.n_seen + n]
        self.n_seen += n
        return np.full(n, sure.all()) if self.whole_batches else sure


def half_leave(name: str, network: BranchedNetwork, images: Tensor, size: int, rounds: int, n: int) -> dict[str, Any]:
    """A random half of each of the batches of n samples leaves at the first cut."""
    parts, module = network.split, network.split.module
    batches = list(images[:n].split(size))
    singles = list(images[:n].split(1))
    random = np.random.default_rng(0)
    leave = np.concatenate([random.permutation(np.arange(len(x)) < len(x) // 2) for x in batches])
    first_only = np.zeros(network.n_exits, dtype=bool)
    first_only[[0, -1]] = True
    if (plain_s := timed(lambda: plain(module, batches[:1]))[0]) > LONGEST_PLAIN_S:
        return left_out(name, size, plain_s)

    def run(whole: bool = False, keep_logits: bool = False) -> Answer:
        policy = FunctionPolicy(Prescribed(leave, whole), first_only)
        return execute(network, batches, policy, batch_size=size, keep_logits=keep_logits)

    def run_one(x: Tensor, leaves: np.bool_) -> Answer:
        """One sample, which stops at the first cut or goes to the end."""
        policy = FunctionPolicy(lambda k, batch: np.array([leaves]), first_only)
        return execute(network, [x], policy, batch_size=1)

    stayers = compare_stayers(run(keep_logits=True), torch.cat(plain(module, batches)), leave)
    with torch.inference_mode():
        waiting = [parts.run(0, x) for x in images[:n][torch.from_numpy(~leave)].split(size)]

    @torch.inference_mode()
    def first_stage() -> None:
        for x in batches:
            network.read(0, parts.run(0, x))

    @torch.inference_mode()
    def other_stages() -> None:
        for carried in waiting:
            for k in range(1, parts.n_stages):
                carried = parts.run(k, carried)

    timings = interleaved(
        {
            "plain": lambda: plain(module, batches),
            "plain again (noise)": lambda: plain(module, batches),
            "half leave": run,
            "whole-batch rule": lambda: run(whole=True),
            "one sample at a time": lambda: [run_one(x, leaves) for x, leaves in zip(singles, leave, strict=True)],
            "plain, one at a time": lambda: plain(module, singles),
            "first stage and head, all samples": first_stage,
            "other stages, half the samples": other_stages,
        },
        rounds,
    )
    seconds = {what: np.array(t["seconds"]) for what, t in timings.items()}
    ideal = seconds["first stage and head, all samples"] + seconds["other stages, half the samples"]
    ways = [what for what in timings if what not in ("plain", *list(timings)[-2:])]
    return {
        "model": name,
        "batch": size,
        "n_samples": n,
        "timings": timings,
        "speed-up": {what: ratios(timings, "plain", what) for what in ways},
        "speed-up, ideal": summarised(seconds["plain"] / ideal),
        "reached / ideal": summarised(ideal / seconds["half leave"]),
        "one at a time, staged over plain": ratios(timings, "plain, one at a time", "one sample at a time"),
        "stayers": stayers,
    }


def compare_stayers(answers: Answer, logits: Tensor, leave: NDArray[np.bool_]) -> dict[str, float]:
    """Stop where the samples left elsewhere than prescribed or those who stay are answered differently."""
    stay = answers.exits > 0
    if not np.array_equal(stay, ~leave):
        raise RuntimeError("samples left elsewhere than prescribed.")
    own = logits.numpy()[stay]
    difference = float(np.abs(answers.logits[stay] - own).max() / np.abs(own).max())
    if difference > TOLERANCE:
        raise RuntimeError(f"those who stay are answered differently: by {difference:.2g} of the largest logit.")
    return {
        "n": int(stay.sum()),
        "same class": float((answers.predictions[stay] == own.argmax(1)).mean()),
        "largest difference of logits": difference,
    }


def half_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """Lines of the table: one a way to run."""
    start = [figures["model"], figures["batch"]]
    if "skipped" in figures:
        return [[*start, figures["skipped"], *[""] * 5]]
    per_sample = {what: 1e3 * t["median"] / figures["n_samples"] for what, t in figures["timings"].items()}
    ideal, share = figures["speed-up, ideal"], figures["reached / ideal"]
    rows: list[list[Any]] = [[*start, "plain", per_sample["plain"], 1.0, "", "", ""]]
    for what, summary in figures["speed-up"].items():
        beside = [f"{ideal['median']:.3f}", middle(share, form=".3f")] if what == "half leave" else ["", ""]
        rows.append([*start, what, per_sample[what], f"{summary['median']:.3f}", quartiles(summary), *beside])
    return rows


# -- both --------------------------------------------------------------------------------------------------------------


def left_out(name: str, size: int, plain_s: float) -> dict[str, Any]:
    """In place of figures."""
    return {"model": name, "batch": size, "skipped": f"left out: one plain run takes {plain_s:.0f} s"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder with resnet56.safetensors")
    parser.add_argument("--data", type=Path, help="folder with val, for ResNet-56")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--quick", action="store_true", help="only try it out: tiny batches, nothing is written")
    args = parser.parse_args()
    restart_with_steady_allocator(args.threads)
    torch.set_num_threads(args.threads)
    print(describe_machine())
    rounds_nobody = {1: 2, 4: 2} if args.quick else ROUNDS_NOBODY
    rounds_half = 2 if args.quick else ROUNDS_HALF
    whole, half = [], []
    for name in args.models:
        cuts = CUTS[name]
        samples_half = {4: 8} if args.quick else SAMPLES_HALF.get(name, SAMPLES_HALF_OTHERS)
        n_images = max(8, *rounds_nobody, *samples_half.values())
        network = branched(name, args.weights)
        with_images = args.data is not None and name == "resnet56_cifar"
        images = tensors(args.data, ("val",))[0][:n_images] if with_images else noise_images(name, n_images)
        print(f"\n{name}: cut after {', '.join(cuts)}; verified to {network.split.difference:.1g}", flush=True)
        whole += [nobody_leaves(name, network, images, size, rounds) for size, rounds in rounds_nobody.items()]
        half += [half_leave(name, network, images, size, rounds_half, n) for size, n in samples_half.items()]
        for figures in half[-len(samples_half) :]:
            stayers = figures.get("stayers", figures.get("skipped"))
            print(f"batch {figures['batch']}, those who stay: {stayers}", flush=True)
    print_table(
        "Nobody leaves",
        ["model", "batch", "variant", "ms a batch (median)", "over plain (median)", "quartiles"],
        [row for figures in whole for row in nobody_rows(figures)],
    )
    print_table(
        "Half the samples leave at the first cut",
        ["model", "batch", "how", "ms a sample", "speed-up over plain", "quartiles", "ideal", "reached / ideal"],
        [row for figures in half for row in half_rows(figures)],
    )
    if args.quick:
        return
    payload = {
        "threads": args.threads,
        "allocator": STEADY_ALLOCATOR,
        "cuts": CUTS,
        "weights": "random, but for resnet56_cifar" if args.weights else "random",
        "nobody leaves": whole,
        "half leave": half,
    }
    print(f"\nwritten: {write_result('staged_execution', payload)}")


if __name__ == "__main__":
    main()
