"""How early exits come to a model that stays as it is: features recorded once, heads trained on them, answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from adaptexit.core.outputs import ExitOutputs
from adaptexit.data.batches import Batches
from adaptexit.data.classes import hold_out
from adaptexit.staging.contexts import evaluating
from adaptexit.training.cached_answers import answers_on, columns_of, record_features
from adaptexit.training.feature_cache import FeatureCache
from adaptexit.training.head_choice import MANY_SAMPLES, Rival, chosen, rival_networks
from adaptexit.training.recipes.auto import AutoRecipe

if TYPE_CHECKING:
    from adaptexit.core.costs import Costs
    from adaptexit.networks.base import Network
    from adaptexit.networks.branched import BranchedNetwork
    from adaptexit.networks.models import TorchModel
    from adaptexit.training.recipes.base import History, Recipe
    from adaptexit.training.samples import Hashed


@dataclass(frozen=True)
class Conditions:
    """What training is told besides the network, the recipe and the data.

    Attributes
    ----------
    classes : array (C,)
        Labels in the order of the logits.
    cost : as for :meth:`adaptexit.networks.base.Network.costs`
    calibration_size : float
        Share of the samples that nothing is trained on.
    needs_logits, needs_features, needs_training : bool
        What the calibrator wants of the answers, and whether it learns from those on the training part too.
    cache_dir, cache_memory, cache_half : as for :func:`adaptexit.training.feature_cache.collect`
    batch_size, seed, verbose : int
    head : Any
        What the user wants to answer at a cut; "auto" leaves it to the recipe.
    """

    classes: NDArray[Any]
    cost: Any
    calibration_size: float
    needs_logits: bool
    needs_features: bool
    needs_training: bool
    cache_dir: Any
    cache_memory: int
    cache_half: bool
    batch_size: int
    seed: int
    verbose: int
    head: Any = None

    @contextmanager
    def progress(self, batches: Batches | Hashed, doing: str) -> Iterator[Any]:
        """The batches, with a bar where one is wanted."""
        with tqdm(batches, total=batches.n_batches, desc=doing, disable=self.verbose < 1) as progress:
            yield progress

    def features(
        self, network: BranchedNetwork, batches: Batches | Hashed, rivals: Sequence[BranchedNetwork] = ()
    ) -> FeatureCache:
        """One pass of the model: what heads read, the rivals' too, and what the calibrator does behind it."""
        with evaluating(network.modules), self.progress(batches, "recording features") as progress:
            return record_features(
                network, progress, self.needs_features,
                half=self.cache_half, memory_limit=self.cache_memory, folder=self.cache_dir, rivals=rivals,
            )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A network whose exits have learned.

    Attributes
    ----------
    network : Network
    history : dict
        Losses of the training, and what else it has to tell, as JSON holds it.
    outputs : ExitOutputs
        What every exit answers on the samples that were held out.
    training_outputs : ExitOutputs or None
        The same on the others, where the calibrator learns from that.
    original : TorchModel or None
        The trained model that was given, where the network is a changed copy of it.
    head : str or None
        Name of the head that was found to be the best, where that was left open.
    """

    network: Network
    history: History
    outputs: ExitOutputs
    training_outputs: ExitOutputs | None
    original: TorchModel | None = None
    head: str | None = None


def retrofitted(network: BranchedNetwork, recipe: Recipe, batches: Batches, conditions: Conditions) -> Trained:
    """Train the heads of a network on features of samples that are not held out; the model stays as it is.

    Parameters
    ----------
    network : BranchedNetwork
        Its heads are trained in place, unless other heads on the same model turn out to be better.
    recipe : Recipe
    batches : Batches
        Without labels heads learn the full model's answers.
    conditions : Conditions
    """
    example = batches.first()
    n_samples = MANY_SAMPLES if batches.n_batches is None else batches.n_batches * len(example)
    rivals = rivals_of(network, recipe, conditions, example, n_samples)
    networks = [network, *(rival.network for rival in rivals.values())]
    history: History = {}
    head = None
    with conditions.features(network, batches, networks[1:]) as recorded:
        full = recorded.logits.argmax(axis=1)
        labels = batches.indices(conditions.classes, len(full)) if batches.labelled else full
        held_in, held_out = hold_out(labels, conditions.calibration_size, conditions.seed)
        columns, sources = columns_of(networks)
        own = columns[0]
        if isinstance(recipe, AutoRecipe) and rivals:
            caches = {name: recorded.part(read) for name, read in zip(rivals, columns[1:], strict=True)}
            head, recipe, history["choice"] = chosen(
                rivals, recipe, caches, held_in, labels[held_in], conditions.seed, conditions.verbose
            )
            network, own = rivals[head].network, columns[1 + list(rivals).index(head)]
        with evaluating(network.modules):
            costs = network.costs(example, conditions.cost)
        features = recorded.part([*own, *range(len(sources), len(recorded.features))])
        history |= recipe.train(
            network.early, features.part(slice(len(own))), held_in, labels[held_in],
            random_state=conditions.seed, verbose=conditions.verbose,
        )  # fmt: skip
        outputs, training = (
            cached_outputs(network, features, rows, labels[rows], costs, conditions) if wanted else None
            for rows, wanted in ((held_out, True), (held_in, conditions.needs_training))
        )
    assert outputs is not None
    return Trained(network, history, outputs, training, head=head)


def rivals_of(
    network: BranchedNetwork, recipe: Recipe, conditions: Conditions, example: Tensor, n_samples: int
) -> dict[str, Rival]:
    """Heads to choose from, where the user has left that to the recipe and the recipe to the data."""
    if not (isinstance(recipe, AutoRecipe) and isinstance(conditions.head, str) and conditions.head == "auto"):
        return {}
    factories = recipe.candidates([head.spec for head in network.early])
    networks = rival_networks(network, factories, len(conditions.classes), conditions.seed, n_samples)
    with evaluating(network.modules):
        return {name: Rival.of(rival, example, conditions.cost) for name, rival in networks.items()}


def cached_outputs(
    network: BranchedNetwork,
    features: FeatureCache,
    rows: NDArray[Any],
    labels: NDArray[Any],
    costs: Costs,
    conditions: Conditions,
) -> ExitOutputs:
    """What every exit answers on samples (rows) whose features were recorded, without running the model."""
    n_early = len(network.early)
    vectors = features.part(slice(n_early, None))
    with evaluating(network.modules):
        answers = answers_on(
            network, features.part(slice(n_early)), rows, vectors if vectors.features else None,
            logits=conditions.needs_logits, batch_size=conditions.batch_size,
        )  # fmt: skip
    return ExitOutputs.from_answers(answers, labels, len(conditions.classes), costs, chained=network.chained)
