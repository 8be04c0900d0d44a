import builtins
import re
from pathlib import Path

import numpy as np
import pandas
import pytest

import adaptexit
from adaptexit import (
    CPMCalibrator,
    ExitOutputs,
    ParetoDisplay,
    PatienceCalibrator,
    SaverWarning,
    ThresholdCalibrator,
    compare,
    verdict,
)

NAMES = np.array(["None", "ant", "cat"])


def log_of(n=400, seed=0):
    """A log of two models with names of classes: the small one right where it is sure."""
    rng = np.random.default_rng(seed)
    labels, sure = rng.integers(3, size=n), rng.random(n)
    small = np.where(rng.random(n) < 0.4 + 0.6 * sure, labels, (labels + 1) % 3)
    large = np.where(rng.random(n) < 0.95, labels, (labels + 2) % 3)
    return {
        "small_score": sure,
        "small_prediction": NAMES[small],
        "large_prediction": NAMES[large],
        "label": NAMES[labels],
        "small_correct": (small == labels).astype(int),
        "large_correct": (large == labels).astype(int),
        "request": np.arange(n),
    }


LOG = log_of()
COST = {"small": 0.2, "large": 1.5}


def without(log, *ends):
    return {name: column for name, column in log.items() if not name.endswith(ends)}


def changed(log, name, row, value):
    column = np.array(log[name], dtype=object)
    column[row] = value
    return log | {name: column}


ANSWERS = without(LOG, "_correct")
GRADES = without(LOG, "_prediction", "label")


def assert_same(one, other):
    for name in ("scores", "predictions", "labels", "quality", "stage_costs", "exit_costs"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.n_classes, one.cost_unit) == (other.n_classes, other.cost_unit)


def test_answers_by_the_names_of_the_models():
    outputs = ExitOutputs.from_frame(ANSWERS, cost=COST)
    assert outputs.scores[0].tolist() == LOG["small_score"].tolist()
    assert not outputs.scores[1].any()
    assert NAMES[outputs.predictions[0]].tolist() == LOG["small_prediction"].tolist()
    assert NAMES[outputs.predictions[1]].tolist() == LOG["large_prediction"].tolist()
    assert NAMES[outputs.labels].tolist() == LOG["label"].tolist()
    assert outputs.accuracies.tolist() == [LOG["small_correct"].mean(), LOG["large_correct"].mean()]
    assert outputs.quality is None


def test_models_share_nothing_and_cost_what_a_cascade_of_them_does():
    outputs = ExitOutputs.from_frame(ANSWERS, cost=[0.2, 1.5])
    assert outputs.stage_costs.tolist() == [0, 0]
    assert outputs.exit_costs.tolist() == [0.2, 1.5]
    assert outputs.path_costs(np.array([True, True])).tolist() == [0.2, 1.7]
    assert outputs.cost_unit == "given"
    assert ExitOutputs.from_frame(ANSWERS, cost=COST, cost_unit="dollars").cost_unit == "dollars"


def test_exits_of_one_model_have_stages_too():
    outputs = ExitOutputs.from_frame(GRADES, stage_costs=[1, 2], exit_costs=[0.1, 0.2], chained=True)
    assert (outputs.stage_costs.tolist(), outputs.exit_costs.tolist(), outputs.chained) == ([1, 2], [0.1, 0.2], True)


def test_correctness_is_enough_and_fractions_of_it_are_kept():
    outputs = ExitOutputs.from_frame(GRADES, cost=COST)
    assert outputs.quality.dtype == bool
    assert outputs.quality.astype(int).tolist() == [LOG["small_correct"].tolist(), LOG["large_correct"].tolist()]
    assert (outputs.predictions, outputs.labels, outputs.n_classes) == (None, None, None)
    assert_same(outputs, ExitOutputs.from_frame(without(LOG, "label"), cost=COST))
    half = ExitOutputs.from_frame(changed(GRADES, "small_correct", 3, 0.5), cost=COST)
    assert half.quality[0, 3] == 0.5


def test_correctness_counts_where_predictions_are_told_too():
    log = changed(LOG, "small_correct", slice(None), 1)
    outputs = ExitOutputs.from_frame(log, cost=COST)
    assert outputs.accuracies[0] == 1
    assert NAMES[outputs.predictions[0]].tolist() == LOG["small_prediction"].tolist()


def test_columns_of_other_names():
    renamed = {
        "p": LOG["small_score"], "q": LOG["small_score"] / 2, "a": LOG["small_prediction"],
        "b": LOG["large_prediction"], "truth": LOG["label"],
    }  # fmt: skip
    expected = ExitOutputs.from_frame(ANSWERS, cost=COST)
    answers = {"predictions": ["a", "b"], "label": "truth", "cost": [0.2, 1.5]}
    assert_same(ExitOutputs.from_frame(renamed, scores=["p"], **answers), expected)
    both = ExitOutputs.from_frame(renamed, scores=["p", "q"], **answers)
    assert both.scores[1].tolist() == renamed["q"].tolist()
    named = ExitOutputs.from_frame(renamed, scores=["p"], models=["s", "l"], **answers | {"cost": {"l": 1.5, "s": 0.2}})
    assert_same(named, expected)


def test_the_order_is_that_of_models_or_of_costs_or_of_columns():
    middle = {name.replace("small", "tiny"): column for name, column in GRADES.items() if name.startswith("small")}
    log = GRADES | {name: column[::-1] for name, column in middle.items()}
    backwards = log_of(seed=1)["small_correct"][::-1]
    cost = {"tiny": 0.1, "small": 0.2, "large": 1.5}
    log = log | {"tiny_correct": backwards}
    for told in ({"cost": cost}, {"models": list(cost), "cost": list(cost.values())}):
        outputs = ExitOutputs.from_frame(log, **told)
        assert outputs.quality[0].astype(int).tolist() == backwards.tolist()
        assert outputs.exit_costs.tolist() == [0.1, 0.2, 1.5]
    assert ExitOutputs.from_frame(GRADES, cost=[1, 2]).accuracies[1] == LOG["large_correct"].mean()


def test_files_frames_and_columns_say_the_same(tmp_path, monkeypatch):
    frame = pandas.DataFrame(LOG)
    expected = ExitOutputs.from_frame(LOG, cost=COST)
    frame.to_csv(tmp_path / "log.csv", index=False)
    frame.to_csv(tmp_path / "log.csv.gz", index=False)
    (tmp_path / "log.parquet").touch()
    monkeypatch.setattr(pandas, "read_parquet", lambda path: frame)
    for log in (frame, frame.set_index("request"), *(tmp_path / f"log.{end}" for end in ("csv", "csv.gz", "parquet"))):
        assert_same(ExitOutputs.from_frame(log, cost=COST), expected)
    assert_same(ExitOutputs.from_frame(str(tmp_path / "log.csv"), cost=COST), expected)
    assert_same(ExitOutputs.from_frame(frame.convert_dtypes(), cost=COST), expected)
    lists = {name: list(column) for name, column in LOG.items()}
    assert_same(ExitOutputs.from_frame(lists, cost=COST), expected)


def test_classes_are_those_that_occur_or_those_told():
    numbers = ANSWERS | {
        name: np.searchsorted(NAMES, ANSWERS[name]) * 10 - 10
        for name in ("label", "small_prediction", "large_prediction")
    }
    assert_same(ExitOutputs.from_frame(numbers, cost=COST), ExitOutputs.from_frame(ANSWERS, cost=COST))
    floats = numbers | {"label": numbers["label"].astype(float)}
    assert_same(ExitOutputs.from_frame(floats, cost=COST), ExitOutputs.from_frame(numbers, cost=COST))
    order = ["emu", "cat", "None", "ant"]
    outputs = ExitOutputs.from_frame(ANSWERS, classes=order, cost=COST)
    assert outputs.n_classes == 4
    assert np.array(order)[outputs.labels].tolist() == LOG["label"].tolist()
    assert np.array(order)[outputs.predictions[1]].tolist() == LOG["large_prediction"].tolist()


def test_a_full_model_without_a_score():
    for score in (np.full(400, np.nan), [None] * 400):
        assert not ExitOutputs.from_frame(LOG | {"large_score": score}, cost=COST).scores[1].any()


def test_a_log_is_calibrated_compared_and_drawn_without_a_model():
    outputs, fresh = ExitOutputs.from_frame(ANSWERS, cost=COST), ExitOutputs.from_frame(log_of(seed=1), cost=COST)
    calibrator = ThresholdCalibrator().fit(outputs)
    point = calibrator.pareto(fresh).at(budget=0.6)
    assert point.cost == pytest.approx(0.6, abs=0.1)
    assert point.accuracy > outputs.accuracies[0] + 0.1
    table = compare(outputs, test=fresh).to_frame()
    assert {"full model", "oracle", "recorded score"} <= set(table.index)
    assert table.loc["oracle", "accuracy"] >= table.loc["full model", "accuracy"]
    for other in (CPMCalibrator(score="recorded"), PatienceCalibrator()):
        assert other.fit(outputs).pareto(fresh).n_samples == 400
    display = ParetoDisplay.from_frontier(calibrator.pareto(fresh)).plot()
    assert display.line_.get_xdata().size >= 2
    assert str(verdict(outputs)).endswith(".")


BAD = {
    "no table": (3, {}, TypeError, "frame must be the path of a CSV or Parquet file, a DataFrame or a dict.*got int"),
    "no columns of models": (
        {"a": [1]},
        {},
        ValueError,
        r"frame must have columns <model>_score and .*it has \['a'\]",
    ),
    "a missing column": (
        without(LOG, "label", "large_correct", "_prediction"),
        {"models": ["small", "large"]},
        ValueError,
        "models must name columns of frame; it has no column 'large_correct'. Was 'small_correct' meant",
    ),
    "a misspelt column": (
        LOG,
        {"scores": ["smal_score"], "correct": ["small_correct", "large_correct"]},
        ValueError,
        r"scores must name columns of frame; it has no column 'smal_score'. Was 'small_score' meant\?",
    ),
    "no label": (without(LOG, "label", "_correct"), {}, ValueError, "label must name columns.*no column 'label'"),
    "no early score": (without(GRADES, "small_score"), {}, ValueError, "it has no column 'small_score'"),
    "two columns of a name": (
        pandas.concat([pandas.DataFrame(GRADES), pandas.DataFrame(GRADES)[["small_score"]]], axis=1),
        {},
        ValueError,
        "columns of frame must have different names; 2 are called 'small_score'",
    ),
    "an empty table": (
        {name: column[:0] for name, column in GRADES.items()},
        {},
        ValueError,
        "frame must hold at least one row; column 'small_correct' has none",
    ),
    "columns of different lengths": (
        GRADES | {"small_score": [0.5]},
        {},
        ValueError,
        "columns must be equally long; 'small_score' has 1 rows, others 400",
    ),
    "a missing score": (
        changed(GRADES, "small_score", [7, 9], None),
        {},
        ValueError,
        r"column 'small_score' must have a value in every row; it is missing in row 7 .*and in 1 other rows",
    ),
    "a missing answer": (
        changed(ANSWERS, "small_prediction", 7, np.nan),
        {},
        ValueError,
        "'small_prediction' .*row 7",
    ),
    "a missing last score": (
        changed(GRADES | {"large_score": np.ones(400)}, "large_score", 7, None),
        {},
        ValueError,
        "'large_score' must have a value in every row; it is missing in row 7",
    ),
    "an infinite score": (
        changed(GRADES, "small_score", 5, np.inf),
        {},
        ValueError,
        r"column 'small_score' must hold finite numbers, larger = surer; row 5 \(the first is 0\) has inf",
    ),
    "a score in words": (
        changed(GRADES, "small_score", 5, "high"),
        {},
        ValueError,
        "column 'small_score' must hold finite numbers.*row 5 .*has 'high'",
    ),
    "correctness in percent": (
        changed(GRADES, "small_correct", 2, 87),
        {},
        ValueError,
        r"column 'small_correct' must hold correctness from 0 \(wrong\) to 1 \(right\); row 2 .*has 87.0",
    ),
    "names and numbers": (
        ANSWERS | {"label": np.arange(400) % 3},
        {},
        ValueError,
        "must be all names or all whole numbers; column 'label' has 0, column 'small_prediction' has '",
    ),
    "a column of names and numbers": (
        changed(ANSWERS, "label", 4, 1),
        {},
        ValueError,
        r"column 'label' must hold names \(text\) throughout, or whole numbers; row 0 .*has '",
    ),
    "a fraction as a class": (
        ANSWERS | {"label": LOG["small_score"]},
        {},
        ValueError,
        "column 'label' must hold names or whole numbers; got dtype float64",
    ),
    "a class that is none": (
        changed(ANSWERS, "large_prediction", 6, "emu"),
        {"classes": NAMES},
        ValueError,
        r"column 'large_prediction' must hold labels among classes \['None', 'ant', 'cat'\]; row 6 .*has 'emu'",
    ),
    "classes twice": (ANSWERS, {"classes": ["a", "a"]}, ValueError, r"classes must be different labels; got \['a', "),
    "no cost": (LOG, {"cost": None}, ValueError, "cost must be what each of the 2 models costs.*got none"),
    "one cost": (LOG, {"cost": [1]}, ValueError, r"cost must have shape \(2,\)"),
    "costs of others": (
        LOG,
        {"models": ["small", "large"], "cost": {"a": 1, "b": 2}},
        ValueError,
        r"cost must have the models \['small', 'large'\] as keys; got \['a', 'b'\]",
    ),
    "negative costs": (LOG, {"cost": [-1, 1]}, ValueError, "cost must be finite and not negative"),
    "two kinds of cost": (LOG, {"exit_costs": [1, 2]}, ValueError, "give either cost or those two, not both"),
    "answers without scores": (LOG, {"correct": ["small_correct"]}, ValueError, "scores must name columns too"),
    "scores without answers": (LOG, {"scores": ["small_score"]}, ValueError, "correct or predictions must name"),
    "too few scores": (
        LOG,
        {"scores": ["small_score"], "correct": ["small_correct", "large_correct", "request"]},
        ValueError,
        "correct, scores must name one column a model, cheapest first .*got 3, 1",
    ),
    "one name": (LOG, {"models": "small"}, TypeError, "models must be a list of names"),
    "a name twice": (LOG, {"models": ["small", "small"]}, ValueError, "models must be different names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_column_the_row_and_what_is_allowed(case):
    frame, told, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        ExitOutputs.from_frame(frame, **{"cost": [0.2, 1.5]} | told)


def test_the_log_of_a_running_cascade_is_refused():
    asked = LOG["small_score"] < 0.5
    running = pandas.DataFrame(LOG)
    running.loc[~asked, ["large_correct", "large_prediction"]] = None
    n, first = int((~asked).sum()), int(np.argmin(asked))
    for end in ("_correct", "_prediction"):
        log = running[[name for name in running if not name.endswith(end)]]
        with pytest.raises(
            ValueError,
            match=rf"{n} of 400 rows have none, the first is row {first}. If 'large.*' was not asked.*random",
        ):
            ExitOutputs.from_frame(log, cost=COST)


def test_models_from_large_to_small_are_remarked_on():
    with pytest.warns(
        SaverWarning, match=r"cheapest first, the full model last; their costs are \[2.0, 1.0\]"
    ) as warned:
        ExitOutputs.from_frame(LOG, cost=[2, 1])
    assert warned[0].filename == __file__


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "log.json").touch()
    with pytest.raises(
        ValueError, match=r"frame must be a file that ends in one of \['\.csv'.*log.json. Read it yoursel"
    ):
        ExitOutputs.from_frame(tmp_path / "log.json", cost=COST)
    for path, nature in ((tmp_path / "no.csv", "not there"), (tmp_path, "a folder")):
        path = path if path.suffix else path.with_suffix(".csv")
        if nature == "a folder":
            path.mkdir()
        with pytest.raises(FileNotFoundError, match=nature):
            ExitOutputs.from_frame(path, cost=COST)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"frame could not be read: .*empty\.csv: No columns"):
        ExitOutputs.from_frame(tmp_path / "empty.csv", cost=COST)
    (tmp_path / "twice.csv").write_text("a_score,a_correct,a_score,b_correct\n1,1,2,1\n")
    with pytest.raises(ValueError, match="2 are called 'a_score'"):
        ExitOutputs.from_frame(tmp_path / "twice.csv", cost=[1, 2])
    (tmp_path / "gap.csv").write_text("a_score,a_correct,b_correct\n1,1,1\n,1,1\n")
    with pytest.raises(ValueError, match="'a_score' must have a value in every row; it is missing in row 1"):
        ExitOutputs.from_frame(tmp_path / "gap.csv", cost=[1, 2])

    def no_engine(path):
        raise ImportError("no engine")

    (tmp_path / "log.parquet").touch()
    monkeypatch.setattr(pandas, "read_parquet", no_engine)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        ExitOutputs.from_frame(tmp_path / "log.parquet", cost=COST)


def test_a_dict_of_columns_does_without_pandas(tmp_path, monkeypatch):
    usual = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    assert ExitOutputs.from_frame(LOG, cost=COST).n_samples == 400
    (tmp_path / "log.csv").touch()
    with pytest.raises(ImportError, match=r"pip install pandas.*or give a dict of columns"):
        ExitOutputs.from_frame(tmp_path / "log.csv", cost=COST)


README = Path(adaptexit.__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="an installed package comes without the README")
def test_the_readme_s_log(tmp_path, monkeypatch, capsys):
    (snippet,) = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "log.csv" in block
    ]
    pandas.DataFrame(LOG).to_csv(tmp_path / "log.csv", index=False)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    text, threshold = capsys.readouterr().out.splitlines()
    outputs = ExitOutputs.from_frame(LOG, cost=COST)
    assert text == str(verdict(outputs))
    assert float(threshold) in outputs.scores[0]
