"""The pieces that a split is made of: a traced forward cut into functions behind its cuts, or stages that were given.

The graph of a forward is cut behind the named modules; each piece becomes a function of the model and of the values
that are still needed, written as text and compiled, so that a stage costs no more than the model's own Python.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

from torch import Tensor, fx, nn

from adaptexit.exceptions import SplitError, SplitWarning, warn
from adaptexit.staging.carried import copied
from adaptexit.staging.fx_trace import CutCall, Traced, trace

_SERIAL = count()

StageFunction = Callable[..., tuple[Any, tuple[Any, ...]]]
"""From the model and what is carried in to what the stage answers and what is carried on."""

CarriedValue = tuple[str, Any, Any]
"""Name of a value that is needed after a cut, and what it is for 2 and for 3 samples."""


@dataclass
class Pieces:
    """Stages as functions; what is carried over every cut; what every stage answers, for 2 and for 3 samples.

    Where the stages turn out to be wrong, ``doubt`` says why, if that is known.
    """

    functions: list[StageFunction]
    carried: list[list[CarriedValue]]
    features: list[tuple[Any, Any]]
    doubt: SplitError | None = None


class Chain:
    """Stages that were given."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self.module = nn.Sequential(*stages)
        self.module.training = any(stage.training for stage in stages)
        self.cuts = tuple(str(k) for k in range(len(stages) - 1))

    def compiled(self, batches: tuple[Tensor, Tensor]) -> Pieces:
        values: list[Any] = list(batches)
        features = []
        for stage in self.module:
            values = [stage(copied(value)) for value in values]
            features.append((values[0], values[1]))

        def function(k: int) -> StageFunction:
            def run(module: Any, carried: Any) -> tuple[Any, tuple[Any, ...]]:
                output = module[k](carried)
                return output, (output,) if k < len(self.cuts) else ()

            return run

        carried = [[("output", *pair)] for pair in features[:-1]]
        return Pieces([function(k) for k in range(len(features))], carried, features)


class TracedModel:
    """Stages cut out of a module's traced forward."""

    def __init__(self, module: nn.Module, cuts: tuple[str, ...]) -> None:
        self.module, self.cuts = module, cuts

    def compiled(self, batches: tuple[Tensor, Tensor]) -> Pieces:
        self._warn_of_hooks()
        traced = trace(self.module, self.cuts, batches)
        calls = [_only_call(self.module, cut, traced) for cut in self.cuts]
        nodes = list(traced.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        ends = [place[call.last] for call in calls]
        _check_order(self.cuts, ends)
        if not any(_computes(node) for node in nodes[ends[-1] + 1 :]):
            raise SplitError(
                f"nothing is left to compute after {self.cuts[-1]!r}: an exit there would be the model itself. "
                "Leave it out."
            )
        # A value is carried over a cut if it is computed before it and used behind it.
        last_use = {node: max([place[user] for user in node.users], default=-1) for node in nodes}
        functions: list[StageFunction] = []
        pairs: list[list[CarriedValue]] = []
        before: list[fx.Node] = []
        for start, end, call in zip(
            [0, *(end + 1 for end in ends)], [*ends, len(nodes) - 1], [*calls, None], strict=True
        ):
            live = [n for n in nodes[: end + 1] if last_use[n] > end and not _attribute(n)] if call else []
            functions.append(_function(nodes[start : end + 1], before, live, call))
            if call:
                pairs.append([(node.name, *traced.values[node]) for node in live])
            before = live
        outputs = [*(call.output for call in calls), nodes[-1].args[0]]
        return Pieces(functions, pairs, [traced.pair_of(output) for output in outputs], traced.by_size)

    def _warn_of_hooks(self) -> None:
        ancestors = {""} | {cut[:i] for cut in self.cuts for i, letter in enumerate(cut) if letter == "."}
        for name in sorted(ancestors):
            part = self.module.get_submodule(name)
            if part._forward_hooks or part._forward_pre_hooks:
                warn(
                    f"hooks on {name or 'the model itself'!r} do not fire in the stages, since a cut lies inside it. "
                    "Put them on modules that are called in one piece.",
                    SplitWarning,
                )


def _only_call(module: nn.Module, cut: str, traced: Traced) -> CutCall:
    calls = traced.cut_calls[cut]
    if len(calls) == 1:
        return calls[0]
    if calls:
        raise SplitError(
            f"{cut!r} is called {len(calls)} times in a forward, and an exit needs one place. Cut at a module that is "
            "called once."
        )
    inside = [name for name in traced.called if name.startswith(f"{cut}.")]
    kind = type(module.get_submodule(cut)).__name__
    hint = (
        f" Cut at its last called child, {inside[-1]!r}."
        if inside
        else " Choose another: list_cuts shows what there is."
    )
    raise SplitError(f"{cut!r} (a {kind}) is never called in the evaluation forward.{hint}")


def _check_order(cuts: Sequence[str], ends: Sequence[int]) -> None:
    order = sorted(range(len(cuts)), key=lambda i: ends[i])
    if order != list(range(len(cuts))):
        raise ValueError(
            f"cuts must come in the order in which the model runs them: {[cuts[i] for i in order]}; got {list(cuts)}."
        )
    for i, (one, other) in enumerate(pairwise(ends)):
        if one == other:
            raise ValueError(f"cuts must lie apart; {cuts[i]!r} and {cuts[i + 1]!r} are the same point. Keep one.")


def _attribute(node: fx.Node) -> bool:
    """Whether a node is read from the model (or was made while tracing), and so can be read again in any stage."""
    return node.op == "get_attr" or getattr(node.target, "__name__", None) == "constant"


def _computes(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_method", "call_function") and not _attribute(node)


def _function(nodes: list[fx.Node], before: list[fx.Node], live: list[fx.Node], call: CutCall | None) -> StageFunction:
    """A piece of the graph as a function of the model and of the values carried in."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in before}

    def local(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, local)  # an attribute that was first read in an earlier stage
        return copies[node]

    for node in nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, local)
    output = call.output if call else nodes[-1].args[0]
    graph.output(fx.node.map_arg((output, tuple(live)), local))
    code = graph.python_code("self")
    source, filename = code.src, f"<adaptexit stage {next(_SERIAL)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)
    function: StageFunction = namespace["forward"]
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function
