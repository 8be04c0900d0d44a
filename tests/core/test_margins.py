import numpy as np
import pytest

from adaptexit.core.frontier import evaluate
from adaptexit.core.margins import Rule, class_precision, margin_thresholds
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import exit_index

INF = np.inf


def recorded(predictions, scores, labels, n_classes=2, costs=None):
    """Outputs whose last row of predictions is the full model's; scores are those of the early exits."""
    return ExitOutputs(
        predictions=np.array(predictions),
        scores=np.array([*scores, np.zeros(len(labels))], dtype=np.float64),
        labels=np.array(labels),
        n_classes=n_classes,
        costs=np.arange(1, len(predictions) + 1) if costs is None else costs,
    )


def one_class(right, scores=None, full=None):
    """One early exit that answers 0 to everything, from the surest sample on; the full model errs where told."""
    labels = np.where(np.array(right, dtype=bool), 0, 1)
    scores = -np.arange(len(right), dtype=float) if scores is None else scores
    return recorded([np.zeros(len(right), int), labels if full is None else full], [scores], labels)


def thresholds(outputs, margin, cascade_aware=True, **rule):
    return margin_thresholds(outputs, [margin], cascade_aware=cascade_aware, rule=Rule(**rule))[0][0]


def means(outputs, margin, cascade_aware=True):
    """Accuracy and mean relative cost at a margin."""
    limits, cutoffs = margin_thresholds(outputs, [margin], cascade_aware=cascade_aware)
    point = evaluate(outputs, limits[0], cutoffs[0])
    return point.accuracy, point.cost


# -- precision by class -----------------------------------------------------------------------------------------------


def test_class_precision():
    answers, labels = np.array([0, 0, 0, 2, 2], dtype=np.int8), np.array([0, 0, 1, 2, 2], dtype=np.int8)
    precision = class_precision(answers, labels, 4)
    assert precision[[0, 2]] == pytest.approx([2 / 3, 1.0])
    assert np.isnan(precision[[1, 3]]).all()


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_the_smallest_threshold_that_is_precise_enough_is_taken():
    outputs = one_class([1, 1, 0, 1, 0, 0], scores=[6, 5, 4, 3, 2, 1])
    assert [thresholds(outputs, m)[0, 0] for m in (0.0, 0.2, 0.3, 0.45, 0.6)] == [INF, 4, 2, 1, -INF]


def test_precision_at_the_target_is_not_enough():
    outputs = one_class([1, 1, 0, 0], scores=[4, 4, 4, 4])
    assert thresholds(outputs, 0.5)[0, 0] == INF
    assert thresholds(outputs, 0.51)[0, 0] == -INF


def test_the_target_is_a_share_of_the_full_models_precision():
    outputs = one_class([1, 1, 0, 1], full=[0, 0, 0, 0])  # precise in 3 of 4
    assert thresholds(outputs, 0.0)[0, 0] == -2
    assert thresholds(outputs, 0.01)[0, 0] == -INF


def test_samples_of_equal_score_leave_together():
    outputs = one_class([1, 1, 0, 1, 1], scores=[3, 2, 2, 2, 1])
    assert thresholds(outputs, 0.2)[0, 0] == 2  # of the three at 2, two are right: 3 of 4 are not above 0.8
    assert thresholds(outputs, 0.25)[0, 0] == -INF
    assert thresholds(outputs, 0.25, min_support=2)[0, 0] == -INF
    assert thresholds(outputs, 0.2, min_support=2)[0, 0] == INF


def test_enough_samples_have_to_leave():
    outputs = one_class([1, 1, 1, 0, 0, 0], scores=[6, 5, 4, 3, 2, 1])
    assert [thresholds(outputs, 0.2, min_support=n)[0, 0] for n in (1, 3, 4)] == [3, 3, INF]
    assert [thresholds(outputs, 0.9, min_support=n)[0, 0] for n in (6, 7)] == [-INF, INF]


def test_all_may_leave_with_a_class():
    assert thresholds(one_class([1, 1, 1]), 0.01)[0, 0] == -INF


def test_nobody_leaves_where_nothing_is_precise_enough():
    assert thresholds(one_class([0, 0, 1]), 0.5)[0, 0] == INF


def test_nobody_leaves_with_a_class_that_the_exit_never_answers():
    outputs = recorded([[0, 0, 0], [0, 1, 2]], [[3, 2, 1]], [0, 1, 2], n_classes=4)
    for bound in ("none", "wilson", "fixed_sequence"):
        assert thresholds(outputs, 5.0, bound=bound)[0].tolist() == [-INF, INF, INF, INF]


@pytest.mark.parametrize("bound", ["none", "wilson", "fixed_sequence"])
def test_nobody_leaves_with_a_class_that_the_full_model_never_answers(bound):
    outputs = one_class([1] * 50, full=[1] * 50)
    assert thresholds(outputs, 1.0, bound=bound)[0, 0] == INF
    assert thresholds(outputs, 5.0, bound=bound)[0, 0] == INF


def test_classes_do_not_mix():
    outputs = recorded([[1, 0, 1, 0], [0, 1, 0, 1]], [[4, 3, 2, 1]], [1, 0, 0, 0])
    assert class_precision(outputs.predictions[-1], outputs.labels, 2).tolist() == [0.5, 0.0]
    assert thresholds(outputs, 0.0, min_support=2)[0].tolist() == [-INF, -INF]
    assert thresholds(outputs, 0.0, min_support=3)[0].tolist() == [INF, INF]


def test_of_a_full_model_that_is_never_right_one_success_is_enough():
    outputs = recorded([[0, 0, 0], [0, 0, 0]], [[3, 2, 1]], [1, 1, 1])
    assert thresholds(outputs, 0.1)[0, 0] == INF
    outputs = recorded([[0, 0, 1], [1, 1, 0]], [[3, 2, 1]], [0, 1, 1], n_classes=2)
    assert thresholds(outputs, 0.1)[0].tolist() == [-INF, -INF]


def test_without_a_success_the_wilson_interval_begins_at_0():
    wrong = np.ones(2000, int)
    outputs = recorded([0 * wrong, 0 * wrong], [-np.arange(2000.0)], wrong)
    assert thresholds(outputs, 0.0, bound="wilson", delta=0.05)[0, 0] == INF


def test_the_last_exit_answers_for_whoever_is_left():
    limits, cutoffs = margin_thresholds(one_class([0, 0]), [0.1, 0.2], cascade_aware=True)
    assert limits.shape == cutoffs.shape == (2, 2, 2)
    assert (limits[:, -1] == -INF).all()
    assert (cutoffs[:, -1] == -INF).all()


def test_one_exit_alone():
    outputs = ExitOutputs(predictions=[[0, 1]], scores=[[0.5, 0.6]], labels=[0, 0], n_classes=2, costs=[1])
    limits, cutoffs = margin_thresholds(outputs, [0.0, 0.5], cascade_aware=True)
    assert limits.tolist() == cutoffs.tolist() == [[[-INF, -INF]]] * 2


def test_the_cutoff_lies_between_the_threshold_and_the_next_score():
    outputs = one_class([1, 1, 0, 0], scores=[8, 4, 2, 1])
    limits, cutoffs = margin_thresholds(outputs, [0.1], cascade_aware=False)
    assert limits[0, 0].tolist() == [2, INF]
    assert cutoffs[0, 0].tolist() == [3, INF]


def test_between_neighbouring_numbers_the_cutoff_is_the_threshold():
    low, high = np.nextafter(1.0, 0.0), 1.0
    limits, cutoffs = margin_thresholds(one_class([1, 0], scores=[high, low]), [0.1], cascade_aware=False)
    assert limits[0, 0, 0] == cutoffs[0, 0, 0] == low


def test_whoever_sits_on_a_cutoff_is_left_over():
    low, high = np.nextafter(1.0, 0.0), 1.0
    outputs = recorded([[0, 0], [0, 1], [0, 1]], [[high, low], [1, 1]], [0, 1])
    assert thresholds(outputs, 0.1)[:2].tolist() == [[low, INF], [INF, -INF]]


def test_predictions_and_labels_are_needed():
    outputs = ExitOutputs(scores=np.zeros((2, 3)), quality=np.ones((2, 3)), costs=[1, 2])
    with pytest.raises(ValueError, match=r"needs predictions and labels.*Use ThresholdCalibrator"):
        margin_thresholds(outputs, [0.1], cascade_aware=True)


# -- the cascade ------------------------------------------------------------------------------------------------------


def counterexample():
    """Two early exits on four samples, where a larger margin costs more."""
    labels = [0, 1, 1, 0]
    return recorded(
        [[1, 1, 0, 1], [0, 0, 0, 1], labels], [[0.05, 0.7, 0.6, 0.25], [0.65, 0.0, 0.3, 0.2]], labels,
        costs=[0.3, 0.6, 1.0],
    )  # fmt: skip


def test_a_larger_margin_can_cost_more_where_survivors_are_counted():
    outputs = counterexample()
    assert means(outputs, 0.6)[1] == pytest.approx(0.45)
    assert means(outputs, 0.8)[1] == pytest.approx(0.475)
    assert thresholds(outputs, 0.6)[1, 0] < thresholds(outputs, 0.8)[1, 0] == INF


def easy_first():
    """The first exit may answer samples 0 and 1 alone; the second is right on them, and wrong on sample 2."""
    labels = [0, 0, 1, 1]
    return recorded([[0, 0, 2, 2], [0, 0, 0, 1], labels], [[4, 3, 2, 1], [4, 3, 2, 1]], labels, n_classes=3)


def test_precision_is_counted_on_whoever_is_left():
    assert thresholds(easy_first(), 0.4)[:2, 0].tolist() == [-INF, INF]


def test_plain_thresholds_can_miss_their_target_on_whoever_is_left():
    outputs = easy_first()
    limits, cutoffs = margin_thresholds(outputs, [0.4], cascade_aware=False)
    there = (exit_index(outputs, cutoffs[0]) == 1) & (outputs.predictions[1] == 0)
    assert limits[0, 1, 0] == -INF
    assert there.tolist() == [False, False, True, False]
    assert outputs.labels[there].tolist() == [1]


@pytest.mark.parametrize("cascade_aware", [False, True])
def test_a_margin_of_0_can_lose_accuracy(cascade_aware):
    # Four of five who leave are right, which is more than four of six; the two left over are the full model's errors.
    labels = [0, 0, 0, 0, 1, 1, 1]
    outputs = recorded([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]], [[7, 6, 5, 4, 3, 2, 1]], labels)
    assert thresholds(outputs, 0.0, cascade_aware)[0].tolist() == [-INF, INF]
    assert means(outputs, 0.0, cascade_aware)[0] == pytest.approx(4 / 7)
    assert outputs.full_accuracy == pytest.approx(5 / 7)


@pytest.mark.parametrize("bound", ["none", "wilson", "fixed_sequence"])
def test_an_exit_that_nobody_reaches_is_off(bound):
    labels = np.zeros(60, int)
    outputs = recorded([labels] * 3, [np.arange(60), np.arange(60)], labels, n_classes=1)
    assert thresholds(outputs, 0.5, bound=bound).tolist() == [[-INF], [INF], [-INF]]
    assert thresholds(outputs, 0.5, cascade_aware=False, bound=bound).tolist() == [[-INF], [-INF], [-INF]]


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_tests_first_size_follows_from_the_target():
    # ceil(2 ln 0.1 / ln 0.9) = 44 samples: 43 tell nothing.
    for n, expected in ((43, INF), (44, -INF)):
        assert thresholds(one_class([1] * n), 0.1, bound="fixed_sequence", delta=0.1)[0, 0] == expected


def test_at_a_low_target_the_first_test_takes_30_samples():
    for n, expected in ((29, INF), (30, -INF)):
        assert thresholds(one_class([1] * n), 0.5, bound="fixed_sequence", delta=0.1)[0, 0] == expected


def test_tests_stop_at_the_first_failure():
    # Good, then bad, then so many good ones that a test of all would succeed.
    outputs = one_class([1] * 50 + [0] * 50 + [1] * 2000)
    assert -100 < thresholds(outputs, 0.2, bound="fixed_sequence", delta=0.1)[0, 0] < -50
    assert thresholds(outputs, 0.2, bound="wilson", delta=0.1)[0, 0] == -INF


def test_no_test_shows_a_precision_of_1_and_any_shows_one_of_0():
    outputs = one_class([1] * 500)
    assert thresholds(outputs, 0.0, bound="fixed_sequence")[0, 0] == INF
    assert thresholds(one_class([0, 0, 1]), 1.0, bound="fixed_sequence")[0, 0] == -INF
    assert thresholds(one_class([0, 0, 1]), 1.0, bound="fixed_sequence", min_support=4)[0, 0] == INF


@pytest.mark.parametrize("bound", ["wilson", "fixed_sequence"])
def test_a_smaller_error_level_asks_for_more(bound):
    rng = np.random.default_rng(0)
    outputs = one_class(rng.random(400) < np.linspace(1.0, 0.6, 400))
    loose, strict = (thresholds(outputs, 0.2, bound=bound, delta=delta)[0, 0] for delta in (0.2, 0.001))
    assert thresholds(outputs, 0.2)[0, 0] < loose < strict < INF


# -- storage ----------------------------------------------------------------------------------------------------------


def test_the_form_in_which_outputs_are_stored_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    answers = np.where(rng.random((3, 200)) < [[0.6], [0.7], [0.95]], labels, rng.integers(3, size=(3, 200)))
    scores = rng.integers(40, size=(3, 200)) / 64
    wide = ExitOutputs(predictions=answers, scores=scores, labels=labels.astype(np.int64), n_classes=3, costs=[1, 2, 3])
    narrow = ExitOutputs(
        predictions=answers.astype(np.int8), scores=scores.astype(np.float32), labels=labels.astype(np.uint8),
        n_classes=3, costs=[1, 2, 3],
    )  # fmt: skip
    narrow.save(tmp_path / "outputs")
    on_disk = ExitOutputs.load(tmp_path / "outputs", mmap=True)
    assert isinstance(on_disk.scores, np.memmap)
    for cascade_aware in (False, True):
        expected, *others = (
            margin_thresholds(o, [0.05, 0.3], cascade_aware=cascade_aware) for o in (wide, narrow, on_disk)
        )
        for other in others:
            assert all(one.tolist() == two.tolist() for one, two in zip(expected, other, strict=True))
        assert np.isfinite(expected[0]).sum() > 4
