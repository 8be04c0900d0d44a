"""Multiply-accumulates against definitions, against published figures, and what cannot be counted by its name."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from adaptexit import CostWarning
from adaptexit.networks.models import TorchModel
from adaptexit.networks.row import Row
from adaptexit.staging.cost import count_macs, counted_macs
from adaptexit.staging.profiling import Scan
from tests.staging.definitions import macs_by_definition
from tests.staging.test_families import EVERY_FAMILY, FAST, images, untrained, words

STEPS, WIDTH, HIDDEN = 5, 6, 4


class Called(nn.Module):
    """A function of the input and one layer."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(self.layer, x)


def of(layer, function=lambda layer, x: layer(x)):
    return Called(layer, function).eval()


def recurrent(kind, **options):
    return of(kind(WIDTH, HIDDEN, batch_first=True, **options))


def packed(layer, x):
    return layer(pack_padded_sequence(x, torch.full((len(x),), STEPS), batch_first=True))[0].data


SEQUENCES = {
    "LSTM": (recurrent(nn.LSTM), 4 * HIDDEN * (WIDTH + HIDDEN)),
    "LSTM, double": (recurrent(nn.LSTM, dtype=torch.float64), 4 * HIDDEN * (WIDTH + HIDDEN)),
    "LSTM, packed": (of(nn.LSTM(WIDTH, HIDDEN, batch_first=True), packed), 4 * HIDDEN * (WIDTH + HIDDEN)),
    "LSTM, both ways, projected": (
        recurrent(nn.LSTM, bidirectional=True, proj_size=3, dtype=torch.float64),
        2 * (4 * HIDDEN * (WIDTH + 3) + 3 * HIDDEN),
    ),
    "LSTM, two layers, both ways": (
        recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        2 * 4 * HIDDEN * (WIDTH + HIDDEN + 2 * HIDDEN + HIDDEN),
    ),
    "GRU": (recurrent(nn.GRU), 3 * HIDDEN * (WIDTH + HIDDEN)),
    "RNN": (recurrent(nn.RNN), HIDDEN * (WIDTH + HIDDEN)),
}
"""Multiply-accumulates of a step."""


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SEQUENCES)
def test_macs_of_recurrent_layers(name, batch):
    net, macs = SEQUENCES[name]
    dtype = next(net.parameters()).dtype
    assert count_macs(net, torch.zeros(batch, STEPS, WIDTH, dtype=dtype)) == STEPS * macs


@pytest.mark.parametrize(
    ("net", "shape", "macs"),
    [
        (of(nn.LSTMCell(6, 4), lambda cell, x: cell(x)[0]), (6,), 4 * 4 * 10),
        (of(nn.Bilinear(6, 7, 5), lambda layer, x: layer(x, torch.ones(len(x), 7))), (6,), 6 * 7 * 5),
        (of(nn.Bilinear(6, 6, 5), lambda layer, x: layer(x, x)), (3, 6), 3 * 6 * 6 * 5),
        (of(nn.Linear(6, 1), lambda layer, x: x @ layer.weight[0]), (6,), 6),
        (of(nn.Linear(6, 1), lambda layer, x: torch.stack([v @ layer.weight[0] for v in x])), (6,), 6),
        (of(nn.Linear(6, 1), lambda layer, x: torch.addmv(x[:, 0], x, layer.weight[0])), (6,), 6),
        (of(nn.Identity(), lambda _, x: torch.addbmm(torch.zeros(3, 3), x, x.mT).expand(len(x), 3, 3)), (3, 4), 36),
        (of(torchvision.ops.DeformConv2d(4, 6, 3, padding=1), lambda layer, x: layer(x, torch.zeros(len(x), 18, 8, 8))),
         (4, 8, 8), 4 * 6 * 9 * 64),
        (of(torchvision.ops.DeformConv2d(4, 6, 3, groups=2), lambda layer, x: layer(x, torch.zeros(len(x), 18, 6, 6))),
         (4, 8, 8), 2 * 6 * 9 * 36),
    ],
    ids=["LSTMCell", "Bilinear", "Bilinear of rows", "mv", "dot", "addmv", "addbmm", "deformed", "deformed groups"],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_operators_that_the_counter_does_not_know(net, shape, macs, batch):
    assert count_macs(net, torch.zeros(batch, *shape)) == macs


def quantized_whole():
    """Convolutions and linear layers in int8."""
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, fuse_modules, get_default_qconfig, prepare

    net = nn.Sequential(
        QuantStub(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.ReLU(),
        nn.Linear(5, 3), DeQuantStub(),
    ).eval()  # fmt: skip
    net.qconfig = get_default_qconfig("x86")
    net = prepare(fuse_modules(net, [["1", "2"], ["4", "5"]]))
    net(torch.randn(2, 4, 8, 8))
    return convert(net)


@pytest.mark.filterwarnings("ignore")  # torch announces that its int8 layers move to another package
def test_macs_of_int8_layers_are_those_of_the_plain_ones():
    from torch.ao.quantization import quantize_dynamic

    def in_int8(layer, **options):
        return quantize_dynamic(of(layer), {type(layer)}, **options)

    sequence, rows = torch.zeros(3, STEPS, WIDTH), torch.zeros(3, WIDTH)
    layers = dict(num_layers=2, bidirectional=True, batch_first=True)
    of_both = HIDDEN * (WIDTH + HIDDEN) + HIDDEN * (2 * HIDDEN + HIDDEN)
    assert count_macs(in_int8(nn.LSTM(WIDTH, HIDDEN, **layers)), sequence) == STEPS * 2 * 4 * of_both
    assert count_macs(in_int8(nn.GRU(WIDTH, HIDDEN, **layers)), sequence) == STEPS * 2 * 3 * of_both
    assert count_macs(in_int8(nn.GRUCell(WIDTH, HIDDEN)), rows) == 3 * HIDDEN * (WIDTH + HIDDEN)
    assert count_macs(in_int8(nn.Linear(WIDTH, 4)), sequence) == STEPS * WIDTH * 4
    assert count_macs(in_int8(nn.Linear(WIDTH, 4), dtype=torch.float16), rows) == WIDTH * 4
    assert count_macs(quantized_whole(), torch.randn(2, 4, 8, 8)) == 2 * 6 * 9 * 36 + 216 * 5 + 5 * 3
    lstm_cell = quantize_dynamic(of(nn.LSTMCell(WIDTH, HIDDEN), lambda cell, x: cell(x)[0]), {nn.LSTMCell})
    assert count_macs(lstm_cell, rows) == 4 * HIDDEN * (WIDTH + HIDDEN)


def test_a_cut_is_looked_for_where_the_work_is_done():
    net = nn.Sequential(nn.LSTM(WIDTH, HIDDEN, batch_first=True), of(nn.Linear(HIDDEN, 2), lambda f, x: f(x[0][:, -1])))
    scan = Scan(net.eval(), torch.zeros(2, STEPS, WIDTH))
    assert scan.macs == STEPS * 4 * HIDDEN * (WIDTH + HIDDEN) + HIDDEN * 2
    assert next(call for call in scan.calls if call.name == "0").works


# -- what cannot be counted --------------------------------------------------------------------------------------------


@torch.library.custom_op("adaptexit_tests::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


class Weighted(nn.Module):
    """A leaf with a matrix."""

    def __init__(self, function, n=6):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(6, n)), function

    def forward(self, x):
        return self.function(x, self.weight)


def in_numpy(x, weight):
    return torch.from_numpy(x.numpy() @ weight.detach().numpy())


@pytest.mark.parametrize(
    ("function", "operator"),
    [(in_numpy, ""), (product, " in adaptexit_tests.product")],
    ids=["outside torch", "custom"],
)
def test_a_leaf_that_cannot_be_counted_is_named(function, operator):
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Weighted(function), nn.ReLU()))
    with pytest.warns(CostWarning, match=rf"of 1.0 \(Weighted\){operator} cannot be counted") as caught:
        macs = count_macs(net, torch.zeros(2, 6), roots=[net])
    assert macs == 36
    (warning,) = caught
    assert warning.filename == __file__


def test_a_cost_that_leaves_something_out_says_so_and_other_costs_do_not():
    net = nn.Sequential(nn.Linear(6, 6), Weighted(in_numpy, 3)).eval()
    network = Row([TorchModel(nn.Linear(6, 3).eval(), None, "small"), TorchModel(net, None, "large")])
    for cost in ("auto", "macs"):
        with pytest.warns(CostWarning, match=r"of 1 \(Weighted\) cannot be counted"):
            network.costs(torch.zeros(2, 6), cost)
    for cost in ("latency", [1.0, 2.0]):
        network.costs(torch.zeros(2, 6), cost)


@pytest.mark.parametrize(
    "leaf",
    [
        nn.LayerNorm([6, 6]),
        of(nn.Embedding(10, 6), lambda layer, x: layer(x.long())),
        Weighted(lambda x, weight: x * weight),
        Weighted(lambda x, weight: x + weight[None].expand(len(x), 6, 6)),
        Weighted(lambda x, weight: x + weight[torch.arange(6)]),
        Weighted(lambda x, weight: torch.cat([x, weight[None].expand(len(x), -1, -1)], 1)),
        Weighted(lambda x, weight: x @ weight.half().float()),
        Weighted(lambda x, weight: x @ nn.functional.softmax(weight, dim=0)),
    ],
    ids=["norm", "embedding", "scale", "positions", "table", "tokens", "cast", "softmax"],
)
def test_what_multiplies_no_matrices_or_is_counted_is_not_named(leaf):
    assert counted_macs(leaf, torch.zeros(2, 6, 6))[1] == []


def n_global_hooks():
    return len(nn.modules.module._global_forward_pre_hooks) + len(nn.modules.module._global_forward_hooks)


def test_counting_leaves_no_hooks():
    before = n_global_hooks()
    count_macs(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(2, 2), torch.zeros(1, 3))
    assert n_global_hooks() == before


# -- families ----------------------------------------------------------------------------------------------------------


def assert_counted(name):
    model, x = untrained(name), images(name, 1)
    assert count_macs(model, x) == pytest.approx(macs_by_definition(model, x), rel=1e-6)


@pytest.mark.parametrize("name", FAST)
def test_macs_are_those_of_the_definitions(name):
    assert_counted(name)


@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_macs_are_those_of_the_definitions_in_every_family(name):
    assert_counted(name)


PUBLISHED = {
    "resnet50": 4.1e9, "vgg16": 15.5e9, "mixer_b16_224": 12.6e9, "vit_base_patch16_224": 17.6e9,
    "swin_tiny_patch4_window7_224": 4.5e9, "convnext_small": 8.7e9, "mobilevit_s": 2.0e9, "cait_xxs24_224": 2.5e9,
    "resmlp_12_224": 3.0e9, "sequencer2d_s": 8.4e9,
}  # fmt: skip
"""As the papers print them."""

DOCUMENTED = words("""
    alexnet vgg16 resnet50 densenet121 googlenet inception_v3 squeezenet1_1 shufflenet_v2_x1_0 mobilenet_v2
    mobilenet_v3_small mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t swin_v2_t vit_b_16 maxvit_t
""")
"""torchvision networks, whose weights say how many billions they take."""

SMALL = ("squeezenet1_1", "mobilenet_v2")


@pytest.mark.slow
@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_those_of_the_papers(name):
    model = timm.create_model(name).eval()
    macs = count_macs(model, torch.zeros(1, *model.default_cfg["input_size"]))
    assert macs == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in DOCUMENTED]
)
def test_macs_are_those_that_torchvision_documents(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval().to("meta")
    side = weights.transforms().crop_size[0]
    macs = count_macs(model, torch.zeros(1, 3, side, side, device="meta"))
    assert macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=0.01)
