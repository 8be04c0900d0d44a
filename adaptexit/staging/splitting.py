"""Cut a model after named modules: stages that a sample can stop between, and the same answers.

Each stage is a function of the model and of the values that are still needed (:mod:`adaptexit.staging.pieces` makes
them). Weights stay where they are, in the user's module, whose hooks on submodules keep firing. No split is handed out
before it was compared with the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.exceptions import DifferenceError, SplitError, UnsupportedValueError
from adaptexit.staging.carried import Carried, Layout, Live, layout_of
from adaptexit.staging.contexts import evaluating, exact_arithmetic
from adaptexit.staging.cuts import check_names, unwrapped
from adaptexit.staging.fx_trace import TRACING
from adaptexit.staging.model_state import state_restored
from adaptexit.staging.pieces import CarriedValue, Chain, StageFunction, TracedModel
from adaptexit.staging.row_order import check_row_orders
from adaptexit.staging.verify import difference_from_model, distinct, shuffled, with_writes_noted

_ILL_CONDITIONED = 1e-2
"""Differences up to this may be rounding in single precision; double precision tells."""


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
    return _verified_split(TracedModel(module, tuple(names)), inputs)


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
    return _verified_split(Chain(stages), distinct(example))


def _verified_split(source: TracedModel | Chain, inputs: Tensor) -> Split:
    with exact_arithmetic, evaluating([source.module]), torch.no_grad(), state_restored(source.module):
        return Split(source, inputs)


class Split:
    """A model in stages.

    Attributes
    ----------
    module : the model, shared
    cuts : tuple of K-1 names, in execution order
    stages : nn.ModuleList of K Stages
        What :meth:`run` runs, on plain values.
    example : tensor
        Inputs for making the stages anew after unpickling: the values that the split was verified on, shuffled.
    difference : largest difference from the model's answers that verification saw, relative to the largest answer

    Notes
    -----
    A split can be copied and pickled with its module; after unpickling its stages are made anew. Hooks on submodules
    fire, except on the ancestors of cuts and on the module itself, which are not called in one piece. The Python of
    these is run once, when the split is made: numbers that it reads from the model stay as they were then (weights and
    buffers do not), and context managers in it (``no_grad``, ``autocast``) are not entered again. Other threads may
    call modules while a split is made, this one too unless its Python keeps what it computes on the module.
    """

    def __init__(self, source: TracedModel | Chain, inputs: Tensor) -> None:
        """Use :func:`split` or :func:`from_stages`."""
        self._source = source
        self.stages = nn.ModuleList(Stage(self, k) for k in range(len(source.cuts) + 1))
        self._parts: list[nn.Module] | None = None
        self.cuts = source.cuts
        self._like = next((p for p in source.module.parameters() if p.is_floating_point()), None)
        self._made_for = None if self._like is None else (self._like.dtype, self._like.device)
        self.example = shuffled(inputs)
        pieces = source.compiled((inputs[:2], inputs[2:5]))
        self._functions: list[StageFunction] | None = pieces.functions
        self._layouts = [_layouts(cut, values) for cut, values in zip(self.cuts, pieces.carried, strict=True)]
        features = [_layout_or_none(*pair) for pair in pieces.features]
        self.difference = self._verified(features, inputs)
        check_row_orders(self.run, self.cuts, features, inputs)

    def _verified(self, features: list[Layout | None], inputs: Tensor) -> float:
        """The largest difference from the model; float32 that is off by more than rounding is tried in float64."""
        try:
            self._layouts = with_writes_noted(self.run, self._layouts, inputs)
            return difference_from_model(self.module, self.run, self.cuts, features, inputs)
        except DifferenceError as error:
            if inputs.dtype != torch.float32 or error.difference > _ILL_CONDITIONED:
                raise
            twin = copy.deepcopy(self)  # whose stages are made anew, for its precision
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
    def live(self) -> list[tuple[Layout, ...]]:
        """How the values that are carried over each cut hang on the number of samples."""
        return list(self._layouts)

    def function(self, k: int) -> StageFunction:
        """Stage k as a plain function of the model and of what is carried in; made anew after unpickling."""
        return (self._functions or self._made_anew())[k]

    def _made_anew(self) -> list[StageFunction]:
        with TRACING:
            place = None if self._like is None else (self._like.dtype, self._like.device)
            if self._functions is None or self._made_for != place:  # another thread may have made them meanwhile
                self._functions, self._made_for = self._rebuilt(), place
            return self._functions

    def run(self, k: int, carried: Any, *, checked: bool = True) -> Carried:
        """Run stage k on inputs (k = 0) or on what stage k-1 returned.

        That no part of the module is in training mode is looked for before the first stage, unless the caller sees to
        it (``checked=False``).
        """
        functions = self._functions or self._made_anew()
        if k == 0:
            if checked:
                self._check_mode()
            if self._like is not None and self._made_for != (self._like.dtype, self._like.device):
                functions = self._made_anew()  # what the model's Python reads of either stands in them
            n, state = len(carried), None
            feature, live = functions[0](self._source.module, carried)
        else:
            n, state = carried.live.n, carried.state
            feature, live = functions[k](self._source.module, *carried.live.values)
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

    def _rebuilt(self) -> list[StageFunction]:
        """The functions made anew, for the device and precision that the module has by now."""
        like = self._like
        example = self.example if like is None else self.example.to(like.device)
        if like is not None and example.is_floating_point():
            example = example.to(like.dtype)
        with evaluating([self.module]), torch.no_grad(), state_restored(self.module):
            return self._source.compiled((example[:2], example[2:5])).functions

    def __getstate__(self) -> dict[str, Any]:
        # Functions that were compiled from text cannot be pickled; the list of parts would go stale.
        return self.__dict__ | {"_functions": None, "_parts": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        # Unlike a pickled one it keeps its functions: they are given the model, and hold nothing of it.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        twin._parts = None
        return twin

    def __repr__(self) -> str:
        return f"Split({type(self.module).__name__}, cuts={list(self.cuts)})"


class Stage(nn.Module):
    """Stage k of a split as a module: from the values that are carried in to the cut's output and those carried on.

    The user's model is part of it, so that it can be exported, compiled and moved like any module; the model itself
    does not know of its stages.
    """

    def __init__(self, parts: Split, k: int) -> None:
        super().__init__()
        self.model = parts.module
        self.training = False  # its own flag: the model's modes are the user's
        self.k = k
        self._split = parts

    def forward(self, *values: Any) -> tuple[Any, tuple[Any, ...]]:
        """Inputs (k = 0), or the values that stage k - 1 carried on -> (output at the cut, values carried on)."""
        return self._split.function(self.k)(self.model, *values)

    def __repr__(self) -> str:
        end = self._split.cuts[self.k] if self.k < len(self._split.cuts) else "the end"
        return f"Stage({self.k}, up to {end} of {type(self.model).__name__})"


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
