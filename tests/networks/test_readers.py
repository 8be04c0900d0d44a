import pickle

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit import CascadeSaver, EMRouter, MultiExitClassifier, ThresholdCalibrator, load
from adaptexit.core.answer import Answer
from adaptexit.core.scores import SCORES
from adaptexit.networks.models import build_model
from adaptexit.networks.readers import LogitsReader, logits_in
from tests.contract.cases import quietly
from tests.nets import EXITS, QUICK, Fixed, branched, digits, large_trained, small_trained
from tests.networks.stand_ins import FORMS, NETS, encoder, plain_answers, wrapped

TRAIN, VAL, TEST = digits()
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0], [-2.0, 1.0, 0.9]])


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_a_confidence_by_name(name):
    answer = LogitsReader(name)(0, LOGITS, logits=True)
    assert answer.predictions.tolist() == [0, 2, 1]
    np.testing.assert_allclose(answer.scores, SCORES[name](LOGITS.numpy()), rtol=1e-5, atol=1e-6)
    assert answer.logits.tolist() == LOGITS.tolist()
    assert isinstance(answer.scores, np.ndarray)


def test_a_callable_confidence_is_given_the_logits():
    assert LogitsReader(lambda logits: logits[:, 0] * 2)(0, LOGITS, logits=False).scores.tolist() == [4, 0, -4]


def test_auto_takes_a_heads_own_confidence_where_it_has_one():
    sure = torch.tensor([[9.0, 0.0, 0.0], [9.0, 9.0, -1.0], [0.0, 2.0, 0.0]])
    own, largest = LogitsReader("auto"), LogitsReader("max_proba")
    assert own(0, Answer(LOGITS, sure), logits=False).scores.tolist() == pytest.approx(
        [float(torch.sigmoid(sure[i, k])) for i, k in enumerate((0, 2, 1))]
    )
    probabilities = LOGITS.softmax(1).amax(1).tolist()
    assert largest(0, Answer(LOGITS, sure), logits=False).scores.tolist() == pytest.approx(probabilities)
    assert own(0, Answer(LOGITS), logits=False).scores.tolist() == pytest.approx(probabilities)
    assert own(0, LOGITS, logits=False).scores.tolist() == pytest.approx(probabilities)


def test_an_answer_that_was_read_holds_arrays_and_what_was_asked_for():
    output = Answer(LOGITS, LOGITS, state={"kept": LOGITS}, features=LOGITS.double())
    answer = LogitsReader("auto")(0, output, logits=False)
    assert answer.logits is answer.confidence_logits is answer.state is None
    assert isinstance(answer.features, np.ndarray)
    assert LogitsReader("auto")(0, Answer(LOGITS), logits=True).features is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_made_of_it(dtype):
    large = (LOGITS * 100).to(dtype)
    answer = LogitsReader("entropy")(0, Answer(large, features=large), logits=True)
    assert answer.scores.dtype == answer.logits.dtype == answer.features.dtype == np.float32
    np.testing.assert_allclose(answer.scores, SCORES["entropy"](large.float().numpy()), atol=1e-5)


@pytest.mark.parametrize("confidence", ["auto", *SCORES])
def test_readers_can_be_pickled(confidence):
    reader = LogitsReader(confidence)
    other = pickle.loads(pickle.dumps(reader))
    assert other(0, LOGITS, logits=False).scores.tolist() == reader(0, LOGITS, logits=False).scores.tolist()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", ["sure", 3, None])
def test_a_confidence_that_is_none(confidence):
    with pytest.raises(
        ValueError, match=r"confidence must be one of \['auto', 'entropy', 'margin', 'max_proba'\] or a call"
    ):
        LogitsReader(confidence)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
def test_logits_of_another_shape(shape):
    with pytest.raises(
        ValueError, match=r"the model of exit 2 must answer with logits of shape \(B, C\); got shape \(3,"
    ):
        LogitsReader()(2, torch.zeros(shape), logits=False)


@pytest.mark.parametrize(
    "confidence", [lambda logits: logits, lambda logits: logits.sum(), lambda logits: logits[:2, 0]]
)
def test_confidences_that_are_not_one_number_a_sample(confidence):
    with pytest.raises(ValueError, match=r"one a sample: expected shape \(3,\), got \("):
        LogitsReader(confidence)(0, LOGITS, logits=False)


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite(n, bad):
    logits = torch.zeros(n, 3)
    logits[-1, 0] = bad
    with pytest.raises(ValueError, match=r"exit 1 gave a score that is NaN or infinite\. Look for NaN or inf in"):
        LogitsReader(lambda x: x[:, 0])(1, logits, logits=False)


# -- logits in objects and dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_what_a_model_returns(form):
    assert logits_in(FORMS[form](LOGITS)) is LOGITS
    assert LogitsReader()(0, FORMS[form](LOGITS), logits=False).predictions.tolist() == [0, 2, 1]


@pytest.mark.parametrize("other", [[LOGITS], (LOGITS, None), {"scores": LOGITS}, None, FORMS["record"]([1.0])])
def test_anything_else_is_refused(other):
    kind = type(other).__name__
    with pytest.raises(
        TypeError, match=rf"base must return a tensor of logits \(B, C\), or an object with .logits; got {kind}"
    ):
        logits_in(other, "base")


@pytest.mark.parametrize(
    "form", [form if k == 0 else pytest.param(form, marks=pytest.mark.slow) for k, form in enumerate(FORMS)]
)
def test_models_that_return_objects_make_a_cascade(form):
    cascade = CascadeSaver(
        wrapped(form, large_trained), wrapped(form), calibrator=EMRouter(epochs=2, hidden=4, n_points=5, prior="global")
    )
    plain = CascadeSaver(large_trained(), small_trained(), calibrator=cascade.calibrator)
    quietly(lambda: [estimator.fit(*VAL) for estimator in (cascade, plain)])
    assert cascade.outputs_.exit_costs.tolist() == plain.outputs_.exit_costs.tolist()
    assert cascade.predict_proba(TEST[0]).tobytes() == plain.predict_proba(TEST[0]).tobytes()
    assert cascade.calibrator_._reads_logits is False


@pytest.mark.parametrize("form", FORMS)
def test_models_that_return_objects_make_a_backbone(form, tmp_path):
    exits = [f"net.{name}" for name in EXITS]
    model = branched(wrapped(form, NETS["backbone"]), exits=exits).fit(*TRAIN).calibrate(*VAL)
    plain = branched().fit(*TRAIN).calibrate(*VAL)
    assert model.outputs_.stage_costs.tolist() == plain.outputs_.stage_costs.tolist()
    for budget in (None, 0.1, 1.0):
        assert model.predict(TEST[0], budget=budget).tolist() == plain.predict(TEST[0], budget=budget).tolist()
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", backbone=wrapped(form, NETS["backbone"]), head=model.head)
    assert loaded.predict_proba(TEST[0]).tobytes() == model.predict_proba(TEST[0]).tobytes()


def test_records_are_carried_from_stage_to_stage():
    calibrator = ThresholdCalibrator(search="geometric")
    model = branched(encoder(), exits=["one", "two"], head="mlp", calibrator=calibrator).fit(*TRAIN).calibrate(*VAL)
    assert model.predict_anytime(TEST[0], 1.0).tolist() == plain_answers(NETS["backbone"](), TEST[0])
    plain = branched(exits=["one", "two"], head="mlp", calibrator=calibrator).fit(*TRAIN).calibrate(*VAL)
    for budget in plain.pareto().cost:
        assert model.trace(TEST[0], budget=budget).exits.tolist() == plain.trace(TEST[0], budget=budget).exits.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_returns_an_object_is_one_network(form):
    model = build_model(wrapped(form), None, "saver")
    x = torch.from_numpy(TEST[0][:5])
    with torch.inference_mode():
        assert torch.equal(model(x), small_trained()(x))
        answer, onward = model.read(0, model.prepare(x), logits=True, features=True)
    assert onward is None
    assert answer.features.shape == (5, 64)


# -- transformers -----------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).random((60, 3, 32, 32), dtype=np.float32)
KINDS = np.arange(60) % 4
random_nets = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning", "ignore::adaptexit.SaverWarning")


def vit(seed=0):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
        net = transformers.ViTForImageClassification(config).eval()
        nn.init.normal_(net.classifier.weight)
    return net


def resnet():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=4)).eval()
        nn.init.normal_(net.classifier[-1].weight)
    return net


def processor(size=32):
    transformers = pytest.importorskip("transformers")
    return transformers.ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )


def logits_of(net, x):
    with torch.inference_mode():
        return net(x).logits


@random_nets
@pytest.mark.parametrize("pixels", [np.float32, np.uint8])
def test_a_cascade_of_transformers_with_their_image_processors(pixels):
    images = IMAGES if pixels is np.float32 else (IMAGES * 255).astype(np.uint8)
    base, saver, small = vit(), resnet(), processor(16)
    cascade = CascadeSaver(base, saver, base_preprocess=processor(), saver_preprocess=small, cost=[1, 10])
    outputs = cascade.set_params(calibrator=ThresholdCalibrator("entropy")).fit(images, KINDS).record(images, KINDS)
    scaled = torch.from_numpy(images) if pixels is np.float32 else torch.from_numpy(images).float() / 255
    np.testing.assert_allclose(outputs.logits[1], logits_of(base, (scaled - 0.4) / 0.2), rtol=1e-3, atol=1e-3)
    resized = small(images=list(scaled), return_tensors="pt", do_rescale=False)["pixel_values"]
    assert resized.shape == (60, 3, 16, 16)
    np.testing.assert_allclose(outputs.logits[0], logits_of(saver, resized), rtol=0.05, atol=0.05)
    assert cascade.predict_anytime(images, 1.0).tolist() == outputs.predictions[1].tolist()


@random_nets
@pytest.mark.parametrize(
    ("factory", "exits"), [(vit, ["vit.layers.0", "vit.layers.1"]), (resnet, ["resnet.encoder.stages.0"])]
)
def test_exits_on_a_transformer(factory, exits, tmp_path):
    net, images = factory(), (IMAGES * 255).astype(np.uint8)
    calibrator = Fixed([*[np.inf] * len(exits), -np.inf])
    model = MultiExitClassifier(net, exits, head="mlp", recipe=QUICK, preprocess=processor(), calibrator=calibrator)
    model.fit(images, KINDS).calibrate(images, KINDS)
    expected = logits_of(net, (torch.from_numpy(images).float() / 255 - 0.4) / 0.2)
    np.testing.assert_allclose(model.predict_proba(images), expected.softmax(1), atol=1e-4)
    assert model.cost_unit_ == "MACs"
    assert (model.outputs_.exit_costs[:-1] > 0).all()
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", backbone=factory(), preprocess=processor(), calibrator=calibrator)
    assert loaded.record(images, KINDS).scores.tobytes() == model.record(images, KINDS).scores.tobytes()


@random_nets
def test_exits_on_a_transformer_are_proposed():
    model = MultiExitClassifier(vit(), recipe=QUICK, calibrator=Fixed([np.inf] * 3 + [-np.inf])).fit(IMAGES, KINDS)
    model.calibrate(IMAGES, KINDS)
    assert len(model.exits_) == 3
    expected = logits_of(vit(), torch.from_numpy(IMAGES)).softmax(1)
    np.testing.assert_allclose(model.predict_proba(IMAGES), expected, atol=1e-4)


@random_nets
@pytest.mark.parametrize("call", ["fit", "predict"])
def test_whole_numbers_without_an_image_processor_name_the_model(call):
    images = (IMAGES * 255).astype(np.uint8)
    model = CascadeSaver(vit(), resnet(), cost=[1, 10])
    message = "X must hold floats for saver, a ResNetForImageClassification without preprocessing.*or give its preproc"
    with pytest.raises(TypeError, match=message):
        model.fit(images, KINDS) if call == "fit" else model.fit(IMAGES, KINDS).predict(images, budget=0.5)
