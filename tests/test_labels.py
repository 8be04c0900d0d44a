import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptexit.labels import class_indices, hold_out


@given(labels=st.lists(st.sampled_from("abcde"), min_size=1), classes=st.permutations("abcde"))
def test_classes_at_the_indices_are_the_labels(labels, classes):
    indices = class_indices(np.array(labels), np.array(classes))
    assert np.array(classes)[indices].tolist() == labels


@pytest.mark.parametrize("classes", [[5, 3, 9], [0.5, -1.0, 2.0], ["b", "a", "c"], [False, True]])
def test_labels_of_every_kind(classes):
    classes = np.array(classes)
    order = [1, 0, 1, len(classes) - 1]
    assert class_indices(classes[order], classes).tolist() == order


@pytest.mark.parametrize("labels", [[0, 1, 7], [-1], [0.5], [np.nan], ["a"]])
def test_labels_that_are_no_class(labels):
    with pytest.raises(ValueError, match=r"y must hold labels among the 3 classes \[0, 1, 2\]; got \["):
        class_indices(np.array(labels), np.arange(3))


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    size=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
@example(counts=[2, 6], size=0.75, seed=0)
def test_the_split_is_a_partition_and_every_class_is_fitted_on(counts, size, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if max(counts) < 2:
        with pytest.raises(ValueError, match=r"at least 2 samples|calibration needs samples besides one of each class"):
            hold_out(y, size, seed)
        return
    held_in, held_out = hold_out(y, size, seed)
    assert sorted([*held_in, *held_out]) == list(range(len(y)))
    assert len(held_out) >= 1
    assert set(y[held_in]) == set(y)
    assert held_in.tolist() == sorted(held_in)
    assert held_out.tolist() == sorted(held_out)
    again = hold_out(y, size, seed)
    assert again[0].tolist() == held_in.tolist()
    assert again[1].tolist() == held_out.tolist()


def test_the_split_keeps_the_classes_shares():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    _, held_out = hold_out(y, 0.3, 0)
    assert np.bincount(y[held_out]).tolist() == [18, 9, 3]
