import numpy as np
import pytest
import torch
from scipy import special, stats

from adaptexit.core.scores import SCORES, margin, max_proba, negative_entropy, resolve_score, softmax

RNG = np.random.default_rng(0)
LOGITS = np.concatenate(
    [
        RNG.normal(size=(50, 5)),
        RNG.normal(scale=100, size=(50, 5)),
        RNG.integers(0, 2, (20, 5)).astype(float),
        np.zeros((1, 5)),
        1e4 * np.eye(5),
    ]
)
PROBA = special.softmax(LOGITS, axis=-1)


def test_softmax_equals_scipys():
    assert softmax(LOGITS) == pytest.approx(PROBA, abs=1e-12)


def test_max_proba_is_the_largest_probability():
    assert max_proba(LOGITS) == pytest.approx(PROBA.max(axis=-1), abs=1e-12)


def test_negative_entropy_is_minus_scipys_entropy():
    assert negative_entropy(LOGITS) == pytest.approx(-stats.entropy(PROBA, axis=-1), abs=1e-9)


def test_margin_is_the_difference_of_the_two_largest_probabilities():
    rising = np.sort(PROBA, axis=-1)
    assert margin(LOGITS) == pytest.approx(rising[:, -1] - rising[:, -2], abs=1e-12)


def test_margin_of_a_tie_for_the_first_place_is_zero():
    assert margin(np.array([[2.0, 2.0, 1.0], [3.0, 3.0, 3.0]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "surest"), [("max_proba", 1.0), ("entropy", 0.0), ("margin", 1.0)])
def test_a_single_class_is_sure(name, surest):
    assert SCORES[name](np.array([[3.0], [-3.0]])).tolist() == [surest, surest]


@pytest.mark.parametrize("name", SCORES)
def test_torch_gives_the_same_scores(name):
    scores = SCORES[name](torch.from_numpy(LOGITS), torch)
    assert scores.numpy() == pytest.approx(SCORES[name](LOGITS), abs=1e-12)


def test_torch_gives_the_same_softmax():
    assert softmax(torch.from_numpy(LOGITS), torch).numpy() == pytest.approx(PROBA, abs=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_scores_keep_the_precision_and_the_leading_axes_of_the_logits(name):
    logits = LOGITS[:6].reshape(2, 3, 5).astype(np.float32)
    scores = SCORES[name](logits)
    assert scores.dtype == np.float32
    assert scores.shape == (2, 3)
    assert SCORES[name](torch.from_numpy(logits), torch).dtype == torch.float32


@pytest.mark.parametrize("name", SCORES)
def test_scores_do_not_change_when_a_constant_is_added_to_the_logits(name):
    assert SCORES[name](LOGITS + 1000.0) == pytest.approx(SCORES[name](LOGITS), abs=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_scores_rise_as_the_logits_are_sharpened(name):
    logits = np.outer([0.5, 1.0, 2.0, 4.0], [3.0, 1.0, 0.0])
    assert (np.diff(SCORES[name](logits)) > 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_a_name_resolves_to_its_formula_on_either_namespace(name):
    assert np.array_equal(resolve_score(name, "score")(LOGITS), SCORES[name](LOGITS))
    assert isinstance(resolve_score(name, "score", torch)(torch.from_numpy(LOGITS)), torch.Tensor)


def test_a_callable_resolves_to_itself():
    assert resolve_score(max_proba, "score") is max_proba


def test_an_unknown_name_is_refused_under_the_name_of_its_argument():
    with pytest.raises(ValueError, match=r"confidence must be one of \['entropy', 'margin', 'max_proba'\] or a call"):
        resolve_score("largest", "confidence")
