"""Python that forwards contain between their modules, and that torch.fx alone does not record."""

import copy
import math
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, is_tensor, nn

from adaptexit.exceptions import SplitError
from adaptexit.staging.splitting import split
from tests.staging import helpers_of_networks
from tests.staging.test_splitting import Chain, assert_staged_equals_plain, built, images, vectors


class Doing(Chain):
    """Does something before, between and behind the cuts."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(self.c(self.how(self.b(self.how(self.a(self.how(x))))))).tanh()


def assert_can_be_split(model, cuts, x, *others):
    """And copied, without anything of the trace left."""
    names = dict(globals())
    parts = split(model, cuts, x)
    assert dict(globals()) == names
    assert torch.is_tensor is is_tensor
    for inputs in (x, *others):
        assert_staged_equals_plain(parts, model, inputs)
    assert_staged_equals_plain(copy.deepcopy(parts), model, x)
    return parts


# -- types -------------------------------------------------------------------------------------------------------------


def checked(x):
    if not isinstance(x, Tensor):
        raise TypeError("x must be a tensor")
    return x


CHECKS = {
    "isinstance": checked,
    "several": lambda x: x if isinstance(x, (list, Tensor)) else x[0],
    "union": lambda x: x if isinstance(x, Tensor | None) else x[0],
    "is_tensor": lambda x: x + 1 if torch.is_tensor(x) else x - 1,
    "is_tensor by name": lambda x: x + 1 if is_tensor(x) else x - 1,
    "in a helper's file": helpers_of_networks.checked,
    "of a size": lambda x: x * (2 if isinstance(x.shape[1], int) else 3),
    "no parameter": lambda x: x * (1.2 if isinstance(x, nn.Parameter) else 1.1),
    "no list": lambda x: x * (1.2 if isinstance(x, (list, tuple, dict)) else 1.1),
    "attribute": lambda x: x.tensors if hasattr(x, "tensors") else x * 2,
    "attribute of a size": lambda x: x.shape.tensors if hasattr(x.shape, "tensors") else x * 2,
    "attribute or another": lambda x: getattr(x, "tensors", x) * 2,
    "attribute that is there": lambda x: x.flatten(1) if hasattr(x, "flatten") else x[0],
}


@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_types(check):
    assert_can_be_split(built(Doing, CHECKS[check]), ["a", "b"], vectors())


def test_missing_attributes_are_missing_in_a_trace_too():
    model = built(Doing, lambda x: x.tensors)
    model.a.register_forward_hook(lambda *_: None)
    with pytest.raises(SplitError, match="no attribute 'tensors'"):
        split(model, ["a"], vectors())


# -- sizes -------------------------------------------------------------------------------------------------------------

SIZES = {
    "len": lambda x: x.reshape(len(x), -1),
    "int": lambda x: x.reshape(int(x.size(0)), 2, 3).flatten(1),
    "int of shape": lambda x: x.view(int(x.shape[0]) * 2, 3).view(-1, 6),
    "index": lambda x: x.view(3 * x.shape[0].__index__() + 0, 2).view(-1, 6),
    "unpacked": lambda x: x.reshape((lambda n, width: (int(n), int(width)))(*x.shape)),
    "slice": lambda x: torch.cat([x, x])[int(x.size(0)) :],
    "expanded": lambda x: x + x.new_ones(1, 6).expand(len(x), 6),
    "decided": lambda x: x if int(x.size(1)) > 3 else -x,
    "scaled by a width": lambda x: x / np.sqrt(x.shape[1]),
    "numpy's product": lambda x: x.reshape(len(x), int(np.prod(x.shape[1:]))),
    "numpy's rounding": lambda x: x * np.ceil(x.shape[1] / 4) + np.maximum(x.shape[1], 2),
    "math": lambda x: x * math.sqrt(x.shape[1]) + math.ceil(x.shape[1] / 4),
    "float": lambda x: x * float(x.shape[1]) / 6,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cuts", [["a"], ["a", "b"]])
def test_sizes_in_python(size, cuts):
    parts = assert_can_be_split(built(Doing, SIZES[size]), cuts, vectors(), vectors(1), vectors(13))
    twin = pickle_by_parts(parts)
    assert_staged_equals_plain(twin, parts.module, vectors())


def pickle_by_parts(parts):
    """Unpickled, with the function of its model, which has no name, given back."""
    how, parts.module.how = parts.module.how, None
    twin = pickle.loads(pickle.dumps(parts))
    parts.module.how = twin.module.how = how
    return twin


def test_sizes_of_images_in_python():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(16, 5)

        def forward(self, x):
            n, side = len(x), int(x.shape[2])
            x = self.a(x).reshape(n, 4, side // 2, 2, side // 2, 2)
            x = x.permute(0, 2, 4, 1, 3, 5).reshape(n * int(x.shape[2]) ** 2, 16)
            return self.b(x).reshape(n, -1, 5).mean(1) / np.sqrt(side)

    assert_can_be_split(built(Windows), ["a"], images(), images(1), images(9))


UNEVEN = {
    "halves": lambda x: x[: int(x.size(0)) // 2].repeat(3, 1)[: len(x)],
    "squares": lambda x: x * len(x) ** 2,
    "added": lambda x: x + len(x),
    "rows": lambda x: torch.stack([x[i] for i in range(len(x))]),
}


@pytest.mark.parametrize("how", UNEVEN)
def test_forwards_in_which_the_number_of_samples_changes_answers_are_refused(how):
    with pytest.raises(SplitError, match=r"takes (int|len)\(\) of .*, which is 2 for 2 samples and 3 for 3"):
        split(built(Doing, UNEVEN[how]), ["a"], vectors())


# -- functions in one piece --------------------------------------------------------------------------------------------


def as_einops(operation):
    """A function that asks for the exact type of what it is given, as einops does."""

    def function(x, pattern, *how, **sizes):
        if not all(type(each) in (Tensor, nn.Parameter) for each in (x if isinstance(x, list) else [x])):
            raise RuntimeError(f"Tensor type unknown to einops {type(x)}")
        assert all(isinstance(size, int) for size in sizes.values())
        return operation(x, pattern, *how, **sizes)

    return function


def rearranged(x, pattern, **sizes):
    if pattern == "b c (h p) (w q) -> b (h w) (p q c)":
        b, c, height, width = x.shape
        p, q = sizes["p"], sizes["q"]
        x = x.reshape(b, c, height // p, p, width // q, q).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(b, height // p * (width // q), p * q * c)
    if pattern == "b n (h d) -> b h n d":
        return x.unflatten(2, (sizes["h"], -1)).transpose(1, 2)
    if pattern == "b h n d -> b n (h d)":
        return x.transpose(1, 2).flatten(2)
    raise ValueError(pattern)


def stand_in():
    """As much of einops as the networks here call."""
    module = types.ModuleType("einops")
    module.rearrange = as_einops(rearranged)
    module.repeat = as_einops(lambda x, pattern, b: x.expand(b, -1, -1))
    module.reduce = as_einops(lambda x, pattern, how: x.mean(1))
    module.pack = as_einops(lambda xs, pattern: (torch.cat(xs, 1), [x.shape[1:-1] for x in xs]))
    return module


@pytest.fixture
def einops(monkeypatch):
    module = stand_in()
    monkeypatch.setitem(sys.modules, "einops", module)
    for name, function in vars(module).items():
        if not name.startswith("_"):
            monkeypatch.setitem(globals(), name, function)
            monkeypatch.setattr(helpers_of_networks, name, function, raising=False)
    return module


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=2) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1))  # noqa: F821
        weights = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return self.to_out(rearrange(weights.softmax(-1) @ v, "b h n d -> b n (h d)"))  # noqa: F821


class ViT(nn.Module):
    """Patches, a class token repeated for the batch, and blocks of attention."""

    def __init__(self, packed=False):
        super().__init__()
        self.packed = packed
        self.embed = nn.Linear(48, 8)
        self.token = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 1, 8))
        self.positions = nn.Parameter(torch.linspace(0, 1, 40).reshape(1, 5, 8))
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, img):
        import einops

        x = self.embed(einops.rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
        b, n, _ = x.shape
        tokens = einops.repeat(self.token, "1 1 d -> b 1 d", b=b)
        if self.packed:
            x, _ = einops.pack([tokens, x], "b * d")
        else:
            x = torch.cat((tokens, x), dim=1)
        x = x + self.positions[:, : n + 1]
        for block in self.blocks:
            x = block(x) + x
        return self.head(reduce(x, "b n d -> b d", "mean"))  # noqa: F821


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cuts", [["blocks.0", "blocks.1"], ["embed", "blocks.0.to_qkv", "blocks.2.norm"]])
def test_einops_in_a_forward(einops, packed, cuts):
    functions = dict(vars(einops))
    assert_can_be_split(built(ViT, packed), cuts, images())
    assert dict(vars(einops)) == functions


def test_einops_in_a_helper(einops):
    class Helped(ViT):
        def forward(self, img):
            x = self.embed(helpers_of_networks.patches(img))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    assert_can_be_split(built(Helped), ["blocks.1.norm"], images())


def test_einops_itself():
    real = pytest.importorskip("einops")

    class Rearranging(ViT):
        def forward(self, img):
            x = self.embed(real.rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
            x = torch.cat((real.repeat(self.token, "1 1 d -> b 1 d", b=x.shape[0]), x), dim=1)
            return self.head(real.reduce(x + self.positions, "b n d -> b d", "mean"))

    assert_can_be_split(built(Rearranging), ["embed"], images())


def doubled(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x * 2 + 0


with warnings.catch_warnings(action="ignore"):  # that TorchScript is deprecated
    scripted_doubled = torch.jit.script(doubled)


@pytest.mark.parametrize("how", [lambda x: scripted_doubled(x), scripted_doubled], ids=["by name", "attribute"])
def test_scripted_functions_stay_in_one_piece(how):
    model = built(Doing, how)
    parts = split(model, ["a", "b"], vectors())
    assert_staged_equals_plain(parts, model, vectors())
    assert model.how is how


def tripled(x):
    return F.gelu(x * 3)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["by name", "attribute", "method", "module"])
def test_compiled_functions(where):
    """Importing the compiler takes seconds."""
    compiled = torch.compile(tripled, backend="eager")

    class Compiled(Chain):
        def __init__(self):
            super().__init__()
            self.how = torch.compile(self.own, backend="eager") if where == "method" else compiled
            self.act = torch.compile(nn.GELU(), backend="eager")

        def own(self, x):
            return self.c(x) * 3

        def forward(self, x):
            between = {"by name": compiled, "module": self.act}.get(where, self.how)
            return self.b(between(self.a(x))).tanh()

    model = built(Compiled)
    parts = split(model, ["a"], vectors())
    assert_staged_equals_plain(parts, model, vectors())
