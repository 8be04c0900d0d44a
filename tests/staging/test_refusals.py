"""What cannot be split says why: the reason that holds for this model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptexit.exceptions import SplitError
from adaptexit.staging.splitting import from_stages, split
from tests.staging.helpers_of_networks import strictly
from tests.staging.test_splitting import Chain, Net, assert_staged_equals_plain, built, images, vectors


class Doing(Chain):
    """Does something between the cut and the end."""

    def __init__(self, how=None):
        super().__init__()
        self.how = how
        self.generator = torch.Generator().manual_seed(0)
        self.last = 0.0

    def forward(self, x):
        return self.c(self.how(self, self.b(self.a(x)).tanh())).tanh()


# -- the model itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuts", "example"), [(["a"], vectors(width=5)), (["a"], images()), (["c"], vectors().to(torch.int64))]
)
def test_models_that_do_not_run_on_the_example(cuts, example):
    shape = r", ".join(map(str, example.shape[1:]))
    with pytest.raises(
        SplitError,
        match=rf"^Chain itself cannot run on the example, here 2 inputs of shape \({shape},?\) and torch\.\w+: "
        r"RuntimeError: .* \(in test_splitting\.py, line \d+: return self\.c\(.*Give an example like the inputs",
    ):
        split(built(Chain), cuts, example)


def test_stages_that_do_not_run_on_the_example():
    with pytest.raises(SplitError, match=r"Sequential itself cannot run on the example, .* mat1 and mat2"):
        from_stages([nn.Linear(6, 5), nn.Linear(6, 5)], vectors())


def test_models_that_yield():
    class Yielding(Chain):
        def forward(self, x):
            yield self.b(self.a(x))

    with pytest.raises(SplitError, match=r"Yielding returns a generator, .* Wrap it so that it returns tensors"):
        split(built(Yielding), ["a"], vectors())


def test_models_that_fail_on_single_samples():
    class Squeezing(nn.Module):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("too few samples")
            return x

    model = built(Doing, lambda model, x: model.inner(x))
    model.inner = Squeezing()
    with pytest.raises(
        SplitError,
        match=r"stages of Doing do not run on some of the samples \(RuntimeError: too few samples \(in .*\)\)\. "
        r"The model itself fails on 1 of 6 samples without the others \(RuntimeError",
    ):
        split(model, ["a"], vectors())


# -- random, remembering, coupled --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: x + torch.rand(6, generator=model.generator),
        lambda model, x: F.dropout(x, training=True),
        lambda model, x: x + remembered(model),
    ],
    ids=["generator", "dropout", "memory"],
)
def test_models_that_answer_differently_each_time(how):
    with pytest.raises(SplitError, match=r"answers the same inputs differently each time: it is random .* remembers"):
        split(built(Doing, how), ["a"], vectors())


def remembered(model):
    model.last += 1.0
    return model.last


@pytest.mark.parametrize(
    "how",
    [lambda model, x: x - x.mean(0), lambda model, x: x / x.abs().amax(), lambda model, x: x.cumsum(0)],
    ids=["mean", "largest", "sum"],
)
def test_models_in_which_samples_depend_on_each_other(how):
    with pytest.raises(SplitError, match=r"In this model samples depend on each other: it answers differently for \d"):
        split(built(Doing, how), ["a"], vectors())


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_layers_scale_by_the_batch():
    model = torch.ao.quantization.quantize_dynamic(built(Net), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(SplitError, match=r"'head' is quantised dynamically, .* samples depend on each other"):
        split(model, ["stem"], images())


@pytest.mark.filterwarnings("ignore")
def test_statically_quantised_models_can_be_split():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.dequant(self.head(self.b(self.a(self.quant(x)).relu()).mean((2, 3))))

    model = built(Quantised)
    model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    model = torch.ao.quantization.prepare(model)
    model(images())
    model = torch.ao.quantization.convert(model).eval()
    parts = split(model, ["a", "b"], images())
    with torch.inference_mode():
        assert torch.equal(parts(images()), model(images()))


# -- what stages do not repeat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [["a"], ["c"]])
def test_autocast_between_modules(cuts):
    class Casting(Chain):
        def forward(self, x):
            x = self.b(self.a(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.c(x)
            return x.float().tanh()

    with pytest.raises(SplitError, match=r"forward of Casting switches autocast between the modules that it calls"):
        split(built(Casting), cuts, vectors())


def test_autocast_that_changes_nothing():
    class Uncasting(Chain):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.b(self.a(x))
            return self.c(x).tanh()

    model = built(Uncasting)
    assert_staged_equals_plain(split(model, ["a"], vectors()), model, vectors())


def test_autocast_inside_a_module_that_is_called_in_one_piece():
    class Cast(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    model = built(Chain)
    model.b = built(Cast, 6, 6)
    parts = split(model, ["a", "b"], vectors())
    torch.testing.assert_close(parts(vectors()), model(vectors()), rtol=1e-2, atol=1e-2)


def test_checks_of_the_exact_type():
    def exactly(model, x):
        return x if type(x) is Tensor else x * 2

    with pytest.raises(SplitError, match=r"model itself answers alike in any batch, .* asks for the exact type"):
        split(built(Doing, exactly), ["a"], vectors())


def test_a_failure_names_the_line():
    with pytest.raises(
        SplitError,
        match=r"cannot be traced .*: AssertionError \(in helpers_of_networks\.py, line \d+: assert type.*\)\. Cut",
    ):
        split(built(Doing, lambda model, x: strictly(x)), ["a"], vectors())


# -- classes that override __call__ ------------------------------------------------------------------------------------


class Called(nn.Linear):
    """Does something around its call."""

    calls = 0

    def __call__(self, x):
        return super().__call__(x * 2).tanh() + 1


class CalledChain(Chain):
    def __call__(self, x):
        return super().__call__(x / 2) * 3


@pytest.mark.parametrize("cuts", [["a"], ["b"], ["a", "b"], ["d.a", "d"], ["d.b"]])
def test_overridden_calls(cuts):
    class Model(CalledChain):
        def __init__(self):
            super().__init__()
            self.b, self.d = Called(6, 6), CalledChain()
            self.d.a = Called(6, 6)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    model = built(Model)
    fired = []
    model.b.register_forward_hook(lambda *_: fired.append(1))
    parts = split(model, cuts, vectors())
    assert_staged_equals_plain(parts, model, vectors())
    fired.clear()
    parts(vectors())
    assert fired == [1]
