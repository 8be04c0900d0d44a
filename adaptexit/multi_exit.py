"""A pretrained model with early exits: heads at some of its modules, thresholds, and a budget at predict time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from adaptexit.base import AdaptiveClassifier, ConfidenceName, CostName
from adaptexit.calibrators.base import Calibrator
from adaptexit.core.outputs import ExitOutputs
from adaptexit.data.batches import Batches, as_batches
from adaptexit.data.classes import class_indices, hold_out, known_classes
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import check_source, check_table, is_stream, split_pair
from adaptexit.exceptions import CalibrationWarning, warn
from adaptexit.heads.by_name import HeadName
from adaptexit.networks.base import Network, below
from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.build import (
    as_module,
    check_backbone,
    checked_exits,
    logits_width,
    new_network,
    restored_network,
    seed_of,
)
from adaptexit.networks.mlp import as_mlp, describe_mlp, fitted_mlp, mlp_of, restored_mlp
from adaptexit.networks.models import TorchModel, build_model, copied, is_fitted, restore_model
from adaptexit.networks.native import NativeNetwork, is_native, native_network
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.executor import MEMORY_LIMIT
from adaptexit.training.joint_fit import Witnessed, trained_jointly
from adaptexit.training.recipes import JointRecipe, Recipe, RecipeName, check_recipe_for, head_for, left_open, recipe_of
from adaptexit.training.retrofit import Conditions, retrofitted
from adaptexit.training.samples import Samples
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.validation import check_switch, check_whole, checked_folder


class MultiExitClassifier(AdaptiveClassifier):
    """Early exits on a model: a head after some of its modules, and samples that stop at the first sure one.

    The backbone's forward is cut at the exits and runs stage by stage; a sample that leaves is no longer computed. The
    heads are trained on features recorded in one pass over the data, the model frozen, or together with a copy of the
    model (``recipe="joint"``). One calibration finds the thresholds for every budget; which one is used is chosen at
    predict time.

    Parameters
    ----------
    backbone : str, callable, nn.Module, list of nn.Module, or MLPClassifier
        The trained model: a timm name (made with its pretrained weights), a factory of a module or a module that
        answers with logits (B, C) or an object with ``.logits``; modules are frozen and shared, not copied. A name in
        ``adaptexit.backbones.NAMED`` is that network for the number of ``classes``, to be trained ("joint"). A list of
        modules is a model given as its stages, for what cannot be cut. A module built with exits (``stages`` and
        ``heads``, ModuleLists of equal length) is taken as trained with its heads, so that ``fit`` only calibrates it,
        unless ``recipe`` is joint training; what says how exits are made (``exits``, ``head``, ``layout``,
        ``cache_dir``, ``cache_half``) is refused. For tables: scikit-learn's MLPClassifier, cloned and fitted on the
        part held in unless it is fitted; "mlp" is one with four layers of 64.
    exits : "auto", int or list of str, default="auto"
        Dotted names of the modules to answer after, in execution order (``adaptexit.staging.list_cuts`` shows what
        there is); a number of exits to choose at even cost, or fewer where the model has fewer places; "auto" is 3.
    head : str or callable, default="auto"
        What answers at a cut: a name in ``adaptexit.heads.NAMED`` ("mlp", "grid", "wide-64", ...) or a factory
        ``(FeatureSpec, n_classes) -> nn.Module``. "auto" is the recipe's own, of "auto" the best of several.
    recipe : str or Recipe, default="auto"
        How the heads are trained, the backbone untouched: "auto" (by the full model's answers or labels, the better of
        both, as of heads), "frozen" (by labels), "calexnet", "calexnet_reference", "ptee", "ztw", "boostnet", or a
        recipe with settings of its own, as ``AutoRecipe(["grid", "wide-64"])``. For a module built with exits "auto"
        is "trained", that is nothing. "joint" trains network and heads together, or a module built with exits from
        scratch; :class:`adaptexit.JointRecipe` has its many settings. It needs data that can be read by number:
        arrays, or a Dataset (of a loader too, which then says how samples are fetched, not in which order).
        Some are published with class precision margins: ``CPMCalibrator.published_with(recipe, margin=0.1)``.
    calibrator : Calibrator, optional
        ``ThresholdCalibrator()`` unless given.
    confidence : {"auto", "max_proba", "entropy", "margin"} or callable, default="auto"
        From logits (B, C) to one number a sample, larger = surer. "auto" is a head's own confidence where it has one
        and the largest probability elsewhere.
    budget : float, optional
        Mean relative cost (1 = the backbone alone) to keep to when ``predict`` gets none.
    cost : {"auto", "macs", "latency"} or sequence of K floats, default="auto"
        Costs of stages and heads, counted or measured on the first batch; "auto" counts. Numbers are what a sample
        costs that one exit answers, the others switched off: here they rise, the full model last, since stages are
        shared, and the heads are free (see the Notes of :class:`CascadeSaver`).
    preprocess : "auto", None or callable, default="auto"
        From a batch of inputs to what the backbone takes. "auto" is timm's data config for timm models (inputs are
        images in [0, 1], resized and normalised) and nothing for others; an image processor of transformers will do.
    layout : str or dict, optional
        Of features that do not tell it: "NCHW", "NHWC", "NLC" ("NLC+1" behind a class token), "NCL", "NC"; or by cut.
    classes : sequence of C labels, optional
        Labels in the order of the logits; 0 ... C-1 unless given. Where they are names, ``y`` may hold names or
        positions.
    calibration_size : float, default=0.25
        Share of the samples given to ``fit`` that heads (or routers) are not trained on, for calibration. Where
        nothing is trained, all samples are calibrated on.
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
        Losses of the training, what heads were compared ("choice"), after joint training what the full model became.
    self_calibrated_ : bool
        Whether the thresholds come from data given to ``fit`` rather than to ``calibrate``.
    stages_, heads_, labelled_, cost_unit_
        As for every adaptive estimator (:class:`adaptexit.base.AdaptiveClassifier`).

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
    :class:`adaptexit.CalibrationWarning` says so when the thresholds are used (a classifier fitted here has not seen
    that part).
    """

    exits_: list[str]
    history_: dict[str, Any]
    self_calibrated_: bool
    training_outputs_: ExitOutputs | None

    def __init__(
        self,
        backbone: Any,
        exits: Any = "auto",
        *,
        head: HeadName | Callable[..., nn.Module] = "auto",
        recipe: RecipeName | Recipe = "auto",
        calibrator: Calibrator | None = None,
        confidence: ConfidenceName | Callable[[Any], Any] = "auto",
        budget: float | None = None,
        cost: CostName | Sequence[float] = "auto",
        preprocess: Any = "auto",
        layout: Any = None,
        classes: Any = None,
        calibration_size: float = 0.25,
        cache_dir: Any = None,
        cache_memory: int = 1 << 30,
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

    @learned_at_once
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
        with torch.inference_mode(False), torch.enable_grad():
            recipe, seed = self._checked_recipe(), seed_of(self.random_state)
            X, y = split_pair(X, y)
            check_source(X)
            mlp = as_mlp(self.backbone)
            if mlp is not None:
                check_table(X, "the backbone is a classifier for tables")
                X, y = self._validated(X, y, reset=True)
                mlp = fitted_mlp(mlp, X, y, self.calibration_size, seed)
            joint = recipe if isinstance(recipe, JointRecipe) else None
            if joint is not None:
                samples = Samples(X, y, self.batch_size, joint.augment, joint.augment_batches)
                batches = samples.in_order(seed=seed)
            else:
                batches = as_batches(X, y, batch_size=self.batch_size, labels=None, ordered=False)
            module = as_module(self.backbone, self.classes, seed) if mlp is None else mlp_of(mlp)
            model = build_model(module, self.preprocess, "backbone", self.device)
            assert isinstance(model, TorchModel)
            self._mlp = mlp if mlp is None else describe_mlp(mlp)
            self._fitted_classes = None if mlp is None else mlp.classes_
            self._unseen = mlp is not None and not is_fitted(as_mlp(self.backbone))
            original, model = model, model if joint is None else copied(model)
            with evaluating([model.module]), torch.no_grad():
                example = batches.first()
                classes = known_classes(self.classes, logits_width(model, example[:8]), self._fitted_classes)
                if not is_stream(X) and y is not None:
                    # Refused before the backbone runs over everything.
                    class_indices(y, classes)
                network: Any = self._with_reader(self._built(model, example, len(classes), seed))
            self.self_calibrated_ = True
            calibrator = self._fresh_calibrator()
            conditions = self._conditions(calibrator, classes, seed)
            if joint is not None:
                trained = trained_jointly(network, original, joint, samples, conditions)
            elif isinstance(network, BranchedNetwork):
                trained = retrofitted(network, recipe, batches, conditions)
            else:
                return self._take_trained(network, batches, classes, seed)
            self.history_, self.training_outputs_ = trained.history, trained.training_outputs
            self._original, self._head_name = trained.original, trained.head
            return self._keep(trained.network, calibrator, trained.outputs, batches, classes)

    @learned_at_once
    def calibrate(self, X: Any, y: Any = None, sample_weight: Any = None) -> MultiExitClassifier:
        """Calibrate on other data (as for :meth:`fit`), by weight as :meth:`record`; backbone and heads stay."""
        check_is_fitted(self)
        self._check_parameters()
        weights = self._checked_weights(X, sample_weight)
        batches = self._labelled_batches(X, y, needed=False, ordered=weights is not None)
        classes = known_classes(self.classes, len(self.classes_), self._fitted_classes)
        calibrator, network = self._fresh_calibrator(weights), self._with_reader(self._network)
        witnessed: Any = Witnessed(batches, self._original)
        outputs = self._outputs_on(network, witnessed, calibrator, classes, weights)
        self.history_ = witnessed.story(outputs, self.history_)
        self.self_calibrated_ = False
        return self._keep(network, calibrator, outputs, batches, classes)

    def _checked_recipe(self) -> Recipe | JointRecipe:
        """The recipe; what could not be met before the backbone has run is refused at once."""
        checked_exits(self.exits)
        self._check_parameters()
        check_whole("cache_memory", self.cache_memory, 0, " (a number of bytes)")
        checked_folder("cache_dir", self.cache_dir)
        check_switch("cache_half", self.cache_half)
        recipe = self._recipe()
        check_backbone(self.backbone, isinstance(recipe, JointRecipe))
        getattr(recipe, "check", lambda: None)()
        return recipe

    def _recipe(self) -> Recipe | JointRecipe:
        return recipe_of("auto" if left_open(self.recipe) else self.recipe)

    def _head(self, name: str | None = None) -> Any:
        """What answers at a cut; with a name, the head that the recipe chose under it."""
        return head_for(self._recipe(), self.head, name)

    def _built(self, model: TorchModel, example: Tensor, n_classes: int, seed: int) -> BranchedNetwork | NativeNetwork:
        """The network with new heads, or one that was built with exits."""
        if is_native(model.module) and not isinstance(self.backbone, (list, tuple)):
            check_recipe_for(self.recipe, native=True)
            return native_network(model, example, self.get_params(deep=False))
        check_recipe_for(self.recipe, native=False)
        exits = self.exits
        if isinstance(self.backbone, (list, tuple)):
            if not isinstance(exits, str):
                raise ValueError(f"exits must be 'auto' for a network given as its stages; got {exits!r}.")
            exits = None
        network = new_network(model, exits, self._head(), self.layout, example, n_classes, seed)
        getattr(self._recipe(), "check_heads", lambda heads: None)(network.early)
        return network

    def _conditions(self, calibrator: Calibrator, classes: NDArray[Any], seed: int) -> Conditions:
        return Conditions(
            classes, self.cost, self.calibration_size,
            calibrator.needs_logits, calibrator.needs_features, calibrator.needs_training,
            self.cache_dir, self.cache_memory, self.cache_half, self.batch_size, seed, self.verbose, self.head,
        )  # fmt: skip

    def _take_trained(
        self, network: Network, batches: Batches, classes: NDArray[Any], seed: int
    ) -> MultiExitClassifier:
        """A network whose exits are trained: samples are held out only where the calibrator trains something."""
        calibrator = self._fresh_calibrator()
        outputs = self._outputs_on(network, batches, calibrator, classes)
        self.history_, self.training_outputs_, self._original, self._head_name = {}, None, None, None
        if calibrator.needs_training:
            assert outputs.labels is not None
            held_in, held_out = hold_out(outputs.labels, self.calibration_size, seed)
            self.training_outputs_, outputs = outputs.take(held_in), outputs.take(held_out)
        return self._keep(network, calibrator, outputs, batches, classes)

    def _outputs_on(
        self, network: Network, batches: Batches, calibrator: Calibrator, classes: NDArray[Any], weights: Any = None
    ) -> ExitOutputs:
        """What every exit answers, at costs counted or measured anew."""
        with evaluating(network.modules):
            costs = network.costs(batches.first(), self.cost)
        return self._recorded(network, batches, classes, costs, calibrator, "calibrating", weights)

    def _keep(
        self,
        network: Network,
        calibrator: Calibrator,
        outputs: ExitOutputs,
        batches: Batches,
        classes: NDArray[Any],
    ) -> MultiExitClassifier:
        model: Any = network.model  # type: ignore[attr-defined]
        inputs = InputSpec.of(batches.example, getattr(model.preprocess, "resizes", False))
        self._calibrated(
            network, calibrator, outputs, classes, inputs,
            labelled=batches.labelled, training=self.training_outputs_,
        )  # fmt: skip
        self.exits_ = network.exit_names[:-1]
        return self

    # -- what the base class asks, persistence -------------------------------------------------------------------------

    def _tabular(self, X: Any) -> bool:
        return as_mlp(self.backbone) is not None and not is_stream(X)

    def _remark(self) -> None:
        if self.self_calibrated_ and not self._unseen:
            warn(
                "thresholds come from data given to fit. If the backbone was trained on them, it is too sure there: "
                "call calibrate with data that it has not seen.",
                CalibrationWarning,
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | ({"_original": None} if "_original" in self.__dict__ else {})

    def _get_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super()._get_state()
        state |= {
            "mlp": self._mlp,
            "fitted_classes": self._fitted_classes is not None,
            "unseen": self._unseen,
            "self_calibrated": self.self_calibrated_,
            "history": self.history_,
        } | ({"head": self._head_name} if self._head_name else {})
        return state, tensors

    def _set_state(self, state: dict[str, Any], tensors: dict[str, Tensor], outputs: ExitOutputs) -> None:
        self._mlp, self._unseen, self.self_calibrated_ = state["mlp"], state["unseen"], state["self_calibrated"]
        self._original, self._head_name = None, state.get("head")
        super()._set_state(state, tensors, outputs)
        self._fitted_classes = self.classes_ if state["fitted_classes"] else None
        self.history_ = state["history"]
        self.training_outputs_ = None  # where there are any, load reads them
        self.exits_ = self.exit_names[:-1]

    def _restored_network(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> Network:
        if self._mlp and as_mlp(self.backbone) is None:
            raise ValueError(f"backbone must be the MLPClassifier that was saved; got {self.backbone!r}.")
        weights = below("backbone.", tensors)
        module = restored_mlp(self._mlp, weights) if self._mlp else as_module(self.backbone, self.classes_)
        model = restore_model(module, self.preprocess, "backbone", state["backbone"], weights, self.device)
        assert isinstance(model, TorchModel)
        as_stages = isinstance(self.backbone, (list, tuple))
        return restored_network(model, state, tensors, self._head(self._head_name), len(self.classes_), as_stages)
