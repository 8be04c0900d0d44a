"""A pretrained model with early exits: heads at some of its modules, thresholds, and a budget at predict time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.neural_network import MLPClassifier
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from adaptexit.backbones.mlp import describe_mlp, mlp_of, new_mlp
from adaptexit.calibrators.base import CalibrationWarning, Calibrator
from adaptexit.core.checks import checked_number
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import resolve_score
from adaptexit.core.undo import unchanged_on_failure
from adaptexit.data import Batches, as_batches, is_stream, split_pair
from adaptexit.estimator import AdaptiveClassifier, below
from adaptexit.labels import class_indices, hold_out, known_classes, warn_of_labels
from adaptexit.models import TorchModel, build_model, is_fitted, restore_model
from adaptexit.network import BranchedNetwork, NativeNetwork, Network, is_native, priced
from adaptexit.retrofit import (
    as_mlp,
    as_module,
    checked_exits,
    logits_width,
    new_heads,
    restored_network,
    seed_of,
    staged_backbone,
)
from adaptexit.staging.cost import StageLatencies
from adaptexit.staging.executor import MEMORY_LIMIT, StagedModel, record
from adaptexit.staging.modes import autocast_in_use, evaluating
from adaptexit.training import FeatureCache, Recipe, cache_key, collect, recipe_of

CACHE_MEMORY = 1 << 30
"""Bytes of cached features above which they move to disk."""


DEFAULT_HEAD = "mlp"
"""Where neither the user nor the recipe says what is to answer at a cut."""


class MultiExitClassifier(AdaptiveClassifier):
    """Early exits on a frozen model: a head after some of its modules, and samples that stop at the first sure one.

    The backbone's forward is cut at the exits and runs stage by stage; a sample that leaves is no longer computed. The
    heads are trained on features recorded in one pass over the data. One calibration finds the thresholds for every
    budget; which one is used is chosen at predict time.

    Parameters
    ----------
    backbone : str, callable, nn.Module, list of nn.Module, or MLPClassifier
        The trained model: a timm name (made with its pretrained weights), a factory of a module or a module that
        answers with logits (B, C); modules are frozen and shared, not copied. A list of modules is a model given as
        its stages, for what cannot be cut. A module built with exits (``stages`` and ``heads``, ModuleLists of equal
        length) is taken as trained with its heads: ``fit`` only calibrates it. For tables: scikit-learn's
        MLPClassifier, cloned and fitted on the part held in unless it is fitted; "mlp" is one with four layers of 64.
    exits : "auto", int or list of str, default="auto"
        Dotted names of the modules to answer after, in execution order (``adaptexit.staging.list_cuts`` shows what
        there is); a number of exits to choose at even cost, or fewer where the model has fewer places; "auto" is 3.
    head : str or callable, default="auto"
        What answers at a cut: "mlp", "conv", "prototype", "refined_prototype", "residual" (see ``adaptexit.heads``), or
        a factory ``(FeatureSpec, n_classes) -> nn.Module``. "auto" is the recipe's own: "mlp" for "frozen".
    recipe : str or Recipe, default="frozen"
        How the heads are trained, the backbone untouched: "frozen" (cross-entropy with the labels), "calexnet",
        "calexnet_reference", "ptee", "ztw", "boostnet", or a recipe with settings of its own, as ``CalexNetRecipe()``.
        Some are published with class precision margins: ``CPMCalibrator.published_with(recipe, margin=0.1)``.
    calibrator : Calibrator, optional
        ``ThresholdCalibrator()`` unless given.
    confidence : {"auto", "max_proba", "entropy", "margin"} or callable, default="auto"
        From logits (B, C) to one number a sample, larger = surer. "auto" is a head's own confidence where it has one
        and the largest probability elsewhere.
    budget : float, optional
        Mean relative cost (1 = the backbone alone) to keep to when ``predict`` gets none.
    cost : {"macs", "latency"} or sequence of K floats, default="macs"
        Costs of stages and heads, counted or measured on the first batch. Numbers are what a sample has spent at each
        exit, rising, the full model last; the heads are then free.
    preprocess : "auto", None or callable, default="auto"
        From a batch of inputs to what the backbone takes. "auto" is timm's data config for timm models (inputs are
        images in [0, 1], resized and normalised) and nothing for others.
    layout : str or dict, optional
        Of the features, "NCHW", "NHWC", "NLC", "NCL" or "NC", for all cuts or by cut, where it cannot be told.
    classes : sequence of C labels, optional
        Labels in the order of the logits; 0 ... C-1 unless given.
    calibration_size : float, default=0.25
        Share of the samples given to ``fit`` that heads are not trained on, for calibration.
    cache_dir : path, optional
        Where features are kept for later runs with the same backbone, exits and data (a loader that shuffles or
        augments anew never gives the same); otherwise they last as long as the fit, in memory or, beyond
        ``cache_memory`` bytes, in the system's folder for temporary files.
    cache_memory : int, default=2**30
    cache_half : bool, default=False
        Keep features in half precision.
    batch_size : int, default=128
        For arrays and datasets, and for merged survivors; loaders bring their own.
    memory_limit : int, default=2**30
        Bytes that survivors waiting for a full batch may hold.
    device : str, optional
        Where a backbone made from a name or factory goes; modules stay where they are, and data follow them.
    random_state : int, RandomState or None, default=0
        Seed of the hold-out split, of the heads' weights and of their training.
    verbose : int, default=0
        At 1 long work shows a progress bar.

    Attributes
    ----------
    classes_ : array (C,)
    exits_ : list of K-1 str
        Where the early exits are.
    calibrator_ : the fitted calibrator
    outputs_ : ExitOutputs
        What every exit answered on the calibration data.
    training_outputs_ : ExitOutputs or None
        What every exit answered on the data that the heads were trained on, where the calibrator learns from that.
    history_ : dict
        Losses of the heads' training.
    self_calibrated_ : bool
        Whether the thresholds come from data given to ``fit`` rather than to ``calibrate``.
    labelled_ : bool
        Whether the calibration data had labels; otherwise accuracy is agreement with the full model, and so ``record``
        and ``pareto`` take data without labels.
    cost_unit_ : "MACs", "seconds" or "given"

    Examples
    --------
    >>> model = MultiExitClassifier("resnet18", exits=["layer1", "layer2", "layer3"])  # doctest: +SKIP
    >>> model.fit(train_images, train_labels).calibrate(val_images, val_labels)  # doctest: +SKIP
    >>> model.predict(images, budget=0.5)  # doctest: +SKIP

    Notes
    -----
    Without labels the heads learn the backbone's own predictions, and accuracy then means agreement with it.

    Calibrate on data that the backbone was not trained on: on its training data it, and what is trained on its
    features, is too sure. Where ``calibrate`` is not called, part of what ``fit`` got serves, and a
    :class:`CalibrationWarning` says so when the thresholds are used (a classifier fitted here has not seen that part).
    """

    exits_: list[str]
    history_: dict[str, Any]
    self_calibrated_: bool
    labelled_: bool
    training_outputs_: ExitOutputs | None
    _network: Network

    def __init__(
        self,
        backbone: Any,
        exits: Any = "auto",
        *,
        head: str | Callable[..., nn.Module] = "auto",
        recipe: str | Recipe = "frozen",
        calibrator: Calibrator | None = None,
        confidence: str | Callable[[Any], Any] = "auto",
        budget: float | None = None,
        cost: Any = "macs",
        preprocess: Any = "auto",
        layout: Any = None,
        classes: Any = None,
        calibration_size: float = 0.25,
        cache_dir: Any = None,
        cache_memory: int = CACHE_MEMORY,
        cache_half: bool = False,
        batch_size: int = 128,
        memory_limit: int = MEMORY_LIMIT,
        device: str | None = None,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.exits = exits
        self.head = head
        self.recipe = recipe
        self.calibrator = calibrator
        self.confidence = confidence
        self.budget = budget
        self.cost = cost
        self.preprocess = preprocess
        self.layout = layout
        self.classes = classes
        self.calibration_size = calibration_size
        self.cache_dir = cache_dir
        self.cache_memory = cache_memory
        self.cache_half = cache_half
        self.batch_size = batch_size
        self.memory_limit = memory_limit
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> MultiExitClassifier:
        """Cut the backbone, train its heads, and calibrate on the part of the data held out from that.

        Parameters
        ----------
        X : array (N, ...), Dataset or DataLoader of (x, y) or x, or a pair (X, y)
            A loader may shuffle.
        y : array (N,), optional
            Without labels the backbone's predictions take their place.

        Raises
        ------
        ValueError, TypeError
            For bad data or parameters (SplitError where the backbone cannot be cut); the estimator is left as it was.
        """
        with unchanged_on_failure(self), torch.inference_mode(False), torch.enable_grad():
            recipe = self._checked_parameters()
            seed = seed_of(self.random_state)
            X, y, mlp = self._fitted_mlp(X, y, seed)
            batches = as_batches(X, y, batch_size=self.batch_size, labels=None, ordered=False)
            given = as_module(self.backbone) if mlp is None else mlp_of(mlp)
            model = build_model(given, self.preprocess, "backbone", self.device)
            assert isinstance(model, TorchModel)
            self._mlp = mlp if mlp is None else describe_mlp(mlp)
            self._fitted_classes = None if mlp is None else mlp.classes_
            self._unseen = mlp is not None and not is_fitted(as_mlp(self.backbone))
            with evaluating([model.module]), torch.no_grad():
                example = batches.first()
                classes = known_classes(self.classes, logits_width(model, example[:8]), self._fitted_classes)
                if not is_stream(X) and y is not None:
                    # Refused before the backbone runs over everything.
                    class_indices(np.asarray(y.cpu() if isinstance(y, Tensor) else y), classes)
                self._network = self._built(model, example, len(classes), seed)
            if isinstance(self._network, NativeNetwork):
                self.history_, self.self_calibrated_, self.training_outputs_ = {}, False, None
                return self._calibrate(batches)
            return self._train(self._network, recipe, batches, classes, seed)

    def calibrate(self, X: Any, y: Any = None) -> MultiExitClassifier:
        """Calibrate on other data (as for :meth:`fit`); the backbone and its heads stay as they are."""
        check_is_fitted(self)
        with unchanged_on_failure(self):
            X, y = split_pair(X, y)
            X, y = self._validated(X, y, reset=False) if y is not None else (self._validated_inputs(X), None)
            self.self_calibrated_ = False
            return self._calibrate(as_batches(X, y, batch_size=self.batch_size, labels=None, ordered=False))

    def _checked_parameters(self) -> Recipe:
        """Refuse at once what would be met only after the backbone has run; the recipe."""
        checked_exits(self.exits)
        backbone = self.backbone
        if as_mlp(backbone) is None and isinstance(backbone, BaseEstimator):
            raise TypeError(
                "backbone must be a module, or scikit-learn's MLPClassifier (a timm name, a factory or a list of "
                f"stages will do too), as other estimators have no stages to stop between; got {backbone!r}. Use "
                "CascadeSaver for other classifiers."
            )
        if self.calibrator is not None and not isinstance(self.calibrator, Calibrator):
            raise TypeError(f"calibrator must be a Calibrator, as ThresholdCalibrator(); got {self.calibrator!r}.")
        self._confidences()
        for name in ("cache_memory", "memory_limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                raise ValueError(f"{name} must be a number of bytes; got {value!r}.")
        if self.cache_dir is not None and Path(self.cache_dir).is_file():
            raise NotADirectoryError(f"cache_dir must be a folder or new; {self.cache_dir} is a file.")
        if not (isinstance(self.calibration_size, Real) and 0 < self.calibration_size < 1):
            raise ValueError(f"calibration_size must lie between 0 and 1; got {self.calibration_size!r}.")
        if self.budget is not None:
            checked_number("budget", self.budget, "a finite relative cost (0.4 is 40% of the full model)")
        if not isinstance(self.verbose, (int, np.integer)):
            raise ValueError(f"verbose must be an integer; got {self.verbose!r}.")
        recipe = recipe_of(self.recipe)
        getattr(recipe, "check", lambda: None)()
        return recipe

    def _fitted_mlp(self, X: Any, y: Any, seed: int) -> tuple[Any, Any, MLPClassifier | None]:
        """Checked data and, for tables, the fitted classifier whose layers are the backbone."""
        X, y = split_pair(X, y)
        mlp = as_mlp(self.backbone)
        if mlp is None:
            return X, y, None
        if is_stream(X):
            raise ValueError(
                f"X must be an array where the backbone is a classifier for tables; got a {type(X).__name__}. Give "
                "arrays."
            )
        X, y = self._validated(X, y, reset=True)
        if is_fitted(mlp):
            if X.shape[1] != mlp.n_features_in_:
                raise ValueError(
                    f"X has {X.shape[1]} features, but the backbone was fitted on {mlp.n_features_in_}. Give a table "
                    "like the one that it learned from, or an unfitted classifier."
                )
            return X, y, mlp
        held_in, _ = hold_out(y, self.calibration_size, seed)
        mlp = clone(mlp)
        if mlp.random_state is None:
            mlp.set_params(random_state=seed)
        return X, y, mlp.fit(X[held_in], y[held_in])

    def _head(self, recipe: Recipe) -> Any:
        """What answers at a cut: the user's choice, the recipe's own, or what the recipe makes of either."""
        chosen = getattr(recipe, "head_for", lambda head: head)(self.head)
        return DEFAULT_HEAD if isinstance(chosen, str) and chosen == "auto" else chosen

    def _built(self, model: TorchModel, example: Tensor, n_classes: int, seed: int) -> Network:
        """The network with new heads."""
        given_as_stages = isinstance(self.backbone, (list, tuple))
        if is_native(model.module) or given_as_stages:
            if not isinstance(self.exits, str):
                raise ValueError(
                    f"exits must be 'auto' for a network built with exits or given as its stages; got {self.exits!r}."
                )
            if not given_as_stages:
                network = NativeNetwork(model)
                network.verify(example[:6])
                return network
        exits = None if given_as_stages else self.exits
        parts, specs = staged_backbone(model.module, exits, model.prepare(example), self.layout)
        recipe = recipe_of(self.recipe)
        heads = new_heads(self._head(recipe), specs, model, n_classes, seed)
        getattr(recipe, "check_heads", lambda heads: None)(heads)
        return BranchedNetwork(model, parts, heads)

    def _train(
        self, network: BranchedNetwork, recipe: Recipe, batches: Batches, classes: NDArray[Any], seed: int
    ) -> MultiExitClassifier:
        calibrator = self._fresh_calibrator()
        with evaluating(network.modules):
            costs = priced(network, batches.first(), self.cost)
        with self._cached(network, batches, calibrator.needs_features) as everything:
            n_early = len(network.heads)
            cache, vectors = everything.part(slice(n_early)), everything.part(slice(n_early, None))
            answered = cache.logits.argmax(axis=1)
            labels = batches.indices(classes, len(answered)) if batches.labelled else answered
            held_in, held_out = hold_out(labels, self.calibration_size, seed)
            self.history_ = recipe.train(
                network.heads, cache, held_in, labels[held_in], random_state=seed, verbose=self.verbose
            )
            staged = network.staged_on(cache, *self._confidences(), vectors if vectors.features else None)

            def answers_on(rows: NDArray[Any]) -> ExitOutputs:
                with evaluating(network.modules):
                    parts = torch.from_numpy(rows).split(self.batch_size)
                    recorded = record(staged, parts, keep_logits=calibrator.needs_logits)
                return ExitOutputs(
                    labels=labels[rows], n_classes=len(classes), chained=network.chained, **recorded._asdict(), **costs
                )

            outputs = answers_on(held_out)
            self.training_outputs_ = answers_on(held_in) if calibrator.needs_training else None
        self.self_calibrated_ = True
        return self._keep(calibrator, outputs, classes, batches.labelled)

    def _cached(self, network: BranchedNetwork, batches: Batches, with_vectors: bool) -> FeatureCache:
        """What the heads keep of the features at every cut and, where wanted, vectors of all of them behind that."""
        run, reducers, reductions = network.collecting(with_vectors)
        key = None
        if self.cache_dir is not None:
            key = cache_key(
                network.split.module, network.split.cuts, reductions,
                preprocess=network.model.preprocess, autocast=autocast_in_use(network.model.device),
            )  # fmt: skip
        with evaluating(network.modules), self._progress(batches, "recording features") as shown:
            return collect(
                shown, run, reducers,
                half=self.cache_half, memory_limit=self.cache_memory, folder=self.cache_dir, key=key,
            )  # fmt: skip

    def _calibrate(self, batches: Batches) -> MultiExitClassifier:
        calibrator = self._fresh_calibrator()
        with evaluating(self._modules()):
            example = batches.first()
            width = logits_width(self._network.model, example[:8])
            classes = known_classes(self.classes, width, self._fitted_classes)
            costs = priced(self._network, example, self.cost)
        outputs = self._recorded(batches, classes, calibrator, "calibrating", chained=self._network.chained, **costs)
        return self._keep(calibrator, outputs, classes, batches.labelled)

    def _keep(
        self, calibrator: Calibrator, outputs: ExitOutputs, classes: NDArray[Any], labelled: bool
    ) -> MultiExitClassifier:
        calibrator.fit(outputs, **({"training": self.training_outputs_} if calibrator.needs_training else {}))
        if self.budget is not None:
            calibrator.operating_point(self.budget)
        self.classes_, self.outputs_, self.calibrator_ = classes, outputs, calibrator
        self.labelled_ = labelled
        if labelled:
            warn_of_labels(outputs)
        self.exits_ = self._network.exit_names[:-1]
        return self

    def latencies(self, X: Any, batch_sizes: Sequence[int] = (1, 8, 64)) -> StageLatencies:
        """Measured seconds of every stage and head on batches of several sizes, made from the first inputs of X.

        MACs mispredict time; this says what leaving early is worth on this machine.
        """
        check_is_fitted(self)
        sizes = np.asarray(batch_sizes)
        if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu" or (sizes < 1).any():
            raise ValueError(f"batch_sizes must be positive integers; got {batch_sizes!r}.")
        with evaluating(self._modules()):
            x = as_batches(self._validated_inputs(X), batch_size=self.batch_size, ordered=False).first()
            measured = [self._network.costs(x[torch.arange(size) % len(x)], "seconds") for size in sizes]
        stage_s, exit_s = (np.stack(part, axis=1) * sizes for part in zip(*measured, strict=True))
        return StageLatencies(self.exit_names, sizes, stage_s, exit_s)

    # -- what the base class runs --------------------------------------------------------------------------------------

    @property
    def exit_names(self) -> list[str]:
        """How pictures and tables name the exits: by their cuts."""
        check_is_fitted(self)
        return self._network.exit_names

    def _confidences(self) -> tuple[Callable[[Tensor], Tensor], bool]:
        own = isinstance(self.confidence, str) and self.confidence == "auto"
        return resolve_score("max_proba" if own else self.confidence, "confidence", torch, also=("auto",)), own

    def _staged(self, calibrator: Calibrator | None = None) -> StagedModel:
        return self._network.staged(*self._confidences(), calibrator is not None and calibrator.needs_features)

    def _modules(self) -> list[nn.Module]:
        return self._network.modules

    def _labels_needed(self) -> bool:
        return self.labelled_

    def _tabular(self, X: Any) -> bool:
        return as_mlp(self.backbone) is not None and not is_stream(X)

    def _point(self, budget: float | None) -> Any:
        point = super()._point(budget)
        self._warn_of_calibration()
        return point

    def pareto(self, X: Any = None, y: Any = None) -> Any:
        frontier = super().pareto(X, y)
        self._warn_of_calibration(stacklevel=3)
        return frontier

    pareto.__doc__ = AdaptiveClassifier.pareto.__doc__

    def _warn_of_calibration(self, stacklevel: int = 4) -> None:
        if self.self_calibrated_ and not self._unseen:
            warnings.warn(
                "thresholds come from part of the data given to fit. If the backbone was trained on them, it is too "
                "sure there: call calibrate with data that it has not seen.",
                CalibrationWarning,
                stacklevel=stacklevel,
            )

    # -- persistence ---------------------------------------------------------------------------------------------------

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super()._get_state()
        described, weights = self._network.get_state()
        state |= described | {
            "mlp": self._mlp,
            "fitted_classes": self._fitted_classes is not None,
            "unseen": self._unseen,
            "self_calibrated": self.self_calibrated_,
            "labelled": self.labelled_,
            "history": self.history_,
        }
        return state, tensors | weights

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        super()._set_state(state, tensors, outputs)
        self._mlp, self._unseen, self.self_calibrated_ = state["mlp"], state["unseen"], state["self_calibrated"]
        self._fitted_classes = self.classes_ if state["fitted_classes"] else None
        self.history_, self.labelled_ = state["history"], state["labelled"]
        self.training_outputs_ = None  # where there are any, load reads them
        if self._mlp and as_mlp(self.backbone) is None:
            raise ValueError(f"backbone must be the MLPClassifier that was saved; got {self.backbone!r}.")
        given = new_mlp(self._mlp) if self._mlp else as_module(self.backbone)
        weights = below("backbone.", tensors)
        if self._mlp:
            given = given.to(next(iter(weights.values())).dtype)
        model = restore_model(given, self.preprocess, "backbone", state["backbone"], weights, self.device)
        assert isinstance(model, TorchModel)
        if "cuts" in state:
            self._network = restored_network(
                model,
                state,
                tensors,
                self._head(recipe_of(self.recipe)),
                len(self.classes_),
                isinstance(self.backbone, (list, tuple)),
            )
        else:
            self._network = NativeNetwork(model)
        self.exits_ = self._network.exit_names[:-1]
