import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from tests import reference
from tests.properties.strategies import exit_outputs, thresholds_for

FIELDS = ("predictions", "scores", "labels", "stage_costs", "exit_costs", "logits", "quality")


@st.composite
def whole_outputs(draw):
    """Outputs that may carry logits, features and quality beside classes."""
    plain = draw(exit_outputs(graded=False))
    shape = (plain.n_exits, plain.n_samples)
    numbers = st.floats(-8, 8, width=32)
    extras = {}
    if draw(st.booleans()):
        extras["logits"] = draw(arrays(np.float32, (*shape, plain.n_classes), elements=numbers))
    if draw(st.booleans()):
        widths = [draw(st.integers(0, 3)) for _ in range(plain.n_exits)]
        extras["features"] = [draw(arrays(np.float32, (plain.n_samples, w), elements=numbers)) for w in widths]
    if draw(st.booleans()):
        extras["quality"] = draw(arrays(np.float64, shape, elements=numbers))
    given_fields = ("predictions", "scores", "labels", "n_classes", "stage_costs", "exit_costs", "chained")
    return ExitOutputs(**{name: getattr(plain, name) for name in given_fields}, **extras)


def check_same(one, other):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b), name
    assert (one.n_classes, one.chained) == (other.n_classes, other.chained)
    assert (one.features is None) == (other.features is None)
    assert all(np.array_equal(a, b) for a, b in zip(one.features or [], other.features or [], strict=True))


@given(whole_outputs(), st.booleans())
def test_saving_and_loading_gives_the_same_outputs(outputs, mmap):
    with tempfile.TemporaryDirectory() as folder:
        outputs.save(Path(folder) / "outputs")
        check_same(outputs, ExitOutputs.load(Path(folder) / "outputs", mmap=mmap))


@given(whole_outputs(), st.data())
def test_taking_samples_equals_indexing_every_array(outputs, data):
    samples = np.array(data.draw(st.lists(st.integers(0, outputs.n_samples - 1), min_size=1)))
    some = outputs.take(samples)
    for k in range(outputs.n_exits):
        for place, i in enumerate(samples):
            assert some.scores[k][place] == outputs.scores[k][i]
            assert reference.quality_of(some, k, place) == reference.quality_of(outputs, k, i)
            if outputs.logits is not None:
                assert some.logits[k][place].tolist() == outputs.logits[k][i].tolist()
            if outputs.features is not None:
                assert some.features[k][place].tolist() == outputs.features[k][i].tolist()


@given(st.data())
def test_dropping_an_exit_equals_switching_it_off(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    k = data.draw(st.integers(0, outputs.n_exits - 2))
    thresholds = data.draw(thresholds_for(outputs))
    thresholds[k] = np.inf
    assume(k not in reference.exits_run(outputs, thresholds))  # a chained exit may be run for a deeper one
    without = reference.outcome(outputs.drop_exit(k), np.delete(thresholds, k))
    assert without == pytest.approx(reference.outcome(outputs, thresholds), abs=1e-9)


@given(exit_outputs())
def test_grades_equal_their_definition(outputs):
    grades = [[reference.quality_of(outputs, k, i) for i in range(outputs.n_samples)] for k in range(outputs.n_exits)]
    assert outputs.graded.tolist() == grades
    assert outputs.accuracies == pytest.approx([sum(row) / outputs.n_samples for row in grades])
    assert outputs.full_accuracy == pytest.approx(outputs.accuracies[-1])


@given(whole_outputs())
def test_paying_every_exit_changes_costs_alone(outputs):
    paid = outputs.every_exit_paid()
    for name in {*FIELDS, "features", "n_classes", "chained", "cost_unit"} - {"stage_costs", "exit_costs"}:
        assert getattr(paid, name) is getattr(outputs, name)
    assert paid.stage_costs.tolist() == (outputs.stage_costs + outputs.exit_costs).tolist()
    assert not paid.exit_costs.any()
    assert paid.every_exit_paid() is paid


@given(st.data())
def test_where_every_exit_is_paid_thresholds_cost_what_all_exits_on_did(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    accuracy, cost = reference.outcome(outputs, thresholds, always=range(outputs.n_exits - 1))
    paid = outputs.every_exit_paid()
    point = evaluate(paid, thresholds, thresholds)
    assert point.accuracy == pytest.approx(accuracy)
    assert point.cost * paid.full_cost == pytest.approx(cost * outputs.full_cost)
