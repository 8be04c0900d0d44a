import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adaptexit import CalibrationWarning, FrozenRecipe, MultiExitClassifier
from adaptexit.core.scores import softmax
from adaptexit.data.classes import hold_out
from adaptexit.networks.mlp import MLP, describe_mlp, mlp_of
from tests.nets import Fixed, assert_same_branches, loader_of

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")

SHORT = FrozenRecipe(epochs=5, lr=1e-2, batch_size=32)
IRIS = StandardScaler().fit_transform(load_iris().data), load_iris().target
CANCER = StandardScaler().fit_transform(load_breast_cancer().data), load_breast_cancer().target
WIDTHS, LEARNING = (16, 16, 16), {"max_iter": 40, "learning_rate_init": 0.02}
NAMES = np.array(["setosa", "versicolor", "virginica"])


def fitted_mlp(data=IRIS, widths=(16, 12, 8), dtype=np.float64, **params):
    X, y = data
    return MLPClassifier(widths, random_state=0, **({"max_iter": 30} | params)).fit(X.astype(dtype), y)


def unfitted(**params):
    return MultiExitClassifier(MLPClassifier(WIDTHS, **LEARNING), **({"recipe": SHORT} | params))


# -- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("data", [IRIS, CANCER])
def test_logits_are_those_of_scikit_learn(data, activation):
    classifier = fitted_mlp(data, activation=activation)
    net = mlp_of(classifier)
    with torch.inference_mode():
        logits = net(torch.from_numpy(data[0])).numpy()
    assert logits.shape == (len(data[1]), len(classifier.classes_))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(softmax(logits), classifier.predict_proba(data[0]), rtol=1e-9, atol=1e-12)


def test_the_logits_of_two_classes():
    classifier = fitted_mlp(CANCER)
    with torch.inference_mode():
        logits = mlp_of(classifier)(torch.from_numpy(CANCER[0])).numpy()
    proba = classifier.predict_proba(CANCER[0])
    assert (logits[:, 0] == 0).all()
    np.testing.assert_allclose(logits[:, 1], np.log(proba[:, 1]) - np.log(proba[:, 0]), rtol=1e-4, atol=1e-4)


def test_the_module_is_like_the_classifier():
    net = mlp_of(fitted_mlp(widths=(7, 5)))
    assert [tuple(p.shape) for p in net.parameters()] == [(7, 4), (7,), (5, 7), (5,), (3, 5), (3,)]
    assert net.feature_info == [{"module": "hidden.0", "num_chs": 7}, {"module": "hidden.1", "num_chs": 5}]
    assert not net.training
    assert net(torch.zeros(3, 4, dtype=torch.int64)).dtype == torch.float64


def test_the_description_makes_the_same_module():
    classifier = fitted_mlp(activation="tanh")
    described = describe_mlp(classifier)
    assert described == {"widths": [4, 16, 12, 8], "n_classes": 3, "activation": "tanh"}
    net = MLP(**described).double()
    net.load_state_dict(mlp_of(classifier).state_dict())
    x = torch.from_numpy(IRIS[0])
    assert torch.equal(net(x), mlp_of(classifier)(x))


def test_the_module_has_the_classifiers_precision_and_weights_of_its_own():
    classifier = fitted_mlp(dtype=np.float32)
    net = mlp_of(classifier)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    before = classifier.coefs_[0].copy()
    with torch.no_grad():
        net.hidden[0][0].weight.zero_()
    assert classifier.coefs_[0].tolist() == before.tolist()


def test_global_random_states_are_untouched():
    classifier = fitted_mlp()
    before = torch.random.get_rng_state().tolist()
    mlp_of(classifier)
    assert torch.random.get_rng_state().tolist() == before


@pytest.mark.parametrize("n_labels", [2, 3])
def test_a_classifier_of_several_labels_is_refused(n_labels):
    several = MLPClassifier((5,), max_iter=10).fit(IRIS[0], np.eye(3)[IRIS[1]][:, :n_labels].astype(int))
    with pytest.raises(ValueError, match="must be an MLPClassifier for one label a sample"):
        mlp_of(several)


# -- exits on a fitted classifier -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [IRIS, CANCER])
def test_a_fitted_classifier_is_used_as_it_is(data):
    X, y = data
    classifier = fitted_mlp(data)
    weights = [array.copy() for array in classifier.coefs_]
    fitted = MultiExitClassifier(classifier, ["hidden.0", "hidden.1"], recipe=SHORT).fit(X, y)
    assert fitted.self_calibrated_
    fitted.calibrate(X, y)
    assert fitted.predict_anytime(X, 1.0).tolist() == classifier.predict(X).tolist()
    assert all(np.array_equal(a, b) for a, b in zip(weights, classifier.coefs_, strict=True))
    assert fitted.exits_ == ["hidden.0", "hidden.1"]
    assert fitted.n_features_in_ == X.shape[1]
    widths = [X.shape[1], 16, 12, 8, len(np.unique(y))]
    layers = [a * b for a, b in pairwise(widths)]
    assert fitted.outputs_.stage_costs.tolist() == [layers[0], layers[1], layers[2] + layers[3]]


def test_thresholds_of_a_fitted_classifier_warn():
    fitted = MultiExitClassifier(fitted_mlp(), ["hidden.0"], recipe=SHORT).fit(*IRIS)
    with pytest.warns(CalibrationWarning):
        fitted.predict(IRIS[0])


def test_answers_equal_a_hand_written_loop():
    X, y = IRIS
    classifier = fitted_mlp()
    fitted = MultiExitClassifier(
        classifier, ["hidden.0", "hidden.1"], recipe=SHORT, calibrator=Fixed([0.7, 0.8, -np.inf])
    )
    fitted.fit(X, y).calibrate(X, y)
    heads, expected = fitted._network.early, []
    for row in torch.from_numpy(X)[:, None]:
        hidden = row
        for k in range(2):
            weights, bias = (torch.from_numpy(a[k]) for a in (classifier.coefs_, classifier.intercepts_))
            hidden = torch.relu(hidden @ weights + bias)
            with torch.inference_mode():
                logits = heads[k](hidden).logits
            if float(logits.softmax(dim=1).max()) > [0.7, 0.8][k]:
                expected.append((int(logits.argmax()), k))
                break
        else:
            expected.append((int(classifier.predict(row.numpy())[0]), 2))
    trace = fitted.trace(X)
    assert list(zip(trace.labels.tolist(), trace.exits.tolist(), strict=True)) == expected
    assert len(set(trace.exits.tolist())) >= 2


def test_string_labels_of_a_fitted_classifier():
    X, y = IRIS[0], NAMES[IRIS[1]]
    classifier = fitted_mlp((X, y))
    fitted = MultiExitClassifier(classifier, ["hidden.0"], recipe=SHORT).fit(X, y).calibrate(X, y)
    assert fitted.classes_.tolist() == NAMES.tolist()
    assert set(fitted.predict(X)) <= set(NAMES)
    assert fitted.predict_anytime(X, 1.0).tolist() == classifier.predict(X).tolist()


# -- a classifier fitted inside ---------------------------------------------------------------------------------------


def test_an_unfitted_classifier_is_cloned_and_fitted_on_the_held_in_part():
    X, y = IRIS[0], NAMES[IRIS[1]]
    fitted = unfitted().fit(X, y)
    assert not hasattr(fitted.backbone, "coefs_")
    held_in, held_out = hold_out(y, 0.25, 0)
    inside = MLPClassifier(WIDTHS, **LEARNING, random_state=0).fit(X[held_in], y[held_in])
    assert fitted.predict_anytime(X, 1.0).tolist() == inside.predict(X).tolist()
    assert fitted.outputs_.labels.tolist() == IRIS[1][held_out].tolist()
    assert fitted.classes_.tolist() == NAMES.tolist()


def test_thresholds_of_a_classifier_fitted_inside_do_not_warn():
    fitted = unfitted().fit(*IRIS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.predict(IRIS[0])
        fitted.pareto()
        assert fitted.score(*IRIS) > 0.8
    assert fitted.self_calibrated_


def test_mlp_is_one_of_four_layers_of_64():
    fitted = MultiExitClassifier("mlp", ["hidden.0", "hidden.2"], recipe=FrozenRecipe(epochs=2)).fit(*IRIS)
    assert fitted.outputs_.stage_costs.tolist() == [4 * 64, 2 * 64 * 64, 64 * 64 + 64 * 3]
    assert fitted.backbone == "mlp"
    X, y = IRIS
    held_in, _ = hold_out(y, 0.25, 0)
    inside = MLPClassifier((64, 64, 64, 64), random_state=0).fit(X[held_in], y[held_in])
    assert fitted.predict_anytime(X, 1.0).tolist() == inside.predict(X).tolist()


def test_random_state_seeds_a_classifier_that_has_none():
    one, same, other = (unfitted(random_state=seed).fit(*IRIS) for seed in (0, 0, 1))
    assert_same_branches(one, same)
    assert one.outputs_.scores.tolist() != other.outputs_.scores.tolist()
    held_in, _ = hold_out(IRIS[1], 0.25, 1)
    seeded = MLPClassifier((8, 8), random_state=5, max_iter=20)
    fitted = MultiExitClassifier(seeded, ["hidden.0"], random_state=1, recipe=SHORT).fit(*IRIS)
    expected = clone(seeded).fit(IRIS[0][held_in], IRIS[1][held_in])
    assert fitted.predict_anytime(IRIS[0], 1.0).tolist() == expected.predict(IRIS[0]).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_tables_of_other_types(dtype):
    X, y = (IRIS[0] * 10).astype(dtype), IRIS[1]
    fitted = unfitted().fit(X, y)
    assert fitted.predict(X).tolist() == fitted.predict(X.astype(np.float64)).tolist()
    assert fitted.score(X, y) > 0.8


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    X, y = pandas.DataFrame(IRIS[0], columns=list("abcd")), pandas.Series(NAMES[IRIS[1]])
    fitted = unfitted().fit(X, y)
    assert fitted.feature_names_in_.tolist() == list("abcd")
    assert fitted.predict(X).tolist() == unfitted().fit(IRIS[0], NAMES[IRIS[1]]).predict(IRIS[0]).tolist()
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(X[list("dcba")])


# -- with scikit-learn ------------------------------------------------------------------------------------------------


def test_in_a_pipeline():
    X, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), unfitted()).fit(X, y)
    assert pipeline.predict(X).tolist() == unfitted().fit(*IRIS).predict(IRIS[0]).tolist()
    assert pipeline.score(X, y) > 0.8


def test_grid_search_over_the_backbone_the_recipe_and_the_exits():
    grid = {
        "backbone__hidden_layer_sizes": [(8, 8, 8)],
        "recipe__epochs": [1, 30],
        "exits": [["hidden.0"], ["hidden.1"]],
    }
    cheap = unfitted(cost=[1.0, 100.0], budget=0.01)  # the early exit answers for all, so its training tells
    search = GridSearchCV(cheap, grid, cv=2, error_score="raise").fit(*IRIS)
    assert search.best_params_["recipe__epochs"] == 30
    scores = dict(
        zip(
            [(p["recipe__epochs"], p["exits"][0]) for p in search.cv_results_["params"]],
            search.cv_results_["mean_test_score"],
            strict=True,
        )
    )
    assert scores[1, "hidden.0"] < scores[30, "hidden.0"]
    assert search.best_estimator_.backbone.hidden_layer_sizes == (8, 8, 8)
    assert search.score(*IRIS) == search.best_estimator_.score(*IRIS)


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["mlp", MLPClassifier((8, 8)), fitted_mlp()])
def test_streams_are_refused(backbone):
    for data in (loader_of(*IRIS), loader_of(*IRIS).dataset):
        with pytest.raises(
            ValueError, match=r"X must be an array where the backbone is a classifier for tables; got a"
        ):
            MultiExitClassifier(backbone).fit(data)


def test_tables_of_another_width():
    fitted = unfitted().fit(*IRIS)
    with pytest.raises(ValueError, match="X has 3 features, but MultiExitClassifier is expecting 4 features"):
        fitted.predict(IRIS[0][:, :3])
    with pytest.raises(ValueError, match="X has 3 features"):
        MultiExitClassifier(fitted_mlp(), ["hidden.0"]).fit(IRIS[0][:, :3], IRIS[1])


def test_labels_that_the_classifier_does_not_know():
    with pytest.raises(ValueError, match=r"y must hold labels among the 3 classes \[0, 1, 2\]; got \[3\]"):
        MultiExitClassifier(fitted_mlp(), ["hidden.0"]).fit(IRIS[0], IRIS[1] + 1)


def test_tables_need_labels_to_fit_but_not_to_calibrate():
    with pytest.raises(ValueError, match="requires y to be passed"):
        unfitted().fit(IRIS[0])
    fitted = unfitted().fit(*IRIS)
    assert fitted.calibrate(IRIS[0]).pareto().full_accuracy == 1.0


def test_a_classifier_without_hidden_layers_has_no_exits():
    with pytest.raises(ValueError, match="cuts of MLP cannot be chosen automatically"):
        MultiExitClassifier(fitted_mlp(widths=())).fit(*IRIS)


def test_several_labels_a_sample():
    with pytest.raises(ValueError, match="y should be a 1d array"):
        unfitted().fit(IRIS[0], np.eye(3)[IRIS[1]])
