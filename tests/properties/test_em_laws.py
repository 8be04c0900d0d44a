"""Laws of exits as a latent variable, on random likelihoods."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.em import (
    LEAST,
    exit_probabilities,
    expectation,
    expected_cost,
    fit_global,
    fit_per_sample,
    halting_targets,
    reach,
)
from tests.properties.strategies import generators, sizes

weights = st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0])


@st.composite
def problems(draw, min_exits=1):
    """Log-likelihoods (N, K), some at their floor, and rising costs (K,)."""
    rng = draw(generators)
    shape = (draw(sizes(1, 30)), draw(sizes(min_exits, 6)))
    p = rng.random(shape) ** draw(st.sampled_from([1, 4, 60]))
    return np.log(np.maximum(p, LEAST)), np.cumsum(rng.random(shape[1]) + 0.01)


@given(problems(), weights, st.booleans(), st.integers(1, 4))
def test_responsibilities_sum_to_one_and_come_back_from_halting(problem, weight, one_prior, n_iter):
    log_p, costs = problem
    penalty = weight * costs
    posterior = fit_global(log_p, penalty) if one_prior else fit_per_sample(log_p, penalty, n_iter=n_iter)
    r = np.exp(posterior.log_responsibilities)
    np.testing.assert_allclose(r.sum(axis=1), 1)
    halting = halting_targets(posterior.log_responsibilities)
    assert ((halting >= 0) & (halting <= 1)).all()
    assert (halting[:, -1] == 1).all()
    np.testing.assert_allclose(exit_probabilities(halting), r, atol=1e-12)


@given(problems(), weights)
def test_reaching_an_exit_is_leaving_there_or_later(problem, weight):
    log_p, costs = problem
    log_r = fit_global(log_p, weight * costs).log_responsibilities
    expected = np.exp(log_r)[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(reach(log_r), expected, atol=1e-12)
    assert reach(log_r).max() <= 1
    np.testing.assert_allclose(reach(log_r) * halting_targets(log_r), np.exp(log_r), atol=1e-12)


@given(problems(), weights, st.integers(1, 6))
def test_the_likelihood_never_falls(problem, weight, n_iter):
    log_p, costs = problem
    for history in (
        fit_global(log_p, weight * costs, tol=0.0, n_iter=30).history,
        fit_per_sample(log_p, weight * costs, n_iter=n_iter).history,
    ):
        assert (np.diff(history) >= -1e-9 * np.abs(history[0]) - 1e-12).all()


@given(problems(), weights, st.floats(-5, 5))
def test_a_constant_added_to_the_costs_changes_nothing(problem, weight, constant):
    log_p, costs = problem
    for fit in (fit_global, fit_per_sample):
        one, other = fit(log_p, weight * costs), fit(log_p, weight * (costs + constant))
        np.testing.assert_allclose(np.exp(one.log_responsibilities), np.exp(other.log_responsibilities), atol=1e-5)


@given(problems(), weights, generators)
def test_scaling_a_samples_likelihoods_changes_nothing(problem, weight, rng):
    log_p, costs = problem
    scaled = log_p + rng.normal(size=(len(log_p), 1))
    for fit in (fit_global, fit_per_sample):
        one, other = fit(log_p, weight * costs), fit(scaled, weight * costs)
        np.testing.assert_allclose(np.exp(one.log_responsibilities), np.exp(other.log_responsibilities), atol=1e-5)


@given(problems())
def test_without_cost_and_with_an_even_prior_it_is_bayes_rule(problem):
    log_p, costs = problem
    r = np.exp(fit_per_sample(log_p, 0.0 * costs).log_responsibilities)
    p = np.exp(log_p)
    np.testing.assert_allclose(r, p / p.sum(axis=1, keepdims=True), rtol=1e-9, atol=1e-15)


@given(problems())
def test_a_huge_cost_weight_sends_everybody_to_the_cheapest_exit(problem):
    log_p, costs = problem
    for fit in (fit_global, fit_per_sample):
        posterior = fit(log_p, 1e7 * costs)
        np.testing.assert_allclose(np.exp(posterior.log_responsibilities)[:, 0], 1)
        np.testing.assert_allclose(halting_targets(posterior.log_responsibilities)[:, 0], 1)


@given(problems(min_exits=2), st.floats(0, 20), st.floats(0, 20), generators)
def test_at_a_fixed_prior_expected_cost_does_not_rise_with_the_cost_weight(problem, one, other, rng):
    log_p, costs = problem
    prior = rng.dirichlet(np.ones(log_p.shape[1]))
    low, high = (expected_cost(expectation(log_p, prior, w * costs)[0], costs) for w in sorted((one, other)))
    assert high <= low + 1e-9


@given(problems(min_exits=2), st.floats(0, 20), st.floats(0, 20))
def test_at_the_global_optimum_expected_cost_does_not_rise_with_the_cost_weight(problem, one, other):
    log_p, costs = problem
    low, high = (fit_global(log_p, w * costs, n_iter=20_000, tol=1e-13) for w in sorted((one, other)))
    assume(low.converged and high.converged)
    slack = 1e-4 * np.ptp(costs)
    assert high.prior @ costs <= low.prior @ costs + slack


@given(problems(), st.integers(2, 6))
def test_a_prior_of_each_sample_only_sharpens(problem, n_iter):
    """After T steps it is the softmax of T times the utility: it collapses."""
    log_p, costs = problem
    utility = log_p - costs
    sharp = np.exp(n_iter * (utility - utility.max(axis=1, keepdims=True)))
    posterior = fit_per_sample(log_p, costs, n_iter=n_iter)
    np.testing.assert_allclose(
        np.exp(posterior.log_responsibilities), sharp / sharp.sum(axis=1, keepdims=True), atol=1e-12
    )
    prior = np.full(log_p.shape, 1 / log_p.shape[1])
    for _ in range(n_iter):
        log_r, _ = expectation(log_p, prior, costs)
        prior = np.exp(log_r)
    np.testing.assert_allclose(prior, np.exp(posterior.log_responsibilities), atol=1e-9)


@given(problems(), weights)
def test_a_step_of_the_global_prior_is_the_mean_responsibility(problem, weight):
    """Computed with evidence relative to each sample's best exit, the same as in logarithms."""
    log_p, costs = problem
    prior = np.full(log_p.shape[1], 1 / log_p.shape[1])
    for n_iter in range(4):
        posterior = fit_global(log_p, weight * costs, n_iter=n_iter, tol=-np.inf)
        np.testing.assert_allclose(posterior.prior, prior, atol=1e-12)
        log_r, value = expectation(log_p, prior, weight * costs)
        np.testing.assert_allclose(posterior.log_responsibilities, log_r, rtol=1e-9, atol=1e-9)
        assert posterior.history[-1] == pytest.approx(value)
        prior = np.exp(log_r).mean(axis=0)
