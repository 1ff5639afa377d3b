"""precision="float16" and "tf32" of the CUDA target, in the emulator, within what the formats' rounding allows."""
import dataclasses

import numpy as np
import pytest
import reference
from cases import CASES, Case
from cuda_emulated import long_form
from test_cuda_float32 import EXTRA, SMALLER, attend, put

import edgeattn

pytestmark = pytest.mark.usefixtures("device")
PRECISIONS = ("float16", "tf32")
# every option, mask and way through the kernel once; the others differ in sizes
SHORT = {"length-33", "everything", "softcap-mask", "scale-negative", "padding-float", "bool-heads", "float-keys", "lengths-lower",
         "window-both", "empty-keys", "empty-size", "size-1", "size-65", "grouped-4-2", "tiles-65-129", "pieces", "wide-pieces",
         "band-tiles", "decode-split-causal"}


def rounded(x, precision):
    """x as the tensor cores read it."""
    if precision == "float16":
        return x.astype(np.float16).astype(np.float32)
    digits, exponent = np.frexp(x.astype(np.float64))
    return (np.copysign(np.floor(np.abs(digits) * 2**11 + 0.5), digits) * 2.0**(exponent - 11)).astype(np.float32)


def check(got, case, arrays, masks, precision):
    """got is what float64 gives of the rounded inputs, but for the rounding of probabilities, and float32's own errors.

    A probability in (0, 1] is off by 2**-11 of itself, a small one of float16 by 2**-25; the largest is 1, and so is
    their sum at least. float32's errors are allowed twice those of plain float32, as everywhere.
    """
    permitted = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"], causal=case.is_causal,
        alignment=case.causal_alignment or "upper_left", window=case.window_size, lengths=masks["lengths"])
    q, k, v = (rounded(x, precision) for x in arrays)
    exact, plain = (reference.attention(q, k, v, permitted, masks["bias"], scale=case.scale, softcap=case.softcap, dtype=dtype)
                    for dtype in (np.float64, np.float32))
    size = np.abs(np.repeat(v.astype(np.float64), case.H // case.kv_heads, 1)) if case.H else np.abs(v)
    allowed = 2.0**-11 * exact[1] @ size + 2.0**-25 * size.sum(2, keepdims=True)
    own = 2 * np.abs(plain[0] - exact[0]).max(initial=0) + 4 * np.spacing(np.float32(np.abs(exact[0]).max(initial=0)))
    assert got.dtype == np.float32 and got.shape == exact[0].shape
    assert (np.abs(got - exact[0]) <= allowed + own).all()
    assert not got[~np.broadcast_to(permitted, exact[1].shape).any(-1)].any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[] if case.name in SHORT else [long_form]) for case in [*CASES, *EXTRA]])
def test_case(case, precision):
    case = dataclasses.replace(case, **SMALLER.get(case.name, {}))
    arrays, masks = case.qkv(), case.masks()
    check(attend(case, arrays, masks, precision=precision).numpy(), case, arrays, masks, precision)


def test_the_short_form_names_cases():
    assert {case.name for case in [*CASES, *EXTRA]} >= SHORT


@pytest.mark.parametrize("precision", PRECISIONS)
def test_alibi_and_lse(precision):
    case = Case("alibi", B=1, H=2, L=5, S=70, D=8)
    arrays, slopes = case.qkv(), np.array([0.5, 0.02], np.float32)
    bias = -slopes[:, None, None] * np.abs(np.arange(5)[:, None] + 65 - np.arange(70)).astype(np.float32)
    got, lse = edgeattn.scaled_dot_product_attention(
        *map(put, arrays), alibi_slopes=put(slopes), causal_alignment="lower_right", return_lse=True, precision=precision)
    check(got.numpy(), case, arrays, {**case.masks(), "bias": bias}, precision)
    q, k = (rounded(x, precision).astype(np.float64) for x in arrays[:2])
    want = np.log(np.exp(q @ k.swapaxes(2, 3) / np.sqrt(8) + bias).sum(-1))  # no probability is rounded for the sum
    np.testing.assert_allclose(lse.numpy(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float16_arrays(precision):
    case = Case("half", B=1, H=2, L=40, S=70, D=72, Dv=136)
    for size in (72, 7):
        arrays = [np.ascontiguousarray(x[..., :size]).astype(np.float16) for x in case.qkv()]
        got = edgeattn.scaled_dot_product_attention(*map(put, arrays), precision=precision).numpy()
        want, weights = reference.attention(*arrays)
        allowed = 2.0**-11 * (weights @ np.abs(arrays[2]) + np.abs(want)) + 1e-5  # of probabilities, and of the result
        assert got.dtype == np.float16 and (np.abs(got - want) <= allowed).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_goes_where_it_is_seen(precision):
    case = Case("not-finite", B=1, H=1, L=70, S=70, D=8)
    q, k, v = case.qkv()
    v[0, 0, 3, 0], v[0, 0, 20, 1], v[0, 0, 65, 1], v[0, 0, 66, 2] = np.nan, np.inf, -np.inf, -np.inf
    v[0, 0, 10:12, 3], v[0, 0, 21:23, 4] = (np.inf, np.nan), (np.inf, -np.inf)
    k[0, 0, 68] = np.nan
    got, want = (edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), is_causal=True, precision=name).numpy()
                 for name in (precision, "float32"))
    for what in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(what(got), what(want))
    there = np.isfinite(want)
    np.testing.assert_allclose(got[there], want[there], atol=0.01)
    keep = np.arange(70) != 68
    bad = ~np.isfinite(v).all(-1)[0, 0]
    got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), put(keep & ~bad), precision=precision).numpy()
    assert np.isfinite(got).all()


def test_the_largest_numbers():
    q, k, v = Case("large", B=1, H=1, L=3, S=5, D=4).qkv()
    v[0, 0, :, 0] = 65519, 65000, -65519, 0, 1
    v[0, 0, :, 1], v[0, 0, :, 2] = 65520, 1e30
    got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), precision="float16").numpy()
    assert np.isfinite(got[..., [0, 3]]).all() and np.isposinf(got[..., 1:3]).all()
    got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), precision="tf32").numpy()
    np.testing.assert_allclose(got, reference.attention(q, k, v)[0], rtol=2e-3, atol=2e-3 * 65520)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float_layer_and_its_cache(precision):
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((16, 16), np.float32) / 4 for name in ("q_weight", "k_weight", "v_weight", "out_weight")}
    layer = edgeattn.MultiHeadAttention(2, **weights)
    placed, x = layer.to("cuda", precision=precision), rng.standard_normal((1, 9, 16), np.float32)
    exact = layer.to("cuda")(put(x), is_causal=True).numpy()
    got = placed(put(x), is_causal=True).numpy()
    assert (got != exact).any() and np.abs(got - exact).max() < 4e-3
    cache = edgeattn.KVCache(1, 2, 20, 8).to("cuda")
    parts = [placed(put(x[:, begin:end]), kv_cache=cache, is_causal=True).numpy() for begin, end in ((0, 5), (5, 9))]
    np.testing.assert_allclose(np.concatenate(parts, 1), got, atol=1e-3)


def test_errors():
    q, k, v = Case("errors", B=1, H=2, L=3, S=3, D=4).qkv()
    with pytest.raises(ValueError, match="precision must be 'float32' or 'int8' for arrays on the CPU, got 'tf32'"):
        edgeattn.scaled_dot_product_attention(q, k, v, precision="tf32")
    with pytest.raises(ValueError, match="precision must be 'float32', 'int8', 'float16' or 'tf32', got 'half'"):
        edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), precision="half")
    layer = edgeattn.MultiHeadAttention(1, *(np.eye(4, dtype=np.float32),) * 3)
    with pytest.raises(ValueError, match="precision must be 'float32', 'float16' or 'tf32', got 'int8'"):
        layer.to("cuda", precision="int8")
    with pytest.raises(ValueError, match="precision must be 'float32' on the CPU, got 'tf32'"):
        layer.to("cpu", precision="tf32")
