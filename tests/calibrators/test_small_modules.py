import numpy as np
import pytest
import torch

from adaptexit.calibrators.em_routers import Router
from adaptexit.calibrators.small_modules import CHUNK, STEP, probabilities, restored, rows_of, state_arrays


@pytest.fixture(scope="module")
def router():
    torch.manual_seed(0)
    return Router(20, 16).eval()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_probabilities_do_not_depend_on_who_is_asked_together(router, dtype):
    x = (30 * np.random.default_rng(0).normal(size=(CHUNK + 300, 20))).astype(dtype)
    together = probabilities(router, x)
    assert together.dtype == np.float64
    for size in (1, 7, 256):
        parts = [probabilities(router, x[start : start + size]) for start in range(0, 512, size)]
        assert np.concatenate(parts)[:512].tolist() == together[:512].tolist()
    assert probabilities(router, x[CHUNK:]).tolist() == together[CHUNK:].tolist()


def test_probabilities_are_the_modules_on_a_grid(router):
    x = np.random.default_rng(1).normal(size=(50, 20)).astype(np.float32)
    with torch.no_grad():
        expected = router(torch.from_numpy(x)).sigmoid().numpy()
    proba = probabilities(router, x)
    np.testing.assert_allclose(proba, expected, atol=STEP)
    np.testing.assert_allclose(proba / STEP, np.rint(proba / STEP), atol=1e-6)
    assert {tensor.dtype for tensor in router.state_dict().values()} == {torch.float32}


def test_read_only_rows_are_copied_and_others_shared():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    rows_of(x)[0, 0] = 9
    assert x[0, 0] == 9
    x.flags.writeable = False
    rows_of(x)[0, 0] = 1
    assert x[0, 0] == 9
    assert rows_of(x.T).is_contiguous()


def test_there_and_back(router):
    arrays = state_arrays("router", [router, router])
    assert {name.split(".")[0] for name in arrays} == {"router_0", "router_1"}
    before = torch.get_rng_state()
    back = restored("router", arrays, lambda k: Router(20, 16), 2)
    assert torch.equal(before, torch.get_rng_state())
    for other in back:
        assert not other.training
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), router.parameters(), strict=True))
