import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptexit.calibrators import CPMCalibrator
from adaptexit.core.frontier import evaluate
from adaptexit.core.margins import Rule, margin_thresholds
from adaptexit.core.routing import exit_index
from tests import reference
from tests.properties.strategies import (
    batched,
    class_outputs,
    generators,
    increasing_maps,
    large_outputs,
    permutations_of,
)
from tests.properties.strategies import margins as margin_lists
from tests.properties.test_calibrator_laws import online_exits

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")

modes = st.booleans()
supports = st.integers(1, 4)
deltas = st.sampled_from([0.01, 0.05, 0.1, 0.3])
rules = st.builds(Rule, supports, st.sampled_from(["none", "wilson"]), deltas)


def plain(outputs, margins, rule=None):
    return margin_thresholds(outputs, margins, cascade_aware=False, rule=rule)


def exits_of(outputs, cutoffs):
    return np.stack([exit_index(outputs, of_margin) for of_margin in cutoffs])


def cells_of(outputs, thresholds, k, cascade_aware):
    """Class, threshold and the samples (a mask) that are counted, for every cell of exit k."""
    arriving = np.array(reference.route(outputs, thresholds)) >= k if cascade_aware else True
    for c in range(outputs.n_classes):
        yield c, thresholds[k, c], (outputs.predictions[k] == c) & arriving


# -- the definition ---------------------------------------------------------------------------------------------------


@given(class_outputs(), margin_lists(), modes, supports)
def test_thresholds_equal_the_naive_rule(outputs, margins, cascade_aware, support):
    thresholds, _ = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=Rule(support))
    cell = partial(reference.smallest_feasible, min_support=support)
    expected = [reference.margin_thresholds(outputs, margin, cascade_aware, cell) for margin in margins]
    assert thresholds.tolist() == expected


@given(class_outputs(max_samples=60), st.lists(st.floats(0, 0.999), min_size=1, max_size=2), modes, supports, deltas)
def test_wilson_thresholds_equal_the_naive_rule(outputs, margins, cascade_aware, support, delta):
    thresholds, _ = margin_thresholds(
        outputs, margins, cascade_aware=cascade_aware, rule=Rule(support, "wilson", delta)
    )
    lower = partial(reference.wilson_lower, delta=delta)
    cell = partial(reference.smallest_feasible, min_support=support, estimate=lower)
    expected = [reference.margin_thresholds(outputs, margin, cascade_aware, cell) for margin in margins]
    assert thresholds.tolist() == expected


@given(large_outputs(), margin_lists(2), modes, st.sampled_from([1, 30, 60]), deltas)
def test_thresholds_by_tests_equal_the_naive_sequence(outputs, margins, cascade_aware, support, delta):
    rule = Rule(support, "fixed_sequence", delta)
    thresholds, _ = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    cell = partial(reference.fixed_sequence, min_support=support, delta=delta)
    expected = [reference.margin_thresholds(outputs, margin, cascade_aware, cell) for margin in margins]
    assert thresholds.tolist() == expected


@given(class_outputs(2), margin_lists(), modes, rules)
def test_each_cell_is_more_precise_than_its_target_on_the_samples_that_leave(outputs, margins, cascade_aware, rule):
    thresholds, cutoffs = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    for m, margin in enumerate(margins):
        exits = exit_index(outputs, cutoffs[m])
        for k in range(outputs.n_exits - 1):
            for c, t, _ in cells_of(outputs, thresholds[m], k, cascade_aware):
                above = exits == k if cascade_aware else outputs.scores[k] > t
                leaving = above & (outputs.predictions[k] == c)
                assert leaving.sum() >= rule.min_support if t < np.inf else not leaving.any()
                if rule.bound == "none" and leaving.any():
                    precision = np.count_nonzero(outputs.labels[leaving] == c) / leaving.sum()
                    assert precision > reference.class_target(outputs, margin, c)


# -- cutoffs ----------------------------------------------------------------------------------------------------------


@given(class_outputs(), margin_lists(), modes, rules)
def test_cutoffs_and_thresholds_give_the_same_exits(outputs, margins, cascade_aware, rule):
    thresholds, cutoffs = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    for t, cutoff in zip(thresholds, cutoffs, strict=True):
        assert exit_index(outputs, cutoff).tolist() == reference.route(outputs, t)


@given(class_outputs(2), margin_lists(), modes, rules)
def test_cutoffs_lie_half_way_to_the_next_score_of_the_cell(outputs, margins, cascade_aware, rule):
    thresholds, cutoffs = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    assert (cutoffs[np.isinf(thresholds)] == thresholds[np.isinf(thresholds)]).all()
    for m in range(len(margins)):
        for k in range(outputs.n_exits - 1):
            for c, t, counted in cells_of(outputs, thresholds[m], k, cascade_aware):
                if np.isfinite(t):
                    above = outputs.scores[k][counted & (outputs.scores[k] > t)].min()
                    assert t <= cutoffs[m, k, c] < above
                    assert cutoffs[m, k, c] == (t + above) / 2 or above - t < 1e-15


@given(st.data(), class_outputs(), margin_lists(), modes)
def test_online_decisions_equal_offline_routing(data, outputs, margins, cascade_aware):
    calibrator = CPMCalibrator(margins[0], margins=margins, cascade_aware=cascade_aware).fit(outputs)
    batches = data.draw(batched(outputs.n_samples))
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, outputs, batches, point).tolist() == offline.tolist()


@given(class_outputs(spacing=0.125), margin_lists(), modes, rules, generators)
def test_rounding_of_the_scores_changes_no_exit(outputs, margins, cascade_aware, rule, rng):
    _, cutoffs = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    nearby = outputs.with_scores(outputs.scores + rng.uniform(-1e-7, 1e-7, outputs.scores.shape))
    assert exits_of(nearby, cutoffs).tolist() == exits_of(outputs, cutoffs).tolist()


# -- margins, supports and the cascade --------------------------------------------------------------------------------


@given(class_outputs(), margin_lists(), rules)
def test_a_larger_margin_never_raises_a_plain_threshold(outputs, margins, rule):
    thresholds, _ = plain(outputs, margins, rule)
    assert (thresholds[1:] <= thresholds[:-1]).all()


@given(class_outputs(), margin_lists(), rules)
def test_who_leaves_by_an_exit_leaves_by_it_at_every_larger_margin(outputs, margins, rule):
    exits = exits_of(outputs, plain(outputs, margins, rule)[1])
    assert (exits[1:] <= exits[:-1]).all()


@given(class_outputs(free=True, unit=1.0), margin_lists(), rules)
def test_at_fixed_cumulative_costs_the_plain_mean_cost_does_not_rise_with_the_margin(outputs, margins, rule):
    costs = [evaluate(outputs, t, cutoff).cost for t, cutoff in zip(*plain(outputs, margins, rule), strict=True)]
    assert (np.diff(costs) <= 1e-12).all()


@given(class_outputs(), margin_lists(), st.sampled_from(["none", "wilson"]))
def test_a_larger_support_never_lowers_a_plain_threshold(outputs, margins, bound):
    thresholds = np.stack([plain(outputs, margins, Rule(support, bound))[0] for support in (1, 2, 3, 4)])
    assert (thresholds[1:] >= thresholds[:-1]).all()


@given(class_outputs(2), margin_lists(), rules)
def test_the_first_exit_is_the_same_with_and_without_the_cascade(outputs, margins, rule):
    aware = margin_thresholds(outputs, margins, cascade_aware=True, rule=rule)
    for one, other in zip(aware, plain(outputs, margins, rule), strict=True):
        assert one[:, 0].tolist() == other[:, 0].tolist()


@given(class_outputs(2), margin_lists(), modes, rules)
def test_every_margin_has_the_thresholds_that_it_has_alone(outputs, margins, cascade_aware, rule):
    together = margin_thresholds(outputs, margins, cascade_aware=cascade_aware, rule=rule)
    for m, margin in enumerate(margins):
        alone = margin_thresholds(outputs, [margin], cascade_aware=cascade_aware, rule=rule)
        assert [array[m].tolist() for array in together] == [array[0].tolist() for array in alone]


# -- symmetries -------------------------------------------------------------------------------------------------------

any_data = st.tuples(class_outputs(), rules) | st.tuples(
    large_outputs(max_samples=300), st.builds(Rule, supports, st.just("fixed_sequence"), deltas)
)


@given(any_data, margin_lists(), modes, st.data())
def test_permuting_the_samples_changes_nothing(example, margins, cascade_aware, data):
    outputs, rule = example
    shuffled = outputs.take(data.draw(permutations_of(outputs.n_samples)))
    both = [margin_thresholds(o, margins, cascade_aware=cascade_aware, rule=rule) for o in (outputs, shuffled)]
    assert all(one.tolist() == other.tolist() for one, other in zip(*both, strict=True))


@given(any_data, margin_lists(), modes, st.data())
def test_relabelling_the_classes_permutes_the_thresholds(example, margins, cascade_aware, data):
    outputs, rule = example
    names = data.draw(permutations_of(outputs.n_classes))
    renamed = dataclasses.replace(outputs, predictions=names[outputs.predictions], labels=names[outputs.labels])
    both = [margin_thresholds(o, margins, cascade_aware=cascade_aware, rule=rule) for o in (outputs, renamed)]
    assert all(one.tolist() == other[:, :, names].tolist() for one, other in zip(*both, strict=True))


@given(any_data, margin_lists(), modes, increasing_maps())
def test_an_increasing_map_of_the_scores_maps_the_thresholds(example, margins, cascade_aware, increasing):
    outputs, rule = example
    scores = increasing(outputs.scores)
    image = dict(zip(outputs.scores.ravel().tolist(), scores.ravel().tolist(), strict=True))
    before, after = (
        margin_thresholds(o, margins, cascade_aware=cascade_aware, rule=rule)
        for o in (outputs, outputs.with_scores(scores))
    )
    assert after[0].ravel().tolist() == [image.get(t, t) for t in before[0].ravel().tolist()]
    assert exits_of(outputs.with_scores(scores), after[1]).tolist() == exits_of(outputs, before[1]).tolist()


@given(class_outputs(), margin_lists(), modes, st.integers(2, 4))
def test_repeating_the_data_changes_nothing(outputs, margins, cascade_aware, times):
    repeated = outputs.take(np.tile(np.arange(outputs.n_samples), times))
    both = [margin_thresholds(o, margins, cascade_aware=cascade_aware) for o in (outputs, repeated)]
    assert all(one.tolist() == other.tolist() for one, other in zip(*both, strict=True))
