import time

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from adaptexit.backbones import resnet20_cifar, resnet56_cifar
from adaptexit.staging.cost import count_macs
from adaptexit.staging.cuts import CutTable, auto_cuts, check_names, list_cuts, propose_cuts, unwrapped

WIDTH = 8


class Block(nn.Module):
    """A residual block of 2 * WIDTH² MACs."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.b(self.act(self.a(x)))


class Net(nn.Module):
    """Two stages of blocks between a stem and a head; ``spare`` is never called, ``act`` twice."""

    def __init__(self, *depths):
        super().__init__()
        self.stem, self.act = nn.Linear(4, WIDTH), nn.ReLU()
        self.layers = nn.ModuleList(nn.Sequential(*(Block() for _ in range(depth))) for depth in depths)
        self.norm, self.spare = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.act(self.norm(x)))


STEM, BLOCK, HEAD = 4 * WIDTH, 2 * WIDTH**2, 3 * WIDTH


class Wired(nn.Module):
    """Named parts, called as a function says."""

    def __init__(self, wiring, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


class Fork(nn.Module):
    """One tensor to several."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(4, 4), form

    def forward(self, x):
        return self.form(self.layer(x))


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x + 1


def x_of(n=1, width=4):
    return torch.ones(n, width)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("n", [1, 3])
def test_structural_cuts_of_a_net_by_formula(n):
    table = list_cuts(Net(2, 1), x_of(n), repeats=1)
    assert table.names == ["stem", "layers.0.0", "layers.0", "layers.1"]
    assert [p.macs for p in table] == [STEM, STEM + BLOCK, STEM + 2 * BLOCK, STEM + 3 * BLOCK]
    assert table.macs == STEM + 3 * BLOCK + HEAD == count_macs(Net(2, 1).eval(), x_of(n))
    assert [p.relative_macs for p in table] == [p.macs / table.macs for p in table]
    assert all(p.shape == (WIDTH,) and p.is_tensor and p.is_narrow for p in table)


def test_every_module_called_once_is_listed_but_the_last():
    names = list_cuts(Net(1), x_of(), every=True, repeats=1).names
    assert names == ["stem", *(f"layers.0.0.{part}" for part in ("a", "act", "b")), "layers.0.0", "layers.0", "norm"]


def test_a_branch_beside_a_residual_is_not_narrow():
    table = list_cuts(Net(1), x_of(), every=True, repeats=1)
    assert [p.name for p in table if not p.is_narrow] == ["layers.0.0.a", "layers.0.0.act", "layers.0.0.b"]


def test_an_input_that_is_read_again_is_carried():
    again = Wired(lambda net, x: net.head(net.body(x) + x), body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    anew = Wired(lambda net, x: net.head(net.body(x)), body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    assert [list_cuts(net, x_of(), every=True, repeats=1)[0].is_narrow for net in (again, anew)] == [False, True]


def test_a_view_of_the_models_output_is_the_models_output():
    net = Wired(lambda net, x: net.head(net.body(x)).reshape(-1), body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    assert list_cuts(net, x_of(), every=True, repeats=1).names == ["body"]
    part = Wired(lambda net, x: net.head(net.body(x))[:, 0], body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    assert list_cuts(part, x_of(), every=True, repeats=1).names == ["body", "head"]


def test_a_module_called_under_two_names_is_left_out():
    same = nn.Linear(4, 4)
    net = Wired(lambda net, x: net.head(net.b(net.a(x))), a=same, b=same, c=same, head=nn.Linear(4, 2))
    assert list_cuts(net, x_of(), every=True, repeats=1).names == []
    net.wiring = lambda net, x: net.head(net.c(x))
    assert list_cuts(net, x_of(), every=True, repeats=1).names == ["a"]


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (lambda x: [x, (x.reshape(-1, 2), x.T.clone()), {"n": 3}], [(4,), ((2, 2), (4, 3)), {"n": "int"}]),
        (lambda x: [x.sum()], [()]),
    ],
)
def test_nested_outputs_are_described(form, shape):
    net = Wired(lambda net, x: net.head(x * net.fork(x)[0]), fork=Fork(form), head=nn.Linear(4, 2))
    point = list_cuts(net, x_of(3), every=True, repeats=1)[-1]
    assert (point.name, point.shape, point.is_tensor) == ("fork", shape, False)


def test_one_tensor_beside_numbers_can_be_read():
    net = Wired(lambda net, x: net.head(net.fork(x)[0]), fork=Fork(lambda x: (x + 1, [2, 2])), head=nn.Linear(4, 2))
    point = list_cuts(net, x_of(3), every=True, repeats=1)[-1]
    assert (point.name, point.shape, point.is_tensor) == ("fork", ((4,), ["int", "int"]), True)


def test_attention_is_counted_as_in_count_macs():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=16, batch_first=True)
    net = nn.Sequential(layer, nn.Linear(WIDTH, 4)).eval()
    x = torch.ones(2, 5, WIDTH)
    table = list_cuts(net, x, repeats=1)
    assert table.names == ["0"]
    assert (table[0].macs, table.macs) == (count_macs(layer, x), count_macs(net, x))
    assert table[0].macs == 4 * 5 * WIDTH**2 + 2 * 25 * WIDTH + 2 * 5 * WIDTH * 16


def test_a_parameter_may_be_passed_to_a_module():
    """Cait hands a view of its class token to a block, where torch's module tracker looks for a gradient function."""
    net = Wired(lambda net, x: net.head(net.body(net.token.expand(len(x), -1)) + x))
    net.token, net.body, net.head = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 4), nn.Linear(4, 2)
    assert list_cuts(net, x_of(2), every=True, repeats=1).names == ["body"]
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(fails):
    net = Net(1).train()
    net.norm.eval()
    net.spare.requires_grad_(False)
    handle = net.stem.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError) as caught:
            list_cuts(net, x_of(1, 5))
        assert "run on an example of shape (1, 5)" in caught.value.__notes__[0]
    else:
        list_cuts(net, x_of(), repeats=1)
        auto_cuts(net, x_of())
    assert hooks(net) == 1
    handle.remove()
    assert [part.training for part in (net, net.norm, net.stem)] == [True, False, True]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["spare.weight", "spare.bias"]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_model_runs_in_evaluation_mode_and_outside_inference_mode():
    modes = []
    net = Net(1).train()
    net.norm.register_forward_hook(lambda part, *_: modes.append((part.training, torch.is_inference_mode_enabled())))
    with torch.inference_mode():
        list_cuts(net, x_of(), repeats=2)
    assert modes == [(False, False)] * 4  # counted, warmed up, timed twice


def test_latency_is_cumulative_seconds_a_sample():
    net = Wired(lambda net, x: net.head(net.b(net.a(x))), a=Slow(0.004), b=Slow(0.012), head=nn.Linear(4, 2))
    for n in (1, 4):
        table = list_cuts(net, x_of(n), every=True, repeats=3)
        a, b = (p.latency_s for p in table)
        assert 0.004 / n < a < 0.012 / n < 0.016 / n < b < table.latency_s < 0.04 / n


def test_latency_is_the_median_after_a_warm_up(monkeypatch):
    waits = iter([0.0, 0.3, 0.001, 0.002, 0.2])  # counted, warm-up, then three timed runs
    net = Wired(lambda net, x: net.head(net.a(x)), a=Slow(0.0), head=nn.Linear(4, 2))
    net.a.register_forward_pre_hook(lambda part, _: setattr(part, "seconds", next(waits)))
    (point,) = list_cuts(net, x_of(), every=True, repeats=3)
    assert 0.002 < point.latency_s < 0.05 < 0.2 / 3


def test_a_table_reads_as_a_sequence_a_text_and_a_frame():
    table = list_cuts(Net(2, 1), x_of(), repeats=1)
    assert isinstance(table, CutTable)
    assert (len(table), table[-1].name, [p.name for p in table[1:3]]) == (4, "layers.1", ["layers.0.0", "layers.0"])
    lines = str(table).splitlines()
    assert repr(table) == str(table)
    assert [line.split()[0] for line in lines] == ["cut", *table.names, "whole"]
    assert len({line.index("(8,)") for line in lines[1:-1]}) == 1
    assert f"{table[2].relative_macs:.1%}" in lines[3]
    frame = table.to_frame()
    assert list(frame["name"]) == table.names
    assert list(frame["macs"]) == [p.macs for p in table]
    assert {"shape", "relative_macs", "latency_s", "is_tensor", "is_narrow"} <= set(frame.columns)
    assert list(list_cuts(nn.Linear(4, 2), x_of(), repeats=1).to_frame().columns) == list(frame.columns)


def test_cuts_of_resnet18():
    table = list_cuts("resnet18", repeats=1)
    assert table.names == ["act1", *(f"layer{i}{j}" for i in range(1, 5) for j in (".0", ""))]
    stages = [p for p in table if p.name in ("layer1", "layer2", "layer3")]
    assert [p.shape for p in stages] == [(64, 56, 56), (128, 28, 28), (256, 14, 14)]
    assert [p.relative_macs for p in stages] == pytest.approx([0.32, 0.547, 0.773], abs=1e-3)


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: "test_resnet", "layer1", (32, 40, 40)),
        (lambda: timm.create_model("test_resnet").double(), "layer1", (32, 40, 40)),
        (lambda: torchvision.models.squeezenet1_1(), "features.0", (64, 111, 111)),
        (lambda: torchvision.models.inception_v3(init_weights=False), "Conv2d_1a_3x3", (32, 149, 149)),
        (lambda: torchvision.models.VisionTransformer(64, 32, 2, 2, 8, 8), "encoder.layers.encoder_layer_0", (5, 8)),
    ],
)
def test_inputs_of_timm_and_torchvision_models_are_known(make, name, shape):
    table = list_cuts(make(), every=True, repeats=1)
    assert next(p.shape for p in table if p.name == name) == shape


def test_bad_arguments_of_list_cuts():
    with pytest.raises(ValueError, match=r"example must be a batch of inputs for Net.*Give example="):
        list_cuts(Net(1))
    with pytest.raises(ValueError, match=r"example must be a batch.*got a tensor of shape \(0, 4\)"):
        list_cuts(Net(1), x_of(0))
    with pytest.raises(ValueError, match=r"example must be a batch.*got ndarray"):
        list_cuts(Net(1), np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"got 'resnet1x8'. Near it: .*resnet18"):
        list_cuts("resnet1x8")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got 3"):
        list_cuts(3, x_of())
    for repeats in (0, 1.0, True):
        with pytest.raises(ValueError, match="repeats must be a whole number, at least 1"):
            list_cuts(Net(1), x_of(), repeats=repeats)


def test_wrappers_are_looked_through():
    net = Net(1)
    compiled = torch.compile(net, backend="eager")
    for wrapper in (net, nn.DataParallel(net), compiled, nn.DataParallel(compiled)):
        assert unwrapped(wrapper) is net
    assert list_cuts(compiled, x_of(), repeats=1).names == list_cuts(net, x_of(), repeats=1).names
    assert check_names(nn.DataParallel(net), ["layers.0"]) == ["layers.0"]


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_is_refused_as_a_model_and_is_one_piece_inside_one():
    script = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x_of())
    for call in (unwrapped, lambda net: list_cuts(net, x_of()), lambda net: auto_cuts(net, x_of())):
        with pytest.raises(TypeError, match="got TorchScript"):
            call(script)
    net = nn.Sequential(nn.Linear(4, 4), script, nn.Linear(4, 4), nn.Linear(4, 2))
    assert list_cuts(net, x_of(), every=True, repeats=1).names == ["0", "2"]


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet18", ["layer1", "layer2", "layer3"]),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            ["layers.0", "layers.2.blocks.1", "layers.2"],  # stage 2: half the MACs
            marks=pytest.mark.slow,
        ),
        ("mobilenetv3_small_050", None),
        ("test_vit", None),
    ],
)
def test_automatic_cuts_of_timm_models(name, cuts):
    names = auto_cuts(name)
    assert cuts is None or names == cuts
    shares = {p.name: p for p in list_cuts(name, repeats=1)}
    shares_of_cuts = [shares[name].relative_macs for name in names]
    assert shares_of_cuts == sorted(set(shares_of_cuts))
    assert len(shares_of_cuts) == 3
    assert np.abs(np.array(shares_of_cuts) - [0.25, 0.5, 0.75]).max() < 0.13
    assert all(shares[name].is_tensor and shares[name].is_narrow for name in names)


def test_automatic_cuts_of_cifar_resnets():
    x = torch.zeros(2, 3, 32, 32)
    assert auto_cuts(resnet56_cifar(), x, n=2) == auto_cuts(resnet20_cifar(), x, n=2) == ["layer1", "layer2"]
    first, nearest, coarse = propose_cuts(resnet56_cifar(), x, n=3)
    assert (first[0], first[2]) == ("layer1", "layer2")
    assert first[1].startswith("layer2.")  # halfway, which no stage comes near
    assert len(set(nearest)) == 3
    assert not {"layer1", "layer2"} & set(nearest)
    assert coarse == ["layer1", "layer2"]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_automatic_cuts_are_even(n):
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(40)))
    assert auto_cuts(net, x_of(1, WIDTH), n) == [str(round(40 * k / (n + 1)) - 1) for k in range(1, n + 1)]


def test_cuts_lie_apart():
    net = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 1), nn.Linear(1, 60))
    assert [p.relative_macs for p in list_cuts(net, x_of(), repeats=1)] == [0.4, 0.5]
    assert auto_cuts(net, x_of(), 2) == ["0"]


def test_stages_come_before_blocks_only_where_they_are_near():
    even, uneven = Net(4, 4, 4, 4), Net(1, 1, 13, 1)
    assert auto_cuts(even, x_of()) == ["layers.0", "layers.1", "layers.2"]
    assert auto_cuts(uneven, x_of(), 1) == ["layers.2.5"]
    assert ["layers.1", "layers.2"] in [choice[-2:] for choice in propose_cuts(uneven, x_of())]


def test_feature_info_says_which_are_the_stages_and_may_err():
    net = Net(4, 4, 4, 4)
    assert auto_cuts(net, x_of(), 1) == ["layers.1"]
    net.feature_info = [{"module": "layers.1.2"}, {"module": "blocks.7"}, {"module": "layers"}, {"num_chs": 3}]
    assert auto_cuts(net, x_of(), 1) == ["layers.1.2"]
    net.feature_info = [{"module": "blocks.7"}]
    assert auto_cuts(net, x_of(), 1) == ["layers.1"]


def test_cuts_at_the_very_ends_and_more_than_there_are_are_not_proposed():
    net = nn.Sequential(nn.Linear(4, 1), *(nn.Linear(n, 64) for n in (1, 64, 64)), nn.Linear(64, 1))
    assert list_cuts(net, x_of(), repeats=1).names == ["0", "1", "2", "3"]
    for n in (2, 5, 2000):
        assert auto_cuts(net, x_of(), n) == ["2"]


def test_a_tensor_that_stands_alone_is_preferred():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x):
            a = self.layers[1](b := self.layers[0](x))
            return self.head(self.layers[3](self.layers[2](a + b) * b))

    assert [p.is_narrow for p in list_cuts(Skipping(), x_of(1, WIDTH), repeats=1)] == [True, False, False, True]
    assert auto_cuts(Skipping(), x_of(1, WIDTH), 1) == ["layers.0"]  # layers.1 is nearer


def test_of_names_after_the_same_work_the_tensor_and_the_outer_one_stay():
    net = Wired(
        lambda net, x: net.head(net.norm(net.fork(x)[0])), fork=Fork(lambda x: [x, x + 1]), norm=nn.LayerNorm(4)
    )
    net.head = nn.Linear(4, 2)
    assert list_cuts(net, x_of(), repeats=1).names == ["norm"]
    net = Wired(lambda net, x: net.head(net.acts[0](net.body(x))), body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    net.acts = nn.ModuleList([nn.Tanh()])
    assert list_cuts(net, x_of(), repeats=1).names == ["body"]


def test_no_automatic_cuts():
    net = Wired(lambda net, x: net.head(net.fork(x)[0]), fork=Fork(lambda x: (x, x)), head=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"cuts of Wired.*list_cuts\(model, example, every=True\).*stages yourself"):
        auto_cuts(net, x_of())
    with pytest.raises(ValueError, match="cannot be chosen"):
        auto_cuts(nn.Sequential(nn.ReLU(), nn.Tanh()), x_of())
    for n in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=f"n must be a whole number, at least 1; got {n}"):
            auto_cuts(Net(1), x_of(), n)


def test_names_that_are_right():
    net = Net(2, 1)
    net.other = net.layers[1]
    assert check_names(net, ("layers.1", "layers.0.1.a")) == ["layers.1", "layers.0.1.a"]
    assert check_names(net, ["other", "stem"]) == ["layers.1", "stem"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "at least one module; got none"),
        ("layer1", TypeError, r"list of module names; got 'layer1'. Write \['layer1'\]"),
        (3, TypeError, "list of module names; got 3"),
        (["layer1", 2], TypeError, r"got 2 of type int"),
        (["layer1", "layer1"], ValueError, "got 'layer1' twice"),
        (["layer1", "alias"], ValueError, "got 'alias' also as 'layer1'"),
        (["layer5"], ValueError, "'layer5' .near it: 'layer1', 'layer2', 'layer3', 'layer4'"),
        (["layer3.7"], ValueError, "'layer3.7' .near it: 'layer3.0', 'layer3.1'"),
        (["layer3.1.conv7"], ValueError, r"near it: 'layer3.1.conv[12]', 'layer3.1.conv[12]'"),
        (["layr2", "layer1", "lyer3"], ValueError, "'layr2' .*'layer2'.*; 'lyer3' .*'layer3'"),
        (["qqqqqqqq"], ValueError, "ResNet; it has no 'qqqqqqqq' .nothing near it; see list_cuts"),
        ([""], ValueError, "it has no ''"),
    ],
)
def test_names_that_are_wrong(resnet, names, error, message):
    with pytest.raises(error, match=message):
        check_names(resnet, names)


def test_the_last_blocks_are_near_a_number_that_is_too_high():
    with pytest.raises(ValueError, match=r"'3.99' .near it: '3.9', '3.10', '3.11'"):
        check_names(nn.Sequential(*(nn.Sequential(*(Block() for _ in range(12))) for _ in range(4))), ["3.99"])


@pytest.fixture(scope="module")
def resnet():
    net = torchvision.models.resnet18()
    net.alias = net.layer1
    return net
