"""scikit-learn's own checks, on cascades of two scikit-learn classifiers and on perceptrons with exits."""

import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from adaptexit import CascadeSaver, FrozenRecipe, MultiExitClassifier

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")

STRONG, WEAK = LogisticRegression(C=10.0), LogisticRegression(C=0.01)


SPLIT = "which samples are held out for calibration depends on how many there are"


def known_failures(estimator):
    return {"check_sample_weight_equivalence_on_dense_data": SPLIT}


@parametrize_with_checks(
    [
        CascadeSaver(STRONG, WEAK, cost=[1, 10]),
        CascadeSaver(STRONG, [GaussianNB(), DecisionTreeClassifier(max_depth=3, random_state=0)], cost=[1, 2, 10]),
    ],
    expected_failed_checks=known_failures,
)
def test_with_given_costs(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [CascadeSaver(RandomForestClassifier(n_estimators=30, random_state=0), WEAK)],
    expected_failed_checks=known_failures,
)
def test_with_measured_costs(estimator, check):
    """A base that is many times dearer, so that the point in use does not hang on the measurement's noise."""
    check(estimator)


SMALL = MLPClassifier((16, 16, 16), learning_rate_init=0.01, max_iter=60)


@pytest.mark.slow
@parametrize_with_checks([MultiExitClassifier(SMALL, recipe=FrozenRecipe(epochs=3))])
def test_a_perceptron_with_exits(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([MultiExitClassifier("mlp", recipe=FrozenRecipe(epochs=3))])
def test_the_default_perceptron_with_exits(estimator, check):
    check(estimator)
