"""Cut a model after named modules: stages that a sample can stop between, and the same answers.

The traced graph is cut behind the named modules; each piece becomes a function of the model and of the values that are
still needed. Weights stay where they are, in the user's module, whose hooks on submodules keep firing. No split is
handed out before it was compared with the model itself.
"""

from __future__ import annotations

import copy
import linecache
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptexit.staging.cuts import check_names, unwrapped
from adaptexit.staging.live import Carried, Layout, Live, UnsupportedValueError, copied, layout_of
from adaptexit.staging.modes import evaluating, exact_arithmetic
from adaptexit.staging.tracing import CutCall, SplitError, Traced, trace
from adaptexit.staging.verify import DifferenceError, difference_from_model, distinct, shuffled

_SERIAL = count()

_ILL_CONDITIONED = 1e-2
"""Differences up to this may be rounding in single precision; double precision tells."""

Stage = Callable[..., tuple[Any, tuple[Any, ...]]]
CarriedValue = tuple[str, Any, Any]
"""Name of a value that is needed after a cut, and what it is for 2 and for 3 samples."""


class SplitWarning(UserWarning):
    """Something of the model is not carried over into its stages."""


def split(module: nn.Module, cuts: Sequence[str], example: Tensor) -> Split:
    """Cut ``module`` after the modules named ``cuts``.

    Parameters
    ----------
    module : nn.Module
        Called with one tensor, the samples along its first axis. It is shared, not copied, and left as it is.
    cuts : sequence of str
        Dotted names of submodules that the evaluation forward calls exactly once, in the order of their calls.
    example : tensor (B, ...)
        Inputs as they will come; six distinct ones are used, and made by adding noise where there are fewer.

    Returns
    -------
    Split
        ``len(cuts) + 1`` stages whose composition answers as the module does, on any subset of the samples.

    Raises
    ------
    SplitError
        With the reason: a module that is never called or called twice, a forward that cannot be traced, a value that
        samples cannot be picked out of, or stages whose answers differ from the model's.
    ValueError
        For unknown names (with the nearest ones), a wrong order, or an empty example.
    """
    module = unwrapped(module)
    names = check_names(module, cuts)
    inputs = distinct(example)
    return _made(_Traceable(module, tuple(names)), inputs)


def from_stages(stages: Sequence[nn.Module], example: Tensor) -> Split:
    """The same for a model given as its stages, for what cannot be traced.

    Parameters
    ----------
    stages : sequence of nn.Module
        Each takes what the one before returned (nested tensors, the first the inputs); the last returns the answers.
        What a stage returns is the feature of its exit.
    example : tensor (B, ...)
    """
    if len(stages) < 2 or not all(isinstance(stage, nn.Module) for stage in stages):
        raise ValueError(f"stages must be at least two modules; got {[type(stage).__name__ for stage in stages]}.")
    return _made(_Chain(stages), distinct(example))


def _made(source: _Traceable | _Chain, inputs: Tensor) -> Split:
    with exact_arithmetic(), evaluating([source.module]), torch.no_grad():
        return Split(source, inputs)


class Split:
    """A model in stages.

    Attributes
    ----------
    module : the model, shared
    cuts : tuple of K-1 names, in execution order
    example : tensor
        Inputs for making the stages anew after unpickling: the values that the split was verified on, shuffled.
    difference : largest difference from the model's answers that verification saw, relative to the largest answer

    Notes
    -----
    A split can be copied and pickled with its module; after unpickling its stages are made anew. Hooks on submodules
    fire, except on the ancestors of cuts and on the module itself, which are not called in one piece. The Python of
    these is run once, when the split is made: numbers that it reads from the model stay as they were then (weights and
    buffers do not), and context managers in it (``no_grad``, ``autocast``) are not entered again. While a split is made
    no other thread may call modules, as torch.fx redirects all calls.
    """

    def __init__(self, source: _Traceable | _Chain, inputs: Tensor) -> None:
        """Use :func:`split` or :func:`from_stages`."""
        self._source = source
        self._parts: list[nn.Module] | None = None
        self.cuts = source.cuts
        pieces = source.compiled((inputs[:2], inputs[2:5]))
        self._functions: list[Stage] | None = pieces.functions
        self._layouts = [_layouts(cut, values) for cut, values in zip(self.cuts, pieces.carried, strict=True)]
        self.difference = self._verified([_layout_or_none(*pair) for pair in pieces.features], inputs)
        self.example = shuffled(inputs)

    def _verified(self, features: list[Layout | None], inputs: Tensor) -> float:
        """The largest difference from the model; float32 that is off by more than rounding is tried in float64."""
        try:
            return difference_from_model(self.module, self.run, self.cuts, features, inputs)
        except DifferenceError as error:
            if inputs.dtype != torch.float32 or error.difference > _ILL_CONDITIONED:
                raise
            twin = copy.deepcopy(self)  # the functions of the stages are shared
            twin.module.double()
            try:
                difference_from_model(twin.module, twin.run, self.cuts, features, inputs.double())
            except Exception:
                raise error from None
            return error.difference
        except SplitError:
            raise
        except Exception as error:
            raise SplitError(
                f"verification failed: {type(self.module).__name__} or its stages do not run on some of the samples, "
                f"so that samples depend on each other. {type(error).__name__}: {error}"
            ) from error

    @property
    def module(self) -> nn.Module:
        """The model whose stages these are."""
        return self._source.module

    @property
    def n_stages(self) -> int:
        """Number of stages K."""
        return len(self.cuts) + 1

    @property
    def stages(self) -> list[Callable[[Any], Carried]]:
        """K callables: the first takes inputs, the others what the one before returned."""
        return [partial(self.run, k) for k in range(self.n_stages)]

    @property
    def live(self) -> list[tuple[Layout, ...]]:
        """How the values that are carried over each cut hang on the number of samples."""
        return list(self._layouts)

    def run(self, k: int, carried: Any, *, checked: bool = True) -> Carried:
        """Run stage k on inputs (k = 0) or on what stage k-1 returned.

        That no part of the module is in training mode is looked for before the first stage, unless the caller sees to
        it (``checked=False``).
        """
        if self._functions is None:
            self._functions = self._rebuilt()
        module = self._source.module
        if k == 0:
            if checked:
                self._check_mode()
            n, state = len(carried), None
            feature, live = self._functions[0](module, carried)
        else:
            n, state = carried.live.n, carried.state
            feature, live = self._functions[k](module, *carried.live.values)
        return Carried(Live(live, self._layouts[k] if k < len(self._layouts) else (), n), feature, state)

    def visit(self, x: Tensor, look: Callable[[int, Any], None]) -> Any:
        """Run all stages on ``x`` and show the feature of every cut to ``look(k, feature)``; the model's output.

        Later stages may overwrite a feature: what is kept of it has to be copied at once.
        """
        carried: Any = x
        for k in range(self.n_stages):
            carried = self.run(k, carried)
            if k < len(self.cuts):
                look(k, carried.feature)
        return carried.feature

    def __call__(self, x: Tensor) -> Any:
        """The model's output, through all stages."""
        return self.visit(x, lambda k, feature: None)

    def _check_mode(self) -> None:
        if self._parts is None:
            self._parts = list(self.module.modules())
        if any(part.training for part in self._parts):
            raise SplitError(
                "stages run in evaluation mode only: in training mode batch normalisation makes samples depend on each "
                "other, so that none can leave. Call module.eval() first."
            )

    def _rebuilt(self) -> list[Stage]:
        """The functions made anew, for the device and precision that the module has by now."""
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        made = self.example if like is None else self.example.to(like.device)
        if like is not None and made.is_floating_point():
            made = made.to(like.dtype)
        with evaluating([self.module]):
            return self._source.compiled((made[:2], made[2:5])).functions

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_functions": None, "_parts": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        made._parts = None
        return made

    def __repr__(self) -> str:
        return f"Split({type(self.module).__name__}, cuts={list(self.cuts)})"


# -- where stages come from --------------------------------------------------------------------------------------------


@dataclass
class _Pieces:
    """Stages as functions; what is carried over every cut; what every stage answers, for 2 and for 3 samples."""

    functions: list[Stage]
    carried: list[list[CarriedValue]]
    features: list[tuple[Any, Any]]


class _Chain:
    """Stages that were given."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self.module = nn.Sequential(*stages)
        self.module.training = any(stage.training for stage in stages)
        self.cuts = tuple(str(k) for k in range(len(stages) - 1))

    def compiled(self, batches: tuple[Tensor, Tensor]) -> _Pieces:
        values: list[Any] = list(batches)
        features = []
        for stage in self.module:
            values = [stage(copied(value)) for value in values]
            features.append((values[0], values[1]))

        def function(k: int) -> Stage:
            def run(module: Any, carried: Any) -> tuple[Any, tuple[Any, ...]]:
                output = module[k](carried)
                return output, (output,) if k < len(self.cuts) else ()

            return run

        carried = [[("output", *pair)] for pair in features[:-1]]
        return _Pieces([function(k) for k in range(len(features))], carried, features)


class _Traceable:
    """Stages cut out of a module's traced forward."""

    def __init__(self, module: nn.Module, cuts: tuple[str, ...]) -> None:
        self.module, self.cuts = module, cuts

    def compiled(self, batches: tuple[Tensor, Tensor]) -> _Pieces:
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
        last_use = {node: max(map(place.get, node.users), default=-1) for node in nodes}  # type: ignore[type-var]
        functions: list[Stage] = []
        pairs: list[list[CarriedValue]] = []
        before: list[fx.Node] = []
        for start, end, call in zip(
            [0, *(end + 1 for end in ends)], [*ends, len(nodes) - 1], [*calls, None], strict=True
        ):
            live = [n for n in nodes[: end + 1] if (last_use[n] or -1) > end and not _attribute(n)] if call else []
            functions.append(_function(nodes[start : end + 1], before, live, call))
            if call:
                pairs.append([(node.name, *traced.values[node]) for node in live])
            before = live
        outputs = [*(call.output for call in calls), nodes[-1].args[0]]
        return _Pieces(functions, pairs, [traced.pair_of(output) for output in outputs])

    def _warn_of_hooks(self) -> None:
        ancestors = {""} | {cut[:i] for cut in self.cuts for i, letter in enumerate(cut) if letter == "."}
        for name in sorted(ancestors):
            part = self.module.get_submodule(name)
            if part._forward_hooks or part._forward_pre_hooks:
                warnings.warn(
                    f"hooks on {name or 'the model itself'!r} do not fire in the stages, since a cut lies inside it. "
                    "Put them on modules that are called in one piece.",
                    SplitWarning,
                    stacklevel=6,
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


def _function(nodes: list[fx.Node], before: list[fx.Node], live: list[fx.Node], call: CutCall | None) -> Stage:
    """A piece of the graph as a function of the model and of the values carried in."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in before}

    def local(node: fx.Node) -> fx.Node:
        if node not in copied:
            copied[node] = graph.node_copy(node, local)  # an attribute that was first read in an earlier stage
        return copied[node]

    for node in nodes:
        if node.op != "output":
            copied[node] = graph.node_copy(node, local)
    output = call.output if call else nodes[-1].args[0]
    graph.output(fx.node.map_arg((output, tuple(live)), local))
    code = graph.python_code("self")
    source, filename = code.src, f"<adaptexit stage {next(_SERIAL)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)
    function: Stage = namespace["forward"]
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def _layout_or_none(two: Any, three: Any) -> Layout | None:
    try:
        return layout_of(two, three)
    except UnsupportedValueError:
        return None


def _layouts(cut: str, values: list[CarriedValue]) -> tuple[Layout, ...]:
    layouts = []
    for name, two, three in values:
        try:
            layouts.append(layout_of(two, three))
        except UnsupportedValueError as error:
            raise SplitError(
                f"{name!r} is needed after the cut {cut!r}, and samples cannot be picked out of it: {error}. Cut "
                "elsewhere."
            ) from None
    return tuple(layouts)
