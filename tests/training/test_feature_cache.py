import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import adaptexit
from adaptexit.data.batches import as_batches
from adaptexit.training import FeatureCache, cache_key, collect

ROOT = Path(adaptexit.__file__).parents[1]
WIDTHS = (6, 4)
N_CLASSES = 3


class Backbone(nn.Module):
    """Two cuts, each followed by an operation that overwrites what was there."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = (5, *WIDTHS, N_CLASSES)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.calls = 0

    def run(self, x, visit):
        self.calls += 1
        for k, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            visit(k, x)
            x.mul_(0.5).relu_()
        return self.layers[-1](x)


class Source:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches = batches
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        yield from self.batches


def identity(x):
    return x


def doubled(x):
    return 2 * x[:, None, :]


REDUCERS = [identity, doubled]


def inputs(sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 5, generator=generator).to(dtype) for size in sizes]


def expected(net, batches, reducers=REDUCERS):
    """Features and logits as PyTorch gives them, batch by batch."""
    columns = [[] for _ in range(len(reducers) + 1)]
    with torch.no_grad():
        for x in batches:
            logits = net.run(x, lambda k, feature: columns[k].append(reducers[k](feature).clone()))
            columns[-1].append(logits)
    return [torch.cat(parts) for parts in columns]


def assert_holds(cache, wanted):
    """Every feature and logit, bit by bit, read as a whole and in random batches."""
    *features, logits = wanted
    logits = logits.numpy() if logits.dtype == torch.float64 else logits.float().numpy()
    assert cache.logits.dtype == logits.dtype
    assert cache.logits.tobytes() == logits.tobytes()
    assert len(cache.features) == len(features)
    assert cache.n_samples == len(logits)
    assert cache.n_bytes == sum(a.nbytes for a in cache.features) + cache.logits.nbytes
    rng = np.random.default_rng(0)
    for k, feature in enumerate(features):
        every, some = np.arange(len(feature)), rng.integers(0, len(feature), 2 * len(feature))
        for indices in (every, some, torch.from_numpy(some)):
            rows = cache.rows(k, indices)
            assert rows.dtype == feature.dtype
            assert torch.equal(rows, feature[torch.as_tensor(indices)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def entries(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def kept(folder, batches, net=None, key="one", **options):
    net = Backbone() if net is None else net
    return collect(batches, net.run, REDUCERS, folder=folder, key=key, **options)


# -- what is held ------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    limit=st.sampled_from([0, 700, 1 << 20]),
)
def test_the_cache_holds_exactly_what_the_backbone_gave(sizes, dtype, limit):
    net, batches = Backbone(dtype), inputs(sizes, dtype)
    source = Source(batches)
    truth = expected(net, [x for x in batches if len(x)])
    with collect(source, net.run, REDUCERS, memory_limit=limit) as cache:
        assert source.reads == 1
        assert all(isinstance(array, np.memmap) == (cache.n_bytes > limit) for array in cache.features)
        assert_holds(cache, truth)


@pytest.mark.parametrize("limit", [500, 2000, 5000])
def test_many_small_batches_move_to_disk_half_way(limit):
    batches = inputs([1] * 150)
    cache = collect(batches, Backbone().run, REDUCERS, memory_limit=limit)
    assert limit < cache.n_bytes
    assert_holds(cache, expected(Backbone(), batches))


def test_bfloat16_keeps_its_range():
    x = torch.tensor([[1e30, -3e-30]], dtype=torch.bfloat16)
    cache = collect([x], lambda x, visit: visit(0, x) or x, [identity])
    assert cache.features[0].dtype == np.float32
    assert_holds(cache, [x, x])


def test_in_memory_and_on_disk_are_the_same(tmp_path):
    net, batches = Backbone(), inputs([7, 1, 30, 12])
    caches = [
        collect(batches, net.run, REDUCERS),
        collect(batches, net.run, REDUCERS, memory_limit=0),
        kept(tmp_path, batches, net),
        kept(tmp_path, batches, net),
    ]
    for cache in caches[1:]:
        for one, other in zip([*caches[0].features, caches[0].logits], [*cache.features, cache.logits], strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.tobytes() == other.tobytes()


def test_features_may_be_pictures_in_channels_last_order():
    x = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
    for limit in (0, 1 << 20):
        cache = collect([x[:4], x[4:]], lambda x, visit: visit(0, x) or x.mean((2, 3)), [identity], memory_limit=limit)
        assert torch.equal(cache.rows(0, [5, 0, 0]), x[[5, 0, 0]])


def test_a_network_without_early_exits_leaves_logits_only():
    cache = collect([torch.ones(2, 3)], lambda x, visit: x, [])
    assert cache.features == []
    assert cache.logits.tolist() == [[1.0] * 3] * 2


def test_half_keeps_float16_and_gives_back_the_type_that_came(tmp_path):
    net, batches = Backbone(), inputs([8, 5])
    *features, logits = expected(net, batches)
    for cache in (collect(batches, net.run, REDUCERS, half=True), *(kept(tmp_path, batches, half=True),) * 2):
        assert all(feature.dtype == np.float16 for feature in cache.features)
        assert_holds(cache, [*(feature.half().float() for feature in features), logits])


def test_half_says_which_exit_overflows():
    def run(x, visit):
        visit(0, x)
        visit(1, 1e5 * x)
        return x

    with pytest.raises(ValueError, match=r"exit 1 must fit into float16 .* got 300000\. Leave half off"):
        collect([torch.full((2, 3), 3.0)], run, [identity, identity], half=True)
    assert collect([torch.full((2, 3), 3.0)], run, [identity, identity]).rows(1, [0]).max() == 3e5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, "logits"])
def test_values_that_are_not_finite_name_the_exit(bad, where):
    def run(x, visit):
        for k in range(2):
            visit(k, torch.where(torch.arange(3) == 1, bad, x) if where == k else x)
        return x * bad if where == "logits" else x

    label = "logits of the full model" if where == "logits" else f"features of exit {where}"
    with pytest.raises(ValueError, match=f"{label} must be finite"):
        collect([torch.ones(2, 3)], run, [identity, identity])


def test_large_finite_values_are_no_error():
    x = torch.full((4, 3), 3e38)
    cache = collect([x], lambda x, visit: visit(0, x) or x, [identity])
    assert torch.equal(cache.rows(0, [0, 1, 2, 3]), x)


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_of_collecting(n_batches, rows, limit):
    """Bytes that NumPy holds at the last batch and held at most, and the size of the cache."""
    batch, in_use = torch.ones(rows, 1000), []

    def batches():
        for _ in range(n_batches):
            in_use.append(tracemalloc.get_traced_memory()[0])
            yield batch

    gc.collect()
    tracemalloc.start()
    try:
        cache = collect(batches(), lambda x, visit: visit(0, x) or x[:, :2], [identity], memory_limit=limit)
        return in_use[-1], tracemalloc.get_traced_memory()[1], cache.n_bytes
    finally:
        tracemalloc.stop()


def test_no_second_copy_is_made_in_memory():
    _, peak, size = memory_of_collecting(60, 100, 1 << 40)
    assert size > 24e6
    assert peak < 1.25 * size


def test_what_goes_to_disk_does_not_stay_in_memory():
    limit = 4_000_000
    in_use, peak, size = memory_of_collecting(60, 100, limit)
    assert size > 24e6
    assert limit < peak < 1.6 * limit
    assert in_use < 0.2 * limit


def test_temporary_files_have_no_name_and_go_with_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
    cache = collect(inputs([9]), Backbone().run, REDUCERS, memory_limit=0)
    assert names(tmp_path) == []
    if sys.platform == "linux":
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        cache.close()
        gc.collect()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_closed_cache_says_so():
    with collect(inputs([9]), Backbone().run, REDUCERS) as cache:
        cache.rows(1, [0])
        with pytest.raises(IndexError, match="below 2; got 2"):
            cache.rows(2, [0])
    with pytest.raises(IndexError, match="a closed cache has none"):
        cache.rows(1, [0])
    assert cache.n_samples == cache.n_bytes == 0


# -- keeping -----------------------------------------------------------------------------------------------------------


def test_a_later_run_finds_the_features_and_runs_the_first_batch_to_make_sure(tmp_path):
    net, source = Backbone(), Source(inputs([4, 4, 3]))
    kept(tmp_path / "new" / "folder", source, net)
    assert (net.calls, source.reads) == (3, 1)
    cache = kept(tmp_path / "new" / "folder", source, net)
    assert (net.calls, source.reads) == (4, 2)
    assert_holds(cache, expected(Backbone(), source.batches))
    cache.close()
    assert len(entries(tmp_path / "new" / "folder")) == 1


@pytest.mark.parametrize(
    "other",
    [inputs([4, 4, 3], seed=1), inputs([4, 4]), inputs([4, 7]), inputs([4, 4, 3], torch.float64)],
    ids=["values", "fewer", "batches", "type"],
)
def test_other_data_are_run_and_kept_beside(tmp_path, other):
    net, first = Backbone(), inputs([4, 4, 3])
    kept(tmp_path, first)
    net = net.to(other[0].dtype)
    source = Source(other)
    assert_holds(kept(tmp_path, source, net), expected(copy.deepcopy(net), other))
    assert (net.calls, source.reads) == (len(other), 2)
    for data, model in ((first, Backbone()), (other, net)):
        model.calls = 0
        kept(tmp_path, data, model)
        assert model.calls == 1


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_features_that_the_backbone_no_longer_gives_are_not_trusted(tmp_path, scale):
    """The key sees no change of a forward, however small the features are."""
    batches = inputs([4, 4])

    class Small(Backbone):
        def run(self, x, visit):
            return super().run(x, lambda k, feature: visit(k, feature * scale))

    class Changed(Backbone):
        def run(self, x, visit):
            return super().run(x, lambda k, feature: visit(k, (feature + 0.1 if k else feature) * scale))

    kept(tmp_path, batches, Small())
    net = Changed()
    cache = kept(tmp_path, batches, net)
    assert net.calls == 3
    assert_holds(cache, expected(Changed(), batches))
    kept(tmp_path, batches, net)
    assert net.calls == 4


def test_another_key_or_type_is_not_even_looked_up(tmp_path):
    batches = inputs([4, 3])
    kept(tmp_path, batches)
    for options in ({"key": "two"}, {"half": True}):
        net, source = Backbone(), Source(batches)
        kept(tmp_path, source, net, **options)
        assert (net.calls, source.reads) == (2, 1)
    net = Backbone()
    collect(batches, lambda x, visit: net.run(x, lambda k, f: visit(k, f) if k == 0 else None), REDUCERS[:1],
            folder=tmp_path, key="one")  # fmt: skip
    assert net.calls == 2


def test_an_iterator_is_read_once_and_never_looked_up(tmp_path):
    batches, net = inputs([4, 3]), Backbone()
    for calls in (2, 4):
        assert_holds(kept(tmp_path, iter(batches), net), expected(Backbone(), batches))
        assert net.calls == calls
    kept(tmp_path, batches, net)
    assert net.calls == 5


class Consumed(IterableDataset):
    def __init__(self, samples):
        self.samples = iter(samples)

    def __iter__(self):
        return self.samples


def test_a_source_that_is_used_up_by_hashing_is_an_error(tmp_path):
    kept(tmp_path, inputs([4]))
    net = Backbone()
    with pytest.raises(ValueError, match="X holds no samples"):
        kept(tmp_path, DataLoader(Consumed(torch.randn(6, 5)), batch_size=2), net)

    class Shrinking(Source):
        def __iter__(self):
            self.reads += 1
            yield from self.batches[self.reads - 1 :]

    with pytest.raises(ValueError, match=r"got 9 when they were hashed and 5 when they were run\. Give a source"):
        kept(tmp_path, Shrinking(inputs([4, 3, 2])), net)
    assert len(entries(tmp_path)) == 1


def test_loaders_and_arrays_are_looked_up_and_give_their_labels(tmp_path):
    X, y = torch.cat(inputs([9])), np.arange(9)
    for data in ((X, y), (DataLoader(torch.utils.data.TensorDataset(X, torch.from_numpy(y)), batch_size=4), None)):
        net = Backbone()
        batches = as_batches(*data, batch_size=4, labels=True)
        batches.first()
        kept(tmp_path, batches, net)
        assert net.calls == (3 if data[1] is not None else 1)
        assert batches.labels.tolist() == y.tolist()


def test_the_key_knows_weights_types_structure_cuts_reducers_and_settings():
    def net(activation=nn.ReLU, dtype=torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), activation(), nn.Dropout(0.1)).to(dtype)

    def changed(name):
        other = net()
        with torch.no_grad():
            other.state_dict()[name].view(-1)[-1:].add_(1)
        return other

    class Same(nn.Linear):
        pass

    Same.__name__ = "Linear"
    namesake = net()
    namesake[0].__class__ = Same
    arguments = ["a", "b"], ["mean", "identity"]
    same = [cache_key(net(), *arguments), cache_key(copy.deepcopy(net()), *arguments), cache_key(net(), *arguments)]
    assert len(set(same)) == 1
    others = [
        cache_key(net(nn.GELU), *arguments),
        cache_key(net(dtype=torch.bfloat16), *arguments),
        cache_key(namesake, *arguments),
        cache_key(net(lambda: nn.LeakyReLU(0.1)), *arguments),
        cache_key(net(lambda: nn.LeakyReLU(0.2)), *arguments),
        *(cache_key(changed(name), *arguments) for name in net().state_dict()),
        cache_key(net(), ["b", "a"], arguments[1]),
        cache_key(net(), arguments[0], ["mean", "max"]),
        cache_key(net(), ["a", "b", "mean"], ["identity"]),
        cache_key(net(), *arguments, autocast=True),
        cache_key(net(), *arguments, autocast=False),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_the_key_tells_equal_bytes_of_other_types_and_shapes_apart():
    keys = set()
    for tensor in (torch.zeros(6), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6, dtype=torch.int32)):
        module = nn.Module()
        module.register_buffer("b", tensor)
        keys.add(cache_key(module, [], []))
    assert len(keys) == 4


def test_bfloat16_empty_and_scalar_tensors_have_keys():
    module = nn.Module()
    for i, tensor in enumerate([torch.zeros(2, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(True)]):
        module.register_buffer(f"b{i}", tensor, persistent=False)
    before = cache_key(module, [], [])
    module.b0[1] = 1
    after = cache_key(module, [], [])
    module.b2.fill_(False)
    assert len({before, after, cache_key(module, [], [])}) == 3


# -- interruption and damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["batches", "run", "header", "move"])
def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch, where):
    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    def batches():
        yield from inputs([4, 4])
        if where == "batches":
            stop()

    net = Backbone()

    def run(x, visit):
        return net.run(x, stop if where == "run" and net.calls == 1 else visit)

    with monkeypatch.context() as patched:
        if where == "header":
            patched.setattr(Path, "write_text", stop)
        if where == "move":
            patched.setattr("adaptexit.training.feature_store.os.replace", stop)
        with pytest.raises(Stop):
            collect(batches(), run, REDUCERS, folder=tmp_path, key="one")
    assert names(tmp_path) == [".lock"]
    assert_holds(kept(tmp_path, inputs([4, 4])), expected(Backbone(), inputs([4, 4])))


KILLED = """
import os, signal, sys
from itertools import pairwise
from pathlib import Path
import adaptexit.training.feature_store as module
from tests.training.test_feature_cache import Backbone, inputs, kept

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

for where in ("run", "header", "move"):
    child = os.fork()
    if child == 0:
        net = Backbone()
        whole = net.run
        if where == "run":
            net.run = lambda x, visit: whole(x, die if net.calls == 2 else visit)
        elif where == "header":
            Path.write_text = die
        else:
            module.os.replace = die
        kept(Path(sys.argv[1]) / where, inputs([4, 4, 4]), net)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_is_not_trusted_and_cleared_away(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for where in ("run", "header", "move"):
        folder, net, batches = tmp_path / where, Backbone(), inputs([4, 4, 4])
        assert len(list(folder.glob(".partial-*"))) == 1
        assert entries(folder) == []
        assert_holds(kept(folder, batches, net), expected(Backbone(), batches))
        assert net.calls == 3
        assert len(entries(folder)) == 1
        assert names(folder)[0] == ".lock"
        assert len(names(folder)) == 2


def test_a_run_at_the_same_time_is_let_alone(tmp_path):
    net, batches = Backbone(), inputs([4, 4])

    def run(x, visit):
        if net.calls == 1:
            kept(tmp_path, batches, key="two")
            kept(tmp_path, batches)
        return net.run(x, visit)

    cache = collect(batches, run, REDUCERS, folder=tmp_path, key="one")
    assert_holds(cache, expected(Backbone(), batches))
    assert len(entries(tmp_path)) == 2
    assert len(names(tmp_path)) == 3


def test_what_another_run_has_finished_meanwhile_is_taken(tmp_path):
    net, batches, others = Backbone(), inputs([4, 4]), []

    def run(x, visit):
        if not others:
            kept(tmp_path, batches)
            others.extend((path, path.stat().st_ino) for path in entries(tmp_path)[0].iterdir())
        return net.run(x, visit)

    cache = collect(batches, run, REDUCERS, folder=tmp_path, key="one")
    assert_holds(cache, expected(Backbone(), batches))
    assert all(path.stat().st_ino == number for path, number in others)
    assert len(names(tmp_path)) == 2


def test_what_another_run_has_damaged_meanwhile_is_replaced(tmp_path):
    net, batches = Backbone(), inputs([4, 4])

    def run(x, visit):
        if not net.calls:
            kept(tmp_path, batches)
            flip(entries(tmp_path)[0] / "logits.bin", 9)
        return net.run(x, visit)

    cache = collect(batches, run, REDUCERS, folder=tmp_path, key="one")
    assert_holds(cache, expected(Backbone(), batches))
    kept(tmp_path, batches, net)
    assert net.calls == 3


TOGETHER = """
import os, sys, time
from pathlib import Path
import adaptexit.training.feature_store as module
from tests.training.test_feature_cache import Backbone, assert_holds, expected, inputs, kept

batches = inputs([4, 4])
truth = expected(Backbone(), batches)
move = os.replace


def slow_move(*places):
    time.sleep(0.05)
    move(*places)


for turn in range(5):
    gates = [os.pipe() for _ in range(3)]
    children = []
    for _, own in gates[1:]:
        child = os.fork()
        if child == 0:
            module.os.replace = slow_move
            net = Backbone()
            whole = net.run

            def run(x, visit):
                if net.calls == 1:  # both wait here, so that neither finds what the other has made
                    os.write(own, b".")
                    os.read(gates[0][0], 1)
                return whole(x, visit)

            net.run = run
            code = 1
            try:
                assert_holds(kept(Path(sys.argv[1]) / str(turn), batches, net), truth)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for ready, _ in gates[1:]:
        os.read(ready, 1)
    os.write(gates[0][1], b"..")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], turn
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_may_finish_the_same_features(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TOGETHER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["features_0.bin", "features_1.bin", "logits.bin", "header.json"])
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path, name, damage):
    batches = inputs([4, 4])
    kept(tmp_path, batches)
    DAMAGES[damage](entries(tmp_path)[0] / name)
    net = Backbone()
    assert_holds(kept(tmp_path, batches, net), expected(Backbone(), batches))
    assert net.calls == 2
    assert_holds(kept(tmp_path, batches, net), expected(Backbone(), batches))
    assert net.calls == 3
    assert len(names(tmp_path)) == 2


def test_no_byte_of_the_header_can_change_what_is_read(tmp_path):
    batches, net = inputs([2]), Backbone()
    truth = expected(Backbone(), batches)
    kept(tmp_path, batches, net)
    header = entries(tmp_path)[0] / "header.json"
    positions = np.random.default_rng(0).choice(header.stat().st_size, 150, replace=False)
    for position in positions.tolist():
        flip(header, position)
        assert_holds(kept(tmp_path, batches, net), truth)
    assert net.calls > 100


def test_a_header_that_describes_other_arrays_is_not_trusted(tmp_path):
    batches, net = inputs([4]), Backbone()
    kept(tmp_path, batches, net)
    header = entries(tmp_path)[0] / "header.json"
    content = json.loads(header.read_text())
    content["described"]["columns"][0]["shape"] = [WIDTHS[0], 4]
    header.write_text(json.dumps(content))
    assert_holds(kept(tmp_path, batches, net), expected(Backbone(), batches))
    assert net.calls == 2


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are those of POSIX")
@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_says_who_may_read_what_is_kept(tmp_path, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        kept(tmp_path / "here", inputs([4]))
    finally:
        os.umask(before)
    (entry,) = entries(tmp_path / "here")
    assert entry.stat().st_mode & 0o777 == folder_mode
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {file_mode}


def test_foreign_files_in_the_folder_stay(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    kept(tmp_path, inputs([4]))
    kept(tmp_path, inputs([4]))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_go_together(tmp_path):
    x, net = inputs([2]), Backbone()
    with pytest.raises(ValueError, match="got folder without key"):
        collect(x, net.run, REDUCERS, folder=tmp_path)
    with pytest.raises(ValueError, match="got key without folder"):
        collect(x, net.run, REDUCERS, key="one")
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes; got -1"):
        collect(x, net.run, REDUCERS, memory_limit=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="folder must be a folder or new"):
        kept(tmp_path / "file", x)
    assert net.calls == 0


@pytest.mark.parametrize("batches", [[], [torch.ones(0, 5)]])
def test_no_samples(tmp_path, batches):
    with pytest.raises(ValueError, match="X holds no samples"):
        collect(batches, Backbone().run, REDUCERS)
    with pytest.raises(ValueError, match="X holds no samples"):
        kept(tmp_path, batches)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("visited", [[], [0], [0, 0, 1], [0, 1, 2], [-1, 0]])
def test_cuts_are_visited_once_each(visited):
    def run(x, visit):
        for k in visited:
            visit(k, x)
        return x

    with pytest.raises(ValueError, match=r"cuts 0 \.\.\. 1 once a batch; it visited"):
        collect([torch.ones(2, 3)], run, [identity, identity])


def test_features_have_one_row_a_sample():
    with pytest.raises(ValueError, match=r"exit 0 must have one row for each of the 2 samples; got shape \(3, 2\)"):
        collect([torch.ones(2, 3)], lambda x, visit: visit(0, x) or x, [torch.t])
    with pytest.raises(ValueError, match=r"logits of shape \(2, C\); got shape \(2,\)"):
        collect([torch.ones(2, 3)], lambda x, visit: visit(0, x) or x[:, 0], [identity])


@pytest.mark.parametrize("second", [torch.ones(2, 4), torch.ones(2, 3, dtype=torch.float64)])
def test_features_are_alike_in_all_batches(second):
    def run(x, visit):
        visit(0, x)
        return torch.ones(len(x), 2)

    with pytest.raises(ValueError, match=r"features of exit 0 must be alike in all batches; .* Resize"):
        collect([torch.ones(2, 3), second], run, [identity])


def test_a_cache_can_be_made_of_arrays():
    cache = FeatureCache([np.arange(6.0).reshape(3, 2)], np.zeros((3, 2)))
    assert torch.equal(cache.rows(0, [2, 0]), torch.tensor([[4.0, 5.0], [0.0, 1.0]], dtype=torch.float64))
    assert repr(cache) == "FeatureCache(1 early exits, 3 samples, 96 bytes)"
