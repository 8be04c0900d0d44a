"""The joint training loop: a network and its exits, every exit's loss in one pass, from checkpoints if it has to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from adaptexit.heads.base import Head
from adaptexit.networks.models import TorchModel
from adaptexit.networks.readers import logits_in
from adaptexit.staging.contexts import evaluating
from adaptexit.training.all_exits import AllExits
from adaptexit.training.averages import average_of, take_statistics_anew
from adaptexit.training.checkpoints import Checkpoints
from adaptexit.training.joint_loss import exit_losses, mixed, mixup_of
from adaptexit.training.loop import only_learning, row_batches, seeded_everywhere
from adaptexit.training.processes import Alone
from adaptexit.training.samples import Samples, seeded
from adaptexit.training.schedules import optimizer_for, schedule_for

LOOKED_AT_EVERY = 20
"""Steps between two looks at whether losses are finite, which a GPU has to be waited for."""

AVERAGED_FROM = 0.75
"""Of the epochs, with "swa"."""


@dataclass
class JointData:
    """What is read: samples by number, which of them, and their classes.

    Attributes
    ----------
    samples : Samples
    rows : integer array (n,)
        Those that are learned from.
    labels : integer array (N,)
        Class index of every sample.
    n_classes : int
    """

    samples: Samples
    rows: NDArray[np.intp]
    labels: NDArray[np.intp]
    n_classes: int


@dataclass
class Progress:
    """How far a training has come.

    Attributes
    ----------
    epoch : int
        Epochs that are over.
    loss, accuracy : lists of K lists
        By exit and epoch, as met while training.
    """

    n_exits: int
    epoch: int = 0
    loss: list[list[float]] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)

    def add(self, losses: list[float], accuracies: list[float]) -> None:
        """Account for one more epoch."""
        if not self.loss:
            self.loss, self.accuracy = [[] for _ in losses], [[] for _ in losses]
        for k, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            self.loss[k].append(loss)
            self.accuracy[k].append(accuracy)
        self.epoch += 1


class JointTraining:
    """One run of the loop over a network, in place.

    Parameters
    ----------
    exits : AllExits
        The network's own modules; nothing else is changed.
    model : TorchModel
        The network's model, for what prepares its inputs.
    teacher : TorchModel or None
    data : JointData
    settings : dict
        :meth:`adaptexit.training.recipes.JointRecipe.settled`.
    exit_weights : callable
        :func:`adaptexit.training.joint_loss.exit_weights`.
    seed : int
    """

    def __init__(
        self,
        exits: AllExits,
        model: TorchModel,
        teacher: TorchModel | None,
        data: JointData,
        settings: dict[str, Any],
        exit_weights: Callable[[float], NDArray[np.float64]],
        seed: int,
        processes: Alone,
    ) -> None:
        self.exits, self.model, self.teacher, self.data = exits, model, teacher, data
        self.settings, self.exit_weights, self.seed, self.processes = settings, exit_weights, seed, processes
        head_learners = [p for head in exits.head_modules for p in class_parameters(head)]
        self.head_learners = list(dict.fromkeys(head_learners))  # exits may share a head
        heads = {id(parameter) for parameter in self.head_learners}
        trainable = trainable_parameters(exits.model, settings["trainable"])
        self.network_learners = [parameter for parameter in trainable if id(parameter) not in heads]
        self.learners = [*self.network_learners, *self.head_learners]
        self.optimizer = optimizer_for(settings, self.network_learners, self.head_learners)
        self.steps_per_epoch = len(self._batches(0))
        self.total_steps = self.steps_per_epoch * settings["epochs"]
        self.schedule = schedule_for(self.optimizer, settings, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=settings["precision"] == "fp16")
        self.mixup = mixup_of(settings, data.n_classes)
        self.average = average_of(exits, settings["averaging"], settings["average_decay"])
        self.progress = Progress(exits.n_exits)
        self.told: dict[str, Any] = {}  # kept with the state, for whoever goes on from it

    def run(self, checkpoints: Checkpoints, verbose: int) -> Progress:
        """Train to the end, from the latest checkpoint if there is one; then the network is in evaluation mode."""
        if (state := checkpoints.latest()) is not None:
            self.load_state(state)
        elif self.processes.main:
            checkpoints.keep(0, self.state())  # what the heads have learned so far
        self.processes.wait()
        epochs, learners = self.settings["epochs"], self.learners
        visible = verbose >= 1 and self.processes.main
        with (
            only_learning(learners, [self.exits]),
            self._memory_format(),
            tqdm(
                total=self.total_steps, initial=self.progress.epoch * self.steps_per_epoch, disable=not visible
            ) as bar,
            torch.enable_grad(),
        ):
            forward = self.processes.prepared(self.exits)
            while self.progress.epoch < epochs:
                with (
                    seeded(self.seed, self.progress.epoch, self.processes.rank) as seed,
                    seeded_everywhere(seed, learners),
                ):
                    self._epoch(forward, seed, bar)
                if self.processes.main:
                    checkpoints.keep(self.progress.epoch, self.state())
                self.processes.wait()
            self._take_average()
        self.exits.eval()
        return self.progress

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that goes on: weights, optimizer, schedule, averages and what is to be told."""
        schedule = self.schedule
        return {
            "exits": self.exits.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule.state_dict() if isinstance(schedule, OneCycleLR) else {},
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": vars(self.progress),
            "told": self.told,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.exits.load_state_dict(state["exits"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.schedule, OneCycleLR):
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = Progress(**state["progress"])

    # -- an epoch ------------------------------------------------------------------------------------------------------

    def _batches(self, epoch: int) -> list[Tensor]:
        """Row numbers of the data of every batch, of all processes together."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        rows = torch.from_numpy(self.data.rows)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        return row_batches(shuffled, self.settings["batch_size"], least=2 * self.processes.count)

    def _epoch(self, forward: nn.Module, seed: int, bar: Any) -> None:
        epoch = self.progress.epoch
        in_training_mode(self.exits, self.settings["batch_norm"], self.learners)
        batches = self._batches(epoch)
        shares = [self.processes.share(rows) for rows in batches]
        totals = torch.zeros(2, self.exits.n_exits, dtype=torch.float64)
        steps: list[Tensor] = []  # not yet looked at
        n_read = 0
        for i, (whole, rows, x) in enumerate(zip(batches, shares, self.data.samples.read(shares, seed), strict=True)):
            step = epoch * self.steps_per_epoch + i
            losses, right = self._step(forward, x, rows, len(whole), step)
            share = len(whole) / self.processes.count  # a loss times this is a sum over this process's samples
            steps.append(torch.stack([share * losses, right]))
            n_read += len(rows)
            if i % LOOKED_AT_EVERY == 0 or i == len(batches) - 1:
                totals += torch.stack(steps).cpu().double().sum(0)
                steps.clear()
                self._check_finite(totals[0], epoch)
                _describe(bar, epoch, self.settings["epochs"], totals / max(n_read, 1))
            bar.update()
        totals = self.processes.summed(totals) / len(self.data.rows)
        if self.settings["averaging"] == "swa" and self.average is not None and self._averages(epoch):
            self.average.update_parameters(self.exits)
        self.progress.add(totals[0].tolist(), totals[1].tolist())

    def _step(self, forward: nn.Module, x: Tensor, rows: Tensor, n_samples: int, step: int) -> tuple[Tensor, Tensor]:
        """One update; the losses of the exits, and how many samples each was right on."""
        settings = self.settings
        x = self.model.prepare(x)
        target = torch.from_numpy(self.data.labels[rows.numpy()]).to(x.device)
        classes = target
        x, target = mixed(self.mixup, x, target, settings["label_smoothing"], self.data.n_classes)
        if settings["channels_last"] and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        precision = settings["precision"]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        with torch.autocast(x.device.type, dtype=dtype, enabled=precision != "float32"):
            teacher_logits = None if self.teacher is None else self._taught(x)
            answers = forward(x)
            # Gradients are averaged over processes, so sums are divided by what makes that the mean over all samples.
            losses = exit_losses(
                answers, target, teacher_logits, settings=settings, n_samples=n_samples / self.processes.count
            )
        counts = torch.as_tensor(self.exit_weights(step / self.total_steps)).to(losses)
        self.scaler.scale((counts * losses).sum()).backward()
        if settings["clip_grad"] is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learners, settings["clip_grad"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if isinstance(self.schedule, OneCycleLR):
            self.schedule.step()
        else:
            self.schedule.step_update(step + 1)
        if settings["averaging"] == "ema" and self.average is not None:
            self.average.update_parameters(self.exits)
        right = torch.stack([(logits.detach().argmax(1) == classes).sum() for logits in answers])
        return losses.detach(), right

    def _taught(self, x: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad(), evaluating([self.teacher.module]):
            output = self.teacher.module(x)
        return logits_in(output[-1] if isinstance(output, (list, tuple)) else output, "teacher")

    def _check_finite(self, losses: Tensor, epoch: int) -> None:
        if not torch.isfinite(losses).all():
            k = int(torch.isfinite(losses).int().argmin())
            raise FloatingPointError(
                f"joint training: the loss of exit {k} (of {len(losses)}) became {losses[k].item()} in epoch "
                f"{epoch + 1} of {self.settings['epochs']} at lr={self.settings['lr']:g}. Lower lr or head_lr, or set "
                "clip_grad."
            )

    # -- averages and memory -------------------------------------------------------------------------------------------

    def _averages(self, epoch: int) -> bool:
        return epoch + 1 > AVERAGED_FROM * self.settings["epochs"] or epoch + 1 == self.settings["epochs"]

    def _take_average(self) -> None:
        """Put the averaged weights in the place of the last ones."""
        if self.average is None:
            return
        self.exits.load_state_dict(self.average.module.state_dict())
        if self.settings["averaging"] == "swa":
            in_training_mode(self.exits, self.settings["batch_norm"], self.learners)
            with seeded(self.seed, self.settings["epochs"]) as seed, seeded_everywhere(seed, self.learners):
                batches = self.data.samples.read(self._batches(self.settings["epochs"]), seed)
                take_statistics_anew(self.exits, map(self.model.prepare, batches))

    @contextmanager
    def _memory_format(self) -> Iterator[None]:
        if not self.settings["channels_last"]:
            yield
            return
        self.exits.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            self.exits.to(memory_format=torch.contiguous_format)


def class_parameters(head: Any) -> list[nn.Parameter]:
    """What a head has besides its confidence output; what whoever made it keeps still does not learn."""
    sure = {id(parameter) for parameter in getattr(head, "confidence_parameters", list)()}
    parameters = [p for p in head.parameters() if p.is_floating_point() and id(p) not in sure]
    # A network built with exits is given as a whole, often without gradients as it was only asked.
    return [p for p in parameters if p.requires_grad] if isinstance(head, Head) else parameters


def trainable_parameters(module: nn.Module, trainable: Any) -> list[nn.Parameter]:
    """The parameters of a network that learn: all, those of normalisation layers, or those that fit a pattern.

    Raises
    ------
    ValueError
        For a pattern that fits nothing, or where nothing is left to learn.
    """
    if trainable == "all":
        parameters = list(module.parameters())
    elif trainable == "norm":
        norms = [part for part in module.modules() if "Norm" in type(part).__name__]
        parameters = [parameter for part in norms for parameter in part.parameters(recurse=False)]
    else:
        names = [name for name, _ in module.named_parameters()]
        fits = {pattern: [name for name in names if _fits(name, pattern)] for pattern in trainable}
        if strangers := [pattern for pattern, matches in fits.items() if not matches]:
            raise ValueError(
                f"trainable must fit names of parameters or modules; {strangers} fits none of {len(names)}, as "
                f"{names[0]!r} or {names[-1]!r}."
            )
        chosen = {name for matches in fits.values() for name in matches}
        parameters = [parameter for name, parameter in module.named_parameters() if name in chosen]
    parameters = [p for p in dict.fromkeys(parameters) if p.is_floating_point()]
    if not parameters:
        raise ValueError(
            f"trainable must leave something to learn; {trainable!r} fits no parameter of the network. For heads alone "
            "take another recipe, as 'frozen'."
        )
    return parameters


def _fits(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits, or that of a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def in_training_mode(exits: AllExits, batch_norm: str, learners: Sequence[nn.Parameter]) -> None:
    """Training mode, but for batch norm of the network whose statistics stand still."""
    learning = {id(parameter) for parameter in learners}
    exits.train()
    for part in exits.model.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            own = list(part.parameters(recurse=False))
            if batch_norm == "freeze" or (own and not any(id(parameter) in learning for parameter in own)):
                part.eval()


def _describe(bar: Any, epoch: int, epochs: int, means: Tensor) -> None:
    if not bar.disable:
        losses, right = means
        accuracies = " ".join(f"{100 * accuracy:.1f}" for accuracy in right.tolist())
        bar.set_description(f"epoch {epoch + 1}/{epochs}, loss {losses.sum():.3f}, right % by exit {accuracies}")
