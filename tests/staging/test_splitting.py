import copy
import pickle
import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptexit.exceptions import SplitError, SplitWarning
from adaptexit.staging.carried import Along, Count, Nest, Static
from adaptexit.staging.splitting import Split, from_stages, split
from adaptexit.staging.verify import N_VERIFIED
from tests.staging.test_carried import same

SEED = 3


def images(n=7, side=8, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def vectors(n=7, width=6, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def built(kind, *args, **kwargs):
    """A model with weights of its own seed, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return kind(*args, **kwargs).eval()


def plain(model, x):
    with torch.inference_mode():
        return model(x.clone())


def after_leaving(parts, x, choose):
    """Answers of those who stay to the end and who they are; ``choose(k, n)`` says who of n goes on after cut k."""
    carried, who = x.clone(), np.arange(len(x))
    with torch.inference_mode():
        for k in range(parts.n_stages):
            carried = parts.run(k, carried)
            if k < len(parts.cuts):
                staying = np.asarray(choose(k, len(who)))
                carried, who = carried.taken(staying), who[staying]
    return carried.feature, who


def every_other_backwards(k, n):
    return np.arange(n)[::-2]


def assert_close(answers, expected, rtol=1e-4):
    assert answers.shape == expected.shape
    assert answers.dtype == expected.dtype
    scale = expected.abs().amax()
    assert scale > 0
    assert (answers - expected).abs().amax() <= rtol * scale


def assert_staged_equals_plain(parts, model, x, rtol=1e-4):
    """On all samples, and on those who stay when others leave after every cut."""
    expected = plain(model, x)
    spread = (expected[:, None] - expected).abs().flatten(2).amax(dim=2) + torch.eye(len(x)) * 1e9
    assert len(x) == 1 or spread.amin() > 10 * rtol * expected.abs().amax()  # a wrong row cannot hide
    with torch.inference_mode():
        assert_close(parts(x.clone()), expected, rtol)
    answers, who = after_leaving(parts, x, every_other_backwards)
    assert 1 <= len(who) < max(len(x), 2)
    assert_close(answers, expected[who], rtol)


class Net(nn.Module):
    """A small network of three blocks."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(3))
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Chain(nn.Module):
    """Linear layers a, b, c one after the other, with something between them."""

    def __init__(self, width=6):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)).tanh()).tanh()


NET_CUTS = ["stem", "blocks.1"]


@pytest.fixture
def net():
    return built(Net)


@pytest.fixture
def parts(net):
    return split(net, NET_CUTS, images())


# -- what a split is ---------------------------------------------------------------------------------------------------


def test_staged_equals_plain(net, parts):
    assert_staged_equals_plain(parts, net, images(seed=1))


def test_what_a_split_tells_of_itself(net, parts):
    assert parts.module is net
    assert parts.cuts == ("stem", "blocks.1")
    assert parts.n_stages == len(parts.stages) == 3
    assert parts.live == [(Along(0, 1),)] * 2
    assert 0 <= parts.difference <= 1e-4
    assert repr(parts) == "Split(Net, cuts=['stem', 'blocks.1'])"


def test_features_are_what_the_cut_modules_return(net, parts):
    x, features, outputs = images(), {}, {}
    parts.visit(x, lambda k, feature: features.update({parts.cuts[k]: feature.clone()}))
    for cut in parts.cuts:
        net.get_submodule(cut).register_forward_hook(
            lambda _, inputs, output, cut=cut: outputs.update({cut: output.clone()})
        )
    net(x)
    assert list(features) == list(parts.cuts)
    assert all(torch.equal(features[cut], outputs[cut]) for cut in parts.cuts)


def test_parts_can_be_joined(net, parts):
    x = images()
    with torch.inference_mode():
        carried = parts.run(0, x)
        joined = carried.taken(np.array([4, 0])).joined([carried.taken(slice(2, 3)), carried.taken(np.array([6]))])
        assert joined.n_rows == 4
        answers = parts.run(2, parts.run(1, joined)).feature
    assert_close(answers, plain(net, x)[[4, 0, 2, 6]])


def test_survivors_of_several_batches_can_be_merged(net, parts):
    one, other = images(seed=1), images(4, seed=2)
    with torch.inference_mode():
        joined = parts.run(0, one).taken(np.array([5, 2])).joined([parts.run(0, other).taken(np.array([3]))])
        answers = parts.run(2, parts.run(1, joined)).feature
    assert_close(answers, torch.cat([plain(net, one)[[5, 2]], plain(net, other)[[3]]]))


def test_memory_of_what_goes_on_is_counted(parts):
    with torch.inference_mode():
        carried = parts.run(0, images(n=4))
    assert carried.nbytes == 4 * 8 * 8 * 8 * 4
    assert carried.taken(np.array([1])).nbytes == carried.nbytes // 4


def test_gradients_flow_through_the_stages(net, parts):
    parts(images()).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(images()).sum().backward()
    assert all(torch.allclose(one, p.grad, atol=1e-5) for one, p in zip(gradients, net.parameters(), strict=True))


# -- the model is left alone -------------------------------------------------------------------------------------------


def everything(model):
    """What a module is, apart from the values of its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_buffers",
             "_parameters", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks")  # fmt: skip
    return {
        name: (id(part), part.training, set(vars(part)), *((key, list(getattr(part, key))) for key in hooks))
        for name, part in model.named_modules()
    }


class Coupled(Chain):
    def forward(self, x):
        x = self.a(x)
        return self.c(self.b(x - x.mean(0)))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = built(Coupled if fails else Net)
    model.train()
    next(model.children()).eval()
    model.register_buffer("unused", torch.ones(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(id(p), p.requires_grad, p.data_ptr()) for p in model.parameters()]
    before = everything(model)
    x = vectors() if fails else images()
    inputs, random_state = x.clone(), torch.get_rng_state()
    if fails:
        with pytest.raises(SplitError):
            split(model, ["a", "b"], x)
    else:
        split(model, NET_CUTS, x)
    assert everything(model) == before
    assert kinds == [(id(p), p.requires_grad, p.data_ptr()) for p in model.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_module_calls_work_as_before_after_a_failed_trace():
    class Broken(Chain):
        def forward(self, x):
            return self.c(self.b(self.a(x)).no_such_method())

    with pytest.raises(SplitError, match="no_such_method"):
        split(built(Broken), ["a"], vectors())
    layer = nn.Linear(2, 2)
    assert type(layer.weight) is nn.Parameter
    assert layer(torch.ones(1, 2)).shape == (1, 2)


def test_weights_are_shared(net, parts):
    before = plain(net, images())
    with torch.no_grad():
        net.blocks[0][0].weight.mul_(1.5)
    assert not torch.allclose(plain(net, images()), before, rtol=1e-2)
    assert_staged_equals_plain(parts, net, images())


def test_other_weights_can_be_loaded_after_the_split(net, parts):
    torch.manual_seed(1)
    other = Net().eval()
    net.load_state_dict(other.state_dict())
    assert_staged_equals_plain(parts, other, images())


def test_a_double_of_the_model_after_the_split(net, parts):
    net.double()
    assert_staged_equals_plain(parts, net, images().double())
    assert parts(images().double()).dtype == torch.float64


def test_a_part_can_be_replaced_after_the_split(net, parts):
    net.head = built(nn.Linear, 8, 11)
    assert_staged_equals_plain(parts, net, images())
    assert parts(images()).shape == (7, 11)


def test_channels_last_weights_after_the_split(net, parts):
    net.to(memory_format=torch.channels_last)
    assert_staged_equals_plain(parts, net, images())


def test_channels_last_is_kept_when_samples_leave(net, parts):
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        carried = parts.run(0, x)
        for samples in (np.array([4, 1, 2]), slice(2, 5)):
            (value,) = carried.taken(samples).live.values
            assert value.is_contiguous(memory_format=torch.channels_last)
            assert not value.is_contiguous()
        (value,) = carried.taken(np.array([1, 5])).joined([carried.taken(np.array([0]))]).live.values
        assert value.is_contiguous(memory_format=torch.channels_last)


# -- stages as modules -------------------------------------------------------------------------------------------------


def in_stages(stages, x):
    """The model's output, from its stages as modules that take and return plain values."""
    output, values = None, (x.clone(),)
    for stage in stages:
        output, values = stage(*values)
    assert values == ()
    return output


def test_stages_go_from_plain_values_to_plain_values(net, parts):
    x = images()
    assert all(isinstance(stage, nn.Module) for stage in parts.stages)
    with torch.inference_mode():
        assert torch.equal(in_stages(parts.stages, x), plain(net, x))
        feature, carried = parts.stages[0](x)
        assert torch.equal(feature, net.stem(x))
        assert same([*carried], [*parts.run(0, x).live.values])


def test_stages_are_made_once_and_share_the_model(net, parts):
    before = list(parts.stages)
    parts(images())
    assert list(parts.stages) == before
    weights = set(net.parameters())
    assert all(set(stage.parameters()) == weights for stage in parts.stages)
    assert all(stage.model is net for stage in parts.stages)
    with torch.no_grad():
        net.blocks[0][0].weight.mul_(1.5)
    assert torch.equal(in_stages(parts.stages, images()), net(images()))


def test_stages_leave_the_model_as_it_was(net, parts):
    net.train()
    net.stem.eval()
    before, names = everything(net), list(net.state_dict())
    again = split(net, NET_CUTS, images())
    assert not any(stage.training for stage in again.stages)
    assert everything(net) == before
    assert list(net.state_dict()) == names
    assert not any(part in set(net.modules()) for part in again.stages)


def test_hooks_on_submodules_fire_once_in_the_stages(net, parts):
    calls = []
    for name in ("stem", "blocks.0", "blocks.2", "head"):
        net.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: calls.append(name))
    per_stage = []
    values = (images(),)
    for stage in parts.stages:
        _, values = stage(*values)
        per_stage.append(calls.copy())
        calls.clear()
    assert per_stage == [["stem"], ["blocks.0"], ["blocks.2", "head"]]


@pytest.mark.parametrize("whole", [True, False], ids=["the split", "its stages"])
@pytest.mark.parametrize("copied", [lambda parts: pickle.loads(pickle.dumps(parts)), copy.deepcopy])
def test_copied_stages_share_a_model_of_their_own(net, parts, whole, copied):
    stages = copied(parts).stages if whole else copied(parts.stages)
    expected = plain(net, images())
    (model,) = {stage.model for stage in stages}
    assert model is not net
    with torch.no_grad():
        net.head.weight.mul_(-2)
    assert torch.equal(in_stages(stages, images()), expected)


def test_a_copied_split_runs_its_own_stages(net, parts):
    other = copy.deepcopy(parts)
    expected = plain(net, images())
    with torch.no_grad():
        other.stages[0].model.head.bias.add_(1.0)
    torch.testing.assert_close(other(images()), expected + 1.0)
    assert torch.equal(parts(images()), expected)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_stages_can_be_exported_for_any_number_of_samples(net, parts, k):
    def inputs_of(x):
        with torch.no_grad():
            return (x,) if k == 0 else parts.run(k - 1, parts.run(0, x) if k == 2 else x).live.values

    samples = torch.export.Dim("samples", min=2, max=64)
    program = torch.export.export(parts.stages[k], inputs_of(images()), dynamic_shapes=(({0: samples},),))
    with torch.no_grad():
        for n in (3, 11):
            values = inputs_of(images(n, seed=1))
            (feature, carried), (expected, going_on) = program.module()(*values), parts.stages[k](*values)
            torch.testing.assert_close(feature, expected)
            torch.testing.assert_close(carried, going_on)


def test_stages_can_be_compiled_in_one_graph(net, parts):
    compiled = [torch.compile(stage, backend="eager", fullgraph=True) for stage in parts.stages]
    with torch.no_grad():
        torch.testing.assert_close(in_stages(compiled, images()), net(images()))


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_deep_copy_has_weights_of_its_own(net, parts):
    copied = copy.deepcopy(parts)
    before = plain(net, images())
    with torch.no_grad():
        net.head.weight.mul_(-2)
    assert copied.module is not net
    assert torch.equal(copied(images()), before)
    assert copied.cuts == parts.cuts
    assert not torch.allclose(parts(images()), before)


def test_a_deep_copy_shares_its_module_with_what_is_copied_along(net, parts):
    module, copied = copy.deepcopy((net, parts))
    assert copied.module is module


@pytest.mark.parametrize("ran", [False, True])
def test_a_pickled_split_answers_as_before(net, parts, ran):
    x = images()
    if ran:
        parts(x)
    twin = pickle.loads(pickle.dumps(parts))
    assert twin.module is not net
    assert twin.cuts == parts.cuts
    assert twin.difference == parts.difference
    assert twin.live == parts.live
    assert torch.equal(twin(x), parts(x))
    assert_staged_equals_plain(twin, net, x)


def test_a_pickled_split_can_be_pickled_before_it_ever_ran(net, parts):
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(parts))))
    assert_staged_equals_plain(again, net, images())


def test_a_pickled_split_of_a_model_that_became_double(net, parts):
    net.double()
    twin = pickle.loads(pickle.dumps(parts))
    assert_staged_equals_plain(twin, net, images().double())


class OfWords(nn.Module):
    def __init__(self, n_words):
        super().__init__()
        self.embedding = nn.Embedding(n_words, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.mix(self.embedding(x)).tanh().mean(1))


def words(n, length, n_words, seed=0):
    return torch.randint(n_words, (n, length), generator=torch.Generator().manual_seed(seed))


def test_integer_inputs():
    model, x = built(OfWords, 50), words(9, 5, 50)
    parts = split(model, ["embedding", "mix"], x)
    assert_staged_equals_plain(parts, model, x)


@pytest.mark.parametrize("n_words", [3, 5])
def test_integer_inputs_with_few_values_when_pickled(n_words):
    model, x = built(OfWords, n_words), words(8, 9, n_words)
    parts = split(model, ["embedding", "mix"], x)
    assert_staged_equals_plain(pickle.loads(pickle.dumps(parts)), model, x)


@pytest.mark.parametrize("n_words", [3, 5])
def test_integer_examples_that_are_too_few_are_filled_up_with_values_like_theirs(n_words):
    model, x = built(OfWords, n_words), words(2, 9, n_words)
    assert x.amax() == n_words - 1
    parts = split(model, ["embedding"], x)
    assert_staged_equals_plain(parts, model, words(8, 9, n_words, seed=9))


def test_a_pickled_split_of_a_model_that_checks_its_inputs():
    model, x = built(Checked), vectors().sigmoid()
    parts = split(model, ["a"], x)
    assert_staged_equals_plain(pickle.loads(pickle.dumps(parts)), model, x)


class Checked(Chain):
    def forward(self, x):
        if x.amin() < 0:
            raise ValueError("inputs must not be negative")
        return super().forward(x)


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_on_submodules_fire_once_in_order_with_those_who_are_left(net, parts):
    events = []
    for name in ("stem", "stem.0", "blocks.0", "blocks.1", "blocks.2", "head"):
        part = net.get_submodule(name)
        part.register_forward_pre_hook(lambda _, inputs, name=name: events.append(("enter", name, len(inputs[0]))))
        part.register_forward_hook(lambda _, inputs, output, name=name: events.append(("leave", name, len(output))))
    after_leaving(parts, images(), lambda k, n: [[5, 0, 3], [2, 1]][k])
    steps = [
        ("enter", "stem", 7), ("enter", "stem.0", 7), ("leave", "stem.0", 7), ("leave", "stem", 7),
        ("enter", "blocks.0", 3), ("leave", "blocks.0", 3), ("enter", "blocks.1", 3), ("leave", "blocks.1", 3),
        ("enter", "blocks.2", 2), ("leave", "blocks.2", 2), ("enter", "head", 2), ("leave", "head", 2),
    ]  # fmt: skip
    assert events == steps


def test_hooks_may_change_what_a_module_returns(net):
    net.blocks[1].register_forward_hook(lambda _, inputs, output: output * 3 + 1)
    parts = split(net, NET_CUTS, images())
    x, features = images(), []
    parts.visit(x, lambda k, feature: features.append(feature))
    assert torch.equal(features[1], net.blocks[:2](net.stem(x)))
    assert_staged_equals_plain(parts, net, x)


@pytest.mark.parametrize(("ancestor", "words"), [("", "the model itself"), ("blocks", "'blocks'")])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_what_a_cut_lies_inside_of_warn(net, ancestor, words, kind):
    events = []
    getattr(net.get_submodule(ancestor), kind)(lambda *values: events.append(len(values)))
    with pytest.warns(SplitWarning, match=f"hooks on .*{words}.* do not fire"):
        parts = split(net, NET_CUTS, images())
    events.clear()
    parts(images())
    assert not events


def test_hooks_on_other_modules_do_not_warn(net):
    for part in (net.stem, net.stem[0], net.blocks[0], net.head):
        part.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split(net, NET_CUTS, images())
    assert not [warning for warning in caught if issubclass(warning.category, SplitWarning)]


# -- inputs other than the example -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 8, 13])
def test_other_sizes_than_the_example(net, parts, side):
    assert_staged_equals_plain(parts, net, images(side=side))


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_other_batch_sizes_than_the_example(net, parts, n):
    assert_staged_equals_plain(parts, net, images(n=n))


class Padding(nn.Module):
    """Pads to a multiple of four, where that is needed."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 4, stride=4)

    def forward(self, x):
        x = self.a(x)
        padding = -x.shape[-1] % 4
        if padding > 0:
            x = F.pad(x, (0, padding, 0, padding))
        return self.b(x).mean((2, 3))


@pytest.mark.parametrize(("example", "holds", "fails"), [(8, 12, 10), (10, 7, 12)])
def test_decisions_on_shapes_are_guarded(example, holds, fails):
    model = built(Padding)
    parts = split(model, ["a"], images(side=example))
    assert_staged_equals_plain(parts, model, images(side=example))
    assert_staged_equals_plain(parts, model, images(side=holds))
    with pytest.raises(SplitError, match=r"that was (True|False) when it was split .* Split it anew"):
        parts(images(side=fails))


class OnData(Chain):
    def forward(self, x):
        x = self.a(x)
        if x.abs().amax() > 1e4:
            x = x / 10
        return self.b(x).tanh()


def test_decisions_on_data_are_guarded_where_the_examples_agree():
    model = built(OnData)
    parts = split(model, ["a"], vectors())
    assert_staged_equals_plain(parts, model, vectors(seed=5))
    with pytest.raises(SplitError, match="was False when it was split and is True on this"):
        parts(vectors() * 1e6)


def test_numbers_taken_from_shapes_follow_the_input():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Linear(4, 5)

        def forward(self, x):
            _, _, height, width = x.shape
            x = self.a(x)
            return self.b(x.flatten(2).transpose(1, 2).reshape(-1, height, width, 4)[:, height // 2, width // 3])

    model = built(Windows)
    parts = split(model, ["a"], images())
    assert_staged_equals_plain(parts, model, images())
    assert_staged_equals_plain(parts, model, images(side=11))


# -- values that are carried -------------------------------------------------------------------------------------------


class SequenceFirst(nn.Module):
    """Batch along the second axis from the embedding to the end."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False) for _ in range(3)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x.flatten(2).permute(2, 0, 1))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(0))


@pytest.mark.parametrize("n_tokens", [4, N_VERIFIED, 9])
def test_batch_along_the_second_axis(n_tokens):
    model = built(SequenceFirst)
    x = torch.randn(7, 3, n_tokens, 1, generator=torch.Generator().manual_seed(0))
    parts = split(model, ["blocks.0", "blocks.1"], x)
    assert parts.live == [(Along(1, 1),)] * 2
    assert_staged_equals_plain(parts, model, x)


class Folded(nn.Module):
    """Four windows of every image, folded into the batch: those of one image side by side, or of one place."""

    def __init__(self, patch_major=False):
        super().__init__()
        self.patch_major = patch_major
        self.embed = nn.Conv2d(3, 6, 1)
        self.local = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        n = x.shape[0]
        x = self.embed(x)
        x = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(n, 4, 16, 6)
        x = (x.transpose(0, 1) if self.patch_major else x).reshape(4 * n, 16, 6)
        x = self.local(x).tanh()
        x = x.reshape(4, n, 16, 6).transpose(0, 1) if self.patch_major else x.reshape(n, 4, 16, 6)
        return self.head(x.amax(2).mean(1))


def test_several_rows_a_sample():
    model = built(Folded)
    parts = split(model, ["local"], images())
    assert set(parts.live[0]) == {Along(0, 4), Count(1)}
    assert_staged_equals_plain(parts, model, images())
    with torch.inference_mode():
        carried = parts.run(0, images())
        middle = parts.run(1, carried.taken(slice(2, 5))).feature
        joined = parts.run(1, carried.taken(np.array([6])).joined([carried.taken(np.array([0, 3]))])).feature
    assert_close(middle, plain(model, images())[2:5])
    assert_close(joined, plain(model, images())[[6, 0, 3]])


def test_rows_that_are_not_side_by_side_are_found_by_verification():
    with pytest.raises(SplitError, match=r"verification failed with 3 of 6 samples going on after 'local'"):
        split(built(Folded, patch_major=True), ["local"], images())


Pair = namedtuple("Pair", ["left", "right"])


class Nesting(nn.Module):
    """Nests what it is given, with things that do not change."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        left, right = self.a(x), self.b(x).T  # samples along the first axis, and along the second
        if self.kind is dict:
            return {"left": left, "right": right, "name": "dict", "inner": [left * 2, (right, None)]}
        if self.kind is OrderedDict:
            return OrderedDict(left=left, right=right, inner=[torch.ones(2)])
        if self.kind is Pair:
            return Pair(left, [right, 3])
        return self.kind([left, self.kind([right, 2.5])])


class OfNested(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.nest = Nesting(kind)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        nest = self.nest(x)
        if isinstance(nest, dict):
            left, right = nest["left"], nest["right"]
        elif self.kind is Pair:
            left, right = nest.left, nest.right[0]
        else:
            left, (right, _) = nest
        return self.head(torch.cat([left, right.T], 1))


@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict, Pair])
def test_nested_values(kind):
    model = built(OfNested, kind)
    parts = split(model, ["nest"], vectors())
    (layout,) = parts.live[0]
    assert isinstance(layout, Nest)
    assert layout.parts[0] == Along(0, 1)
    assert_staged_equals_plain(parts, model, vectors())
    x = vectors()
    with torch.inference_mode():
        carried = parts.run(0, x)
        joined = carried.taken(np.array([4])).joined([carried.taken(slice(0, 2))])
        assert type(joined.live.values[0]) is kind
        assert_close(parts.run(1, joined).feature, plain(model, x)[[4, 0, 1]])


class Iterated(nn.Module):
    """Goes through what a module returned."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.nest = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
        self.spread = Branches()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        branches = self.spread(x)
        if self.method == "keys":
            return self.head(sum(branches[key] for key in branches))
        if self.method == "values":
            return self.head(sum(branches.values()))
        return self.head(sum(value for _, value in branches.items()))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


@pytest.mark.parametrize("method", ["keys", "values", "items"])
def test_dicts_can_be_gone_through(method):
    model = built(Iterated, method)
    parts = split(model, ["spread"], vectors())
    assert_staged_equals_plain(parts, model, vectors())


class Mixed(Chain):
    """Everything that may live across a cut at once."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, 6))

    def forward(self, x):
        n, width = x.shape
        position = torch.arange(6) * self.scale  # made before the cut, used after it
        mask = position > 3
        twice = 2 * n
        first = self.a(x)
        h = self.b(first)
        h = torch.where(mask, h, -h) + position
        return self.c(h.reshape(twice, width // 2).reshape(n, width)) + x + first


def test_static_values_counts_and_skips():
    model = built(Mixed)
    parts = split(model, ["a", "b"], vectors())
    assert {Static(), Along(0, 1), Count(1), Count(2)} <= set(parts.live[0])
    assert_staged_equals_plain(parts, model, vectors())
    with torch.inference_mode():
        joined = parts.run(0, vectors()).taken(np.array([3, 1])).joined([parts.run(0, vectors(seed=1))])
        answers = parts.run(2, parts.run(1, joined)).feature
    assert_close(answers, torch.cat([plain(model, vectors())[[3, 1]], plain(model, vectors(seed=1))]))


class Sized(nn.Module):
    """A number taken from the size of the input is used after the cut."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        side = x.shape[-1]
        return self.a(x).mean((2, 3)) * side


@pytest.mark.parametrize(("kind", "cut"), [(Sized, "a"), (Net, "stem")])
def test_batches_of_different_sizes_cannot_be_merged(kind, cut):
    parts = split(built(kind), [cut], images())
    with torch.inference_mode():
        one, other = parts.run(0, images(side=8)), parts.run(0, images(side=10))
        with pytest.raises(ValueError, match="merged only where their inputs have the same size"):
            one.joined([other])


class Unsupported(Chain):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        live = self.value(x)
        x = self.a(x)
        return self.b(x) + combined(live)


def combined(live):
    if isinstance(live, tuple):
        return sum(part.sum() for part in live)
    return live.sum() if isinstance(live, torch.Tensor) else live


torch.fx.wrap("combined")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda x: x.mean(), "a tensor without an axis for the samples that changes"),
        (lambda x: x.mean(0), "a tensor without an axis for the samples that changes"),
        (lambda x: x[:-1].sum(), "a tensor without an axis for the samples that changes"),
        (lambda x: x.shape[0] + 1, "an? int that changes with the samples"),
        (lambda x: x.shape[0] / 2, "a float that changes with the samples"),
        (lambda x: x.sum().item(), "a float that changes with the samples"),
        (lambda x: x @ x.T, "more than one axis that grows"),
        (lambda x: x[1:], "no whole number of rows a sample"),
        (lambda x: x.split(1), "a tuple whose entries change"),
    ],
)
def test_values_that_samples_cannot_be_picked_out_of(value, words):
    with pytest.raises(SplitError, match=rf"needed after the cut 'a', and samples cannot be picked .*{words}"):
        split(built(Unsupported, value), ["a"], vectors())


# -- what a forward may do ---------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """A ReLU after the cut overwrites what the cut module returned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.b(self.relu(self.a(x))).mean((2, 3))


def test_features_are_seen_before_they_are_overwritten():
    model, x = built(InPlace), images()
    parts, copies, features = split(model, ["a"], x), [], []

    def look(k, feature):
        features.append(feature)
        copies.append(feature.clone())

    with torch.inference_mode():
        parts.visit(x, look)
        assert torch.equal(copies[0], model.a(x))
        assert copies[0].amin() < 0 <= features[0].amin()  # it was overwritten
    assert_staged_equals_plain(parts, model, x)


def test_models_that_overwrite_their_inputs_leave_the_example_alone():
    class Overwriting(Chain):
        def forward(self, x):
            x.mul_(2).add_(1)
            return super().forward(x)

    model, x = built(Overwriting), vectors()
    parts = split(model, ["a"], x)
    assert torch.equal(x, vectors())
    assert_staged_equals_plain(parts, model, x)


def test_what_was_taken_is_not_overwritten_through_its_origin():
    model, x = built(InPlace), images()
    parts = split(model, ["a"], x)
    with torch.inference_mode():
        carried = parts.run(0, x)
        some = carried.taken(np.array([2, 5]))
        parts.run(1, some)
        assert carried.feature.amin() < 0
        assert_close(parts.run(1, carried).feature, plain(model, x))


def test_views_of_overwritten_values_are_refused():
    class Aliased(Chain):
        def forward(self, x):
            x = self.a(x)
            base = x.flip(1).flip(1).view(-1, 2, 3)
            same = base.view(-1, 6)
            same = self.b(same)
            base.mul_(0)
            return self.c(same) + base.view(-1, 6)

    class Aliasing(Chain):
        def forward(self, x):
            x = self.a(x)
            view = x.view(-1, 2, 3)
            h = self.b(x)
            x.mul_(-3)
            return self.c(h) + view.view(-1, 6)

    assert_staged_equals_plain(split(built(Aliased), ["b"], vectors()), built(Aliased), vectors())
    with pytest.raises(SplitError, match="verification failed"):
        split(built(Aliasing), ["b"], vectors())


def test_keyword_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, *, x, scale=1.0, skip=None):
            return self.layer(x) * scale + (0 if skip is None else skip)

    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Scaled(), Scaled()

        def forward(self, x, scale=3.0, unused=None):
            h = self.one(x=x, scale=scale)
            return self.two(x=h, skip=x)

    model = built(Keyed)
    assert_staged_equals_plain(split(model, ["one"], vectors()), model, vectors())
    assert_staged_equals_plain(split(model, ["one.layer", "one"], vectors()), model, vectors())


def test_a_cut_inside_another(net):
    cuts = ["stem.0", "stem", "blocks.0.0", "blocks.0", "blocks"]
    parts = split(net, cuts, images())
    assert parts.cuts == tuple(cuts)
    assert_staged_equals_plain(parts, net, images())
    x, features = images(), []
    parts.visit(x, lambda k, feature: features.append(feature.clone()))
    stem = net.stem(x)
    assert torch.equal(features[0], net.stem[0](x))
    assert torch.equal(features[1], stem)
    assert torch.equal(features[4], net.blocks(stem))


def test_cut_modules_that_return_several_values():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.a(x), [self.b(x)], 4

    class OfSeveral(nn.Module):
        def __init__(self):
            super().__init__()
            self.several, self.head = Several(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.several(x)[0])

    for cuts in (["several"], ["several.a", "several"]):
        model = built(OfSeveral)
        parts, features = split(model, cuts, vectors()), []
        parts.visit(vectors(), lambda k, feature, features=features: features.append(feature))
        first, (second,), number = features[-1]
        assert torch.equal(first, model.several.a(vectors()))
        assert torch.equal(second, model.several.b(vectors()))
        assert number == 4
        assert_staged_equals_plain(parts, model, vectors())


def test_models_that_return_several_values():
    class Auxiliary(Chain):
        def forward(self, x):
            h = self.a(x)
            return {"logits": self.c(self.b(h).tanh()), "hidden": [h, None]}

    model, x = built(Auxiliary), vectors()
    parts = split(model, ["a", "b"], x)
    output, who = after_leaving(parts, x, every_other_backwards)
    expected = plain(model, x)
    assert list(output) == ["logits", "hidden"]
    assert_close(output["logits"], expected["logits"][who])
    assert_close(output["hidden"][0], expected["hidden"][0][who])
    assert output["hidden"][1] is None


class Constants(Chain):
    """Makes tensors on the fly, before and after the cut."""

    def forward(self, x):
        places = torch.arange(6).float().sin()
        x = self.a(x * places)
        zeros = torch.zeros(6)
        zeros[2:] = 1.5
        x = self.b(x * zeros + x.new_full((x.shape[0], 1), 0.25) + places)
        return self.c(x + torch.full((6,), 0.5)).tanh()


def test_constants_made_in_the_forward():
    model = built(Constants)
    parts = split(model, ["a", "b"], vectors())
    assert_staged_equals_plain(parts, model, vectors())
    assert_staged_equals_plain(pickle.loads(pickle.dumps(parts)), model, vectors())
    assert_staged_equals_plain(copy.deepcopy(parts), model, vectors())


def test_gradients_flow_past_constants():
    model = built(Constants)
    parts = split(model, ["a", "b"], vectors())
    parts(vectors()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(vectors()).sum().backward()
    assert all(torch.allclose(one, p.grad, atol=1e-5) for one, p in zip(gradients, model.parameters(), strict=True))


def test_constants_that_are_written_to():
    class Accumulating(Chain):
        def forward(self, x):
            x = self.a(x)
            total = torch.zeros(6)
            total += self.a.bias
            total.add_(self.b.bias)
            return self.b(x).tanh() + total

    model = built(Accumulating)
    parts = split(model, ["a"], vectors())
    for _ in range(2):
        assert_staged_equals_plain(parts, model, vectors())


class Buffered(Chain):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.linspace(-1, 1, 6))
        self.register_buffer("passing", torch.linspace(1, 2, 6), persistent=False)
        self.token = nn.Parameter(torch.linspace(0, 1, 6))
        self.attribute = torch.linspace(2, 3, 6)

    def forward(self, x):
        x = self.a(x * self.kept) + self.passing.square()
        return self.b(x * self.kept + self.token).tanh() * self.attribute


def test_buffers_replaced_after_the_split():
    model = built(Buffered)
    parts = split(model, ["a"], vectors())
    assert parts.live[0] == (Along(0, 1),)  # what the model holds is not carried
    assert_staged_equals_plain(parts, model, vectors())
    before = plain(model, vectors())
    for name in ("kept", "passing", "attribute"):
        setattr(model, name, torch.linspace(3, -2, 6))
    model.token = nn.Parameter(torch.linspace(1, -1, 6))
    assert not torch.allclose(plain(model, vectors()), before, rtol=0.1)
    assert_staged_equals_plain(parts, model, vectors())


def test_checks_for_containers_in_the_forward():
    class Typed(Chain):
        def forward(self, x):
            x = self.a(x)
            shape = x.shape
            assert isinstance(shape, torch.Size)
            return self.b(x).tanh().reshape(shape)

    model = built(Typed)
    assert_staged_equals_plain(split(model, ["a"], vectors()), model, vectors())


def test_items_that_are_written_to():
    class Writing(Chain):
        def forward(self, x):
            x = self.a(x)
            shift = torch.zeros_like(x)
            shift[:, 1:3] = x[:, 2:4]
            x = self.b(x) + shift
            shift[:, 0] = 1
            return x.tanh() - 0.1 * shift

    model = built(Writing)
    assert_staged_equals_plain(split(model, ["a", "b"], vectors()), model, vectors())


def test_a_forward_of_the_instance():
    model = built(Chain)
    model.forward = lambda x: model.b(model.a(x)).tanh()
    assert_staged_equals_plain(split(model, ["a"], vectors()), model, vectors())


def test_rounding_of_an_ill_conditioned_model_is_told_from_samples_that_depend_on_each_other():
    class Rounding(nn.Module):
        """Off by a thousandth for odd numbers of samples: in single precision only, or in any."""

        def __init__(self, always):
            super().__init__()
            self.always = always

        def forward(self, x):
            off = len(x) % 2 and (self.always or x.dtype == torch.float32)
            return x * (1.001 if off else 1.0)

    class Model(Chain):
        def forward(self, x):
            return self.rounding(self.a(x))

    model = built(Model)
    model.rounding = Rounding(always=False)
    assert 5e-4 < split(model, ["a"], vectors()).difference < 2e-3
    model.rounding = Rounding(always=True)
    with pytest.raises(SplitError, match=r"values differ by 0\.001 of the largest.* samples depend on each other"):
        split(model, ["a"], vectors())


def test_modules_made_in_the_forward_are_refused():
    class Making(Chain):
        def forward(self, x):
            return nn.Tanh()(self.b(nn.ReLU()(self.a(x))))

    with pytest.raises(SplitError, match=r"cannot be traced .* module is not installed as a submodule"):
        split(built(Making), ["a"], vectors())


def scripted(module):
    with warnings.catch_warnings(action="ignore"):  # that TorchScript is deprecated
        return torch.jit.script(module)


def test_scripted_parts_of_an_ordinary_model(net):
    net.blocks[1] = scripted(net.blocks[1])
    parts = split(net, ["stem", "blocks.0"], images())
    assert_staged_equals_plain(parts, net, images())


def test_spectral_norm_and_parametrisations(net):
    nn.utils.parametrizations.spectral_norm(net.blocks[1][0])
    nn.utils.parametrizations.weight_norm(net.head)
    parts = split(net.eval(), NET_CUTS, images())
    assert_staged_equals_plain(parts, net, images())


def compiled(model):
    return torch.compile(model)


@pytest.mark.parametrize(
    "wrappers",
    [
        [nn.DataParallel],
        [nn.DataParallel, nn.DataParallel],
        pytest.param([compiled], marks=pytest.mark.slow),  # importing the compiler takes seconds
        pytest.param([compiled, nn.DataParallel], marks=pytest.mark.slow),
    ],
)
def test_wrappers_are_looked_through(net, wrappers):
    model = net
    for wrapper in wrappers:
        model = wrapper(model)
    assert model is not net
    parts = split(model, NET_CUTS, images())
    assert parts.module is net
    assert_staged_equals_plain(parts, net, images())


# -- number formats ----------------------------------------------------------------------------------------------------


def test_autocast():
    model, x = built(Net), images()
    parts = split(model, NET_CUTS, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        expected, answers = model(x), parts(x)
        carried = parts.run(0, x).taken(np.array([3, 1]))
        assert parts.run(1, carried).feature.dtype == torch.bfloat16
        some = parts.run(2, parts.run(1, parts.run(0, x).taken(np.array([3, 1])))).feature
    assert torch.equal(answers, expected)
    assert answers.dtype == torch.bfloat16
    assert not torch.allclose(answers.float(), plain(model, x), rtol=1e-5, atol=0)  # autocast did something
    assert_close(some.float(), expected[[3, 1]].float(), 2e-2)


def test_splitting_under_autocast():
    model, x = built(Net), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = split(model, NET_CUTS, x)
        assert parts(x).dtype == torch.bfloat16
    assert_staged_equals_plain(parts, model, x)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_modules_of_other_precision(dtype, rtol):
    model, x = built(Chain).to(dtype), vectors().to(dtype)
    parts = split(model, ["a", "b"], x)
    assert parts.difference <= rtol
    assert parts(x).dtype == dtype
    answers, who = after_leaving(parts, x, every_other_backwards)
    assert_close(answers, plain(model, x)[who], rtol)
    assert torch.equal(pickle.loads(pickle.dumps(parts))(x), parts(x))


# -- examples ----------------------------------------------------------------------------------------------------------


def seen_inputs(model, cuts, example):
    """The batches of the size that verification uses, as the first module saw them."""
    batches = []
    handle = model.get_submodule(cuts[0]).register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].clone()))
    split(model, cuts, example)
    handle.remove()
    return [batch for batch in batches if len(batch) == N_VERIFIED]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["distinct", "identical", "zeros"])
def test_few_or_identical_examples_are_filled_up(n, kind):
    x = vectors(n) if kind == "distinct" else vectors(1).expand(n, -1) if kind == "identical" else torch.zeros(n, 6)
    batches = seen_inputs(built(Chain), ["a"], x)
    assert batches
    for batch in batches:
        assert len({tuple(row.tolist()) for row in batch}) == N_VERIFIED
        assert torch.equal(batch[0], x[0])


def test_examples_that_are_distinct_are_used_as_they_are():
    x = vectors(12)
    x[1] = x[0]
    for batch in seen_inputs(built(Chain), ["a"], x):
        assert torch.equal(batch, x[[0, *range(2, 7)]])


def test_channels_last_examples_stay_so():
    x = images().contiguous(memory_format=torch.channels_last)
    for batch in seen_inputs(built(Net), ["stem"], x):
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_coupled_model_is_found_with_identical_examples():
    with pytest.raises(SplitError, match="verification failed"):
        split(built(Coupled), ["a"], torch.ones(8, 6))


@pytest.mark.parametrize("example", [torch.zeros(0, 6), torch.tensor(1.0), [[1.0]], None, np.zeros((2, 6))])
def test_examples_that_are_none(example):
    with pytest.raises(ValueError, match=r"example must be a tensor of at least one input, \(B, \.\.\.\); got"):
        split(built(Chain), ["a"], example)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Forced(Chain):
    """Batch normalisation by the statistics of the batch, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x):
        return self.c(self.norm(self.b(self.a(x))))


class Attending(Chain):
    def forward(self, x):
        x = self.a(x)
        return self.b(x + (x @ x.T).softmax(1) @ x)


class Random(Chain):
    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, training=True))


class RandomConstant(Chain):
    def forward(self, x):
        return self.b(self.a(x)) + torch.randn(6)


@pytest.mark.parametrize(("kind", "cut"), [(Coupled, "a"), (Forced, "a"), (Forced, "b"), (Attending, "a")])
def test_models_that_couple_samples_are_refused(kind, cut):
    with pytest.raises(SplitError, match=r"verification failed .* samples depend on each other"):
        split(built(kind), [cut], vectors())


@pytest.mark.parametrize("cut", ["stem", "blocks.0"])
def test_batch_normalisation_by_the_batch_is_refused(net, cut):
    net.blocks[2][1] = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(SplitError, match=rf"verification failed with 3 of 6 samples going on after '{cut}'"):
        split(net, [cut], images())


@pytest.mark.parametrize("kind", [Random, RandomConstant])
def test_models_that_are_random_in_evaluation_are_refused(kind):
    with pytest.raises(SplitError, match=r"verification failed .* random in evaluation"):
        split(built(kind), ["a"], vectors())


def test_the_random_state_is_given_back():
    before = torch.get_rng_state()
    with pytest.raises(SplitError):
        split(built(Random), ["a"], vectors())
    assert torch.equal(torch.get_rng_state(), before)


class Branching(Chain):
    def forward(self, x):
        x = self.a(x)
        if x.sum() > (x - x.mean()).sum() + x.shape[0] * 1e9 - 2.5e9:
            x = -x
        return self.b(x)


class Counted(Chain):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.b(self.how(self.a(x)))


@pytest.mark.parametrize(
    ("how", "conversion"),
    [
        (lambda x: torch.stack([x[i] for i in range(x.shape[0])]), "index"),
        (lambda x: torch.stack(list(x)), "len"),
        (lambda x: x * float(x.shape[0] > 2), "float"),
        (lambda x: x + len(x), "len"),
        (lambda x: torch.zeros(int(x.shape[0]), 6) + x, "int"),
        (lambda x: x if x.shape[0] == 2 else x + 0, "bool"),
    ],
)
def test_a_captured_batch_size_is_refused(how, conversion):
    with pytest.raises(SplitError, match=rf"takes {conversion}\(\) of .* for 2 samples and .* for 3"):
        split(built(Counted, how), ["a"], vectors())


def test_control_flow_on_data_is_refused():
    with pytest.raises(SplitError, match=r"takes bool\(\) of .* by the number of samples or by their content"):
        split(built(Branching), ["a"], vectors())


def test_unknown_names_are_answered_with_the_nearest(net):
    with pytest.raises(ValueError, match=r"it has no 'steam' \(near it: 'stem'"):
        split(net, ["steam"], images())
    with pytest.raises(ValueError, match=r"'blocks\.7' \(near it: 'blocks\.0', 'blocks\.1', 'blocks\.2'"):
        split(net, ["stem", "blocks.7"], images())


def test_modules_that_are_never_called():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.unused = nn.Linear(6, 6)
            self.attention = nn.MultiheadAttention(6, 1, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            x = x[:, None]
            return self.head(self.attention(x, x, x)[0].squeeze(1))

    model = built(Listed)
    with pytest.raises(SplitError, match=r"'blocks' \(a ModuleList\) is never called .* called child, 'blocks\.2'"):
        split(model, ["blocks"], vectors())
    with pytest.raises(SplitError, match=r"'unused' \(a Linear\) is never called .* list_cuts shows"):
        split(model, ["unused"], vectors())
    assert_staged_equals_plain(split(model, ["blocks.2"], vectors()), model, vectors())


def test_modules_that_are_called_twice():
    class Twice(Chain):
        def forward(self, x):
            return self.c(self.a(self.b(self.a(x)).tanh()))

    model = built(Twice)
    with pytest.raises(SplitError, match="'a' is called 2 times in a forward, and an exit needs one place"):
        split(model, ["a"], vectors())
    assert_staged_equals_plain(split(model, ["b"], vectors()), model, vectors())


def test_cuts_in_the_wrong_order(net):
    with pytest.raises(ValueError, match=r"order in which the model runs them: \['stem', 'blocks\.1'\]; got \['bl"):
        split(net, ["blocks.1", "stem"], images())


def test_cuts_that_are_the_same_point(net):
    with pytest.raises(ValueError, match=r"cuts must lie apart; 'stem\.2' and 'stem' are the same point"):
        split(net, ["stem.2", "stem"], images())
    with pytest.raises(ValueError, match="'stem' twice"):
        split(net, ["stem", "stem"], images())


@pytest.mark.parametrize("cuts", [["c"], ["a", "c"]])
def test_nothing_left_after_the_last_cut(cuts):
    class Bare(Chain):
        def forward(self, x):
            return self.c(self.b(self.a(x)))

    with pytest.raises(SplitError, match="nothing is left to compute after 'c'"):
        split(built(Bare), cuts, vectors())


def test_torchscript_is_refused(net):
    with pytest.raises(TypeError, match="got TorchScript"):
        split(scripted(net), ["stem"], images())


def test_stages_do_not_run_in_training_mode(net, parts):
    net.train()
    with pytest.raises(SplitError, match=r"stages run in evaluation mode only.* Call module\.eval\(\) first"):
        parts(images())
    net.eval()
    assert_staged_equals_plain(parts, net, images())


def test_stages_do_not_run_with_a_part_in_training_mode(net, parts):
    net.blocks[1].train()
    with pytest.raises(SplitError, match="stages run in evaluation mode only"):
        parts(images())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_answers_that_are_not_finite(net, bad):
    with torch.no_grad():
        net.head.bias[2] = bad
    with pytest.raises(SplitError, match="answers to the example are NaN or infinite"):
        split(net, NET_CUTS, images())


def test_rows_picked_by_their_place_in_the_batch_are_refused():
    class Placed(Chain):
        def forward(self, x):
            place = torch.arange(x.shape[0])
            return self.c(self.b(self.a(x)))[place]

    with pytest.raises(SplitError, match="verification failed"):
        split(built(Placed), ["a"], vectors())


def test_what_cannot_be_traced_says_why():
    class Opaque(Chain):
        def forward(self, x):
            return self.c(torch.from_numpy(self.b(self.a(x)).detach().numpy().copy()))

    with pytest.raises(SplitError, match=r"forward of Opaque cannot be traced .* give the stages explicitly"):
        split(built(Opaque), ["a"], vectors())


def test_no_stages_are_handed_out_that_answer_differently():
    class Cached(Chain):
        """Answers by how often it was called: untraceable state."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x)) * self.calls

    with pytest.raises(SplitError, match=r"verification failed with .*: values differ by"):
        split(built(Cached), ["a"], vectors())


# -- stages that are given ---------------------------------------------------------------------------------------------


class First(nn.Module):
    """Untraceable: batch along the second axis, beside a number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        rows = torch.stack([self.layer(row) for row in x], 1)
        return {"rows": rows, "n": len(x), "fixed": [1.5]}


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, carried):
        assert carried["rows"].shape[1] == carried["n"]
        return self.layer(carried["rows"].T.tanh() * carried["fixed"][0])


def given_stages():
    return [built(First), built(Second), built(nn.Linear, 4, 3)]


def in_a_row(stages):
    return nn.Sequential(*stages).eval()


def test_given_stages():
    stages = given_stages()
    parts = from_stages(stages, vectors())
    assert isinstance(parts, Split)
    assert parts.cuts == ("0", "1")
    assert parts.n_stages == 3
    assert parts.live == [(Nest((Along(1, 1), Count(1), Nest((Static(),)))),), (Along(0, 1),)]
    assert [part is stage for part, stage in zip(parts.module, stages, strict=True)] == [True] * 3
    assert_staged_equals_plain(parts, in_a_row(stages), vectors())
    features = []
    parts.visit(vectors(), lambda k, feature: features.append(feature))
    assert torch.equal(features[0]["rows"], stages[0](vectors())["rows"])


@pytest.mark.parametrize("copied", [lambda parts: pickle.loads(pickle.dumps(parts)), copy.deepcopy])
def test_given_stages_can_be_copied(copied):
    stages = given_stages()
    other = copied(from_stages(stages, vectors()))
    expected = plain(in_a_row(stages), vectors())
    with torch.no_grad():
        stages[2].weight.zero_()
    assert_close(other(vectors()), expected)
    answers, who = after_leaving(other, vectors(), every_other_backwards)
    assert_close(answers, expected[who])


def test_given_stages_are_verified():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    with pytest.raises(SplitError, match=r"verification failed with 3 of 6 samples going on after '0'"):
        from_stages([built(nn.Linear, 6, 6), built(Centred)], vectors())


@pytest.mark.parametrize("stages", [[], [nn.Identity()], [nn.Identity(), torch.tanh]])
def test_given_stages_must_be_modules(stages):
    with pytest.raises(ValueError, match="stages must be at least two modules; got"):
        from_stages(stages, vectors())


def test_given_stages_in_training_mode_are_refused():
    parts = from_stages(given_stages(), vectors())
    parts.module.train()
    with pytest.raises(SplitError, match="stages run in evaluation mode only"):
        parts(vectors())
