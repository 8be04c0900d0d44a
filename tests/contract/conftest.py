"""Every law of the contract is asked of every estimator, of those that are much like others with the slow tests."""

import copy

import pytest

from tests.contract.cases import CASES, fitted_once, in_turn


@pytest.fixture(params=in_turn(CASES))
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return CASES[name]


@pytest.fixture
def model(name):
    """A fitted one, which tests only ask questions."""
    return fitted_once(name)


@pytest.fixture
def own(model):
    """A copy that a test may calibrate or spoil."""
    return copy.deepcopy(model)
