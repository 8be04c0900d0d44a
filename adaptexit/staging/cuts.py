"""Where a model can be cut: candidates found by running it once under hooks, and a choice of them at even cost.

A cut is the dotted name of a module that is called exactly once in the evaluation forward; the cut point is right after
it returns. Whether a model can really be split there is for the splitting to prove.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from adaptexit.staging.contexts import evaluating, random_state_kept
from adaptexit.staging.cut_table import CutPoint, CutTable
from adaptexit.staging.model_state import state_restored
from adaptexit.staging.nested import Rows, tensors_in
from adaptexit.staging.profiling import Call, Scan, ancestors, latencies

FIRST_SHARE, LAST_SHARE = 0.05, 0.97
"""Automatic cuts lie between these shares of the whole model's MACs."""


def list_cuts(
    model: str | nn.Module, example: Rows | None = None, *, every: bool = False, repeats: int = 5
) -> CutTable:
    """What a model can be cut at, in execution order, with the cost of getting there.

    Left out are modules that are never called (a ``ModuleList``), that are called more than once, and whose return is
    the model's own output. By default the table holds what a person would cut at, the outermost name of each point:
    the modules in the model's ``feature_info``, its stages and blocks, and modules after which nothing but their output
    is needed, all with MACs before and after them; convolutions, norms and activations inside blocks are left out.

    Parameters
    ----------
    model : str or nn.Module
        A timm name (made without pretrained weights) or a module, which is run in evaluation mode and given back as it
        was. ``DataParallel`` and ``torch.compile`` wrappers are looked through.
    example : batch of inputs, optional
        What the model is run on, (N, ...). Needed unless the model is timm's or a torchvision classifier: one image of
        the size that they are made for.
    every : bool
        Every module that can be cut at, inside blocks too, and every name of the same point.
    repeats : int
        Timed runs; the latency is their median, after one run that is thrown away.

    Returns
    -------
    CutTable

    Raises
    ------
    TypeError
        For TorchScript, or what is no model.
    ValueError
        For an unknown timm name, a module that needs an ``example``, or ``repeats`` below 1.
    """
    _check_count("repeats", repeats)
    module, example = _prepared(model, example)
    with evaluating([module]), state_restored(module):
        scan = Scan(module, example)
        calls = scan.once() if every else scan.structural()
        seconds = latencies(module, example, [call.name for call in calls], repeats)
    points = tuple(_point(scan, call, float(s)) for call, s in zip(calls, seconds, strict=False))
    return CutTable(points, scan.macs, float(seconds[-1]))


def auto_cuts(model: str | nn.Module, example: Rows | None = None, n: int = 3) -> list[str]:
    """About ``n`` cuts at even cost, in execution order: the first of :func:`propose_cuts`.

    Parameters
    ----------
    model, example
        As for :func:`list_cuts`.
    n : int
        Cuts wanted.

    Returns
    -------
    list of str
        ``n`` names, or fewer where the model does not offer as many that lie apart.

    Raises
    ------
    ValueError
        Where the model offers none, and as :func:`list_cuts`.
    """
    return propose_cuts(model, example, n)[0]


def propose_cuts(model: str | nn.Module, example: Rows | None = None, n: int = 3) -> list[list[str]]:
    """Several choices of about ``n`` cuts at even cost, best first, for a caller who finds that one cannot be split.

    The targets are 1/(n+1) ... n/(n+1) of the model's MACs. The first choice takes the model's own stages (its
    ``feature_info``, or else its outermost modules) and, where these are uneven, blocks inside them; the second takes
    stages only, the third whatever is nearest to the targets; a choice of fewer cuts comes later. Every cut returns one
    tensor.

    Parameters
    ----------
    model, example, n
        As for :func:`auto_cuts`.

    Returns
    -------
    list of list of str
        At least one choice; each holds distinct names in execution order.

    Raises
    ------
    ValueError
        As :func:`auto_cuts`.
    """
    _check_count("n", n)
    module, example = _prepared(model, example)
    with evaluating([module]), state_restored(module):
        scan = Scan(module, example)
    calls = [c for c in scan.structural() if c.is_tensor and FIRST_SHARE <= c.macs / scan.macs <= LAST_SHARE]
    points = [_point(scan, call) for call in calls]
    if not points:
        raise ValueError(
            f"cuts of {type(module).__name__} cannot be chosen automatically: none of its stages and blocks returns "
            f"one tensor between {FIRST_SHARE:.0%} and {LAST_SHARE:.0%} of its MACs. Look at list_cuts(model, example, "
            "every=True) and name the cuts, or give the stages yourself."
        )
    names = {p.name for p in points}
    outermost = {name for name in names if not any(above in names for above in ancestors(name))}
    coarse = (
        {p.name for p in points if p.name in scan.info and p.is_narrow}
        or outermost & {call.name for call in calls if call.holds_work}
        or outermost
    )
    choices = [
        _even(points, n, [0.4 / (n + 1) * (p.name not in coarse) for p in points]),
        _even([p for p in points if p.name in coarse], n),
        _even(points, n),
    ]
    choices = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    return sorted(choices, key=len, reverse=True)


def check_names(model: nn.Module, names: Iterable[str], argument: str = "cuts") -> list[str]:
    """Names of cuts, checked against the modules that a model has.

    Parameters
    ----------
    model : nn.Module
        Wrappers are looked through, as in :func:`list_cuts`.
    names : sequence of str
    argument : str
        How errors name it.

    Returns
    -------
    list of str
        The same modules in the order given; one that is registered under several names goes by the first.

    Raises
    ------
    TypeError
        For anything but a sequence of strings, or TorchScript.
    ValueError
        For no names, names that the model does not have (the nearest are named), and modules named twice.
    """
    module = unwrapped(model)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"{argument} must be a list of module names; got {names!r}. Write [{names!r}] for a single one."
        )
    names = list(names)
    if not names:
        raise ValueError(f"{argument} must name at least one module; got none. See list_cuts(model) for what there is.")
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{argument} must be module names (str); got {odd[0]!r} of type {type(odd[0]).__name__}.")
    modules = dict(module.named_modules(remove_duplicate=False))
    if wrong := [name for name in names if not name or name not in modules]:
        hints = "; ".join(f"{name!r} ({_nearest(module, name)})" for name in wrong)
        raise ValueError(f"{argument} must be names of modules of {type(module).__name__}; it has no {hints}.")
    first_names = {id(part): name for name, part in module.named_modules()}
    canonical = [first_names[id(modules[name])] for name in names]
    for i, name in enumerate(canonical):
        if name in canonical[:i]:
            other = names[canonical.index(name)]
            also = "twice" if other == names[i] else f"also as {other!r}"
            raise ValueError(f"{argument} must be different modules; got {names[i]!r} {also}. Leave one out.")
    return canonical


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``; TorchScript is refused.

    Raises
    ------
    TypeError
        For a ``torch.jit.ScriptModule``, or what is no ``nn.Module``.
    """
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's
            module = original
        else:
            break
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be an ordinary nn.Module to be cut; got TorchScript ({type(module).__name__}). Give the "
            "module that it was scripted or traced from."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {module!r}.")
    return module


def _point(scan: Scan, call: Call, latency_s: float = float("nan")) -> CutPoint:
    relative = call.macs / scan.macs if scan.macs else 0.0
    return CutPoint(call.name, call.shape, call.macs, relative, latency_s, call.is_tensor, scan.is_narrow(call))


def _even(points: Sequence[CutPoint], n: int, handicaps: Sequence[float] | None = None) -> list[str]:
    """Names of up to n points nearest to even shares; a handicap is a distance that a point has to make up for.

    Points closer together than a third of the spacing are not chosen together; a target further than two spacings from
    what is left goes without. A point that is not narrow starts half a spacing behind.
    """
    n = min(n, len(points))
    spacing = 1 / (n + 1)
    shares = [p.relative_macs for p in points]
    behind = [0.5 * spacing * (not p.is_narrow) for p in points]
    behind = [b + h for b, h in zip(behind, handicaps or [0.0] * len(points), strict=True)]

    @cache
    def best(target: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The least distance of the targets from this one on to points from ``start`` on, and these points."""
        if target > n:
            return 0.0, ()
        distance, later = best(target + 1, start)
        options = [(distance + 2 * spacing, later)]
        for i in range(start, len(points)):
            after = next((j for j in range(i + 1, len(points)) if shares[j] >= shares[i] + spacing / 3), len(points))
            distance, later = best(target + 1, after)
            options.append((distance + abs(shares[i] - target * spacing) + behind[i], (i, *later)))
        return min(options)

    choice = best(1, 0)[1]
    if not choice:  # all lie so far from every target that leaving each without a point costs less
        targets = spacing * np.arange(1, n + 1)
        choice = (min(range(len(points)), key=lambda i: np.abs(targets - shares[i]).min() + behind[i]),)
    return [points[i].name for i in choice]


def _nearest(module: nn.Module, wrong: str) -> str:
    """Which names come near a wrong one: spelt alike, or the last children of the part of it that is right."""
    names = [name for name, _ in module.named_modules() if name]
    right = next((name for name in reversed(ancestors(wrong)) if name in names), "")
    children = [f"{right}.{name}" for name, _ in module.get_submodule(right).named_children()] if right else []
    if wrong[len(right) + 1 :].isdigit() and children:
        near = children[-3:]
    else:
        near = difflib.get_close_matches(wrong, children, n=4) if children else []
        near = near or sorted(difflib.get_close_matches(wrong, names, n=4)) or children[-4:]
    return f"near it: {', '.join(map(repr, near))}" if near else "nothing near it; see list_cuts(model)"


def _prepared(model: str | nn.Module, example: Rows | None) -> tuple[nn.Module, Rows]:
    """The module to run and what to run it on."""
    if isinstance(model, str):
        if ":" not in model and not timm.is_model(model):
            near = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=3))
            raise ValueError(
                f"model must be the name of a timm model or an nn.Module; got {model!r}. "
                + (f"Near it: {near}." if near else "See timm.list_models().")
            )
        with random_state_kept():
            model = timm.create_model(model, pretrained=False)
    module = unwrapped(model)
    if example is None:
        return module, _default_example(module)
    first = next(tensors_in(example), None)
    if first is None or not first.ndim or not len(first):
        kind = type(example).__name__ if first is None else f"a tensor of shape {tuple(first.shape)}"
        raise ValueError(
            "example must be a batch of inputs, a tensor (N, ...) of at least one sample or several nested; got "
            f"{kind}."
        )
    return module, example


def _default_example(module: nn.Module) -> Tensor:
    """One black image of the size that a timm model or a torchvision classifier is made for."""
    path = type(module).__module__.split(".")
    if getattr(module, "pretrained_cfg", None):
        shape = tuple(resolve_model_data_config(module)["input_size"])
    elif path[:2] == ["torchvision", "models"] and len(path) == 3:
        side = int(getattr(module, "image_size", 299 if path[2] == "inception" else 224))
        shape = (3, side, side)
    else:
        raise ValueError(
            f"example must be a batch of inputs for {type(module).__name__}: what it takes is known only of timm "
            "models and torchvision classifiers. Give example=, a tensor (N, ...)."
        )
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}.")
