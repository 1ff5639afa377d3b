"""One query per head against a cache: accurate whatever the sizes and blocks, the same bits on any number of threads."""
import numpy as np
import pytest
import reference

from edgeattn import threads
from edgeattn.kernels.cpu.decode import decode
from edgeattn.kernels.cpu.decode_blocks import BLOCK

# H, Hkv, D, Dv: one query a key head, several, more than the registers take at once; sizes that fill no vector
SHAPES = [(4, 4, 64, 64), (6, 3, 16, 16), (6, 1, 5, 3), (10, 2, 72, 100), (7, 1, 128, 20)]
LENGTHS = (1, 15, BLOCK, BLOCK + 1, 700)
DIGITS_ERROR = 1e-6  # of int8, results being at most 1 or so: digits keep 23 bits of the largest number of a row


pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def made(shape, S):
    H, Hkv, D, Dv = shape
    rng = np.random.default_rng((S, *shape))
    return (rng.standard_normal((2, H, D)).astype(np.float32), rng.standard_normal((2, Hkv, S, D)).astype(np.float32),
            rng.standard_normal((2, Hkv, S, Dv)).astype(np.float32))


def quantized(x):
    scale = np.abs(x).max(-1) / np.float32(127)
    return np.rint(x / scale[..., None]).astype(np.int8), scale


def exact_and_plain(q, k, v, softcap=0.0, lengths=None):
    permitted = None if lengths is None else np.arange(k.shape[2]) < lengths[:, None, None, None]
    return [reference.attention(q[:, :, None], k, v, permitted, softcap=softcap, dtype=dtype)[0][:, :, 0]
            for dtype in (np.float64, np.float32)]


@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_accurate(shape, S):
    q, k, v = made(shape, S)
    (k8, k_scale), (v8, v_scale) = quantized(k), quantized(v)
    stored = k8 * k_scale[..., None], v8 * v_scale[..., None]
    for options in ({}, {"softcap": 2.0}, {"lengths": np.array([S, S // 2], np.int64)}):
        around = np.full((2, q.shape[1] + 2, v.shape[3]), 77, np.float32)
        out = decode(q, k, v, around[:, 1:-1], q.shape[2] ** -0.5, **options)
        reference.assert_as_accurate(out, *exact_and_plain(q, k, v, **options))
        out = decode(q, k8, v8, around[:, 1:-1], q.shape[2] ** -0.5, k_scale=k_scale, v_scale=v_scale, **options)
        np.testing.assert_allclose(out, exact_and_plain(q, *stored, **options)[0], rtol=0, atol=DIGITS_ERROR)
        assert (around[:, 0] == 77).all() and (around[:, -1] == 77).all()


def test_peaked_and_long_rows_of_int8():
    """Weights far below the largest of their block add up: what their digits leave out does not show."""
    q, k, v = made((2, 2, 64, 64), 4000)
    (k8, k_scale), (v8, v_scale) = quantized(k), quantized(v)
    for sharper in (1, 8):
        out = decode(sharper * q, k8, v8, np.zeros_like(q), 0.125, k_scale=k_scale, v_scale=v_scale)
        exact, plain = exact_and_plain(sharper * q, k8 * k_scale[..., None], v8 * v_scale[..., None])
        reference.assert_as_accurate(out, exact, plain)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_threads_share_the_keys_of_one_head_and_do_not_change_a_bit(shape):
    q, k, v = made(shape, 3000)
    (k8, k_scale), (v8, v_scale) = quantized(k), quantized(v)
    alone, alone8 = (np.zeros(q.shape[:2] + v.shape[3:], np.float32) for _ in range(2))
    decode(q, k, v, alone, 0.2)
    decode(q, k8, v8, alone8, 0.2, k_scale=k_scale, v_scale=v_scale)
    for count in (2, 3):
        threads.set_num_threads(count)
        for _ in range(20):
            np.testing.assert_array_equal(decode(q, k, v, np.zeros_like(alone), 0.2), alone)
            np.testing.assert_array_equal(
                decode(q, k8, v8, np.zeros_like(alone8), 0.2, k_scale=k_scale, v_scale=v_scale), alone8)


def test_rows_past_the_last_key_are_not_read():
    """Memory ends with the last row; what lies behind it belongs to others."""
    for D in (5, 16, 60):
        q, k, v = made((2, 1, D, D), 33)
        around = np.full((2, 2, 1, 50, D), np.nan, np.float32)
        around[0, :, :, :33], around[1, :, :, :33] = k, v
        out = decode(q, around[0, :, :, :33], around[1, :, :, :33], np.zeros_like(q), D ** -0.5)
        reference.assert_as_accurate(out, *exact_and_plain(q, k, v))
