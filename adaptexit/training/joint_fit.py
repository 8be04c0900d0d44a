"""How a network and its exits come to learn together: heads first, then everything, then what the exits answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from torch import Tensor

from adaptexit.core.outputs import ExitOutputs
from adaptexit.data.batches import Batches
from adaptexit.data.classes import hold_out
from adaptexit.exceptions import FullModelWarning, warn
from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.models import TorchModel
from adaptexit.networks.native import NativeNetwork
from adaptexit.networks.readers import logits_in
from adaptexit.networks.weights import plain_weights
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.executor import record
from adaptexit.training.all_exits import all_exits
from adaptexit.training.checkpoints import Checkpoints, key_of
from adaptexit.training.feature_cache import FeatureCache
from adaptexit.training.head_trainer import Lesson
from adaptexit.training.joint import JointData, JointTraining, trainable_parameters
from adaptexit.training.joint_loss import exit_weights
from adaptexit.training.processes import Alone, processes
from adaptexit.training.recipes.base import History
from adaptexit.training.recipes.joint import JointRecipe
from adaptexit.training.retrofit import Conditions, Trained
from adaptexit.training.samples import Hashed, Samples, seeded
from adaptexit.utils.validation import checked_folder

REMARKABLE_LOSS = 0.005
"""Of the full model's accuracy, which is warned of where it is beyond two standard errors too."""


def trained_jointly(
    network: BranchedNetwork | NativeNetwork,
    original: TorchModel,
    recipe: JointRecipe,
    samples: Samples,
    conditions: Conditions,
) -> Trained:
    """Train a network with its exits, in place, on the samples that are not held out.

    Parameters
    ----------
    network : BranchedNetwork or NativeNetwork
        Of a copy of the user's module.
    original : TorchModel
        The user's own, for a teacher and for comparison; it is not changed.
    recipe : JointRecipe
    samples : Samples
    conditions : Conditions
    """
    return _JointFit(network, original, recipe, samples, conditions).run()


class _JointFit:
    """One fit, step by step."""

    def __init__(
        self,
        network: BranchedNetwork | NativeNetwork,
        original: TorchModel,
        recipe: JointRecipe,
        samples: Samples,
        conditions: Conditions,
    ) -> None:
        self.network, self.original, self.recipe = network, original, recipe
        self.samples, self.conditions = samples, conditions
        self.native = isinstance(network, NativeNetwork)
        self.processes: Alone = processes()
        if self.processes.device is not None:
            for module in network.modules:
                module.to(self.processes.device)

    def run(self) -> Trained:
        """First a look at all samples, then heads alone, then everything, then what the exits answer."""
        network, conditions = self.network, self.conditions
        with self._looked_through() as cache:
            settings = self.recipe.settled(self.native, self.labelled)
            held_in, held_out = hold_out(self.labels, conditions.calibration_size, conditions.seed)
            checkpoints = self._checkpoints(settings, held_in)
            trained = cache is not None or settings["teacher"] == "original"
            before = self._original_answers(cache, held_out) if trained else None
            original = self.original if trained else None
            state = checkpoints.latest()
            told = state["told"] if state else {
                "heads": self._heads_alone(cache, held_in),
                "relative_costs": (self.costs.alone() / self.costs.full).tolist(),  # never measured twice the same
            }  # fmt: skip
        training = JointTraining(
            all_exits(network, settings["rescale"]), network.model, self._teacher(settings),
            JointData(self.samples, held_in, self.labels, len(conditions.classes)), settings,
            exit_weights(settings["weights"], np.array(told["relative_costs"])), conditions.seed, self.processes,
        )  # fmt: skip
        training.told = told
        progress = training.run(checkpoints, conditions.verbose)
        history: History = {"loss": progress.loss, "accuracy": progress.accuracy, "heads": told["heads"]}
        history |= self._confidence(held_in)
        outputs = self._recorded(network, held_out)
        history["full_model"] = full_model_story(outputs, before)
        training_outputs = self._recorded(network, held_in) if conditions.needs_training else None
        return Trained(network, history, outputs, training_outputs, original)

    # -- before --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _looked_through(self) -> Iterator[FeatureCache | None]:
        """Read all samples once: costs, labels, a hash of the inputs, and what heads learn from at first."""
        network, conditions = self.network, self.conditions
        batches = self.samples.in_order(seed=conditions.seed)
        hashing = Hashed(batches, conditions.seed)
        with seeded(conditions.seed), evaluating(network.modules):
            example = self.samples.in_order(seed=conditions.seed).first()
            self.costs = network.costs(example, conditions.cost)
            self._check(network.prepare(example))
        cache: FeatureCache | None = None
        if isinstance(network, BranchedNetwork):
            cache = conditions.features(network, hashing)
            answers = cache.logits.argmax(axis=1)
        else:
            answers = self._run_through(hashing)
        self.inputs_hash, self.labelled = hashing.result, batches.labelled
        self.labels = batches.indices(conditions.classes, len(self.samples)) if self.labelled else answers
        with nullcontext() if cache is None else cache:
            yield cache

    def _check(self, example: Tensor) -> None:
        """Refuse settings that do not fit this network, before it has run over all samples."""
        recipe = self.recipe
        exit_weights(recipe.weights, self.costs.alone() / self.costs.full)
        trainable_parameters(self.network.model.module, recipe.trainable)
        if recipe.cutmix and example.ndim != 4:
            raise ValueError(
                f"cutmix must be 0 for inputs that are no images (B, C, H, W); got {recipe.cutmix!r} for inputs of "
                f"shape {tuple(example.shape)}. Take mixup, which blends any inputs."
            )

    def _run_through(self, batches: Hashed) -> NDArray[np.intp]:
        """Read all samples for their labels; what the original answers, where there are none."""
        answers = [np.empty(0, np.intp)]
        with torch.inference_mode(), evaluating([self.original.module]):
            for x in batches:
                if not batches.batches.labelled:
                    answers.append(self.original.module(self.original.prepare(x))[-1].argmax(1).cpu().numpy())
        return np.concatenate(answers)

    def _checkpoints(self, settings: dict[str, Any], held_in: NDArray[np.intp]) -> Checkpoints:
        """Where this run and no other keeps its state."""
        network, conditions = self.network, self.conditions
        early = network.early if isinstance(network, BranchedNetwork) else []
        key = key_of(
            {**settings, "checkpoint_dir": None}, conditions.seed, self.processes.count, self.inputs_hash, held_in,
            self.labels, plain_weights(network.model.module), network.model.preprocess, network.exit_names,
            [(str(head), str(head.spec), plain_weights(head)) for head in early], conditions.cost,
            conditions.cache_half,
        )  # fmt: skip
        return Checkpoints(checked_folder("checkpoint_dir", settings["checkpoint_dir"]), key)

    def _original_answers(self, cache: FeatureCache | None, rows: NDArray[np.intp]) -> NDArray[Any]:
        """What the model that was given says of some samples."""
        if cache is not None:
            return cache.logits[rows].argmax(axis=1)
        network = NativeNetwork(self.original)
        network.reader = self.network.reader
        return np.asarray(self._recorded(network, rows).predictions)[-1]

    def _heads_alone(self, cache: FeatureCache | None, rows: NDArray[np.intp]) -> History | None:
        """Train new heads on cached features; what their recipe tells."""
        recipe = self.recipe.for_heads(len(rows))
        if cache is None or recipe is None or not isinstance(self.network, BranchedNetwork):
            return None
        heads, conditions = self.network.early, self.conditions
        return recipe.train(
            heads, cache.part(slice(len(heads))), rows, self.labels[rows],
            random_state=conditions.seed, verbose=conditions.verbose,
        )  # fmt: skip

    # -- meanwhile and after -------------------------------------------------------------------------------------------

    def _teacher(self, settings: dict[str, Any]) -> TorchModel | None:
        if settings["teacher"] != "original" or not settings["distillation"]:
            return None
        device = self.processes.device
        if not settings["channels_last"] and device is None:
            return self.original
        module = copy.deepcopy(self.original.module)  # the user's stays where and as it is
        if settings["channels_last"]:
            module.to(memory_format=torch.channels_last)
        return TorchModel(module if device is None else module.to(device), self.original.preprocess, "teacher")

    def _recorded(self, network: Any, rows: NDArray[np.intp]) -> ExitOutputs:
        """What every exit of a network answers on some samples."""
        conditions = self.conditions
        batches = self.samples.in_order(rows, conditions.seed)
        with (
            seeded(conditions.seed),
            evaluating(network.modules),
            conditions.progress(batches, "recording answers") as progress,
        ):
            answers = record(network, progress, logits=conditions.needs_logits, features=conditions.needs_features)
        n_classes = len(conditions.classes)
        return ExitOutputs.from_answers(answers, self.labels[rows], n_classes, self.costs, chained=network.chained)

    def _confidence(self, held_in: NDArray[np.intp]) -> History:
        """Let heads that have an output for confidence learn it, from the features that they now get."""
        network, conditions = self.network, self.conditions
        if not isinstance(network, BranchedNetwork) or not any(head.confidence_parameters() for head in network.early):
            return {}
        with seeded(conditions.seed):
            features = conditions.features(network, self.samples.in_order(held_in, conditions.seed))
        with features:
            loop = {
                "lr": 1e-3, "weight_decay": 0.0, "batch_size": 256, "verbose": conditions.verbose,
                "random_state": check_random_state(conditions.seed),
            }  # fmt: skip
            cache, rows = features.part(slice(len(network.early))), np.arange(len(held_in))
            lesson = Lesson(network.early, cache, rows, torch.from_numpy(self.labels[held_in]), loop)
            epochs = lesson.epochs("auto", 5)
            return {"confidence_loss": lesson.learn_confidence(lesson.everyone, 1e-7, epochs=epochs)}


class Witnessed:
    """Batches that the original model answers too as they pass, if there is one; all else is the batches' own."""

    def __init__(self, batches: Batches, original: TorchModel | None) -> None:
        self._batches, self._original = batches, original
        self._answers: list[NDArray[np.intp]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[Tensor]:
        self._answers = []
        for x in self._batches:
            if self._original is not None:
                with evaluating([self._original.module]):
                    output = self._original.module(self._original.prepare(x))
                last = output[-1] if isinstance(output, (list, tuple)) else output
                self._answers.append(logits_in(last, self._original.label).argmax(1).cpu().numpy())
            yield x

    def story(self, outputs: ExitOutputs, history: History) -> History:
        """The history, with what became of the full model on the samples read; a warning where it has lost."""
        if "full_model" not in history:
            return history
        if self._original is None:  # loaded, or from scratch
            return history | {"full_model": full_model_story(outputs, None)}
        story = full_model_story(outputs, np.concatenate(self._answers))
        _remark_on_loss(story)
        return history | {"full_model": story}


def full_model_story(outputs: ExitOutputs, before: NDArray[Any] | None) -> dict[str, Any]:
    """Accuracy of the last exit, of the original on the same samples, and how often both agree."""
    after, labels = np.asarray(outputs.predictions)[-1], outputs.labels
    story: dict[str, Any] = {"accuracy": float(np.mean(after == labels)), "n": len(after)}
    if before is not None:
        story |= {"original_accuracy": float(np.mean(before == labels)), "agreement": float(np.mean(after == before))}
    return story


def _remark_on_loss(story: dict[str, Any]) -> None:
    """Warn where the full model has lost accuracy beyond what chance explains."""
    loss = story["original_accuracy"] - story["accuracy"]
    # Of a difference of two 0-1 values that differ on a share of the samples, the largest standard error.
    error = float(np.sqrt(max(1.0 - story["agreement"] - loss**2, 0.0) / story["n"]))
    if loss > max(REMARKABLE_LOSS, 2 * error):
        warn(
            f"the full model has lost {100 * loss:.1f} points of accuracy by training with its exits (standard error "
            f"{100 * error:.1f}, {story['n']} samples): {100 * story['original_accuracy']:.1f}% before, "
            f"{100 * story['accuracy']:.1f}% now. Relative cost 1 is the model as it is now. Train longer, at a lower "
            "lr, with more weight on the last exit, or only the normalisation layers (trainable='norm').",
            FullModelWarning,
        )
