"""Several kernels in one call."""
import numpy as np
import pytest

from edgeattn import threads
from edgeattn.kernels.cpu.layer_dynamic import DynamicLayer
from edgeattn.kernels.cpu.layer_float32 import FloatLayer
from edgeattn.kernels.cpu.stages import Stages


def layers(rng, E, H):
    def weights():
        return [*(rng.standard_normal((E, E)).astype(np.float32) / np.float32(np.sqrt(E)) for _ in range(4)),
                *(rng.standard_normal(E).astype(np.float32) for _ in range(4))]
    return FloatLayer(H, H, *weights(), 0.3), DynamicLayer(H, H, *weights(), 0.3), FloatLayer(H, H, *weights(), 0.3)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("L", "E", "H"), [(1, 16, 2), (37, 64, 4), (130, 96, 3)])
def test_stages_give_the_bytes_of_calls_one_by_one(L, E, H, count, monkeypatch):
    rng = np.random.default_rng(L)
    x = rng.standard_normal((2, L, E)).astype(np.float32)
    keep = rng.random((2, 1, 1, L)) > 0.3
    first, second, third = layers(rng, E, H)
    one, two, three = (np.empty_like(x) for _ in range(3))
    first(x, x, x, one, keep=keep)
    second(one, one, one, two, band=(-3, 0))
    third(two, x, x, three)
    got = [np.full_like(x, np.nan) for _ in range(3)]
    for least in (0, threads.SMALLEST_SHARED_WORK):
        monkeypatch.setattr(threads, "SMALLEST_SHARED_WORK", least)
        stages = Stages([first.prepare(x, x, x, keep), second.prepare(one, one, one, band=(-3, 0)),
                         third.prepare(two, x, x)])
        threads.set_num_threads(count)
        stages((x, x, x, got[0], keep), (got[0], got[0], got[0], got[1]), (got[1], x, x, got[2]))
        threads.set_num_threads(1)
        for result, wanted in zip(got, (one, two, three), strict=True):
            np.testing.assert_array_equal(result, wanted)
            result[:] = np.nan
