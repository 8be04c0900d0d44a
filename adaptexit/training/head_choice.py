"""Which head answers best at the cuts of a model: several are trained a little, and compared by their frontiers.

All learn from one pass of the model. First each is trained for a quarter of its epochs, by the full model's answers and
labels in equal parts. The best one tells from whom to learn: by either alone or both, for half of its epochs. Then it,
the second and all that take much longer, which come forward late, are trained in full, and the best one stays. Work is
counted, never timed, so that equal arguments give equal choices, and it is bounded: with the pass and the training of
the winner all takes at most three times the pass and one training, that of the dearest head compared; trainings are
shortened where that would be exceeded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from adaptexit.core.frontier_score import frontier_score
from adaptexit.core.outputs import ExitOutputs
from adaptexit.data.classes import hold_out
from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.build import new_heads
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.cost import counted_macs
from adaptexit.training.cached_answers import answers_on

if TYPE_CHECKING:
    from adaptexit.core.costs import Costs
    from adaptexit.heads.base import Head
    from adaptexit.heads.by_name import HeadFactory
    from adaptexit.training.feature_cache import FeatureCache
    from adaptexit.training.recipes.auto import AutoRecipe

FEWEST_ROWS = 1000
"""Training samples below which nothing is compared: differences would be noise."""

VALIDATION_SHARE, MOST_VALIDATION = 0.2, 5000
"""Of the training samples, those that a comparison is made on."""

FIRST_SHARE, TEACHER_SHARE, LAST_SHARE = 0.25, 0.5, 1.0
"""Of a training that a trial is, at most: of all heads, of the best by each teacher, of those in front."""

STEP = 2e7
"""Multiply-accumulates in whose time a head is called, and its weights are moved, once."""

CLEAR = 0.02
"""Mean accuracy behind the best from which a head that takes no longer is not tried again."""

HEDGE = 0.002
"""Mean accuracy by which both teachers together must be better than one alone."""

MUCH = 2.0
"""Times the work of the best: a head that takes so much comes forward in a whole training only."""

BOTH, TEACHERS = 0.5, (1.0, 0.0)
"""What distillation counts where both teachers are heard, and where it is one of them: the model first, then labels."""

MODEST, DEAR = 0.03, 0.3
"""Of the model's cost: the most that a head may have that is taken without a comparison, and that is compared."""

MOST_KEPT = 1 << 31
"""Numbers (8 GiB of them) that the heads of a network may read of all samples, unless no heads read fewer."""

MANY_SAMPLES = 1 << 16
"""Taken for the number of samples where the source does not know it."""


@dataclass(frozen=True)
class Rival:
    """A network with one kind of head.

    Attributes
    ----------
    network : BranchedNetwork
        Its heads are as they were made.
    costs : Costs
    macs, full_macs : float
        Multiply-accumulates of all its heads, and of the model, for one sample; what cannot be counted is left out.
    """

    network: BranchedNetwork
    costs: Costs
    macs: float
    full_macs: float

    @classmethod
    def of(cls, network: BranchedNetwork, example: torch.Tensor, cost: Any) -> Rival:
        """A network with what it costs, counted or measured on raw inputs; it is in evaluation mode."""
        with evaluating(network.modules), torch.no_grad():
            costs = network.costs(example, cost)
            if costs.unit == "MACs":
                return cls(network, costs, float(costs.exits[:-1].sum()), costs.full)
            macs = sum(counted_macs(head.answer, _reduced(head))[0] for head in network.early)
            return cls(network, costs, macs, counted_macs(network.split.module, network.split.example[:1])[0])


def rival_networks(
    network: BranchedNetwork,
    factories: Mapping[str, HeadFactory],
    n_classes: int,
    seed: int,
    n_samples: int = MANY_SAMPLES,
) -> dict[str, BranchedNetwork]:
    """Networks on one model with other heads, by name.

    Heads that cannot read its features are left out, and those for which too much of all samples had to be kept.

    Raises
    ------
    ValueError
        Where no head can.
    """
    specs = [head.spec for head in network.early]
    rivals: dict[str, BranchedNetwork] = {}
    sizes: dict[str, int] = {}
    refusals = []
    for name, factory in factories.items():
        try:
            heads = new_heads(factory, specs, network.model, n_classes, seed)
        except ValueError as error:
            refusals.append(f"{name}: {error}")
            continue
        rivals[name] = BranchedNetwork(network.model, network.split, heads)
        rivals[name].reader = network.reader
        sizes[name] = sum(_reduced(head)[0].numel() for head in heads)
    if not rivals:
        raise ValueError(f"heads must hold one that can read the features; got {'; '.join(refusals)}")
    limit = max(MOST_KEPT / n_samples, min(sizes.values()))
    return {name: rival for name, rival in rivals.items() if sizes[name] <= limit}


def _reduced(head: Head) -> torch.Tensor:
    """What a head keeps of one feature of zeros."""
    like = next(head.parameters(), torch.empty(0))
    with torch.no_grad():
        return head.reduce(torch.zeros(1, *head.spec.shape, dtype=like.dtype, device=like.device))


def dearest_head(rival: Rival) -> float:
    """Cost of the dearest of its heads, relative to the full model's."""
    return float(rival.costs.exits[:-1].max(initial=0.0)) / rival.costs.full


def modest(rivals: Mapping[str, Rival]) -> str:
    """The dearest heads that cost little beside the model, by name; the cheapest where none does."""
    prices = {name: dearest_head(rival) for name, rival in rivals.items()}
    little = [name for name in rivals if prices[name] <= MODEST]
    return max(little, key=lambda name: prices[name]) if little else min(rivals, key=lambda name: prices[name])


# -- how far each is trained -------------------------------------------------------------------------------------------


def training_work(rival: Rival, n_samples: int, epochs: int, batch_size: int) -> float:
    """Of a whole training in multiply-accumulates: a backward pass counts two, a minibatch what it takes by itself."""
    steps = epochs * -(-n_samples // batch_size)
    return 3.0 * epochs * n_samples * rival.macs + STEP * steps * len(rival.network.early)


@dataclass
class Allowance:
    """The work that trials may still take, in multiply-accumulates."""

    spare: float

    def share(self, work: Sequence[float], most: float, of: float = 1.0) -> float:
        """Take what all can have of their trainings, the same share each, at most so much of them and of the rest."""
        share = min(most, of * self.spare / max(sum(work), 1e-12))
        self.spare -= share * sum(work)
        return share


Tried = Callable[[Sequence[str], float, float], dict[str, float]]
"""Heads by name, what distillation counts, the share of a training -> their scores, the best first."""


def tournament(work: Mapping[str, float], a_pass: float, teachers: Sequence[float], tried: Tried) -> tuple[str, float]:
    """The best head, and from whom it learns best (what distillation counts).

    Parameters
    ----------
    work : dict of name to float
        Of the whole training of each.
    a_pass : float
        Work of the pass.
    teachers : sequence of float
        The first is that of heads' trials.
    tried : callable
    """
    allowance = Allowance(2 * (a_pass + max(work.values())))
    first = allowance.share([*work.values()], FIRST_SHARE, of=0.5)
    scores = tried([*work], teachers[0], first)
    best, weight = next(iter(scores)), teachers[0]
    if len(teachers) > 1:
        share = allowance.share([work[best]] * len(teachers), TEACHER_SHARE, of=0.5)
        by_teacher = {teacher: tried([best], teacher, share)[best] for teacher in teachers}
        # A mixture is a hedge that ranks heads well; one teacher alone is mostly better in the end where both are near.
        weight = max(by_teacher, key=lambda teacher: by_teacher[teacher] - (HEDGE if 0 < teacher < 1 else 0.0))
    finalists = in_front(scores, work)
    last = allowance.share([work[name] for name in finalists], LAST_SHARE)
    if len(finalists) == 1 or last <= first:  # a shorter trial would say less than the first one
        return best, weight
    return next(iter(tried(finalists, weight, last))), weight


# -- the choice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trials:
    """Heads on trial: what they learn from, and what they are judged on.

    Attributes
    ----------
    recipe : AutoRecipe
    caches : dict of name to FeatureCache
        What the heads of each rival read.
    rows, targets : integer arrays (n,)
        Samples to learn from, and their classes.
    judged, judged_targets : integer arrays (m,)
        The same of those to be judged on.
    epochs : int
        Of a whole training.
    seed, verbose : int
    """

    recipe: AutoRecipe
    caches: Mapping[str, FeatureCache]
    rows: NDArray[Any]
    targets: NDArray[Any]
    judged: NDArray[Any]
    judged_targets: NDArray[Any]
    epochs: int
    seed: int
    verbose: int

    def score(self, name: str, rival: Rival, share: float, distillation: float | str) -> float:
        """Of heads that were trained for a share of the epochs; the rival's own stay as they are."""
        epochs = max(1, int(share * self.epochs))
        n_rows = min(len(self.rows), max(2, int(len(self.rows) * share * self.epochs / epochs)))
        trial = BranchedNetwork(rival.network.model, rival.network.split, copy.deepcopy(rival.network.early))
        trial.reader = rival.network.reader
        recipe = clone(self.recipe).set_params(epochs=epochs, distillation=distillation)
        recipe.train(trial.early, self.caches[name], self.rows[:n_rows], self.targets[:n_rows], random_state=self.seed)
        with evaluating(trial.modules):
            answers = answers_on(trial, self.caches[name], self.judged, logits=False, batch_size=1024)
        n_classes = self.caches[name].logits.shape[1]
        outputs = ExitOutputs.from_answers(
            answers, self.judged_targets, n_classes, rival.costs, chained=rival.network.chained
        )
        return frontier_score(outputs, self.seed)


def chosen(
    rivals: Mapping[str, Rival],
    recipe: AutoRecipe,
    caches: Mapping[str, FeatureCache],
    rows: NDArray[Any],
    targets: NDArray[Any],
    seed: int,
    verbose: int = 0,
) -> tuple[str, AutoRecipe, dict[str, Any]]:
    """The name of the head to take, the recipe to train it by, and what was compared, as JSON holds it.

    Parameters
    ----------
    rivals : dict of name to Rival
    recipe : AutoRecipe
    caches : dict of name to FeatureCache
    rows, targets : integer arrays (n,)
        Training samples and their classes.
    seed : int
    verbose : int
        From 1 on, a bar over the epochs of every trial.
    """
    epochs = recipe.n_epochs(len(rows))
    run_macs = max(caches[name].n_samples * rival.full_macs for name, rival in rivals.items())
    work = {name: training_work(rival, len(rows), epochs, recipe.batch_size) for name, rival in rivals.items()}
    report: dict[str, Any] = {
        "candidates": {
            name: {"head_costs": [float(c) for c in rival.costs.exits[:-1] / rival.costs.full], "trials": []}
            for name, rival in rivals.items()
        },
        "n_validation": 0,
    }
    parts = _parted(targets, seed)
    names = [name for name in rivals if dearest_head(rivals[name]) <= DEAR] or [min(work, key=lambda name: work[name])]
    if parts is None or len(names) == 1:
        winner = modest(rivals) if parts is None else names[0]
        return winner, recipe, report | {"head": winner, "distillation": recipe.distillation}
    learning, judged = parts
    trials = Trials(
        recipe, caches, rows[learning], targets[learning], rows[judged], targets[judged], epochs, seed, verbose
    )  # fmt: skip
    report["n_validation"] = len(judged)

    def tried(names: Sequence[str], weight: float, share: float) -> dict[str, float]:
        """Scores of heads trained by one mixture of teachers, the best first."""
        scores = {name: trials.score(name, rivals[name], share, weight) for name in names}
        for name, score in scores.items():
            trial = {"epochs": share * epochs, "distillation": weight, "score": score}
            report["candidates"][name]["trials"].append(trial)
        return dict(sorted(scores.items(), key=lambda item: (-item[1], work[item[0]])))

    teachers = _teachers(recipe, labelled=not np.array_equal(targets, _answered(caches, rows)))
    winner, weight = tournament({name: work[name] for name in names}, run_macs, teachers, tried)
    return winner, clone(recipe).set_params(distillation=weight), report | {"head": winner, "distillation": weight}


def in_front(scores: Mapping[str, float], work: Mapping[str, float]) -> list[str]:
    """Heads that are tried again: the best, the second where it is near, and all that take much longer to train."""
    ranking = sorted(scores, key=lambda name: (-scores[name], work[name]))
    best = ranking[0]
    near = [name for name in ranking[:2] if scores[name] > scores[best] - CLEAR]
    return near + [name for name in ranking if name not in near and work[name] >= MUCH * work[best]]


def _teachers(recipe: AutoRecipe, labelled: bool) -> tuple[float, ...]:
    """What distillation counts: in the trials of heads, and what else is compared for the best of them."""
    if not isinstance(recipe.distillation, str):
        return (recipe.distillation,)
    return (BOTH, *TEACHERS) if labelled else (1.0,)


def _answered(caches: Mapping[str, FeatureCache], rows: NDArray[Any]) -> NDArray[Any]:
    """What the full model answers to samples: their targets where there are no labels."""
    return np.asarray(next(iter(caches.values())).logits[rows].argmax(axis=1))


def _parted(targets: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Training samples to learn from, in random order, and those to be judged on; None where they are too few."""
    if len(targets) < FEWEST_ROWS:
        return None
    try:
        learning, judged = hold_out(targets, min(VALIDATION_SHARE, MOST_VALIDATION / len(targets)), seed)
    except ValueError:  # hardly a class has more than one sample
        return None
    return np.random.default_rng(seed).permutation(learning), judged
