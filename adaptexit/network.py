"""Multi-exit networks: a model in stages with a head at every cut, or one that was built with exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.features import pooled
from adaptexit.heads import Head, HeadOutput
from adaptexit.models import TorchModel, describe_model, writes_into
from adaptexit.staging.cost import count_macs, measure_latency
from adaptexit.staging.cuts import unwrapped
from adaptexit.staging.executor import ExitAnswer, StagedModel
from adaptexit.staging.live import Along, Carried, Live
from adaptexit.staging.modes import evaluating
from adaptexit.staging.rows import tensors_in
from adaptexit.staging.splitting import Split
from adaptexit.staging.tracing import SplitError
from adaptexit.training.cache import FeatureCache, Reducer, Run

Confidence = Callable[[Tensor], Tensor]
Costs = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass
class BranchedNetwork:
    """A frozen model in K stages with a head at each of its K-1 cuts; the model itself is the last exit.

    Attributes
    ----------
    model : TorchModel
        The model behind its preprocessing.
    split : Split
        The same in stages.
    heads : list of K-1 Heads
    """

    model: TorchModel
    split: Split
    heads: list[Head]

    def __post_init__(self) -> None:
        self._overwrites = self._heads_that_overwrite()

    def _heads_that_overwrite(self) -> list[bool]:
        """Whether each head writes into its feature, which the stages behind it may still need; it then gets a copy."""
        found: list[bool] = []
        state: Any = None

        def try_head(k: int, feature: Tensor) -> None:
            nonlocal state
            feature, head = feature.clone(), self.heads[k]
            writes = writes_into(feature)
            output = head(feature, state) if head.chained else head(feature)
            state = state if output.state is None else output.state
            found.append(writes_into(feature) != writes)

        with evaluating(self.modules), torch.inference_mode(False), torch.no_grad():
            self._look(self.split.example[:2].clone(), try_head)
        return found

    def _look(self, prepared: Tensor, look: Callable[[int, Tensor], None]) -> Any:
        """Run the stages and show each head's feature, in its precision; the model's output."""
        dtypes = [_dtype_of(head) for head in self.heads]

        def cast(k: int, feature: Any) -> None:
            tensor = sole_tensor(feature)
            look(k, tensor.to(dtypes[k] or tensor.dtype))

        return self.split.visit(prepared, cast)

    @property
    def exit_names(self) -> list[str]:
        return [*self.split.cuts, "full model"]

    @property
    def reductions(self) -> list[str]:
        """What is kept of the feature at every cut, in words that change when it does."""
        return [head.reduction_key for head in self.heads]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.split.module, *self.heads]

    @property
    def chained(self) -> bool:
        """Whether a head reads what earlier ones left."""
        return any(head.chained for head in self.heads)

    def staged(self, confidence: Confidence, own_confidence: bool, with_features: bool = False) -> StagedModel:
        """For the executor, all modules in evaluation mode.

        ``own_confidence`` prefers that of the heads with one; ``with_features`` gives the means of the features over
        their positions beside the answers of the early exits.
        """
        first, *later = self._stages()
        stages: list[Any] = [lambda x: first(self._prepared(x)), *later]
        exits: list[Any] = [*self._branches(own_confidence), _full_model]
        if with_features:
            exits[:-1] = [_WithFeatures(exit_, pool) for exit_, pool in zip(exits, self.poolings, strict=False)]
        return StagedModel(stages, exits, confidence, self.chained)

    def collecting(self, with_vectors: bool) -> tuple[Run, list[Reducer], list[str]]:
        """How a cache is filled: the run, what is kept of the feature at every cut, and that in words.

        ``with_vectors`` keeps vectors of all features as well, behind what the heads read.
        """
        reducers: list[Reducer] = [head.reduce for head in self.heads]
        if not with_vectors:
            return self.collect_run, reducers, self.reductions

        def run(x: Tensor, look: Callable[[int, Tensor], None]) -> Tensor:
            def twice(k: int, feature: Any) -> None:
                look(k, feature)
                look(len(self.heads) + k, feature)

            return self.collect_run(x, twice)

        return run, [*reducers, *self.poolings], [*self.reductions, "and their means"]

    @property
    def poolings(self) -> list[Callable[[Tensor], Tensor]]:
        """What makes a vector (B, d) of the feature at every cut."""
        return [partial(pooled, spec=head.spec) for head in self.heads]

    def _stages(self) -> list[Callable[[Any], Carried]]:
        return [partial(self.split.run, k, checked=False) for k in range(self.split.n_stages)]

    def _branches(self, own_confidence: bool) -> list[_Branch]:
        pairs = zip(self.heads, self._overwrites, strict=True)
        return [_Branch(head, head.__call__, own_confidence, overwrites) for head, overwrites in pairs]

    def staged_on(
        self, cache: FeatureCache, confidence: Confidence, own_confidence: bool, vectors: FeatureCache | None = None
    ) -> StagedModel:
        """The same over cached features; its inputs are row numbers (B,). ``vectors`` are those of ``poolings``."""
        answers: list[Any] = [_Branch(head, head.answer, own_confidence) for head in self.heads]
        if vectors is not None:
            answers = [_WithFeatures(a, vectors.rows, k) for k, a in enumerate(answers)]
        device = next((p.device for head in self.heads for p in head.parameters()), torch.device("cpu"))

        def stage(k: int) -> Callable[[Any], Carried]:
            def fetch(carried: Any) -> Carried:
                if isinstance(carried, Tensor):
                    carried = Carried(Live((carried,), (Along(0, 1),), len(carried)))
                rows = carried.live.values[0].numpy()
                feature = torch.from_numpy(cache.logits[rows]) if k == len(self.heads) else cache.rows(k, rows)
                return Carried(carried.live, feature.to(device), carried.state)

            return fetch

        exits = [*answers, _full_model]
        return StagedModel([stage(k) for k in range(len(exits))], exits, confidence, self.chained)

    def collect_run(self, x: Tensor, look: Callable[[int, Any], None]) -> Tensor:
        """Run the model on raw inputs and show the feature at every cut, in the heads' precision; the logits."""
        return _logits(self._look(self._prepared(x), look))

    def _prepared(self, x: Tensor) -> Tensor:
        """Inputs as the first stage takes them."""
        prepared = self.model.prepare(x)
        if prepared.ndim != self.split.example.ndim:
            shape = ", ".join(map(str, self.split.example.shape[1:]))
            raise ValueError(
                f"X must have the shape (N, {shape}) of the inputs that the model was fitted on; got {tuple(x.shape)}. "
                "Give a single input its axis for the samples: x[None]."
            )
        return prepared

    def costs(self, x: Tensor, unit: str) -> Costs:
        """Stage and exit costs a sample on inputs like ``x``, each (K,): "MACs" or "seconds"."""
        measure = count_macs if unit == "MACs" else measure_latency
        stage_costs, exit_costs = [], []
        carried: Any = self.model.prepare(x)
        branches = self._branches(own_confidence=True)
        for k, stage in enumerate(self._stages()):
            stage_costs.append(measure(stage, carried))
            with torch.inference_mode(unit != "MACs"), torch.no_grad():
                carried = stage(carried)
            if k < len(branches):
                answer = branches[k]
                exit_costs.append(measure(answer, carried))
                with torch.inference_mode(unit != "MACs"), torch.no_grad():
                    carried = answer(carried).carried
        return np.array(stage_costs), np.array([*exit_costs, 0.0])

    def get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What makes it anew (``restored_network``), as a JSON value and tensors."""
        state = {
            "backbone": describe_model(self.model),
            "cuts": list(self.split.cuts),
            "features": [dataclasses.asdict(head.spec) for head in self.heads],
        }
        tensors = _named("backbone", self.model.module) | {"example": self.split.example}
        for k, head in enumerate(self.heads):
            tensors |= _named(f"heads.{k}", head)
        return state, tensors


@dataclass
class NativeNetwork:
    """A network built with K stages and K heads (``stages`` and ``heads``, ModuleLists of equal length)."""

    model: TorchModel

    def verify(self, x: Tensor) -> None:
        """Compare stages and heads with the network's own forward, on a batch and on part of it."""
        prepared = self.model.prepare(x)
        expected = self.model.module(prepared.clone())
        if not isinstance(expected, (list, tuple)) or len(expected) != len(self.heads):
            came = len(expected) if isinstance(expected, (list, tuple)) else type(expected).__name__
            raise ValueError(
                f"a network with {len(self.heads)} exits must return a list of as many logits; got {came}. Let forward "
                "answer with the output of every head."
            )
        for rows in (slice(None), slice(1, None, 2)):
            carried: Any = prepared[rows].clone()
            for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
                carried = stage(carried)
                got, right = head(carried), expected[k][rows]
                if got.shape != right.shape or not torch.allclose(got, right, rtol=1e-3, atol=1e-4 * right.abs().max()):
                    raise SplitError(
                        f"exit {k} of the network answers otherwise through its stages and heads than through its "
                        "forward, which must be stage, head, stage, head and nothing else, every sample alone."
                    )

    @property
    def exit_names(self) -> list[str]:
        return [*(f"exit {k}" for k in range(len(self.heads) - 1)), "full model"]

    @property
    def stages(self) -> list[nn.Module]:
        return list(unwrapped(self.model.module).stages)  # type: ignore[arg-type]

    @property
    def heads(self) -> list[nn.Module]:
        """All K of them."""
        return list(unwrapped(self.model.module).heads)  # type: ignore[arg-type]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model.module]

    @property
    def chained(self) -> bool:
        return False

    def staged(self, confidence: Confidence, own_confidence: bool, with_features: bool = False) -> StagedModel:
        """For the executor; what its exits read may be anything, so there are no features."""
        first, *later = self.stages
        return StagedModel([lambda x: first(self.model.prepare(x)), *later], self.heads, confidence)

    def get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What describes it, as a JSON value and tensors."""
        return {"backbone": describe_model(self.model)}, _named("backbone", self.model.module)

    def costs(self, x: Tensor, unit: str) -> Costs:
        """Stage and exit costs a sample on inputs like ``x``, each (K,): "MACs" or "seconds"."""
        measure = count_macs if unit == "MACs" else measure_latency
        stage_costs, exit_costs = [], []
        carried: Any = self.model.prepare(x)
        for stage, head in zip(self.stages, self.heads, strict=True):
            stage_costs.append(measure(stage, carried))
            with torch.inference_mode(unit != "MACs"), torch.no_grad():
                carried = stage(carried)
            exit_costs.append(measure(head, carried))
        return np.array(stage_costs), np.array(exit_costs)


Network = BranchedNetwork | NativeNetwork


def priced(network: Network, x: Tensor, cost: Any) -> dict[str, Any]:
    """Stage and exit costs and their unit, as ``ExitOutputs`` takes them.

    Parameters
    ----------
    network : Network
    x : tensor (B, ...)
        Raw inputs to count or measure on.
    cost : "macs", "latency" or K floats
        Numbers are what a sample has spent at each exit, its head included.
    """
    n_exits = len(network.exit_names)
    if isinstance(cost, str):
        if cost not in ("macs", "latency"):
            raise ValueError(f"cost must be 'macs', 'latency' or a sequence of numbers; got {cost!r}.")
        unit = "MACs" if cost == "macs" else "seconds"
        stage_costs, exit_costs = network.costs(x[:1] if unit == "MACs" else x, unit)
        if stage_costs.sum() + exit_costs[-1] <= 0:
            raise ValueError("cost='macs' found no multiply-accumulates. Use cost='latency' or give the costs.")
        return {"stage_costs": stage_costs, "exit_costs": exit_costs, "cost_unit": unit}
    try:
        costs = np.asarray(cost, dtype=np.float64)
    except (TypeError, ValueError):
        costs = np.empty(0)
    if costs.shape != (n_exits,) or not np.isfinite(costs).all() or costs[0] <= 0 or (np.diff(costs) < 0).any():
        raise ValueError(
            f"cost must be {n_exits} positive numbers that do not fall, what a sample has spent at each exit; "
            f"got {cost!r}."
        )
    return {"stage_costs": np.diff(costs, prepend=0.0), "exit_costs": np.zeros(n_exits), "cost_unit": "given"}


def is_native(module: Any) -> bool:
    """Whether a module was built with exits: ``stages`` and ``heads``, ModuleLists of equal length."""
    module = module.module if isinstance(module, nn.DataParallel) else module
    stages, heads = getattr(module, "stages", None), getattr(module, "heads", None)
    return isinstance(stages, nn.ModuleList) and isinstance(heads, nn.ModuleList) and len(stages) == len(heads) > 0


class _Branch:
    """A head at a cut, from what the stage carries to the exit's answer."""

    def __init__(
        self, head: Head, run: Callable[..., HeadOutput], own_confidence: bool, overwrites: bool = False
    ) -> None:
        self.run, self.chained, self.own_confidence, self.overwrites = run, head.chained, own_confidence, overwrites
        self.dtype = _dtype_of(head)

    def __call__(self, carried: Carried) -> ExitAnswer:
        feature = sole_tensor(carried.feature)
        if self.dtype is not None and feature.dtype != self.dtype:
            feature = feature.to(self.dtype)
        elif self.overwrites:
            feature = feature.clone()
        output = self.run(feature, carried.state) if self.chained else self.run(feature)
        scores = None
        if self.own_confidence and output.confidence_logits is not None:
            answer = output.logits.argmax(dim=1, keepdim=True)
            scores = output.confidence_logits.gather(1, answer).squeeze(1).sigmoid()
        state = carried.state if output.state is None else output.state
        return ExitAnswer(output.logits, scores, Carried(carried.live, None, state))


class _WithFeatures:
    """An exit that hands on a vector of its feature beside its answer: pooled from it, or read by row number."""

    def __init__(self, answer: Callable[[Any], ExitAnswer], read: Callable[..., Tensor], kept_at: int | None = None):
        self.answer, self.read, self.kept_at = answer, read, kept_at

    def __call__(self, carried: Carried) -> ExitAnswer:
        if self.kept_at is None:
            # Before the head, which may write into the feature.
            features = self.read(sole_tensor(carried.feature))
        else:
            features = self.read(self.kept_at, carried.live.values[0].numpy())
        answer = self.answer(carried)
        answer.features = features
        return answer


def sole_tensor(feature: Any) -> Any:
    """The one tensor in what a cut returns, where numbers stand beside it; anything else as it is."""
    if isinstance(feature, Tensor):
        return feature
    found = list(tensors_in(feature))
    return found[0] if len(found) == 1 else feature


def _dtype_of(head: nn.Module) -> torch.dtype | None:
    """Precision of a head's parameters; None where it has none."""
    return next((parameter.dtype for parameter in head.parameters()), None)


def _full_model(carried: Carried) -> Tensor:
    return _logits(carried.feature)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"backbone must return a tensor of logits (B, C); got {type(output).__name__}. Wrap the module so that it "
            "returns the logits alone."
        )
    return output


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
