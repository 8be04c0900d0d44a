"""Joint training: a network and its exits learn together, every exit's loss in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from sklearn.base import BaseEstimator
from torch import Tensor

from adaptexit.heads.base import Head
from adaptexit.heads.by_name import FOR_VECTORS, heads_to_try, make_head
from adaptexit.heads.chained import BoostedHead
from adaptexit.heads.layout import FeatureSpec
from adaptexit.training.recipes.auto import AutoRecipe
from adaptexit.training.recipes.base import Recipe
from adaptexit.utils.validation import check_switch, check_whole, checked_folder, checked_number

Auto = Literal["auto"]
Weights = Literal["equal", "rising", "scheduled"]
Teacher = Literal["auto", "original", "last"]
BatchNorm = Literal["learn", "freeze"]
Averaging = Literal["ema", "swa"]
Precision = Literal["float32", "bf16", "fp16"]
Scheduler = Literal["cosine", "onecycle", "multistep", "constant"]

FINE_TUNING = {"epochs": 10, "batch_size": 128, "lr": 0.02, "warmup_epochs": 1.0}
"""Where "auto" is left for a model that was trained already."""

FROM_SCRATCH = {"epochs": 300, "batch_size": 512, "lr": 0.1, "warmup_epochs": 20.0}
"""Where "auto" is left for a network built with exits: what was published for MSDNet and those after it."""


class JointRecipe(BaseEstimator):
    """Network and heads learn together: sum_k w_k [(1 - a) CE(labels, exit k) + a T^2 KL(teacher || exit k)].

    The user's module is copied, never changed. Heads put on a trained model learn alone first, from cached features;
    then everything learns, all exits' losses in one pass. Heads whose confidence is an output of its own learn that
    last, when their features stand still.

    Parameters
    ----------
    epochs, batch_size : int or "auto", default="auto"
        10 epochs of batches of 128 for a trained model, 300 of 512 for a network built with exits. Of all processes
        together where there are several.
    optimizer : str or callable, default="sgd"
        A name of timm's optimizer factory, or a function from parameter groups (dicts with ``params`` and ``lr``) to a
        torch Optimizer.
    lr : float or "auto", default="auto"
        Of the network: 0.02 for a trained model, 0.1 for a network built with exits.
    head_lr : float or "auto", default="auto"
        Of the heads; "auto" is ``lr``.
    momentum, weight_decay : float, default=0.9, 1e-4
        For "sgd" momentum is Nesterov's, unless it is 0. Everything decays, as published for MSDNet.
    scheduler : {"cosine", "onecycle", "multistep", "constant"}, default="cosine"
        Per step: linear warm-up, then half a cosine to 0, a tenth each after half and three quarters of the steps
        (timm's), or no change; torch's one-cycle policy, which moves the momentum of an optimizer that has one, too.
    warmup_epochs : float or "auto", default="auto"
        1 for a trained model, 20 for a network built with exits, and no more than a tenth of all epochs.
    weights : {"equal", "rising", "scheduled"} or sequence of K floats, default="equal"
        w_k. "equal": 1 (BranchyNet, MSDNet). "rising": (k + 1) / K, growing with depth as EENet's. "scheduled": of an
        early exit from 0.01 to its relative cost along the training, of the last one 1 (Kaya et al., "Shallow-Deep
        Networks", ICML 2019, section 4.3).
    teacher : {"auto", "original", "last"} or None, default="auto"
        "original": the model as it was given. "last": the network's own last exit, without a gradient; it learns from
        labels alone then. "auto" is "original" for a model that heads were put on, None for a network built with exits
        (unless there are no labels). Without labels the teacher is all there is to learn from.
    distillation : float, default=0.5
        a, from 0 to 1; taken as 0 without a teacher and as 1 without labels.
    temperature : float, default=2.0
        T.
    rescale : bool, default=False
        Gradient equilibrium (Li et al., ICCV 2019): see :class:`adaptexit.training.all_exits.AllExits`.
    boost : float, optional
        Heads are boosted with this weight of earlier answers: every head learns CE(out_n + F_{n-1}), F_{n-1} without
        a gradient (:class:`adaptexit.heads.chained.BoostedHead`).
    trainable : {"all", "norm"} or list of str, default="all"
        What of the network learns, whatever its ``requires_grad`` says: everything, normalisation layers, or the
        parameters whose names, or whose modules' names, fit a pattern ("layer3.*", "linear"). Heads always learn. What
        does not learn stays to the bit.
    batch_norm : {"learn", "freeze"}, default="learn"
        Whether running means and variances of the network follow the data. Those of layers that do not learn never do.
    mixup, cutmix : float, default=0.0
        Alpha of timm's Mixup and CutMix; half of the batches get each where both are on.
    label_smoothing : float, default=0.0
    augment : callable, optional
        From one sample to another (torchvision's v2 transforms), for arrays; a Dataset augments by itself, and is read
        anew each epoch.
    augment_batches : bool, default=False
        Whether ``augment`` takes whole batches (B, ...) instead, and draws for every sample by itself; it is faster.
    clip_grad : float, optional
        Largest norm of the gradient.
    averaging : {"ema", "swa"} or None, default=None
        What is kept: the weights at the end, their exponential average over the steps, or the plain average over the
        ends of the last quarter of the epochs, with batch statistics taken anew (torch's ``swa_utils``).
    average_decay : float, default=0.999
        Of "ema".
    precision : {"float32", "bf16", "fp16"}, default="float32"
        Of autocast.
    channels_last : bool, default=False
        Memory format while training; faster for convolutions on many machines.
    head_recipe : "auto", Recipe or None, default="auto"
        How new heads learn before the rest does: "auto" is distillation from the model on cached features, a quarter of
        :class:`AutoRecipe`'s epochs; None leaves them as they were made.
    checkpoint_dir : path, optional
        Where the state is kept after every epoch. A run that was killed goes on from there when it is started again
        with the same settings, data and weights, and ends with the same weights, bit for bit on a CPU. What lies there
        of other runs is left alone.

    Notes
    -----
    ``history_`` of the estimator has ``"loss"`` and ``"accuracy"`` by exit and epoch as met while training, ``"heads"``
    (what the recipe for the heads tells) and ``"full_model"``: accuracy of the last exit and of the original, how often
    they agree, and on how many samples. After ``fit`` these are the samples held out, which the original may have
    learned from; ``calibrate`` replaces them by its own. Relative cost 1 is the retrained model, no longer the one that
    was given: a :class:`adaptexit.exceptions.FullModelWarning` of ``calibrate`` tells where it has lost.
    """

    def __init__(
        self,
        epochs: int | Auto = "auto",
        batch_size: int | Auto = "auto",
        *,
        optimizer: str | Callable[[list[dict[str, Any]]], Any] = "sgd",
        lr: float | Auto = "auto",
        head_lr: float | Auto = "auto",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        scheduler: Scheduler = "cosine",
        warmup_epochs: float | Auto = "auto",
        weights: Weights | Sequence[float] = "equal",
        teacher: Teacher | None = "auto",
        distillation: float = 0.5,
        temperature: float = 2.0,
        rescale: bool = False,
        boost: float | None = None,
        trainable: Literal["all", "norm"] | Sequence[str] = "all",
        batch_norm: BatchNorm = "learn",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
        augment_batches: bool = False,
        clip_grad: float | None = None,
        averaging: Averaging | None = None,
        average_decay: float = 0.999,
        precision: Precision = "float32",
        channels_last: bool = False,
        head_recipe: Any = "auto",
        checkpoint_dir: Any = None,
    ) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.head_lr = head_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.scheduler = scheduler
        self.warmup_epochs = warmup_epochs
        self.weights = weights
        self.teacher = teacher
        self.distillation = distillation
        self.temperature = temperature
        self.rescale = rescale
        self.boost = boost
        self.trainable = trainable
        self.batch_norm = batch_norm
        self.mixup = mixup
        self.cutmix = cutmix
        self.label_smoothing = label_smoothing
        self.augment = augment
        self.augment_batches = augment_batches
        self.clip_grad = clip_grad
        self.averaging = averaging
        self.average_decay = average_decay
        self.precision = precision
        self.channels_last = channels_last
        self.head_recipe = head_recipe
        self.checkpoint_dir = checkpoint_dir

    @classmethod
    def boostnet(cls, **settings: Any) -> JointRecipe:
        """BoostNet's own training (Yu et al., "Boosted Dynamic Neural Networks", AAAI 2023), for a model with heads.

        Heads learn what the heads before them leave over, gradients are rescaled where exits branch off, and there is
        no teacher. The full model stays one by itself, as relative cost 1 is the model without its exits.
        """
        return cls(**({"boost": 0.5, "rescale": True, "teacher": None} | settings))

    def head_for(self, head: Any) -> Any:
        """What answers at a cut: the user's choice, or a wide residual block on a pooled map where there is a map."""
        head = usual_head if isinstance(head, str) and head == "auto" else head
        return head if self.boost is None else partial(BoostedHead, head=head, weight=self.boost)

    def for_heads(self, n_samples: int) -> Recipe | None:
        """How new heads learn before the rest does: a quarter of what they would get alone, unless told otherwise."""
        if not _is_auto(self.head_recipe):
            return self.head_recipe
        recipe = AutoRecipe()
        return recipe.set_params(epochs=max(1, round(recipe.n_epochs(n_samples) / 4)))

    def check(self) -> None:
        """Refuse settings that cannot be, before anything has run."""
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if not _is_auto(getattr(self, name)):
                check_whole(name, getattr(self, name), least, " or 'auto'")
        for name in ("lr", "head_lr"):
            if not _is_auto(getattr(self, name)):
                checked_number(name, getattr(self, name), "a finite number above 0, or 'auto'", np.nextafter(0, 1))
        if not _is_auto(self.warmup_epochs):
            checked_number("warmup_epochs", self.warmup_epochs, "a finite number, 0 or above, or 'auto'", 0.0)
        for name in ("momentum", "distillation", "label_smoothing", "average_decay"):
            if not 0 <= checked_number(name, getattr(self, name), "a number from 0 to 1") <= 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)!r}.")
        for name in ("weight_decay", "mixup", "cutmix"):
            checked_number(name, getattr(self, name), "a finite number, 0 or above", 0.0)
        if self.boost is not None:
            checked_number("boost", self.boost, "a finite number, at least 0, or None", 0.0)
        if self.clip_grad is not None:
            checked_number("clip_grad", self.clip_grad, "a finite number above 0, or None", np.nextafter(0, 1))
        checked_number("temperature", self.temperature, "a finite number above 0", np.nextafter(0, 1))
        for name in ("rescale", "channels_last", "augment_batches"):
            check_switch(name, getattr(self, name))
        _check_choice("scheduler", self.scheduler, get_args(Scheduler))
        _check_choice("teacher", self.teacher, (*get_args(Teacher), None))
        _check_choice("batch_norm", self.batch_norm, get_args(BatchNorm))
        _check_choice("averaging", self.averaging, (*get_args(Averaging), None))
        _check_choice("precision", self.precision, get_args(Precision))
        if isinstance(self.weights, str):
            _check_choice("weights", self.weights, get_args(Weights), " or K numbers, one an exit")
        self._check_trainable()
        if not (callable(self.optimizer) or isinstance(self.optimizer, str)):
            raise TypeError(
                "optimizer must be a name of timm's, as 'sgd' or 'adamw', or a function that makes one from parameter "
                f"groups; got {self.optimizer!r}."
            )
        if isinstance(self.optimizer, str):
            from timm.optim import list_optimizers

            if self.optimizer.lower() not in list_optimizers():
                raise ValueError(
                    f"optimizer must be the name of one of timm's; got {self.optimizer!r}. "
                    "timm.optim.list_optimizers() shows them."
                )
        if self.augment is not None and not callable(self.augment):
            raise TypeError(f"augment must be callable, as a v2 transform of torchvision; got {self.augment!r}.")
        if not (self.head_recipe is None or _is_auto(self.head_recipe) or isinstance(self.head_recipe, Recipe)):
            raise TypeError(
                f"head_recipe must be 'auto', a recipe as FrozenRecipe(), or None; got {self.head_recipe!r}."
            )
        getattr(self.head_recipe, "check", lambda: None)()
        checked_folder("checkpoint_dir", self.checkpoint_dir)

    def check_heads(self, heads: Sequence[Head]) -> None:
        """Refuse heads that the recipe for them cannot train."""
        getattr(self.head_recipe, "check_heads", lambda heads: None)(heads)

    def check_native(self) -> None:
        """Refuse what says how new heads are made, for a network built with exits."""
        for name, default in (("boost", None), ("head_recipe", "auto")):
            value = getattr(self, name)
            if not (value is default or (isinstance(value, str) and value == default)):
                raise ValueError(
                    f"{name} must be left at {default!r} for a network built with exits, whose heads are its own and "
                    f"learn with it; got {value!r}. Leave it out, or give the backbone without its exits."
                )

    def _check_trainable(self) -> None:
        if isinstance(self.trainable, str):
            _check_choice("trainable", self.trainable, ("all", "norm"), " or a list of patterns")
        elif not (
            isinstance(self.trainable, (list, tuple))
            and self.trainable
            and all(isinstance(pattern, str) for pattern in self.trainable)
        ):
            raise ValueError(
                "trainable must be 'all', 'norm' or a list of at least one pattern, as ['layer3.*', 'linear']; got "
                f"{self.trainable!r}."
            )

    def settled(self, native: bool, labelled: bool) -> dict[str, Any]:
        """All settings, with a value in the place of every "auto"."""
        usual = FROM_SCRATCH if native else FINE_TUNING
        # Plain numbers, as a checkpoint brings back nothing else.
        settings = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.get_params(deep=False).items()
        }
        for name in ("epochs", "batch_size", "lr"):
            if _is_auto(settings[name]):
                settings[name] = usual[name]
        if _is_auto(settings["head_lr"]):
            settings["head_lr"] = settings["lr"]
        if _is_auto(settings["warmup_epochs"]):
            settings["warmup_epochs"] = min(usual["warmup_epochs"], settings["epochs"] / 10)
        if _is_auto(settings["teacher"]):
            settings["teacher"] = None if native and labelled else "original"
        if not labelled and settings["teacher"] != "original":
            raise ValueError(
                "teacher must be 'original' where there are no labels, as there is nothing else to learn from; got "
                f"{self.teacher!r}. Give labels, or leave teacher at 'auto'."
            )
        if settings["teacher"] is None or not labelled:
            settings["distillation"] = 1.0 if not labelled else 0.0
        return settings


def usual_head(spec: FeatureSpec, n_classes: int) -> Head:
    """A wide residual block on a pooled map where the feature can be one, a perceptron on its means elsewhere."""
    return make_head("mlp" if heads_to_try([spec]) == FOR_VECTORS else "wide", spec, n_classes)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _check_choice(name: str, value: Any, allowed: Sequence[Any], other: str = "") -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}{other}; got {value!r}.")
