import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptexit.core.costs import Costs
from tests import reference
from tests.properties.strategies import cost_pairs, exit_outputs, sizes, thresholds_for


@st.composite
def costs_and_switches(draw, chained=None):
    """Costs of up to six exits, and which of these are switched on."""
    n = draw(sizes(1, 6))
    stages, exits = draw(cost_pairs(n))
    costs = Costs(stages, exits, draw(st.booleans()) if chained is None else chained)
    return costs, np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))


def plain(costs):
    return np.zeros(len(costs.stages), dtype=bool)


@given(st.data())
def test_paths_equal_what_a_sample_spends(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    run = reference.exits_run(outputs, thresholds)
    paths = outputs.pricing.paths(thresholds < np.inf)
    spent = [reference.spent(outputs, run, k) for k in range(outputs.n_exits)]
    assert paths == pytest.approx(spent)
    assert outputs.path_costs(thresholds < np.inf).tolist() == paths.tolist()


@given(costs_and_switches(chained=False))
def test_what_is_switched_on_is_run_and_the_last_exit_always(pair):
    costs, on = pair
    assert costs.runs(on).tolist() == [*on[:-1], True]


@given(costs_and_switches(chained=True))
def test_chained_exits_are_run_up_to_the_deepest_one_that_is_on(pair):
    costs, on = pair
    deepest = max(np.flatnonzero(on[:-1]), default=-1)
    assert costs.runs(on).tolist() == [k <= deepest for k in range(len(on) - 1)] + [True]


@given(costs_and_switches())
def test_running_twice_changes_nothing_and_leaves_the_switches_alone(pair):
    costs, on = pair
    before = on.copy()
    run = costs.runs(on)
    assert costs.runs(run).tolist() == run.tolist()
    assert on.tolist() == before.tolist()


@given(costs_and_switches(), st.data())
def test_no_path_is_cheaper_with_more_exits_on(pair, data):
    costs, on = pair
    more = on | np.array(data.draw(st.lists(st.booleans(), min_size=len(on), max_size=len(on))))
    assert (costs.paths(more) >= costs.paths(on)).all()


@given(costs_and_switches())
def test_the_full_cost_is_that_of_the_whole_path_with_every_other_exit_off(pair):
    costs, _ = pair
    assert costs.full == pytest.approx(costs.paths(plain(costs))[-1])
    assert costs.full == pytest.approx(costs.alone()[-1])


@given(costs_and_switches())
def test_an_exit_alone_costs_its_path_when_only_it_is_on(pair):
    costs, _ = pair
    for k, cost in enumerate(costs.alone()):
        only = plain(costs)
        only[k] = True
        run = range(k + 1) if costs.chained and k < len(only) - 1 else [k]
        assert cost == costs.paths(only)[k] == pytest.approx(costs.stages[: k + 1].sum() + costs.exits[[*run]].sum())


@given(costs_and_switches(), st.data())
def test_what_is_charged_is_paid_at_every_exit_that_is_run(pair, data):
    costs, on = pair
    extra = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(on), max_size=len(on))), dtype=float)
    charged = costs.charged(extra, chained=data.draw(st.booleans()))
    expected = np.cumsum(np.where(charged.runs(on), extra + costs.exits, 0.0) + costs.stages)
    assert charged.paths(on) == pytest.approx(expected)
    assert charged.chained or not costs.chained
    assert charged.unit == costs.unit


@given(costs_and_switches())
def test_charging_nothing_changes_nothing(pair):
    costs, on = pair
    assert costs.charged(np.zeros(len(on)), chained=False) is costs
    assert costs.charged(np.zeros(len(on)), chained=True).chained


@given(costs_and_switches(), st.data())
def test_cumulative_costs_are_what_every_path_costs(pair, data):
    _, on = pair
    rising = np.cumsum(data.draw(st.lists(st.integers(1, 9), min_size=len(on), max_size=len(on))))
    costs = Costs.checked(None, None, rising, len(on), chained=data.draw(st.booleans()), unit="given")
    assert costs.paths(on).tolist() == costs.alone().tolist() == rising.tolist()
    assert costs.full == rising[-1]
    assert costs.unit == "given"


@given(costs_and_switches())
def test_where_every_exit_is_paid_a_path_costs_all_that_it_passes_whichever_exits_are_on(pair):
    costs, on = pair
    paid = costs.every_exit_paid()
    passed = np.cumsum(costs.stages + costs.exits)
    for switches in (on, ~on, plain(costs)):
        assert paid.paths(switches) == pytest.approx(passed)
        assert (paid.paths(switches) >= costs.paths(switches) - 1e-9 * passed[-1]).all()
    assert paid.alone() == pytest.approx(passed)
    assert paid.full == pytest.approx(costs.stages.sum() + costs.exits.sum())
    assert not paid.exits.any()
    assert (paid.chained, paid.unit) == (costs.chained, costs.unit)


@given(costs_and_switches())
def test_paying_every_exit_twice_changes_nothing_and_leaves_the_costs_alone(pair):
    costs, _ = pair
    before = costs.stages.copy(), costs.exits.copy()
    paid = costs.every_exit_paid()
    assert paid.every_exit_paid() is paid
    assert (paid is costs) == (not before[1].any())
    assert (costs.stages.tolist(), costs.exits.tolist()) == (before[0].tolist(), before[1].tolist())


@given(costs_and_switches())
def test_where_every_exit_is_paid_all_on_costs_what_it_did(pair):
    costs, on = pair
    assert costs.every_exit_paid().paths(on) == pytest.approx(costs.paths(np.ones_like(on)))
