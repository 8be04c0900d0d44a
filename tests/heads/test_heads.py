import copy
import dataclasses
import functools
import json
import pickle
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptexit.core.answer import Answer
from adaptexit.heads import (
    HEADS,
    NAMED,
    ConvHead,
    GridHead,
    Head,
    HeadName,
    MLPHead,
    PrototypeHead,
    RefinedPrototypeHead,
    ResidualHead,
    ScalarConfidenceHead,
    WideHead,
    make_head,
)
from adaptexit.heads.base import WrappedHead
from adaptexit.heads.by_name import FOR_MAPS, FOR_VECTORS
from adaptexit.heads.layout import FeatureSpec, pooled
from adaptexit.staging.cost import count_macs

N_CLASSES = 3
MAP = FeatureSpec((6, 4, 5), "NCHW")
WIDE = FeatureSpec((40, 3, 3), "NCHW")  # its second moment is larger than itself
SPECS = [
    MAP,
    FeatureSpec((4, 5, 6), "NHWC"),
    FeatureSpec((22, 6), "NLC", 2, (4, 5)),
    FeatureSpec((6, 20), "NCL", grid=(4, 5)),
    FeatureSpec((6,), "NC"),
    WIDE,
]


def awake(head, seed=0):
    """The head with every parameter random, also those that start at zero, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / weight.shape[-1] ** 0.5)
    return head.eval()


def features(spec, n=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *spec.shape, generator=generator, dtype=torch.float64).to(dtype)


def outputs(answer):
    return [tensor for tensor in (answer.logits, answer.confidence_logits) if tensor is not None]


def assert_same(one, other, **tolerance):
    assert len(outputs(one)) == len(outputs(other))
    for left, right in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


# ---- equations 1-4


def prototype_logits(head, feature):
    """Equations 1-4 of CalexNet in loops, the sum over the positions divided by their number."""
    weight = head.prototypes.weight.tolist()
    classes, confidences = [], []
    for sample in feature.tolist():
        aggregates = []
        for prototype in weight:
            total, n_positions = 0.0, 0
            for u in range(feature.shape[2]):
                for v in range(feature.shape[3]):
                    response = sum(prototype[c] * sample[c][u][v] for c in range(feature.shape[1]))
                    total += response * response
                    n_positions += 1
            aggregates.append(total / n_positions)
        for layer, rows in ((head.classification, classes), (head.confidence, confidences)):
            rows.append(
                [
                    sum(w * m for w, m in zip(row, aggregates, strict=True)) + bias
                    for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
                ]
            )
    return torch.tensor(classes).double(), torch.tensor(confidences).double()


@pytest.mark.parametrize("spec", [MAP, WIDE])
def test_prototype_head_by_its_equations(spec):
    head = awake(PrototypeHead(spec, N_CLASSES, n_prototypes=5).double())
    x = features(spec, 3, torch.float64)
    classes, confidences = prototype_logits(head, x)
    for answer in (head(x), head.answer(head.reduce(x))):
        torch.testing.assert_close(answer.logits, classes, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(answer.confidence_logits, confidences, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(classes, confidences)


def test_refined_head_by_its_equation():
    head = awake(RefinedPrototypeHead(MAP, N_CLASSES, n_prototypes=4).double())
    x = features(MAP, 3, torch.float64)
    responses = torch.stack([(x * w[:, None, None]).sum(dim=1) for w in head.prototypes.weight], dim=1)
    sums = responses.square().sum(dim=(2, 3))
    parameters = dict(head.refine.named_parameters())
    scaled = (sums - sums.mean(1, keepdim=True)) / sums.std(1, keepdim=True, correction=0)
    hidden = F.gelu(
        (scaled * parameters["0.weight"] + parameters["0.bias"]) @ parameters["1.weight"].T + parameters["1.bias"]
    )
    refined = hidden @ parameters["4.weight"].T + parameters["4.bias"]
    assert hidden.shape == (3, 8)
    for answer in (head(x), head.answer(head.reduce(x))):
        torch.testing.assert_close(answer.logits, refined @ head.classification.weight.T + head.classification.bias)
        torch.testing.assert_close(answer.confidence_logits, refined @ head.confidence.weight.T + head.confidence.bias)


def test_refined_head_does_not_see_the_scale_of_features():
    head = awake(RefinedPrototypeHead(MAP, N_CLASSES).double())
    x = features(MAP, dtype=torch.float64)
    for scale in (0.03, 100.0):
        assert_same(head(scale * x), head(x), rtol=1e-3, atol=1e-4)


def test_dropout_of_the_refined_head_is_a_tenth_between_its_layers():
    assert [type(layer) for layer in RefinedPrototypeHead(MAP, N_CLASSES).refine] == [
        nn.LayerNorm,
        nn.Linear,
        nn.GELU,
        nn.Dropout,
        nn.Linear,
    ]
    assert RefinedPrototypeHead(MAP, N_CLASSES).refine[3].p == 0.1


# ---- reduce and answer


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_forward_equals_answer_of_reduce(name, spec, dtype, tolerance):
    head = awake(make_head(name, spec, N_CLASSES).to(dtype))
    x = 3 * features(spec, dtype=dtype) + 1
    reduced = head.reduce(x)
    assert len(reduced) == len(x)
    assert not reduced.requires_grad
    assert_same(head(x), head.answer(reduced), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("spec", [MAP, WIDE])
def test_a_sample_does_not_depend_on_its_batch(name, spec):
    head, x = awake(make_head(name, spec, N_CLASSES)), features(spec)
    some = torch.tensor([5, 1])
    together = head(x)
    expected = Answer(*(tensor[some] for tensor in outputs(together)))
    assert_same(head(x[some]), expected)
    assert_same(head.answer(head.reduce(x)[some]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (FeatureSpec((6, 2, 2), "NCHW"), (6 * 7 // 2,)),
        (FeatureSpec((7, 2, 2), "NCHW"), (7, 4)),  # both have 28 numbers
        (FeatureSpec((8, 2, 2), "NCHW"), (8, 4)),
        (FeatureSpec((6, 6), "NLC", 2, (2, 2)), (6 * 7 // 2,)),
        (FeatureSpec((6,), "NC"), (6, 1)),
    ],
)
@pytest.mark.parametrize("head", [PrototypeHead, RefinedPrototypeHead])
def test_the_second_moment_is_stored_where_it_is_smaller(head, spec, shape):
    assert head(spec, N_CLASSES).reduce(features(spec)).shape == (7, *shape)


def test_the_second_moment_holds_each_product_once():
    x = torch.tensor([[[[1.0, 3.0, 1.0, 1.0]], [[2.0, -1.0, 0.0, 0.0]]]])
    reduced = PrototypeHead(FeatureSpec((2, 1, 4), "NCHW"), N_CLASSES).reduce(x)
    assert torch.equal(reduced, torch.tensor([[(1 + 9 + 1 + 1) / 4, 2 * (2 - 3) / 4, (4 + 1) / 4]]))


def test_what_the_other_heads_store():
    x = features(SPECS[2])
    assert torch.equal(make_head("mlp", SPECS[2], N_CLASSES).reduce(x), pooled(x, SPECS[2]))
    reduced = make_head("conv", SPECS[2], N_CLASSES).reduce(x)
    assert reduced.shape == (7, 6, 4, 5)
    assert reduced.is_contiguous()
    assert torch.equal(reduced[:, :, 1, 2], x[:, 2 + 5 + 2])


@pytest.mark.parametrize("name", HEADS)
def test_layouts_of_the_same_vectors_give_the_same_answer(name):
    x = features(MAP, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    front = torch.full((7, 2, 6), 50.0, dtype=torch.float64)
    forms = [x, x.permute(0, 2, 3, 1), torch.cat([front, tokens], dim=1), x.flatten(2)]
    expected = awake(make_head(name, MAP, N_CLASSES).double())(x)
    for spec, form in zip(SPECS[:4], forms, strict=True):
        head = awake(make_head(name, spec, N_CLASSES).double())
        assert_same(head(form), expected)
        assert_same(head.answer(head.reduce(form)), expected)
    assert_same(awake(make_head(name, MAP, N_CLASSES).double())(x.to(memory_format=torch.channels_last)), expected)


# ---- the pieces


def test_mlp_head_by_its_layers():
    head = awake(MLPHead(MAP, N_CLASSES, hidden=9).double())
    x = features(MAP, dtype=torch.float64)
    norm, first, _, _, last = head.net
    means = torch.stack([x[:, :, i, j] for i in range(4) for j in range(5)]).mean(dim=0)
    scaled = F.layer_norm(means, (6,), norm.weight, norm.bias)
    answer = head(x)
    torch.testing.assert_close(answer.logits, last(F.gelu(first(scaled))))
    assert answer.confidence_logits is None
    assert first.out_features == 9


@pytest.mark.parametrize(
    ("channels", "of_maps", "of_vectors"), [(6, 64, 16), (100, 100, 25), (2048, 256, 512), (64, 64, 16)]
)
def test_default_width_of_the_mlp_head(channels, of_maps, of_vectors):
    assert MLPHead(FeatureSpec((channels, 3, 3), "NCHW"), N_CLASSES).net[1].out_features == of_maps
    assert MLPHead(FeatureSpec((9, channels), "NLC"), N_CLASSES).net[1].out_features == of_maps
    assert MLPHead(FeatureSpec((channels,), "NC"), N_CLASSES).net[1].out_features == of_vectors


def test_dropout_of_the_mlp_head_acts_in_training_alone():
    head, x = awake(MLPHead(MAP, N_CLASSES, dropout=0.5)), features(MAP)
    assert torch.equal(head(x).logits, head(x).logits)
    head.train()
    with torch.random.fork_rng():
        assert not torch.equal(head(x).logits, head(x).logits)


def test_conv_head_is_msdnets_classifier_on_its_maps():
    spec = FeatureSpec((10, 8, 8), "NCHW")
    head, x = awake(ConvHead(spec, N_CLASSES)), features(spec)
    theirs = nn.Sequential(
        nn.Conv2d(10, 128, 3, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, N_CLASSES),
    ).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), head.state_dict().values(), strict=True)))
    torch.testing.assert_close(head(x).logits, theirs(x))


@pytest.mark.parametrize(
    ("size", "kernels", "strides", "sizes"),
    [
        ((8, 8), (3, 3), (2, 2), [16, 4]),
        ((7, 5), (3, 3), (2, 2), [12, 4]),
        ((2, 2), (3, 1), (2, 1), [1, 1]),
        ((1, 1), (1, 1), (1, 1), [1, 1]),
        ((1, 6), (3, 3), (1, 1), [6, 6]),
        ((2, 6), (3, 3), (2, 1), [3, 3]),
    ],
)
def test_conv_head_on_small_maps(size, kernels, strides, sizes):
    spec = FeatureSpec((6, *size), "NCHW")
    head = awake(ConvHead(spec, N_CLASSES, channels=4))
    convolutions = [layer for layer in head.convolutions if isinstance(layer, nn.Conv2d)]
    assert [c.kernel_size for c in convolutions] == [(k, k) for k in kernels]
    assert [c.stride for c in convolutions] == [(s, s) for s in strides]
    macs = 6 * 4 * kernels[0] ** 2 * sizes[0] + 4 * 4 * kernels[1] ** 2 * sizes[1] + 4 * N_CLASSES
    assert count_macs(head, features(spec)) == macs
    assert torch.isfinite(head(features(spec)).logits).all()


def test_conv_head_needs_a_grid():
    with pytest.raises(ValueError, match="tokens must lie on a grid"):
        make_head("conv", FeatureSpec((11, 6), "NLC", 1), N_CLASSES)


# ---- costs


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_by_formula(spec, batch):
    x, d, n = features(spec, batch), spec.channels, spec.n_positions
    k = 11
    assert count_macs(PrototypeHead(spec, N_CLASSES, k), x) == k * d * n + 2 * k * N_CLASSES
    assert count_macs(RefinedPrototypeHead(spec, N_CLASSES, k), x) == k * d * n + 4 * k * k + 2 * k * N_CLASSES
    assert count_macs(MLPHead(spec, N_CLASSES, hidden=k).eval(), x) == d * k + k * N_CLASSES


@pytest.mark.parametrize(("size", "n_positions"), [(None, 9 * 5), (4, 4 * 4), (20, 9 * 5)])
def test_macs_of_a_residual_block_on_a_whole_map_and_on_a_pooled_one(size, n_positions):
    spec = FeatureSpec((6, 9, 5), "NCHW")
    head = ResidualHead(spec, N_CLASSES, size).eval()
    # A padded convolution is counted at all its taps, also beside the border.
    assert count_macs(head, features(spec, 2)) == 2 * 9 * 6 * 6 * n_positions + 2 * 6 * N_CLASSES


# ---- training


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("spec", [MAP, WIDE])
@pytest.mark.parametrize("reduced", [True, False])
def test_every_parameter_gets_a_gradient(name, spec, reduced):
    head = awake(make_head(name, spec, N_CLASSES)).train()
    x = features(spec)
    answer = head.answer(head.reduce(x)) if reduced else head(x)
    sum((tensor * torch.arange(1.0, 1 + tensor.numel()).view_as(tensor)).sum() for tensor in outputs(answer)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in head.parameters())


@pytest.mark.parametrize("name", ["prototype", "refined_prototype"])
@pytest.mark.parametrize("spec", [MAP, WIDE])
def test_both_ways_have_the_same_gradients(name, spec):
    gradients = []
    for reduced in (True, False):
        head = awake(make_head(name, spec, N_CLASSES).double())
        x = features(spec, dtype=torch.float64)
        answer = head.answer(head.reduce(x)) if reduced else head(x)
        (answer.logits.square().sum() + answer.confidence_logits.sum()).backward()
        gradients.append([weight.grad for weight in head.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_the_feature(name):
    x = features(MAP).requires_grad_()
    awake(make_head(name, MAP, N_CLASSES))(x).logits.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("head", [PrototypeHead, RefinedPrototypeHead])
def test_confidence_parameters_change_no_class_logits(head):
    module, x = awake(head(MAP, N_CLASSES)), features(MAP)
    before = module(x)
    assert module.confidence_parameters() == [module.confidence.weight, module.confidence.bias]
    with torch.no_grad():
        for weight in module.confidence_parameters():
            weight.add_(1.0)
    after = module(x)
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(after.confidence_logits, before.confidence_logits)


# ---- one confidence for all classes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["prototype", "refined_prototype", "residual"])
def test_a_scalar_confidence_is_the_mean_and_changes_nothing_else(name, spec):
    head, x = awake(ScalarConfidenceHead(spec, N_CLASSES, name)), features(spec)
    inner, answer = head.inner(x), head(x)
    assert torch.equal(answer.logits, inner.logits)
    torch.testing.assert_close(answer.confidence_logits, inner.confidence_logits.mean(1)[:, None].repeat(1, N_CLASSES))
    assert not torch.allclose(answer.confidence_logits, inner.confidence_logits)
    assert_same(head.answer(head.reduce(x)), answer, rtol=1e-4, atol=1e-4)
    assert head.reduction_key == head.inner.reduction_key
    assert head.confidence_parameters() == head.inner.confidence_parameters() != []


def test_a_scalar_confidence_is_linear_in_what_the_head_reads():
    """As one linear output would have it: its weights are the means of the classes'."""
    head = awake(ScalarConfidenceHead(FeatureSpec((6,), "NC"), N_CLASSES, "residual"))
    x = features(head.spec)
    vectors, layer = head.inner.read(head.reduce(x)), head.inner.confidence
    expected = vectors @ layer.weight.mean(0) + layer.bias.mean()
    torch.testing.assert_close(head(x).confidence_logits[:, 1], expected)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            "mlp",
            "head must have a confidence output to be given one confidence; got MLPHead, which has none. Take 'prot",
        ),
        (lambda spec, n: nn.Linear(6, n), "head must have a confidence output.*got WrappedHead"),
        (lambda spec, n: Chained(spec, n), "head must answer by itself to be given one confidence; got Chained"),
    ],
)
def test_heads_that_cannot_be_given_one_confidence(inner, message):
    with pytest.raises(ValueError, match=message):
        ScalarConfidenceHead(FeatureSpec((6,), "NC"), N_CLASSES, inner)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_heads_without_a_confidence(name):
    head = make_head(name, MAP, N_CLASSES)
    assert head.confidence_parameters() == []
    assert head.eval()(features(MAP)).confidence_logits is None


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [1, 28])
def test_prototype_head_starts_even_and_learns_at_the_usual_rate(scale, size):
    spec = FeatureSpec((8, size, size), "NCHW")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = torch.randint(0, 2, (64,))
        directions = torch.randn(2, 8)
        x = scale * torch.randn(64, 8, size, size)
        x += scale * 3 * directions[y][:, :, None, None] * torch.randn(64, 1, size, size)  # seen in second moments only
        head = PrototypeHead(spec, 2)
        reduced = head.reduce(x)
        answer = head.answer(reduced)
        assert torch.equal(answer.logits, torch.zeros(64, 2))
        assert torch.equal(answer.confidence_logits, torch.zeros(64, 2))
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        losses = []
        for _ in range(300):
            loss = F.cross_entropy(head.answer(reduced).logits, y)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert max(losses) < 5 * losses[0]  # sums over the positions would start hundreds of times higher


# ---- what a module has to do


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    head, x = awake(make_head(name, MAP, N_CLASSES)), features(MAP)
    expected = head(x)
    head.to(dtype)
    for answer in (head(x.to(dtype)), head.answer(head.reduce(x.to(dtype)))):
        assert answer.logits.dtype == dtype
        tolerance = 0.02 if dtype is torch.float16 else 0.2
        assert_same(Answer(*(t.float() for t in outputs(answer))), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("spec", [MAP, WIDE])
def test_copies_pickles_and_rebuilt_heads_answer_alike(name, spec):
    head, x = awake(make_head(name, spec, N_CLASSES)), features(spec)
    description = json.loads(json.dumps({"spec": dataclasses.asdict(spec), "name": name}))
    rebuilt = make_head(description["name"], FeatureSpec(**description["spec"]), N_CLASSES)
    rebuilt.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), rebuilt.eval()):
        assert_same(other(x), head(x), rtol=0, atol=0)
        assert other.spec == spec
        assert {weight.data_ptr() for weight in other.parameters()}.isdisjoint(w.data_ptr() for w in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_heads_draw_from_torchs_random_state(name):
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(make_head(name, MAP, N_CLASSES).state_dict())
    first, again, other = (torch.cat([value.flatten().float() for value in state.values()]) for state in states)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", HEADS)
def test_features_of_another_width_are_refused(name):
    head = make_head(name, MAP, N_CLASSES).eval()
    for function in (head, head.reduce):
        with pytest.raises(
            ValueError, match=r"feature must have shape \(B, 6, 4, 5\) in layout NCHW; got \(2, 4, 5, 6\)"
        ):
            function(torch.zeros(2, 4, 5, 6))


# ---- making heads


def linear_on_pixels(spec, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(spec.channels * spec.n_positions, n_classes))


class Chained(Head):
    """Adds its logits to those of the head before."""

    chained = True

    def __init__(self, spec, n_classes):
        super().__init__(spec, n_classes)
        self.linear = nn.Linear(spec.channels, n_classes)

    def reduce(self, feature):
        return pooled(feature, self.spec)

    def answer(self, reduced, state=None):
        logits = self.linear(reduced) + (0 if state is None else state["logits"])
        return Answer(logits, state={"logits": logits})


@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, MAP) for name in HEADS] + [pytest.param("mlp", spec, marks=pytest.mark.slow) for spec in SPECS[1:]],
)
def test_heads_can_be_compiled_and_exported(name, spec):
    head, x = awake(make_head(name, spec, N_CLASSES)), features(spec)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x).logits

    torch.compiler.reset()  # it refuses to compile one forward more than eight times
    with torch.no_grad():
        expected = head(x).logits
        compiled = torch.compile(Logits(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(Logits(), (x,)).module()(x), expected)


def test_heads_by_name():
    assert {name: type(make_head(name, MAP, N_CLASSES)) for name in HEADS} == HEADS
    assert list(HEADS) == ["linear", "mlp", "grid", "conv", "prototype", "refined_prototype", "residual", "wide"]


def test_names_with_a_width():
    assert set(FOR_MAPS) | set(FOR_VECTORS) <= set(NAMED)
    assert set(get_args(HeadName)) == {"auto", *NAMED}
    wide, grid, mlp = (make_head(name, MAP, N_CLASSES) for name in ("wide-32", "grid-64", "mlp-64"))
    assert (wide.width, wide.linear.in_features) == (32, 32)
    assert (grid.net[1].in_features, grid.net[1].out_features) == (6 * 4 * 4, 64)
    assert mlp.net[1].out_features == 64


def test_heads_on_a_pooled_map_by_hand():
    x = features(MAP, 3, torch.float64)
    grid = awake(make_head("grid", MAP, N_CLASSES).double())
    norm, linear = grid.net
    flat = F.adaptive_avg_pool2d(x, (4, 4)).flatten(1)
    torch.testing.assert_close(grid(x).logits, linear(F.layer_norm(flat, flat.shape[1:], norm.weight, norm.bias)))
    mean = awake(make_head("linear", MAP, N_CLASSES).double())
    vectors = F.layer_norm(x.mean(dim=(2, 3)), (6,), mean.norm.weight, mean.norm.bias)
    torch.testing.assert_close(mean(x).logits, mean.linear(vectors))


def test_a_wide_head_keeps_its_width_where_the_feature_has_it_already():
    assert WideHead(MAP, N_CLASSES, width=6).block.downsample is None
    assert WideHead(MAP, N_CLASSES, width=7).block.downsample[0].weight.shape == (7, 6, 1, 1)
    with pytest.raises(ValueError, match="width must be an integer of at least 1; got 0"):
        WideHead(MAP, N_CLASSES, width=0)


def test_heads_of_one_pooled_size_share_what_is_recorded_for_them():
    keys = {make_head(name, MAP, N_CLASSES).reduction_key for name in ("grid", "grid-64", "residual", "wide-32")}
    assert len(keys) == 1
    assert GridHead(MAP, N_CLASSES, size=2).reduction_key not in keys

    class Doubled(GridHead):
        def reduce(self, feature):
            return 2 * super().reduce(feature)

    assert Doubled(MAP, N_CLASSES).reduction_key not in keys


def test_a_factory_of_a_module_is_wrapped():
    head, x = make_head(linear_on_pixels, MAP, N_CLASSES), features(MAP)
    assert isinstance(head, WrappedHead)
    assert head.reduce(x) is x
    answer = head(x)
    assert torch.equal(answer.logits, head.net(x))
    assert answer.confidence_logits is None
    assert not head.chained
    assert count_macs(head, x) == 6 * 4 * 5 * N_CLASSES


def test_a_factory_of_a_head_is_taken_as_it_is():
    head = make_head(functools.partial(PrototypeHead, n_prototypes=7), MAP, N_CLASSES)
    assert type(head) is PrototypeHead
    assert head.prototypes.weight.shape == (7, 6)
    assert type(make_head(ConvHead, MAP, N_CLASSES)) is ConvHead


def test_chained_heads_hand_their_state_on():
    first, second = (make_head(Chained, MAP, N_CLASSES) for _ in range(2))
    assert first.chained
    assert not make_head("mlp", MAP, N_CLASSES).chained
    x = features(MAP)
    before = first(x)
    torch.testing.assert_close(second(x, before.state).logits, before.logits + second(x).logits)
    reduced = second.answer(second.reduce(x), before.state)
    assert_same(reduced, second(x, before.state))
    assert reduced.state["logits"] is reduced.logits


@pytest.mark.parametrize(
    ("name", "near"), [("prototypes", "prototype"), ("MLP", "mlp"), ("refined", "refined_prototype"), ("xyz", None)]
)
def test_unknown_names(name, near):
    with pytest.raises(ValueError, match=f"head must be one of linear, mlp, .*factory.*got '{name}'") as caught:
        make_head(name, MAP, N_CLASSES)
    assert ("Near it" in str(caught.value)) == (near is not None)
    if near:
        assert near in str(caught.value).partition("Near it")[2]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(2, 2), "got the module Linear.*Every exit needs a head of its own"),
        (3, "head must be one of linear.*got 3"),
        (lambda spec, n_classes: "mlp", "must return an nn.Module; got str"),
    ],
)
def test_what_is_no_head(head, message):
    with pytest.raises(TypeError, match=message):
        make_head(head, MAP, N_CLASSES)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("net", "got"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(120, 4)), r"shape \(7, 4\)"),
        (nn.Identity(), r"shape \(7, 6, 4, 5\)"),
        (Pair(), "a tuple"),
    ],
)
def test_wrapped_modules_that_return_no_logits(net, got):
    head = make_head(lambda spec, n_classes: net, MAP, N_CLASSES)
    with pytest.raises(ValueError, match=rf"head {type(net).__name__} must return logits of shape \(7, 3\).*got {got}"):
        head(features(MAP))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
@pytest.mark.parametrize(
    ("head", "name"),
    [
        (MLPHead, "n_classes"),
        (MLPHead, "hidden"),
        (ConvHead, "channels"),
        (PrototypeHead, "n_prototypes"),
        (RefinedPrototypeHead, "n_prototypes"),
    ],
)
def test_sizes_that_cannot_be(head, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got {value!r}"):
        head(MAP, **{"n_classes": N_CLASSES, name: value})


def test_the_base_has_no_answer():
    with pytest.raises(NotImplementedError):
        Head(MAP, N_CLASSES)(features(MAP))
