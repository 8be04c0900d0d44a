"""Multi-layer perceptrons for tables, with the weights of scikit-learn's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from adaptexit.data.classes import hold_out
from adaptexit.networks.models import is_fitted, is_scikit
from adaptexit.staging.contexts import random_state_kept

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid, "identity": nn.Identity,
}  # fmt: skip


class MLP(nn.Module):
    """Hidden layers of the given widths and a linear output; input (N, widths[0]), output (N, n_classes).

    Parameters
    ----------
    widths : sequence of int
        Number of inputs, then of units of every hidden layer.
    n_classes : int
    activation : {"relu", "tanh", "logistic", "identity"}

    Attributes
    ----------
    feature_info : list of dict
        Module and width of each hidden layer, in timm's form.
    """

    def __init__(self, widths: Sequence[int], n_classes: int, activation: str = "relu") -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            *(nn.Sequential(nn.Linear(*pair), ACTIVATIONS[activation]()) for pair in pairwise(widths))
        )
        self.output = nn.Linear(widths[-1], n_classes)
        self.feature_info = [{"module": f"hidden.{i}", "num_chs": width} for i, width in enumerate(widths[1:])]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x.to(self.output.weight.dtype)))  # tables may hold integers


def as_mlp(backbone: Any) -> MLPClassifier | None:
    """The classifier for tables that was asked for, if any."""
    if isinstance(backbone, FrozenEstimator):
        backbone = backbone.estimator
    if isinstance(backbone, str) and backbone == "mlp":
        return MLPClassifier(hidden_layer_sizes=(64, 64, 64, 64))
    return backbone if is_scikit(backbone) and isinstance(backbone, MLPClassifier) else None


def fitted_mlp(mlp: MLPClassifier, X: Any, y: Any, calibration_size: float, seed: int) -> MLPClassifier:
    """The classifier as it is, or a clone fitted on the part of a table that is not held out for calibration."""
    if is_fitted(mlp):
        if X.shape[1] != mlp.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but the backbone was fitted on {mlp.n_features_in_}. Give a table like "
                "the one that it learned from, or an unfitted classifier."
            )
        return mlp
    held_in, _ = hold_out(y, calibration_size, seed)
    mlp = clone(mlp)
    if mlp.random_state is None:
        mlp.set_params(random_state=seed)
    return mlp.fit(X[held_in], y[held_in])


def describe_mlp(classifier: MLPClassifier) -> dict[str, Any]:
    """What :class:`MLP` has to be given to take the weights of a fitted classifier, as a JSON value."""
    return {
        "widths": [int(weights.shape[0]) for weights in classifier.coefs_],
        "n_classes": len(classifier.classes_),
        "activation": classifier.activation,
    }


def new_mlp(described: dict[str, Any]) -> MLP:
    """A network with weights that are yet to be set; torch's random state is left as it was."""
    with random_state_kept():
        return MLP(**described)


def restored_mlp(described: dict[str, Any], weights: dict[str, Tensor]) -> MLP:
    """A network for saved weights, in their precision; widths that are not theirs are refused before it is made."""
    widths = described["widths"]
    shapes = {f"hidden.{i}.0.weight": (b, a) for i, (a, b) in enumerate(pairwise(widths))}
    for name, shape in (shapes | {"output.weight": (described["n_classes"], widths[-1])}).items():
        if name not in weights or tuple(weights[name].shape) != shape:
            own_shape = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"the saved weights do not fit the widths {widths}: {name} must be {shape}; got {own_shape}."
            )
    return new_mlp(described).to(next(iter(weights.values())).dtype)


def mlp_of(classifier: MLPClassifier) -> MLP:
    """The same function as a fitted single-label MLPClassifier before its softmax, in its precision.

    A classifier of two classes has one output z; here their logits are 0 and z.
    """
    if classifier.out_activation_ == "logistic" and classifier.n_outputs_ > 1:
        raise ValueError("backbone must be an MLPClassifier for one label a sample; got one for several labels.")
    network = new_mlp(describe_mlp(classifier)).to(torch.from_numpy(classifier.coefs_[0][:0]).dtype)
    layers = [part for part in network.modules() if isinstance(part, nn.Linear)]
    weights, biases = list(classifier.coefs_), list(classifier.intercepts_)
    if weights[-1].shape[1] < network.output.out_features:
        weights[-1] = np.hstack([np.zeros_like(weights[-1]), weights[-1]])
        biases[-1] = np.hstack([np.zeros_like(biases[-1]), biases[-1]])
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    return network.eval()
