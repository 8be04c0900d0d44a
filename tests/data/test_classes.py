import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptexit.data.classes import class_indices, hold_out, known_classes


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


@pytest.mark.parametrize("dtype", [str, object])
def test_names_or_positions_where_classes_have_names(dtype):
    classes = np.array(["cat", "ant", "dog"], dtype=dtype)
    names = np.array(["dog", "cat", "dog", "ant"])
    for labels in (names, names.astype(object), np.array([2, 0, 2, 1]), np.array([2, 0, 2, 1], dtype=np.uint8)):
        indices = class_indices(labels, classes)
        assert indices.tolist() == [2, 0, 2, 1]
        assert indices.dtype == np.intp


@pytest.mark.parametrize(("labels", "span"), [([0, 3], "0 to 3"), ([-1, 2], "-1 to 2")])
def test_positions_that_no_class_has(labels, span):
    classes = np.array(["cat", "ant", "dog"])
    with pytest.raises(ValueError, match=rf"names of the 3 classes .*positions 0 \.\.\. 2; got positions from {span}"):
        class_indices(np.array(labels), classes)


def test_integers_are_labels_where_classes_are_integers():
    assert class_indices(np.array([9, 5, 3]), np.array([5, 3, 9])).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"labels among the 3 classes \[5, 3, 9\]; got \[0\]"):
        class_indices(np.array([5, 0]), np.array([5, 3, 9]))


@pytest.mark.parametrize("dtype", [str, object])
@pytest.mark.parametrize("labels", [np.array([0.0]), np.array([True]), np.array([1], dtype=object), np.array(["emu"])])
def test_what_is_neither_a_name_nor_a_position(labels, dtype):
    with pytest.raises(ValueError, match=r"y must hold labels among the 2 classes \['cat', 'ant'\]; got \["):
        class_indices(labels, np.array(["cat", "ant"], dtype=dtype))


def test_labels_are_one_a_sample():
    with pytest.raises(ValueError, match=r"y must be one label a sample; got shape \(2, 3\)"):
        class_indices(np.eye(3, dtype=int)[:2], np.arange(3))


def test_classes_are_counted_given_or_those_of_fitted_models():
    assert known_classes(None, 3, None).tolist() == [0, 1, 2]
    assert known_classes(None, 2, np.array(["a", "b"])).tolist() == ["a", "b"]
    assert known_classes(["b", "a"], 2, None).tolist() == ["b", "a"]
    assert known_classes(("a", "b"), 2, np.array(["a", "b"])).tolist() == ["a", "b"]
    for refused in (["a"], ["a", "a"], [["a", "b"]], "ab"):
        with pytest.raises(ValueError, match="classes must be 2 different labels, one an output; got"):
            known_classes(refused, 2, None)
    with pytest.raises(ValueError, match=r"those of the fitted classifiers, \['a', 'b'\]; got \['b', 'a'\]"):
        known_classes(["b", "a"], 2, np.array(["a", "b"]))


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
