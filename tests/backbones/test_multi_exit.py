"""What holds for every network built with exits, asked of small ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptexit import JointRecipe, MultiExitClassifier
from adaptexit.backbones import MultiExitBackbone
from adaptexit.backbones.multi_exit import MapClassifier
from adaptexit.networks.models import build_model
from adaptexit.networks.native import NativeNetwork
from adaptexit.staging.executor import execute, record
from adaptexit.staging.nested import join, take
from tests.backbones.small_networks import SMALL, images, naive_exit_macs, seeded, small, with_statistics
from tests.nets import digits, leaving_above

pytestmark = [
    pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning"),
]
EVERY = pytest.mark.parametrize("name", SMALL)
IMAGES, LABELS = images()


def tensor(n):
    return torch.from_numpy(IMAGES[:n])


def close(actual, expected, share=1e-4):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=share, atol=share * float(other.abs().max()))


# -- shapes ------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("n_classes", "in_channels", "size"), [(7, 3, 16), (2, 1, 20), (10, 2, 33)])
def test_every_exit_answers_for_every_class_on_images_of_other_kinds(name, n_classes, in_channels, size):
    net = seeded(SMALL[name], n_classes=n_classes, in_channels=in_channels).eval()
    with torch.no_grad():
        logits = net(torch.randn(3, in_channels, size, size + 4))
    assert len(net.stages) == len(net.heads) == len(net.exit_info) == len(logits)
    assert {tuple(answer.shape) for answer in logits} == {(3, n_classes)}
    assert net.input_size == (in_channels, 16, 16)


@EVERY
def test_exits_answer_otherwise_from_each_other_and_from_image_to_image(name):
    with torch.no_grad():
        logits = torch.stack(small(name)(tensor(6)))
    assert logits.std(dim=0).min() > 0
    assert logits.std(dim=1).min() > 0


@EVERY
def test_an_answer_is_that_of_stages_and_heads_in_turn(name):
    net, carried = small(name), tensor(5)
    with torch.no_grad():
        expected = net(carried)
        for k, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
            carried = stage(carried)
            assert torch.equal(head(carried), expected[k])


@EVERY
def test_what_exit_info_tells_of_maps_is_what_classifiers_read(name):
    net, maps = small(name), []
    hooks = [head.convolutions.register_forward_pre_hook(lambda part, x: maps.append(x[0])) for head in net.heads]
    with torch.no_grad():
        net(tensor(1))
    for hook in hooks:
        hook.remove()
    assert [info["num_chs"] for info in net.exit_info] == [x.shape[1] for x in maps]
    assert [info["resolution"] for info in net.exit_info] == [tuple(x.shape[2:]) for x in maps]
    assert [info["name"] for info in net.exit_info] == [*(f"exit {k}" for k in range(len(maps) - 1)), "full model"]


def test_a_classifier_reads_the_last_map_or_its_last_channels():
    x = torch.arange(2 * 6.0).reshape(2, 6, 1, 1)
    whole = MapClassifier(nn.Identity(), 6, 2)
    part = MapClassifier(nn.Identity(), 2, 2, reads=2)
    for carried in (x, [None, x], (x + 1, x)):
        assert torch.equal(whole.read(carried), x)
        assert torch.equal(part.read(carried), x[:, 4:])
        assert torch.equal(part(carried), part.linear(x[:, 4:, 0, 0]))


# -- weights -----------------------------------------------------------------------------------------------------------


@EVERY
def test_weights_are_drawn_as_for_rectifiers_and_biases_begin_at_zero(name):
    net = seeded(SMALL[name])
    n_seen = 0
    for part in net.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
            assert part.bias.count_nonzero() == 0
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 2000:
            width = (2 / (part.out_channels * part.weight[0, 0].numel())) ** 0.5
            assert float(part.weight.detach().std()) == pytest.approx(width, rel=0.15)
            n_seen += 1
    assert n_seen > 0


@EVERY
def test_weights_go_into_a_copy_and_another_network(name):
    net = small(name)
    twin, other = copy.deepcopy(net), seeded(SMALL[name], 1).eval()
    with torch.no_grad():
        expected = net(tensor(4))
        assert not torch.equal(other(tensor(4))[-1], expected[-1])
        other.load_state_dict(net.state_dict(), strict=True)
        for copied in (twin, other):
            assert all(torch.equal(a, b) for a, b in zip(copied(tensor(4)), expected, strict=True))
        next(twin.parameters()).zero_()
        assert all(torch.equal(a, b) for a, b in zip(net(tensor(4)), expected, strict=True))


ALSO_ONLY_THE_DEEPEST = {
    "msdnet": ["stages.0.2.own.0.", "stages.1.0.down.1.", "stages.1.0.own.1.", "stages.1.1.scales.1."],
    "ranet": [],
    "fusion_stem": [],
    "chase": [],
}
"""Where MSDNet's finer maps no longer come down to the classifier before: they wait for the deepest."""


@EVERY
def test_gradients_reach_every_parameter_and_some_from_the_deepest_exit_alone(name):
    net = seeded(SMALL[name]).train()
    names, parameters = zip(*net.named_parameters(), strict=True)
    losses = [F.cross_entropy(logits, torch.arange(8)) for logits in net(tensor(8))]
    reached, last = [], len(losses) - 1
    for k, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reached.append({n for n, g in zip(names, gradients, strict=True) if g is not None and bool(g.abs().max() > 0)})
        later = tuple(f"{part}.{j}." for part in ("stages", "heads") for j in range(k + 1, last + 1))
        assert not any(n.startswith(later) for n in reached[k])
    sum(losses).backward()
    assert [n for n, parameter in zip(names, parameters, strict=True) if not parameter.grad.abs().max() > 0] == []
    only = (f"stages.{last}.", f"heads.{last}.", *ALSO_ONLY_THE_DEEPEST[name])
    assert reached[last] - set().union(*reached[:last]) == {n for n in names if n.startswith(only)}


# -- costs -------------------------------------------------------------------------------------------------------------


@EVERY
def test_exit_info_counts_what_formulas_give(name):
    net = small(name)
    behind, alone = naive_exit_macs(net)
    assert [info["macs"] for info in net.exit_info] == behind
    assert [info["macs_alone"] for info in net.exit_info] == alone


@EVERY
def test_exit_info_counts_the_same_while_training_and_leaves_the_mode_and_random_state(name):
    net = seeded(SMALL[name]).train()
    statistics = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert net.exit_info == small(name).exit_info
    assert torch.equal(torch.rand(1), expected)
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, statistics[key]) for key, value in net.state_dict().items())


@EVERY
def test_the_estimator_counts_what_exit_info_tells(name):
    net = small(name)
    model = MultiExitClassifier(net, recipe="trained").fit(IMAGES[:60], LABELS[:60])
    outputs = model.outputs_
    stages = np.cumsum(outputs.stage_costs)
    assert (stages + np.cumsum(outputs.exit_costs)).tolist() == [info["macs"] for info in net.exit_info]
    assert (stages + outputs.exit_costs).tolist() == [info["macs_alone"] for info in net.exit_info]


# -- stage by stage ----------------------------------------------------------------------------------------------------


def in_double(name):
    """In double precision, so that no sample stands so near a threshold that rounding decides."""
    return copy.deepcopy(small(name)).double()


@EVERY
@pytest.mark.parametrize(("seed", "merge"), [(0, True), (1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_samples_that_leave_anywhere_get_the_whole_networks_answers(name, seed, merge):
    rng, net = np.random.default_rng(seed), in_double(name)
    network, x = NativeNetwork(build_model(net, None, "backbone")), tensor(45).double()
    scores = np.stack([answer.scores for answer in record(network, [x])])
    cutoffs = [*(np.quantile(row, rng.uniform(0.4, 0.9)) for row in scores[:-1]), -np.inf]
    batches = list(x.split(int(rng.integers(4, 20))))
    limit = int(rng.choice([0, 100_000, 1 << 30]))
    answers = execute(
        network, batches, leaving_above(cutoffs), batch_size=int(rng.integers(4, 20)), memory_limit=limit,
        merge=merge, keep_logits=True,
    )  # fmt: skip
    exits = (scores > np.array(cutoffs)[:, None]).argmax(axis=0)
    with torch.no_grad():
        logits = torch.stack(net(x)).numpy()[exits, np.arange(45)]
    assert answers.exits.tolist() == exits.tolist()
    assert len(set(exits.tolist())) == network.n_exits
    np.testing.assert_allclose(answers.logits, logits, atol=1e-9)
    assert answers.predictions.tolist() == logits.argmax(axis=1).tolist()


@EVERY
def test_exits_that_are_off_are_passed(name):
    net = in_double(name)
    network, x = NativeNetwork(build_model(net, None, "backbone")), tensor(20).double()
    cutoffs = [np.inf] * (network.n_exits - 1) + [-np.inf]
    answers = execute(network, list(x.split(7)), leaving_above(cutoffs), batch_size=6, keep_logits=True)
    with torch.no_grad():
        np.testing.assert_allclose(answers.logits, net(x)[-1].numpy(), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("msdnet", [[], [0], [0, 1]]),
        ("fusion_stem", [[0], [0, 1], [0, 1]]),
        ("chase", [[0], [0, 1], [0, 1]]),
    ],
)
def test_what_goes_on_has_no_maps_of_scales_that_are_gone(name, gone):
    carried = tensor(6)
    with torch.no_grad():
        for k, stage in enumerate(small(name).stages):
            carried = stage(carried)
            assert [scale for scale, x in enumerate(carried) if x is None] == gone[k]
            parts = take(carried, np.array([4, 1])), take(carried, slice(2, 4))
            whole = join([*parts, take(carried, np.array([5, 0]))])
            for x, y in zip(carried, whole, strict=True):
                assert (x is None and y is None) or torch.equal(x[[4, 1, 2, 3, 5, 0]], y)


@EVERY
def test_the_vector_before_the_last_layer_is_there_for_routers(name):
    net = small(name)
    network, carried = NativeNetwork(build_model(net, None, "backbone")), tensor(4)
    with torch.inference_mode():
        for k, head in enumerate(net.heads):
            carried = network.stage(k, carried)
            answer, _ = network.read(k, carried, logits=True, features=True)
            again = head.linear(torch.from_numpy(answer.features))
            np.testing.assert_allclose(again.numpy(), answer.logits, rtol=1e-4, atol=1e-5)


# -- precision, memory formats, other forms ----------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.2), (torch.float16, 0.05)])
def test_half_precision(name, dtype, share):
    net = small(name)
    halved = copy.deepcopy(net).to(dtype)
    with torch.no_grad():
        answers = halved(tensor(8).to(dtype))
        assert {answer.dtype for answer in answers} == {dtype}
        close(answers, net(tensor(8)), share)


@EVERY
def test_channels_last_changes_no_answer(name):
    net, x = small(name), tensor(8)
    copied = copy.deepcopy(net).to(memory_format=torch.channels_last)
    with torch.no_grad():
        close(copied(x.to(memory_format=torch.channels_last)), net(x))


@pytest.mark.slow
@EVERY
def test_stages_can_be_exported(name):
    net, carried = small(name), tensor(2)
    with torch.no_grad():
        for stage in net.stages:
            program = torch.export.export(stage, (carried,)).module()
            after = stage(carried)
            flat, other = (torch.utils._pytree.tree_leaves(rows) for rows in (after, program(carried)))
            assert [x is None for x in flat] == [x is None for x in other]
            close([x for x in other if x is not None], [x for x in flat if x is not None])
            carried = after


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fusion_stem", "chase"])
def test_a_few_steps_lower_every_exits_loss(name):
    net = seeded(SMALL[name])
    before = copy.deepcopy(net.state_dict())
    recipe = JointRecipe(epochs=4, batch_size=40, lr=0.1)
    model = MultiExitClassifier(net, recipe=recipe).fit(IMAGES[:160], LABELS[:160])
    losses = np.array(model.history_["loss"])
    assert losses.shape == (len(net.heads), 4)
    assert (losses[:, -1] < 0.95 * losses[:, 0]).all()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert isinstance(model._network.model.module, MultiExitBackbone)


@pytest.mark.slow
@EVERY
def test_training_makes_every_exit_good(name):
    recipe = JointRecipe(epochs=10, batch_size=50, lr=0.1)
    model = MultiExitClassifier(seeded(SMALL[name]), recipe=recipe).fit(IMAGES, LABELS)
    X, y = digits()[2]
    outputs = model.record(np.repeat(np.repeat(X, 2, axis=2), 2, axis=3), y)
    assert outputs.accuracies.min() > 0.6


def test_statistics_of_small_networks_matter():
    """The helper of these tests does what it says: batch statistics are those of the images."""
    net = with_statistics(seeded(SMALL["chase"]), tensor(64))
    assert not net.training
    first = next(part for part in net.modules() if isinstance(part, nn.BatchNorm2d))
    assert float((first.running_var - 1).abs().min()) > 0
