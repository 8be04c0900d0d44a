"""From what a user gives to a network with exits: the backbone as a module, in stages, with new heads or saved ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.neural_network import MLPClassifier
from sklearn.utils import check_random_state
from torch import Tensor, nn

from adaptexit.backbones.mlp import MLP
from adaptexit.features import FeatureSpec, feature_spec
from adaptexit.heads import Head, make_head
from adaptexit.models import TorchModel, is_scikit, unspoiled
from adaptexit.network import BranchedNetwork, is_native, sole_tensor
from adaptexit.staging.cuts import check_names, propose_cuts
from adaptexit.staging.modes import evaluating
from adaptexit.staging.splitting import Split, from_stages, split
from adaptexit.staging.tracing import SplitError

N_AUTO_CUTS = 3
"""Cuts that ``exits="auto"`` looks for."""


def as_mlp(backbone: Any) -> MLPClassifier | None:
    """The classifier for tables that was asked for, if any."""
    if isinstance(backbone, FrozenEstimator):
        backbone = backbone.estimator
    if isinstance(backbone, str) and backbone == "mlp":
        return MLPClassifier(hidden_layer_sizes=(64, 64, 64, 64))
    return backbone if is_scikit(backbone) and isinstance(backbone, MLPClassifier) else None


def as_module(backbone: Any) -> Any:
    """A backbone given as its stages as one module."""
    if isinstance(backbone, (list, tuple)):
        if len(backbone) < 2 or not all(isinstance(stage, nn.Module) for stage in backbone):
            raise ValueError(f"backbone must have at least two stages, all modules; got {backbone!r}.")
        return nn.Sequential(*backbone)
    return backbone


def logits_width(model: TorchModel, x: Tensor) -> int:
    """Number of classes that the backbone answers for; it has to leave its input alone."""
    with torch.inference_mode(), unspoiled(x, "backbone"):
        output = model.module(model.prepare(x)) if is_native(model.module) else model(x)
    last = output[-1] if isinstance(output, (list, tuple)) else output
    if not isinstance(last, Tensor) or last.ndim != 2:
        came = tuple(last.shape) if isinstance(last, Tensor) else type(last).__name__
        raise ValueError(f"backbone must answer with logits of shape (B, C); got {came}. Wrap it so that it does.")
    if last.shape[1] < 2 and not isinstance(model.module, MLP):
        raise ValueError("backbone must answer with at least 2 logits, one a class; got 1. Give two, as (0, z) for z.")
    return int(last.shape[1])


def seed_of(random_state: Any) -> int:
    """What splits, heads and training are seeded by: an integer as it is, a draw from anything else."""
    if random_state is None:
        return int(np.random.default_rng().integers(np.iinfo(np.int32).max))
    try:
        drawn = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    except ValueError as error:
        raise ValueError(f"random_state must be an integer, a RandomState or None; got {random_state!r}.") from error
    return int(random_state if isinstance(random_state, (int, np.integer)) else drawn)


def checked_exits(exits: Any) -> Any:
    """The argument ``exits``: "auto", a number of exits, or names (which the backbone checks)."""
    number = isinstance(exits, (int, np.integer)) and not isinstance(exits, bool) and exits >= 1
    if not (number or isinstance(exits, (list, tuple)) or (isinstance(exits, str) and exits == "auto")):
        raise ValueError(f"exits must be 'auto', a number of at least 1 or a list of module names; got {exits!r}.")
    return exits


def staged_backbone(module: nn.Module, exits: Any, example: Tensor, layout: Any) -> tuple[Split, list[FeatureSpec]]:
    """A backbone in stages, and the layout of the feature at every cut.

    Parameters
    ----------
    module : nn.Module
    exits : "auto", int, list of str or None
        Where to cut; None takes the children of the module as its stages.
    example : tensor (B, ...)
        Inputs as the module takes them.
    layout : str, dict by cut, or None
        Of the features, where it cannot be inferred.
    """
    if exits is None:
        assert isinstance(module, nn.Sequential)
        parts = from_stages(list(module), example)  # children() would leave out a stage that comes twice
        return parts, feature_specs(parts, layout)
    if not isinstance(exits, (str, int, np.integer)):
        check_names(module, exits, "exits")
        parts = split(module, exits, example)
        return parts, feature_specs(parts, layout)
    refused: list[str] = []
    for cuts in propose_cuts(module, example[:1], N_AUTO_CUTS if isinstance(exits, str) else int(exits)):
        try:
            parts = split(module, cuts, example)
            return parts, feature_specs(parts, layout)
        except ValueError as error:  # a SplitError among them
            refused.append(f"{cuts}: {error}")
    raise SplitError("none of the exits that could be proposed works; name some yourself. " + " ".join(refused))


def feature_specs(parts: Split, layout: Any = None) -> list[FeatureSpec]:
    """Layout of the feature at every cut; ``layout`` tells it, for all cuts or by cut, where it cannot be inferred."""
    features: list[Any] = []
    with evaluating([parts.module]), torch.no_grad():
        parts.visit(parts.example[:2].clone(), lambda k, feature: features.append(sole_tensor(feature)))
    told = layout if isinstance(layout, dict) else dict.fromkeys(parts.cuts, layout)
    if unknown := sorted(set(told) - set(parts.cuts)):
        raise ValueError(f"layout must name cuts among {list(parts.cuts)}; got {unknown}.")
    for cut, feature in zip(parts.cuts, features, strict=True):
        if isinstance(feature, Tensor) and feature.shape[:1] != (2,):
            raise SplitError(
                f"no head can read the cut {cut!r}: its output has shape {tuple(feature.shape)} for 2 samples, which "
                "must lie along its first axis. Cut elsewhere."
            )
    shape = tuple(parts.example.shape[1:])
    return [
        feature_spec(parts.module, cut, feature, shape, told.get(cut))
        for cut, feature in zip(parts.cuts, features, strict=True)
    ]


def new_heads(head: Any, specs: Sequence[FeatureSpec], model: TorchModel, n_classes: int, seed: int) -> list[Head]:
    """A head for every feature, in single precision (double where the model is) on the model's device."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        heads = [make_head(head, spec, n_classes) for spec in specs]
        for k, made in enumerate(heads):
            made.place(k)
    return [made.to(model.device, dtype) for made in heads]


def restored_network(
    model: TorchModel,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    head: Any,
    n_classes: int,
    given_as_stages: bool,
) -> BranchedNetwork:
    """The network that was described; the backbone is cut and verified anew."""
    exits = None if given_as_stages else state["cuts"]
    layout = dict(zip(state["cuts"], (told["layout"] for told in state["features"]), strict=True))
    parts, _ = staged_backbone(model.module, exits, tensors["example"].to(model.device), layout)
    specs = [FeatureSpec(**described) for described in state["features"]]
    heads = new_heads(head, specs, model, n_classes, 0)
    numbers = {str(k) for k in range(len(heads))}
    if extra := sorted(n for n in tensors if n.startswith("heads.") and n.split(".")[1] not in numbers):
        raise ValueError(f"the saved weights do not fit the {len(heads)} heads: {', '.join(extra)} belong to none.")
    for k, made in enumerate(heads):
        prefix = f"heads.{k}."
        weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        try:
            made.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the saved weights do not fit the head at {parts.cuts[k]!r}: {error}") from error
        made.eval()
    return BranchedNetwork(model, parts, heads)
