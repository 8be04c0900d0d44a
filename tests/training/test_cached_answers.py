"""Heads on features that were recorded once answer as the network does while it runs."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adaptexit.core.answer import Answer
from adaptexit.heads import BoostedHead, Head, ZTWHead
from adaptexit.heads.layout import pooled
from adaptexit.networks.build import new_network
from adaptexit.networks.models import TorchModel
from adaptexit.networks.readers import LogitsReader
from adaptexit.staging.contexts import evaluating
from adaptexit.staging.executor import record
from adaptexit.training.cached_answers import answers_on, record_features
from tests.nets import EXITS, AddingHead, branched_trained, digits

X = torch.from_numpy(digits()[2][0][:130])
SIZE = 50
"""Of the batches, the last one of which is smaller."""


class Overwriting(Head):
    """Reads means of a feature and doubles them in place."""

    def reduce(self, feature):
        return F.adaptive_avg_pool2d(feature, 2).flatten(1)[:, : self.n_classes]

    def answer(self, reduced, state=None):
        return Answer(reduced.mul_(2.0))


SAME_REDUCTION = {"mlp": "mlp", "residual": "residual", "conv": "conv", "chained": AddingHead, "ZTW": ZTWHead,
                  "boosted": lambda spec, n: BoostedHead(spec, n, "mlp"), "overwriting": Overwriting}  # fmt: skip
OTHER_REDUCTION = {
    "prototype": "prototype",
    "refined": "refined_prototype",
    "boosted prototypes": lambda spec, n: BoostedHead(spec, n, "prototype"),
}


def network_of(head, exits=EXITS, confidence="auto"):
    """A trained network with new heads at its cuts, whose batch norms and ensembles are no identity."""
    network = new_network(TorchModel(branched_trained(), None, "backbone"), exits, head, None, X[:8], 10, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.reader = LogitsReader(confidence)
    return network


def online(network, x, *, features, logits=True):
    with evaluating(network.modules):
        return record(network, x.split(SIZE), logits=logits, features=features)


def cached(network, x, rows=None, *, features, logits=True, batch_size=SIZE, **options):
    """The same from a cache that was filled with batches of other sizes."""
    settings = {"half": False, "memory_limit": 1 << 30, "folder": None} | options
    with evaluating(network.modules):
        everything = record_features(network, x.split(SIZE), features, **settings)
        n_early = len(network.early)
        vectors = everything.part(slice(n_early, None)) if features else None
        rows = np.arange(len(x)) if rows is None else rows
        return answers_on(network, everything.part(slice(n_early)), rows, vectors, logits=logits, batch_size=batch_size)


def assert_equal(one, other, tolerance=0.0):
    """The answers of all exits, up to a tolerance."""
    assert len(one) == len(other)
    for k, (first, second) in enumerate(zip(one, other, strict=True)):
        for name in ("logits", "predictions", "scores", "features"):
            array, right = getattr(first, name), getattr(second, name)
            assert (array is None) == (right is None), (k, name)
            if array is not None:
                assert array.dtype == right.dtype
                np.testing.assert_allclose(array, right, rtol=tolerance, atol=tolerance, err_msg=f"{name} of exit {k}")


@pytest.mark.parametrize("features", [False, True], ids=["answers", "with vectors"])
@pytest.mark.parametrize("head", SAME_REDUCTION.values(), ids=SAME_REDUCTION)
def test_heads_that_read_the_same_reduction_answer_bit_for_bit(head, features):
    network = network_of(head)
    answers = cached(network, X, features=features)
    assert_equal(answers, online(network, X, features=features))
    assert [answer.features is not None for answer in answers] == [features] * 3 + [False]
    assert len({answer.logits.tobytes() for answer in answers}) == 4


@pytest.mark.parametrize("features", [False, True], ids=["answers", "with vectors"])
@pytest.mark.parametrize("head", OTHER_REDUCTION.values(), ids=OTHER_REDUCTION)
def test_heads_that_compute_otherwise_on_reductions_answer_up_to_rounding(head, features):
    network = network_of(head)
    assert_equal(cached(network, X, features=features), online(network, X, features=features), 2e-4)


def test_a_heads_own_confidence_is_its_score():
    own, largest = (cached(network_of("prototype", confidence=c), X, features=False) for c in ("auto", "max_proba"))
    assert own[0].logits.tobytes() == largest[0].logits.tobytes()
    assert not np.allclose(own[0].scores, largest[0].scores)
    assert own[-1].scores.tobytes() == largest[-1].scores.tobytes()


def test_chained_heads_after_heads_that_leave_no_state():
    def mixed(spec, n_classes):
        return AddingHead(spec, n_classes) if spec.channels != 16 else Overwriting(spec, n_classes)

    network = network_of(mixed)
    assert [head.chained for head in network.early] == [True, False, True]
    answers = cached(network, X, features=False)
    assert_equal(answers, online(network, X, features=False))
    with evaluating(network.modules), torch.no_grad():
        first, _, third = (
            head.linear(F.adaptive_avg_pool2d(feature, 4).flatten(1)) if head.chained else None
            for head, feature in zip(network.early, features_of(network, X), strict=True)
        )
    np.testing.assert_allclose(answers[2].logits, first + third, rtol=1e-4, atol=1e-4)


def features_of(network, x):
    """The feature at every cut."""
    features = []
    with evaluating(network.modules), torch.no_grad():
        network.look(x, lambda k, feature: features.append(feature.clone()))
    return features


def test_vectors_are_means_over_positions():
    network = network_of("mlp")
    answers = cached(network, X, features=True)
    for answer, feature, head in zip(answers, features_of(network, X), network.early, strict=False):
        np.testing.assert_allclose(answer.features, pooled(feature, head.spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["mlp", AddingHead])
def test_some_samples_in_any_order_and_batches(head):
    network = network_of(head)
    rows = np.random.default_rng(0).permutation(130)[:77]
    everybody = cached(network, X, features=True)
    some = cached(network, X, rows, features=True, batch_size=13)
    assert_equal(some, [answer.take(rows) for answer in everybody], 1e-5)
    assert_equal(cached(network, X, np.array([5, 5, 0]), features=True),
                 [answer.take(np.array([5, 5, 0])) for answer in everybody], 1e-5)  # fmt: skip


def test_logits_are_kept_only_where_asked_for():
    network = network_of("mlp")
    answers = cached(network, X, features=False, logits=False)
    assert all(answer.logits is None for answer in answers)
    assert_equal(answers, online(network, X, features=False, logits=False))


@pytest.mark.parametrize("features", [False, True])
def test_a_cache_on_disk_gives_the_same(features, tmp_path):
    network = network_of(AddingHead)
    in_memory = cached(network, X, features=features)
    assert_equal(cached(network, X, features=features, memory_limit=0), in_memory)
    for _ in range(2):
        assert_equal(cached(network, X, features=features, folder=tmp_path), in_memory)
    assert len([path for path in tmp_path.iterdir() if path.name[0] != "."]) == 1


def test_nothing_of_the_model_is_run(monkeypatch):
    network = network_of("mlp")
    with evaluating(network.modules):
        cache = record_features(network, X.split(SIZE), False, half=False, memory_limit=1 << 30, folder=None)
    expected = online(network, X, features=False)
    for stage in network.stages:
        monkeypatch.setattr(stage, "forward", None)
    with evaluating(network.modules):
        assert_equal(answers_on(network, cache, np.arange(130), logits=True, batch_size=SIZE), expected)


def test_double_precision():
    network = new_network(TorchModel(branched_trained().double(), None, "backbone"), EXITS, "mlp", None, X[:8], 10, 0)
    answers = cached(network, X, features=True)
    assert answers[0].logits.dtype == answers[-1].logits.dtype == np.float64
    assert_equal(answers, online(network, X, features=True), 1e-12)
