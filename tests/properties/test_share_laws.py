import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit.core.routing import exit_index
from adaptexit.core.search.methods import quota_policies
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.shares import frontier_of_shares, geometric_frontier, matched_shares
from tests import reference
from tests.properties.strategies import exit_outputs, generators, sizes

ABOVE_NOTHING = st.floats(1e-6, 1.0)


@st.composite
def shares_and_costs(draw):
    n = draw(sizes(1, 6))
    return draw(arrays(np.float64, n, elements=ABOVE_NOTHING)), draw(arrays(np.float64, n, elements=st.floats(0, 10)))


def divergence(p, q):
    """Of p from q, in nats."""
    return float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0.0)))


@given(shares_and_costs(), st.floats(0, 1))
def test_matched_shares_cost_the_budget(pair, place):
    shares, costs = pair
    assume(np.ptp(costs) == 0 or np.ptp(costs) > 1e-3)
    budget = costs.min() + place * np.ptp(costs)
    fitting = matched_shares(shares, costs, budget)
    assert fitting.sum() == pytest.approx(1.0)
    assert (fitting >= 0).all()
    assert fitting @ costs == pytest.approx(budget, abs=1e-4 * max(np.ptp(costs), 1e-9))


@given(shares_and_costs(), st.floats(-5, 20), st.floats(1.001, 1e3), st.floats(-3, 3))
def test_matched_shares_know_no_unit(pair, budget, unit, shift):
    shares, costs = pair
    fitting = matched_shares(shares, costs, budget)
    np.testing.assert_allclose(matched_shares(7 * shares, costs, budget), fitting, atol=1e-6)
    assume(np.ptp(costs) == 0 or np.ptp(costs) > 1e-3)
    in_another_unit = matched_shares(shares, unit * (costs + shift), unit * (budget + shift))
    np.testing.assert_allclose(in_another_unit, fitting, atol=1e-4)


@given(shares_and_costs(), st.floats(0.05, 0.95), generators)
def test_no_shares_of_that_cost_are_nearer(pair, place, rng):
    shares, costs = pair
    assume(len(costs) > 2 and np.ptp(costs) > 1e-2)
    q = shares / shares.sum()
    budget = costs.min() + place * np.ptp(costs)
    fitting = matched_shares(shares, costs, budget)
    along = rng.normal(size=len(costs))
    basis = np.linalg.qr(np.stack([np.ones_like(costs), costs - costs.mean()], axis=1))[0]
    along -= basis @ (basis.T @ along)  # keeps both the sum and the cost
    for step in (1e-3, -1e-3):
        other = fitting + step * along
        if (other >= 0).all():
            assert divergence(other, q) >= divergence(fitting, q) - 1e-7


@given(shares_and_costs())
def test_shares_that_fit_already_stay(pair):
    shares, costs = pair
    q = shares / shares.sum()
    np.testing.assert_allclose(matched_shares(shares, costs, float(q @ costs)), q, atol=1e-6)


@given(exit_outputs(min_exits=2), st.data())
def test_quotas_take_the_surest_of_those_who_reach_an_exit(outputs, data):
    n = outputs.n_samples
    quotas = np.array(
        data.draw(st.lists(st.integers(0, n), min_size=outputs.n_exits - 1, max_size=outputs.n_exits - 1))
    )
    problem = Problem.from_outputs(outputs)
    _, cutoffs = problem.thresholds(quota_policies(problem, quotas[None])[0])
    exits = exit_index(outputs, cutoffs)
    alive = np.ones(n, dtype=bool)
    for k, quota in enumerate(quotas):
        leave = alive & (exits == k)
        scores = outputs.scores[k][alive]
        count = min(int(quota), int(alive.sum()))
        if count:
            limit = np.sort(scores)[::-1][count - 1]
            assert leave.sum() == np.count_nonzero(scores >= limit)
        else:
            assert not leave.any()
        alive &= ~leave


@given(exit_outputs(min_exits=1), st.data())
def test_points_cost_their_budget_or_less(outputs, data):
    shares = data.draw(arrays(np.float64, outputs.n_exits, elements=ABOVE_NOTHING))
    costs = outputs.path_costs(np.ones(outputs.n_exits, dtype=bool)) / outputs.full_cost
    budgets = [float(b) for b in np.linspace(costs[0], max(costs[-1], 1.0), 5)]
    in_use = data.draw(st.sampled_from(budgets))
    frontier, point_in_use = frontier_of_shares(outputs, shares, budgets, in_use)
    assert frontier.points[frontier.index(point_in_use)] is point_in_use
    assert point_in_use.params == {"budget": in_use}
    for point in frontier.points:
        assert point.cost <= point.params.get("budget", 1.0) + 1e-6
    assert any(point.exit_rates[-1] == 1 and not point.on[:-1].any() for point in frontier.points)
    assert (np.diff(frontier.cost) >= 0).all()


@given(exit_outputs(min_exits=1), st.sampled_from([2, 20, 39]))
def test_the_geometric_frontier_equals_msdnets_loop(outputs, n_points):
    frontier = geometric_frontier(outputs, n_points)
    assert sorted(p.params["q"] for p in frontier.points) == pytest.approx(np.linspace(0.05, 1.95, n_points))
    assert (np.diff(frontier.cost) >= 0).all()
    for point in frontier.points:
        powers = [point.params["q"] ** k for k in range(outputs.n_exits)]
        shares = [outputs.n_samples * power / sum(powers) for power in powers]
        if any(abs(share - round(share)) < 1e-6 for share in shares[:-1]):
            continue  # rounding may fall to either side
        exits = reference.msdnet_rule(outputs.scores.tolist(), [int(share) for share in shares])
        rates = [exits.count(k) / outputs.n_samples for k in range(outputs.n_exits)]
        assert point.exit_rates.tolist() == rates
        right = sum(float(outputs.graded[k][i]) for i, k in enumerate(exits))
        assert point.accuracy == pytest.approx(right / outputs.n_samples)
