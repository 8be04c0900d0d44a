"""Odd arguments to public callables: refused by name, and nothing is changed by it."""

import copy
import re
import warnings
from fractions import Fraction
from functools import cache

import matplotlib
import numpy as np
import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptexit import ExitOutputs, FrozenRecipe, ThresholdCalibrator, compare
from adaptexit.data.batches import as_batches
from adaptexit.data.classes import as_labels, known_classes
from adaptexit.data.sources import check_source, is_stream, split_pair
from adaptexit.displays import (
    BarsDisplay,
    ComparisonDisplay,
    ExemplarDisplay,
    ExitFlowDisplay,
    JobRatioDisplay,
    ParetoDisplay,
    ReliabilityDisplay,
    SweepDisplay,
)
from adaptexit.staging.contexts import random_state_kept
from tests.contract.cases import CASES, assert_as_before, fitted_once, learned, random_states, snapshot
from tests.displays.test_displays_checks import GOOD

matplotlib.use("Agg")
from matplotlib import pyplot

ALLOWED = (ValueError, TypeError, OSError)  # NotFittedError is a ValueError

# -- odd values -------------------------------------------------------------------------------------------------------

X, Y = (part[:40] for part in CASES["two modules"].train)

THINGS = {
    "None": None, "True": True, "ellipsis": ..., "empty text": "", "text": "abc", "auto": "auto", "home": "~",
    "bytes": b"ab", "infinity": np.inf, "nan": np.nan, "complex": 1j, "fraction": Fraction(1, 3), "list": [],
    "tuple": (), "dict": {}, "set": {1, 2}, "named": {"a": 1}, "range": range(3), "texts": ["a", "b"],
    "ragged": [[1.0], [1.0, 2.0]], "nothings": [None, None], "object": object(), "class": dict, "function": len,
    "lambda": lambda x: x, "generator class": iter, "scalar": np.float32(0.5), "0-d": np.array(0.5),
    "datetime": np.datetime64("2020-01-01"), "objects": np.array([object(), None]), "unicode": np.array(["a", "b"]),
    "masked": np.ma.masked_array([0.5, 1.0], [True, False]), "complexes": np.ones(3, complex),
    "nans": np.full((40, 1, 8, 8), np.nan), "booleans": np.ones((40, 1, 8, 8), bool), "one image": X[0],
    "inputs": X, "labels": Y, "no inputs": X[:0], "bare": np.zeros(40), "columns": np.eye(40), "pair": (X, Y),
    "pair of pairs": ((X, Y), (X, Y)), "list of pairs": list(zip(X, Y, strict=True)), "rows": [{"image": X[0]}],
    "frame": pandas.DataFrame({"a": [1.0, 2.0]}), "series": pandas.Series(["a", "b"]), "sparse": sparse.eye(4).tocsr(),
    "picture": Image.new("L", (8, 8)), "pictures": [Image.new("L", (8, 8))] * 2,
    "tensor": torch.ones(3), "gradients": torch.ones(3, requires_grad=True), "complex tensor": torch.ones(3) * 1j,
    "half": torch.ones(40, 1, 8, 8).half(), "meta": torch.ones(40, 1, 8, 8, device="meta"),
    "sparse tensor": torch.eye(4).to_sparse(), "integers": torch.ones(40, 1, 8, 8, dtype=torch.int16),
    "dataset": TensorDataset(torch.from_numpy(X)), "triples": TensorDataset(*[torch.ones(4, 1, 8, 8)] * 3),
    "loader": DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=7, shuffle=True),
    "module": nn.Linear(3, 2), "module class": nn.Linear, "classifier": LogisticRegression(),
    "calibrator": ThresholdCalibrator(), "recipe": FrozenRecipe(epochs=1), "display": GOOD, "axes": pyplot,
}  # fmt: skip
"""Things that somebody may give where something else is meant."""

ODD = st.one_of(
    st.sampled_from(list(THINGS.values())),
    st.integers(-3, 300),
    st.floats(-2, 3),
    st.text("ab~/é", max_size=4),
    st.lists(st.one_of(st.integers(-2, 12), st.floats(), st.none(), st.text("ab", max_size=2)), max_size=4),
    hnp.arrays(
        st.sampled_from([np.float64, np.float16, np.int8, np.uint64, bool, "U2", complex, object]),
        hnp.array_shapes(min_dims=0, max_dims=4, max_side=4),
    ),
)


# -- public callables -------------------------------------------------------------------------------------------------


@cache
def model_of(kind):
    return fitted_once(kind)


def asked(method):
    return lambda kind, **arguments: getattr(model_of(kind), method)(**arguments)


def learning(method):
    def learn(kind, X=X, y=Y, **params):
        if method == "fit":
            return CASES[kind].make(**params).fit(X, y)
        return copy.copy(model_of(kind)).set_params(**params).calibrate(X, y)

    return learn


AT = {"budget": None, "max_drop": None}
DATA = {"X": X, "y": Y}
METHODS = {
    "at": {**AT, "policy": None},
    "operating_point": AT,
    "predict": {"X": X, **AT},
    "predict_proba": {"X": X, **AT},
    "trace": {"X": X, **AT},
    "predict_anytime": {"X": X, "limit": 1.0},
    "score": {**DATA, "sample_weight": None, **AT},
    "record": DATA,
    "pareto": DATA,
    "exit_calibration": {**DATA, **AT, "n_bins": 5},
    "exit_flow": {**DATA, **AT},
    "survivor_shift": {**DATA, **AT},
    "exemplars": {**DATA, **AT, "n": 2},
    "latencies": {"X": X, "batch_sizes": (1, 2)},
}
SHARED = {
    "confidence": "auto", "calibrator": None, "budget": None, "cost": "macs", "classes": None, "calibration_size": 0.5,
    "batch_size": 20, "memory_limit": 1 << 20, "device": None, "random_state": 0, "verbose": 0,
}  # fmt: skip
OWN = {
    "two modules": {"base_preprocess": None, "saver_preprocess": None},
    "branched": {
        "recipe": FrozenRecipe(epochs=1), "preprocess": None, "layout": None, "head": "mlp", "exits": ["one"],
        "cache_dir": None, "cache_memory": 1 << 20, "cache_half": False,
    },
    "native": {"preprocess": None},
}  # fmt: skip


def estimator_calls(kind):
    calls = {f"{kind}.{name}": (asked(name), {"kind": kind}, arguments) for name, arguments in METHODS.items()}
    for name in ("fit", "calibrate"):
        calls[f"{kind}.{name}"] = learning(name), {"kind": kind}, DATA | SHARED | (OWN[kind] if name == "fit" else {})
    return calls


def batches_of(**arguments):
    """As estimators run over them: loaders draw from torch's random state, which they keep around the run."""
    batches = as_batches(**arguments, labels="y" in arguments)
    with random_state_kept():
        batches.first()
        return list(batches)


def outputs():
    return model_of("two modules").outputs_


def point():
    return model_of("two modules").operating_point()


def plotted(display, **arguments):
    return display(**GOOD[display]).plot(**arguments)


class Later:
    """A good argument that is made when it is needed."""

    def __init__(self, make):
        self.make = make


def pictures():
    return np.zeros((outputs().n_samples, 4, 4))


ESTIMATOR = {"X": X, "y": Y, **AT}
FROM = {
    ParetoDisplay.from_estimator: {**ESTIMATOR, "name": None},
    ParetoDisplay.from_frontier: {**AT, "exit_names": None, "name": None},
    JobRatioDisplay.from_estimator: {"X": X, "y": Y, "saver": 0},
    JobRatioDisplay.from_outputs: {"saver": 0, "exit_names": None},
    JobRatioDisplay.from_curve: {"saver_name": "a", "base_name": "b"},
    ExitFlowDisplay.from_estimator: {**ESTIMATOR, "class_names": None},
    ExitFlowDisplay.from_outputs: {"chosen_by": None, "exit_names": None, "class_names": None},
    ReliabilityDisplay.from_estimator: {**ESTIMATOR, "n_bins": 5},
    ReliabilityDisplay.from_outputs: {"n_bins": 5, "chosen_by": None, "exit_names": None},
    ReliabilityDisplay.from_calibration: {"exit_names": None, "chosen": None, "chosen_by": None},
    ExemplarDisplay.from_estimator: {**ESTIMATOR, "n": 2, "images": None, "class_names": None},
    ExemplarDisplay.from_outputs: {
        "images": Later(pictures),
        "n": 2,
        "chosen_by": None,
        "exit_names": None,
        "class_names": None,
    },
    SweepDisplay.from_frontier: {"knob": "budget", "exit_names": None},
    ComparisonDisplay.from_comparison: {},
    BarsDisplay.from_comparison: AT,
}
FIRST = {
    "from_estimator": ("estimator", lambda: model_of("two modules")),
    "from_frontier": ("frontier", lambda: model_of("two modules").pareto()),
    "from_outputs": ("outputs", outputs),
    "from_curve": ("curve", lambda: model_of("two modules").job_curve()),
    "from_calibration": ("calibration", lambda: model_of("two modules").exit_calibration()),
    "from_comparison": ("comparison", lambda: compare(outputs(), methods={"thresholds": ThresholdCalibrator()})),
}


def display_calls():
    calls = {}
    for display, good in GOOD.items():
        calls[display.__name__] = display, {}, good
        calls[f"{display.__name__}.plot"] = plotted, {"display": display}, {"ax": None, "alpha": 0.5}
    for make, arguments in FROM.items():
        name, first = FIRST[make.__name__]
        more = {"point": Later(point)} if name == "outputs" and "saver" not in arguments else {}
        calls[make.__qualname__] = make, {}, {name: Later(first), **more, **arguments}
    return calls


DATA_CALLS = {
    "as_batches": (batches_of, {}, {"X": X, "y": Y, "batch_size": 9}),
    "as_batches, no labels": (batches_of, {}, {"X": X, "batch_size": 9}),
    "split_pair": (split_pair, {}, DATA),
    "check_source": (check_source, {}, {"X": X}),
    "is_stream": (is_stream, {}, {"X": X}),
    "as_labels": (as_labels, {}, {"y": Y}),
    "known_classes": (lambda classes: known_classes(classes, 3, None), {}, {"classes": None}),
    "ExitOutputs": (
        ExitOutputs,
        {},
        {
            "predictions": np.zeros((2, 3), int), "scores": np.ones((2, 3)), "labels": np.zeros(3, int), "n_classes": 3,
            "stage_costs": [1.0, 2.0], "exit_costs": [0.0, 0.0], "logits": None, "features": None, "quality": None,
            "chained": False, "cost_unit": None, "costs": None,
        },
    ),
}  # fmt: skip
CALLS = {
    **{name: call for kind in OWN for name, call in estimator_calls(kind).items()},
    **DATA_CALLS,
    **display_calls(),
}
ALSO_CALLED = {
    "X": ["inputs", "samples", "batch", "array", "feature", "data loader", "the data", "images"],
    "y": ["label", "X", "target"],
    "base_preprocess": ["preprocessing of base", "base"],
    "saver_preprocess": ["preprocessing of saver", "saver"],
    "preprocess": ["preprocessing of backbone", "backbone"],
    "calibrator": ["score", "training_outputs"],
    "head": ["heads"],
    "alpha": ["styles"],
    "scores": ["predictions"],
    "exit_rates": ["exit_names"],
    "X and y": [],
    "images": ["X"],
    "exits": ["cut", "module"],
    "recipe": ["heads"],
}
"""How else an error may name what is odd."""


CALLED = ("confidence", "preprocess", "base_preprocess", "saver_preprocess", "head", "recipe")
"""Arguments that may be functions."""


def names_of(argument):
    return [argument, *ALSO_CALLED.get(argument, [])]


@st.composite
def odd_calls(draw):
    name = draw(st.sampled_from(list(CALLS)))
    arguments = CALLS[name][2]
    changed = draw(st.sampled_from(list(arguments)))
    return name, changed, draw(ODD)


def ask_oddly(name, changed, value):
    """Call it, and see what is said."""
    call, fixed, arguments = CALLS[name]
    good = {key: part.make() if isinstance(part, Later) else part for key, part in arguments.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**fixed, **(good | {changed: value}))
            return
        except Exception as error:
            told = f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
            own = changed in CALLED and callable(value)  # whatever a user's function raises
            if own or "This is " in told:  # or a user's model, which is named
                return
            if not isinstance(error, ALLOWED):
                raise
    named = any(re.search(rf"(?<!\w){re.escape(word)}", told) for word in names_of(changed))
    assert named, f"{name}({changed}={value!r:.60}) says: {told}"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Folders that are named by chance lie in a temporary one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    pyplot.close("all")


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd=odd_calls())
def test_odd_arguments_are_refused_by_name_and_change_nothing(elsewhere, odd):
    assert_refused_by_name_and_nothing_changed(odd)


@pytest.mark.exhaustive
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd=odd_calls())
def test_odd_arguments_of_every_kind_are_refused_by_name_and_change_nothing(elsewhere, odd):
    assert_refused_by_name_and_nothing_changed(odd)


def assert_refused_by_name_and_nothing_changed(odd):
    kinds = list(OWN)
    modules = [part for kind in kinds for part in model_of(kind)._network.modules]
    before = [snapshot(module) for module in modules]
    states, data = random_states(), (X.tobytes(), Y.tobytes())
    knowledge = [learned(model_of(kind)) for kind in kinds]
    ask_oddly(*odd)
    assert random_states() == states
    assert (X.tobytes(), Y.tobytes()) == data
    for module, was in zip(modules, before, strict=True):
        assert_as_before(module, was)
    for kind, known in zip(kinds, knowledge, strict=True):
        now = learned(model_of(kind))
        assert now.keys() == known.keys()
        assert all(now[key] is value for key, value in known.items())
