from functools import partial

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from adaptexit import CascadeSaver, SaverWarning, ThresholdCalibrator
from adaptexit.core.scores import SCORES, max_proba, softmax
from tests.nets import (
    Columns,
    Constant,
    Recording,
    column_cascade,
    column_data,
    digits,
    large_trained,
    loader_of,
    middle_trained,
    naive_cascade,
    small_trained,
)

TRAIN, VAL, TEST = digits()
BUDGETS = [None, 0.05, 0.2, 0.5, 1.0]
confidence = partial(max_proba, xp=torch)
saver_may_not_pay = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["cascade", "three"])
def test_answers_equal_a_hand_written_loop(name, budget, request):
    fitted = request.getfixturevalue(name)
    models = [fitted.saver, fitted.base] if name == "cascade" else [*fitted.saver, fitted.base]
    point = fitted.operating_point(budget)
    X = TEST[0][:200]
    labels, exits = naive_cascade(models, torch.from_numpy(X), point.cutoffs, confidence)
    trace = fitted.trace(X, budget=budget)
    assert fitted.predict(X, budget=budget).tolist() == trace.labels.tolist() == labels
    assert trace.exits.tolist() == exits
    logits = np.stack([models[k](torch.from_numpy(X)).detach().numpy() for k in range(len(models))])
    logits = logits[exits, np.arange(len(X))]
    np.testing.assert_allclose(trace.scores, max_proba(logits), rtol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(X, budget=budget), softmax(logits), atol=1e-5)


def test_answers_on_known_logits_are_exact():
    X, y = column_data(400)
    fitted = column_cascade().fit(X, y)
    point = fitted.operating_point(0.4)
    scores = max_proba(X.reshape(-1, 2, 3))
    leaves = scores[:, 0] > point.cutoffs[0]
    assert 0.5 < leaves.mean() < 1
    expected = np.where(leaves, X[:, :3].argmax(axis=1), X[:, 3:].argmax(axis=1))
    trace = fitted.trace(X, budget=0.4)
    assert trace.labels.tolist() == expected.tolist()
    assert trace.exits.tolist() == (~leaves).astype(int).tolist()
    assert trace.costs.tolist() == np.where(leaves, 1.0, 11.0).tolist()
    assert trace.full_cost == 10.0
    assert trace.relative_costs.tolist() == (trace.costs / 10).tolist()


def test_survivors_of_a_loader_fill_the_bases_batches():
    base = Recording(large_trained())
    fitted = CascadeSaver(base, small_trained()).fit(*VAL)
    base.sizes.clear()
    exits = fitted.trace(loader_of(*TEST, batch_size=32)).exits
    survivors = int(exits.sum())
    assert base.sizes == [32] * (survivors // 32) + [survivors % 32]


@saver_may_not_pay
def test_a_saver_that_is_off_is_neither_called_nor_paid():
    X, y = column_data(300, 3)
    savers = [Recording(Columns(0)), Recording(Columns(1))]
    fitted = CascadeSaver(Columns(2), savers, cost=[5.0, 6.0, 100.0]).fit(X, y)
    point = next(p for p in fitted.pareto().points if not p.on[0] and 0 < p.exit_rates[1] < 1)
    for saver in savers:
        saver.sizes.clear()
    trace = fitted.trace(X, budget=point.cost)
    assert savers[0].sizes == []
    assert sum(savers[1].sizes) == 300
    assert set(zip(trace.exits.tolist(), trace.costs.tolist(), strict=True)) == {(1, 6.0), (2, 106.0)}
    assert trace.relative_costs.mean() == pytest.approx(point.cost)


# -- reports and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saver", [-1, 2, 0.5])
def test_a_job_curve_is_that_of_a_saver(three, saver):
    with pytest.raises(ValueError, match=r"saver must be one of 0 \.\.\. 1; got"):
        three.job_curve(saver)


def test_an_error_inside_a_model_names_it():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError) as caught:
        CascadeSaver(large_trained(), Broken()).fit(np.zeros((4, 1, 8, 8), dtype=np.float32), np.zeros(4, dtype=int))
    assert any("This is saver, run on inputs of shape (1, 1, 8, 8)" in note for note in caught.value.__notes__)


def test_exit_names(cascade, three):
    assert cascade.exit_names == ["saver", "base"]
    assert three.exit_names == ["saver[0]", "saver[1]", "base"]


def test_reports_of_the_savers(cascade):
    (report,) = cascade.saver_reports_
    saver_right, base_right = cascade.outputs_.graded
    order = np.argsort(-cascade.outputs_.scores[0], kind="stable")
    balance = np.cumsum(saver_right[order].astype(int) - base_right[order])
    ratio = (np.flatnonzero(balance >= 0)[-1] + 1) / len(order)
    small, large = cascade.outputs_.exit_costs
    assert report.job_ratio == pytest.approx(ratio)
    assert report.delta_cost == pytest.approx(small / large - ratio)
    assert report.pays


# -- preprocessing ----------------------------------------------------------------------------------------------------


@saver_may_not_pay
def test_each_model_has_its_own_preprocessing_and_input_size():
    def enlarged(x):
        return F.interpolate(x, size=(16, 16), mode="nearest")

    def negative(x):
        return 1.0 - 2.0 * x

    base = nn.Sequential(nn.MaxPool2d(2), large_trained())
    savers = [nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (1, 8, 8)), small_trained()), middle_trained()]
    fitted = CascadeSaver(
        base, savers, base_preprocess=enlarged, saver_preprocess=[negative, None], cost=[1.0, 2.0, 30.0]
    )
    fitted.fit(*VAL)
    x = torch.from_numpy(TEST[0])
    expected = [savers[0](negative(x)), savers[1](x), base(enlarged(x))]
    outputs = fitted.record(*TEST)
    assert outputs.predictions.tolist() == [logits.argmax(dim=1).tolist() for logits in expected]


@saver_may_not_pay
def test_one_preprocessing_for_all_savers():
    savers = [Constant(64, 10, 1), middle_trained()]
    fitted = CascadeSaver(large_trained(), savers, saver_preprocess=lambda x: x.flip(-1), cost=[1, 2, 30]).fit(*VAL)
    flipped = torch.from_numpy(TEST[0]).flip(-1)
    assert fitted.record(*TEST).predictions[1].tolist() == middle_trained()(flipped).argmax(dim=1).tolist()


@saver_may_not_pay
def test_timm_models_with_different_data_configs():
    configs = [
        {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)},
        {"input_size": (3, 96, 96), "interpolation": "bilinear"},
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        saver, base = (
            timm.create_model("test_efficientnet", num_classes=4, pretrained_cfg_overlay=config).eval()
            for config in configs
        )
        images = torch.rand(12, 3, 64, 64)
    fitted = CascadeSaver(base, saver, cost=[1, 10]).fit(images, np.arange(12) % 4)
    mean, std = (torch.tensor(saver.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = saver((images - mean) / std)
    torch.testing.assert_close(torch.from_numpy(fitted.predict_proba(images, budget=0.1)), expected.softmax(dim=1))
    shapes = []
    with base.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[1:])):
        fitted.predict_anytime((images * 255).to(torch.uint8), 1.0)
    assert shapes == [(3, 96, 96)]


# -- confidence and score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_confidence_by_name(name):
    X, y = column_data(300)
    fitted = column_cascade(confidence=name).fit(X, y)
    np.testing.assert_allclose(fitted.outputs_.scores, SCORES[name](X.reshape(300, 2, 3)).T, atol=1e-12)
    scored = CascadeSaver(Columns(1), Columns(0), calibrator=ThresholdCalibrator(name), cost=[1, 10]).fit(X, y)
    assert scored.outputs_.logits.shape == (2, 300, 3)
    for budget in (None, 0.3, 0.8):
        assert fitted.trace(X, budget).exits.tolist() == scored.trace(X, budget).exits.tolist()
        offline = scored.calibrator_.exit_index(scored.outputs_, scored.operating_point(budget))
        assert scored.trace(X, budget).exits.tolist() == offline.tolist()


def test_confidence_by_a_callable_on_the_output():
    X, y = column_data(300)
    fitted = column_cascade(confidence=lambda logits: logits[:, 0] * 2).fit(X, y)
    assert fitted.outputs_.scores.tolist() == (X[:, [0, 3]].T * 2).tolist()
    point = fitted.pareto().at(budget=0.6)
    leaves = X[:, 0] * 2 > point.cutoffs[0]
    assert fitted.trace(X, budget=0.6).exits.tolist() == np.where(leaves, 0, 1).tolist()


# -- classes ----------------------------------------------------------------------------------------------------------


def test_labels_of_a_dataset_by_name():
    X, y = column_data(300)
    pairs = [(torch.from_numpy(x), "cab"[label]) for x, label in zip(X, y, strict=True)]
    fitted = column_cascade(classes=["c", "a", "b"]).fit(DataLoader(pairs, batch_size=16))
    assert fitted.outputs_.labels.tolist() == y.tolist()
    assert fitted.score(DataLoader(pairs, batch_size=16)) == column_cascade().fit(X, y).score(X, y)


# -- savers that pay and that do not ----------------------------------------------------------------------------------


def test_a_saver_that_does_not_pay_warns_where_fit_was_called():
    with pytest.warns(SaverWarning, match=r"saver does not pay.*ΔC >= 0; it could take 0.0% of the samples") as caught:
        fitted = CascadeSaver(large_trained(), Constant(64, 10, answer=3)).fit(*VAL)
    assert [warning.filename for warning in caught] == [__file__]
    assert not fitted.saver_reports_[0].pays
    with pytest.warns(SaverWarning) as caught:
        fitted.calibrate(*TEST)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_base_and_a_saver_that_are_swapped_are_told_so():
    with pytest.warns(
        SaverWarning, match=r"it costs \d+(\.\d+)? times what the base costs. Are base and saver swapped\?"
    ):
        CascadeSaver(small_trained(), large_trained()).fit(*VAL)
    with pytest.warns(SaverWarning, match="it costs 1 times what the base costs"):
        CascadeSaver(large_trained(), large_trained()).fit(*VAL)


def test_of_several_savers_only_the_one_that_does_not_pay_is_named():
    with pytest.warns(SaverWarning) as caught:
        CascadeSaver(large_trained(), [Constant(64, 10, answer=3), small_trained()]).fit(*VAL)
    of_savers = [warning for warning in caught if warning.category is SaverWarning]
    assert [str(warning.message)[:22] for warning in of_savers] == ["saver[0] does not pay:"]
    assert of_savers[0].filename == __file__


def test_savers_from_large_to_small_warn():
    with pytest.warns(SaverWarning) as caught:
        CascadeSaver(large_trained(), [middle_trained(), small_trained()]).fit(*VAL)
    messages = [str(warning.message) for warning in caught]
    assert any("from small to large, base last" in message for message in messages)
    assert {warning.filename for warning in caught} == {__file__}


# -- costs ------------------------------------------------------------------------------------------------------------


def test_macs_are_counted_for_modules(cascade):
    small, large = cascade.outputs_.exit_costs
    assert cascade.cost_unit_ == "MACs"
    assert small == 4 * 9 * 16 + 64 * 10
    assert large == 32 * 9 * 64 + 32 * 32 * 9 * 16 + 128 * 10
    assert cascade.trace(TEST[0]).full_cost == large
    assert cascade.outputs_.stage_costs.tolist() == [0, 0]


def test_latency_is_measured_where_a_classifier_is_among_the_models():
    saver = LogisticRegression(max_iter=500).fit(TRAIN[0].reshape(600, -1), TRAIN[1])
    fitted = CascadeSaver(large_trained(), saver, batch_size=600).fit(*VAL)
    assert fitted.cost_unit_ == "seconds"
    assert (fitted.outputs_.exit_costs > 0).all()
