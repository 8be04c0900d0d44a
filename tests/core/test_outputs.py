import pickle

import numpy as np
import pytest

from adaptexit.core.outputs import ExitOutputs

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 6, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, 6)


def arguments(**changes):
    """A valid call's arguments, some of them changed; ``...`` leaves one out."""
    valid = {
        "predictions": LOGITS.argmax(axis=2),
        "scores": LOGITS.max(axis=2),
        "labels": LABELS,
        "n_classes": 4,
        "stage_costs": [1.0, 2.0, 3.0],
        "exit_costs": [0.5, 0.5, 4.0],
    }
    return {name: value for name, value in {**valid, **changes}.items() if value is not ...}


def with_value(array, place, value):
    copy = np.array(array, dtype=np.float64)
    copy[place] = value
    return copy


BAD = {
    "no scores": ({"scores": ...}, r"scores must have shape \(K, N\) with K >= 1 exits; got shape \(\)"),
    "flat scores": ({"scores": np.zeros(6)}, r"scores must have shape \(K, N\).*got shape \(6,\)"),
    "no exits": ({"scores": np.zeros((0, 6))}, r"scores must have shape \(K, N\).*got shape \(0, 6\)"),
    "no samples": ({"scores": np.zeros((3, 0))}, "scores must hold at least one sample.*data set is not empty"),
    "text scores": ({"scores": np.full((3, 6), "a")}, "scores must be real numbers; got dtype <U1"),
    "NaN score": (
        {"scores": with_value(np.zeros((3, 6)), (1, 4), np.nan)},
        r"scores must be finite; exit 1 has .*nan.* at sample 4",
    ),
    "infinite score": (
        {"scores": with_value(np.zeros((3, 6)), (2, 0), np.inf)},
        r"scores must be finite; exit 2 has .*inf.* at sample 0",
    ),
    "predictions of other samples": (
        {"predictions": np.zeros((3, 5), int)},
        r"predictions must have shape \(3, 6\); got shape \(3, 5\)",
    ),
    "labels of other samples": ({"labels": np.zeros(5, int)}, r"labels must have shape \(6,\); got shape \(5,\)"),
    "fractional predictions": (
        {"predictions": np.zeros((3, 6))},
        "predictions must be integer class indices; got dtype float64",
    ),
    "text labels": ({"labels": np.full(6, "cat")}, "labels must be integer class indices; got dtype <U3"),
    "prediction beyond the classes": (
        {"predictions": np.full((3, 6), 4)},
        r"predictions must lie in 0 \.\.\. 3; got values from 4 to 4",
    ),
    "negative label": (
        {"labels": np.array([-1, 0, 1, 2, 3, 0])},
        r"labels must lie in 0 \.\.\. 3; got values from -1 to 3. Map other label values",
    ),
    "no class count": ({"n_classes": ...}, "n_classes must be a positive integer; got None"),
    "no classes": ({"n_classes": 0}, "n_classes must be a positive integer; got 0"),
    "infinitely many classes": ({"n_classes": np.inf}, "n_classes must be a positive integer; got inf"),
    "a fraction of classes": ({"n_classes": 4.5}, "n_classes must be a positive integer; got 4.5"),
    "classes of nothing": (
        {"predictions": ..., "labels": ..., "n_classes": np.inf, "quality": np.zeros((3, 6)), "logits": LOGITS},
        "n_classes must be a positive integer; got inf",
    ),
    "chained": ({"chained": "no"}, "chained must be True or False; got 'no'"),
    "unit": ({"cost_unit": 3}, "cost_unit must be a word, as 'MACs', or None; got 3"),
    "masked scores": (
        {"scores": np.ma.masked_array(np.zeros((3, 6)), True)},
        "scores must be a plain array; got a mask",
    ),
    "complex scores": ({"scores": np.zeros((3, 6), complex)}, "scores must be real numbers; got complex128"),
    "complex logits": ({"logits": LOGITS.astype(complex)}, "logits must be real numbers; got complex128"),
    "masked labels": ({"labels": np.ma.masked_array(LABELS, LABELS > 1)}, "labels must be a plain array; got a masked"),
    "masked quality": ({"quality": np.ma.masked_array(np.zeros((3, 6)), True)}, "quality must be a plain array"),
    "complex features": ({"features": [np.zeros((6, 2), complex)] * 3}, "features must be real numbers; got complex"),
    "complex costs": ({"stage_costs": [1j, 2, 3]}, "stage_costs must be real numbers; got complex128"),
    "masked costs": ({"exit_costs": np.ma.masked_array([1.0, 2, 3], True)}, "exit_costs must be a plain array"),
    "ragged costs": ({"exit_costs": [1, [2], 3]}, "exit_costs must be an array; got entries of different shapes"),
    "no labels": ({"labels": ...}, r"accuracy is undefined.*predictions=shape \(3, 6\), labels=None, quality=None"),
    "no predictions": ({"predictions": ...}, r"accuracy is undefined.*predictions=None, labels=shape \(6,\)"),
    "neither": (
        {"predictions": ..., "labels": ..., "n_classes": ...},
        "accuracy is undefined: give predictions and labels, or quality",
    ),
    "quality of other shape": ({"quality": np.zeros((2, 6))}, r"quality must have shape \(3, 6\); got shape \(2, 6\)"),
    "NaN quality": (
        {"quality": with_value(np.zeros((3, 6)), (0, 5), np.nan)},
        "quality must be finite; exit 0 has .*nan.* at sample 5",
    ),
    "logits of other shape": (
        {"logits": LOGITS[:, :, :3]},
        r"logits must have shape \(3, 6, 4\); got shape \(3, 6, 3\)",
    ),
    "NaN logit": (
        {"logits": with_value(LOGITS, (1, 2, 3), np.nan)},
        "logits must be finite; exit 1 has .*nan.* at sample 2",
    ),
    "logits without classes": (
        {"predictions": ..., "labels": ..., "n_classes": ..., "quality": np.zeros((3, 6)), "logits": LOGITS},
        "logits need n_classes; got n_classes=None",
    ),
    "too few features": (
        {"features": [np.zeros((6, 2))]},
        r"features must be a list of 3 arrays of shape \(6, d_k\); got shapes \[\(6, 2\)\]",
    ),
    "features of other samples": (
        {"features": [np.zeros((6, 2)), np.zeros((5, 2)), np.zeros((6, 2))]},
        r"features must be a list of 3 arrays.*\(5, 2\)",
    ),
    "flat features": ({"features": [np.zeros(6)] * 3}, r"features must be a list of 3 arrays.*\(6,\)"),
    "NaN feature": (
        {"features": [np.zeros((6, 2)), with_value(np.zeros((6, 2)), (4, 1), np.nan), np.zeros((6, 2))]},
        "features must be finite; exit 1 has .*nan.* at sample 4",
    ),
    "no stage costs": ({"stage_costs": ...}, r"stage_costs must be given, or costs= \(cumulative, free exits\)"),
    "no exit costs": ({"exit_costs": ...}, "exit_costs must be given, or costs="),
    "no costs": ({"stage_costs": ..., "exit_costs": ...}, "stage_costs and exit_costs must be given, or costs="),
    "both kinds of costs": ({"costs": [1, 2, 3]}, "give either costs or those two, not both"),
    "falling costs": (
        {"stage_costs": ..., "exit_costs": ..., "costs": [1, 3, 2]},
        r"costs are cumulative and must not fall from exit to exit; got \[1.0, 3.0, 2.0\]",
    ),
    "costs of other exits": (
        {"stage_costs": ..., "exit_costs": ..., "costs": [1, 3]},
        r"costs must have shape \(3,\); got shape \(2,\)",
    ),
    "stage costs of other exits": ({"stage_costs": [1, 2]}, r"stage_costs must have shape \(3,\); got shape \(2,\)"),
    "negative exit cost": ({"exit_costs": [0, -1, 2]}, r"exit_costs must be finite and not negative; got \[0.0, -1.0"),
    "infinite stage cost": ({"stage_costs": [1, np.inf, 2]}, "stage_costs must be finite and not negative"),
    "negative cumulative cost": (
        {"stage_costs": ..., "exit_costs": ..., "costs": [-1, 1, 2]},
        "costs must be finite and not negative",
    ),
    "free full model": (
        {"stage_costs": [0, 0, 0], "exit_costs": [1, 1, 0]},
        "the full model must cost something: stage_costs plus the last of exit_costs is 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_reason(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ExitOutputs(**arguments(**changes))


def test_the_arguments_that_the_refusals_change_are_good():
    outputs = ExitOutputs(**arguments())
    assert (outputs.n_exits, outputs.n_samples, outputs.n_classes) == (3, 6, 4)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((3, 6)), r"logits must have shape \(K, N, C\).*got shape \(3, 6\)"),
        (np.zeros((0, 6, 4)), r"logits must have shape \(K, N, C\) with K, C >= 1; got shape \(0, 6, 4\)"),
        (np.zeros((3, 6, 0)), r"logits must have shape \(K, N, C\) with K, C >= 1; got shape \(3, 6, 0\)"),
        (np.zeros((3, 0, 4)), "scores must hold at least one sample"),
        (with_value(LOGITS, (2, 3, 0), np.inf), "logits must be finite; exit 2 has .*inf.* at sample 3"),
    ],
)
def test_bad_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        ExitOutputs.from_logits(logits, LABELS[: logits.shape[1]], costs=[1, 2, 3][: len(logits)])


def test_an_unknown_score_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"score must be one of \['entropy', 'margin', 'max_proba'\].*got 'gini'"):
        ExitOutputs.from_logits(LOGITS, LABELS, costs=[1, 2, 3], score="gini")


def test_a_score_that_is_not_one_number_a_sample_is_refused():
    with pytest.raises(ValueError, match=r"scores must have shape \(K, N\)"):
        ExitOutputs.from_logits(LOGITS, LABELS, costs=[1, 2, 3], score=lambda logits: logits)


def test_other_scores_are_checked_like_the_first():
    outputs = ExitOutputs(**arguments())
    with pytest.raises(ValueError, match=r"scores must have shape \(3, 6\); got shape \(3, 5\)"):
        outputs.with_scores(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"scores must be finite; exit 0 has .*nan.* at sample 1"):
        outputs.with_scores(with_value(np.zeros((3, 6)), (0, 1), np.nan))


def test_other_costs_are_checked_like_the_first():
    outputs = ExitOutputs(**arguments())
    with pytest.raises(ValueError, match="exit_costs must be finite and not negative"):
        outputs.with_costs([1, 2, 3], [0, 0, -1])


def test_from_logits_takes_argmax_and_largest_probability():
    outputs = ExitOutputs.from_logits(LOGITS, LABELS, stage_costs=[1, 1, 1], exit_costs=[0, 0, 1])
    proba = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=2, keepdims=True)
    assert outputs.predictions.tolist() == LOGITS.argmax(axis=2).tolist()
    assert outputs.scores == pytest.approx(proba.max(axis=2), abs=1e-6)
    assert np.array_equal(outputs.logits, LOGITS)
    assert outputs.n_classes == 4


def test_from_logits_takes_a_callable_score_and_may_drop_the_logits():
    outputs = ExitOutputs.from_logits(
        LOGITS, LABELS, costs=[1, 2, 3], score=lambda logits: logits[:, 0], keep_logits=False, chained=True
    )
    assert np.array_equal(outputs.scores, LOGITS[:, :, 0])
    assert outputs.logits is None
    assert outputs.chained


def test_cumulative_costs_become_stages_with_free_exits():
    outputs = ExitOutputs(**arguments(stage_costs=..., exit_costs=..., costs=[1.0, 3.0, 7.0]))
    assert outputs.stage_costs.tolist() == [1.0, 2.0, 4.0]
    assert outputs.exit_costs.tolist() == [0.0, 0.0, 0.0]
    assert outputs.full_cost == 7.0


def test_costs_of_a_path_count_the_exits_switched_on():
    outputs = ExitOutputs(**arguments())
    assert outputs.full_cost == 10.0
    assert outputs.path_costs(np.array([False, True, True])).tolist() == [1.0, 3.5, 10.5]
    assert outputs.path_costs(np.array([False, False, False])).tolist() == [1.0, 3.0, 10.0]
    assert outputs.alone_costs().tolist() == [1.5, 3.5, 10.0]


def test_costs_of_a_chained_path_count_all_exits_up_to_the_deepest_one_on():
    outputs = ExitOutputs(**arguments(chained=True))
    assert outputs.path_costs(np.array([False, True, True])).tolist() == [1.5, 4.0, 11.0]
    assert outputs.path_costs(np.array([True, False, True])).tolist() == [1.5, 3.5, 10.5]
    assert outputs.path_costs(np.array([False, False, True])).tolist() == [1.0, 3.0, 10.0]
    assert outputs.alone_costs().tolist() == [1.5, 4.0, 10.0]


@pytest.mark.parametrize(("n_classes", "dtype"), [(4, np.int8), (128, np.int8), (129, np.int16), (40000, np.int32)])
def test_class_indices_are_narrowed_to_what_holds_them(n_classes, dtype):
    top = np.full(6, n_classes - 1)
    outputs = ExitOutputs(**arguments(labels=top, predictions=np.tile(top, (3, 1)), n_classes=n_classes))
    assert outputs.predictions.dtype == outputs.labels.dtype == dtype
    assert outputs.labels.tolist() == top.tolist()
    assert outputs.full_accuracy == 1.0


@pytest.mark.parametrize(
    ("before", "after"),
    [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64), (np.int64, np.float64)],
)
def test_scores_keep_their_precision_or_are_widened(before, after):
    assert ExitOutputs(**arguments(scores=np.arange(18).reshape(3, 6).astype(before))).scores.dtype == after


def test_compact_arrays_are_not_copied():
    scores, labels = LOGITS.max(axis=2), LABELS.astype(np.int8)
    outputs = ExitOutputs(**arguments(scores=scores, labels=labels))
    assert outputs.scores is scores
    assert outputs.labels is labels


def test_quality_stands_in_for_predictions_and_labels():
    quality = np.array([[0.0, 0.5], [1.0, 0.25]])
    outputs = ExitOutputs(scores=np.zeros((2, 2)), quality=quality, costs=[1, 2])
    assert outputs.accuracies.tolist() == [0.25, 0.625]
    assert outputs.full_accuracy == 0.625
    assert outputs.n_classes is None


def test_quality_takes_precedence_over_correctness():
    outputs = ExitOutputs(**arguments(quality=np.full((3, 6), 0.5)))
    assert outputs.full_accuracy == 0.5


def test_taking_samples_by_a_mask_keeps_the_costs_and_the_kind():
    outputs = ExitOutputs(**arguments(chained=True))
    some = outputs.take(np.array([True, False, True, False, False, False]))
    assert some.labels.tolist() == LABELS[[0, 2]].tolist()
    assert some.chained
    assert np.array_equal(some.stage_costs, outputs.stage_costs)


def test_dropping_an_exit_hands_its_stage_to_the_next():
    features = [np.full((6, k + 1), float(k)) for k in range(3)]
    fewer = ExitOutputs(**arguments(logits=LOGITS, features=features)).drop_exit(1)
    assert fewer.stage_costs.tolist() == [1.0, 5.0]
    assert fewer.exit_costs.tolist() == [0.5, 4.0]
    assert np.array_equal(fewer.logits, LOGITS[[0, 2]])
    assert [f.shape[1] for f in fewer.features] == [1, 3]


def test_outputs_loaded_as_maps_stay_on_disk_and_calibrate_alike(tmp_path):
    outputs = ExitOutputs(**arguments(logits=LOGITS))
    outputs.save(tmp_path / "outputs")
    on_disk = ExitOutputs.load(tmp_path / "outputs", mmap=True)
    assert isinstance(on_disk.scores, np.memmap)
    assert isinstance(on_disk.logits, np.memmap)
    assert not on_disk.scores.flags.writeable
    assert on_disk.accuracies.tolist() == outputs.accuracies.tolist()
    assert isinstance(ExitOutputs(**arguments(scores=on_disk.scores)).scores, np.memmap)


def test_outputs_can_be_saved_over_the_folder_they_are_mapped_from(tmp_path):
    ExitOutputs(**arguments()).save(tmp_path / "outputs")
    on_disk = ExitOutputs.load(tmp_path / "outputs", mmap=True)
    on_disk.take(np.arange(3)).save(tmp_path / "outputs")
    assert ExitOutputs.load(tmp_path / "outputs").labels.tolist() == LABELS[:3].tolist()


def test_more_than_ten_features_come_back_in_their_order(tmp_path):
    features = [np.full((2, 1), float(k)) for k in range(12)]
    outputs = ExitOutputs(scores=np.zeros((12, 2)), quality=np.zeros((12, 2)), costs=range(1, 13), features=features)
    outputs.save(tmp_path / "outputs")
    loaded = ExitOutputs.load(tmp_path / "outputs")
    assert [feature[0, 0] for feature in loaded.features] == list(range(12))


def test_loading_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no outputs\.json"):
        ExitOutputs.load(tmp_path)


def test_loading_another_format_is_refused(tmp_path):
    ExitOutputs(**arguments()).save(tmp_path / "outputs")
    description = tmp_path / "outputs" / "outputs.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99; this version reads format 1"):
        ExitOutputs.load(tmp_path / "outputs")


def test_loading_arrays_of_another_size_is_refused(tmp_path):
    ExitOutputs(**arguments()).save(tmp_path / "outputs")
    np.save(tmp_path / "outputs" / "scores.npy", np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"scores must have shape \(3, 6\); got shape \(3, 5\)"):
        ExitOutputs.load(tmp_path / "outputs")


def test_nothing_is_unpickled_on_loading(tmp_path):
    ExitOutputs(**arguments()).save(tmp_path / "outputs")
    np.save(tmp_path / "outputs" / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ExitOutputs.load(tmp_path / "outputs")


def test_outputs_cannot_be_changed_by_assignment():
    with pytest.raises(AttributeError, match="scores"):
        ExitOutputs(**arguments()).scores = np.zeros((3, 6))


def test_outputs_survive_pickling():
    outputs = ExitOutputs(**arguments(logits=LOGITS))
    again = pickle.loads(pickle.dumps(outputs))
    assert np.array_equal(again.logits, outputs.logits)
    assert again.full_cost == outputs.full_cost


def test_repr_names_sizes_and_what_is_kept():
    assert repr(ExitOutputs(**arguments(logits=LOGITS))) == "ExitOutputs(3 exits, 6 samples, 4 classes, with logits)"
