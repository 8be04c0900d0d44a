"""From what a user gives to a network with exits: the backbone as a module, in stages, with new heads or saved ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import Tensor, nn

from adaptexit.backbones import NAMED
from adaptexit.exceptions import SplitError
from adaptexit.heads.base import Head
from adaptexit.heads.by_name import make_head
from adaptexit.heads.layout import FeatureSpec
from adaptexit.heads.layout_inference import feature_spec
from adaptexit.networks.base import Network, below
from adaptexit.networks.branched import BranchedNetwork, sole_tensor
from adaptexit.networks.mlp import MLP, as_mlp
from adaptexit.networks.models import TorchModel, unspoiled
from adaptexit.networks.native import NativeNetwork, is_native
from adaptexit.networks.readers import logits_in
from adaptexit.networks.token_order import with_orders
from adaptexit.staging.contexts import evaluating, random_state_kept
from adaptexit.staging.cuts import check_names, propose_cuts
from adaptexit.staging.splitting import Split, from_stages, split
from adaptexit.utils.validation import plain_array

N_AUTO_CUTS = 3
"""Cuts that ``exits="auto"`` looks for."""


def check_backbone(backbone: Any, trains: bool) -> None:
    """Refuse scikit-learn estimators without layers to stop between, and names of networks that nothing trains."""
    if as_mlp(backbone) is None and isinstance(backbone, BaseEstimator):
        raise TypeError(
            "backbone must be a module, or scikit-learn's MLPClassifier (a timm name, a factory or a list of stages "
            f"will do too), as other estimators have no stages to stop between; got {backbone!r}. Use CascadeSaver "
            "for other classifiers."
        )
    if isinstance(backbone, str) and backbone in NAMED and not trains:
        raise ValueError(
            f"recipe must be 'joint' for {backbone!r}, which is made without trained weights. To use weights that you "
            f"have, give the module: net = adaptexit.backbones.{backbone}(), and net.load_state_dict(...)."
        )


def as_module(backbone: Any, classes: Any, seed: int = 0) -> Any:
    """A backbone given as its stages as one module; a name of ours as the factory of that network for those classes."""
    if isinstance(backbone, str) and backbone in NAMED:
        settings = {} if classes is None else {"n_classes": len(plain_array("classes", classes))}

        def factory() -> nn.Module:
            with random_state_kept():
                torch.manual_seed(seed)
                return NAMED[backbone](**settings).eval()

        return factory
    if isinstance(backbone, (list, tuple)):
        if len(backbone) < 2 or not all(isinstance(stage, nn.Module) for stage in backbone):
            raise ValueError(f"backbone must have at least two stages, all modules; got {backbone!r}.")
        return nn.Sequential(*backbone)
    return backbone


def logits_width(model: TorchModel, x: Tensor) -> int:
    """Number of classes that the backbone answers for; it has to leave its input alone."""
    with torch.inference_mode(), unspoiled(x, "backbone"):
        output = model.exit(0, model.prepare(x))[0] if is_native(model.module) else model(x)
    last = logits_in(output[-1], "backbone") if isinstance(output, (list, tuple)) else logits_in(output, "backbone")
    if last.ndim != 2:
        raise ValueError(
            f"backbone must answer with logits of shape (B, C); got {tuple(last.shape)}. Wrap it so that it does."
        )
    if last.shape[1] < 2 and not isinstance(model.module, MLP):
        raise ValueError("backbone must answer with at least 2 logits, one a class; got 1. Give two, as (0, z) for z.")
    return int(last.shape[1])


def seed_of(random_state: Any) -> int:
    """What splits, heads and training are seeded by: an integer as it is, a draw from anything else."""
    if isinstance(random_state, (bool, np.bool_)):
        raise ValueError(f"random_state must be an integer, a RandomState or None; got {random_state!r}.")
    if random_state is None:
        return int(np.random.default_rng().integers(np.iinfo(np.int32).max))
    try:
        draw = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    except ValueError as error:
        raise ValueError(f"random_state must be an integer, a RandomState or None; got {random_state!r}.") from error
    return int(random_state if isinstance(random_state, (int, np.integer)) else draw)


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
    refusals: list[str] = []
    for cuts in propose_cuts(module, example[:1], N_AUTO_CUTS if isinstance(exits, str) else int(exits)):
        try:
            parts = split(module, cuts, example)
            return parts, feature_specs(parts, layout)
        except ValueError as error:  # a SplitError among them
            refusals.append(f"{cuts}: {error}")
    raise SplitError("none of the exits that could be proposed works; name some yourself. " + " ".join(refusals))


def feature_specs(parts: Split, layout: Any = None) -> list[FeatureSpec]:
    """Layout of the feature at every cut; ``layout`` tells it, for all cuts or by cut, where it cannot be inferred."""
    features: list[Any] = []
    with evaluating([parts.module]), torch.no_grad():
        parts.visit(parts.example[:2].clone(), lambda k, feature: features.append(sole_tensor(feature)))
    if not (layout is None or isinstance(layout, (str, dict))):
        raise TypeError(f"layout must be a name, a dict of names by cut, or None; got {layout!r}.")
    layouts = layout if isinstance(layout, dict) else dict.fromkeys(parts.cuts, layout)
    if unknown := sorted(set(layouts) - set(parts.cuts), key=str):
        raise ValueError(f"layout must name cuts among {list(parts.cuts)}; got {unknown}.")
    for cut, feature in zip(parts.cuts, features, strict=True):
        if isinstance(feature, Tensor) and feature.shape[:1] != (2,):
            raise SplitError(
                f"no head can read the cut {cut!r}: its output has shape {tuple(feature.shape)} for 2 samples, which "
                "must lie along its first axis. Cut elsewhere."
            )
    shape = tuple(parts.example.shape[1:])
    specs = [
        feature_spec(parts.module, cut, feature, shape, layouts.get(cut))
        for cut, feature in zip(parts.cuts, features, strict=True)
    ]
    with evaluating([parts.module]), torch.no_grad():
        return with_orders(parts, specs)


def new_heads(head: Any, specs: Sequence[FeatureSpec], model: TorchModel, n_classes: int, seed: int) -> list[Head]:
    """A head for every feature, in single precision (double where the model is) on the model's device."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    with random_state_kept(seed):
        heads = [make_head(head, spec, n_classes) for spec in specs]
        for k, module in enumerate(heads):
            module.place(k)
    return [module.to(model.device, dtype) for module in heads]


def new_network(
    model: TorchModel, exits: Any, head: Any, layout: Any, example: Tensor, n_classes: int, seed: int
) -> BranchedNetwork:
    """A model with new heads: cut as :func:`staged_backbone` says, from raw inputs ``example`` (B, ...)."""
    parts, specs = staged_backbone(model.module, exits, model.prepare(example), layout)
    return BranchedNetwork(model, parts, new_heads(head, specs, model, n_classes, seed))


def restored_network(
    model: TorchModel,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    head: Any,
    n_classes: int,
    given_as_stages: bool,
) -> Network:
    """The network that was described; the backbone is cut and verified anew."""
    if "cuts" not in state:
        if not is_native(model.module):
            raise ValueError("backbone must be a network built with exits, as the one saved; it has none.")
        return NativeNetwork(model)
    exits = None if given_as_stages else state["cuts"]
    layout = dict(zip(state["cuts"], map(_told_layout, state["features"]), strict=True))
    if "example" not in tensors:
        raise ValueError("the saved weights must hold an example of the inputs; they do not.")
    parts, actual = staged_backbone(model.module, exits, tensors["example"].to(model.device), layout)
    specs = [FeatureSpec(**fields) for fields in state["features"]]
    # Heads are made for these sizes, so they have to be the network's before that.
    shapes, real_shapes = [spec.shape for spec in specs], [spec.shape for spec in actual]
    with evaluating([model.module]), torch.no_grad():
        width = logits_in(model.module(parts.example[:2].clone()), "backbone").shape[-1]
    if shapes != real_shapes or width != n_classes:
        raise ValueError(
            f"the backbone must give the features and logits that were saved, {shapes} and {n_classes}; got "
            f"{real_shapes} and {width}."
        )
    heads = new_heads(head, specs, model, n_classes, 0)
    numbers = {str(k) for k in range(len(heads))}
    if extra := sorted(n for n in tensors if n.startswith("heads.") and n.split(".")[1] not in numbers):
        raise ValueError(f"the saved weights do not fit the {len(heads)} heads: {', '.join(extra)} belong to none.")
    for k, module in enumerate(heads):
        try:
            module.load_state_dict(below(f"heads.{k}.", tensors), strict=True)
        except RuntimeError as error:
            raise ValueError(f"the saved weights do not fit the head at {parts.cuts[k]!r}: {error}") from error
        module.eval()
    return BranchedNetwork(model, parts, heads)


def _told_layout(spec: dict[str, Any]) -> str:
    """A spec's layout as it is given: with its prefix, where it has one."""
    return f"NLC+{spec['prefix_tokens']}" if spec["layout"] == "NLC" else str(spec["layout"])
