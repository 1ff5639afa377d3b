"""precision="int8" of the CUDA target, in the emulator: the CPU's formula, within what the rounding of bytes allows."""
import dataclasses

import numpy as np
import pytest
import reference
from cases import CASES, Case
from cuda_cases import seen
from cuda_emulated import long_form
from test_cuda_float32 import EXTRA, SMALLER, attend, oracle, put
from test_cuda_precision import SHORT
from test_functional_dynamic import distance

import edgeattn
from edgeattn.kernels.cuda import host

pytestmark = pytest.mark.usefixtures("device")


def codes(x):
    """(codes, scales) of the last axis, as edgeattn/kernels/cpu/dynamic.py has them: float32, a multiplication each."""
    largest = np.abs(x).max(-1, keepdims=True, initial=0)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.minimum(np.float32(127) / largest, np.finfo(np.float32).max)
    return np.rint(x * inverse), largest * np.float32(1 / 127)


def smoothed(k, permitted):
    """k (B, Hkv, S, D) minus the weighted mean of its first keys."""
    k = k.copy()
    for b, h in np.ndindex(k.shape[:2]):
        first, there = k[b, h, :32], permitted[b].any((0, 1))[:32]
        size = np.abs(first).max(-1)
        weight = np.where(there & (size > 1e-30), 1 / np.maximum(size, np.float32(1e-30)), 0)
        k[b, h] -= (weight @ np.where(there[:, None], first, 0) / max(weight.sum(), 1e-30)).astype(np.float32)
    return k


def expected(case, arrays, masks):
    """(result with exact probabilities, the most that their rounding to bytes changes), in float64."""
    permitted = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"], causal=case.is_causal,
        alignment=case.causal_alignment or "upper_left", window=case.window_size, lengths=masks["lengths"])
    bias = np.zeros((1, 1, 1, 1)) if masks["bias"] is None else masks["bias"].astype(np.float64)
    permitted = np.broadcast_to(permitted & (bias > -np.inf), (case.B, case.H, case.L, case.S))
    scale = np.float32(case.D**-0.5 if case.scale is None else case.scale)
    q, k, v = arrays[0] * np.float32(scale * 1.4426950408889634), smoothed(arrays[1], permitted), arrays[2]
    (qc, qs), (kc, ks), (vc, vs) = (tuple(np.repeat(part, case.H // x.shape[1], 1).astype(np.float64) for part in codes(x))
                                    for x in (q, k, v))
    vs = np.maximum(vs, 2.0**-60).swapaxes(2, 3)
    w = np.where(permitted, (qc @ kc.swapaxes(2, 3)) * qs * ks.swapaxes(2, 3) + np.where(permitted, bias, 0) * np.log2(np.e),
                 -np.inf)
    top = w.max(-1, keepdims=True)
    w = w - np.where(np.isfinite(top), top, 0) + np.log2(vs)
    top = w.max(-1, keepdims=True)
    p = 255 * np.exp2(w - np.where(np.isfinite(top), top, 0))
    total = (p / vs).sum(-1, keepdims=True)
    exact = p @ vc / np.where(total > 0, total, 1)
    # Half a byte at most is lost or won by every key, above and below the line; the largest byte is exact.
    half = 0.5 * permitted.astype(np.float64)
    least = np.maximum(total - (half / vs).sum(-1, keepdims=True), (p / vs * (p == 255)).max(-1, keepdims=True))
    return exact, (half @ np.abs(vc) + np.abs(exact) * (half / vs).sum(-1, keepdims=True)) / np.where(least > 0, least, 1)


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[] if case.name in {*SHORT, "cross-17-33"} else [long_form])
    for case in [*CASES, *EXTRA] if not case.softcap])
def test_case(case):
    case = dataclasses.replace(case, **SMALLER.get(case.name, {}))
    arrays, masks = case.qkv(), case.masks()
    got = attend(case, arrays, masks, precision="int8").numpy()
    exact = oracle(case, arrays, masks, np.float64)
    assert got.shape == exact.shape and got.dtype == np.float32
    if case.name != "scale-large":  # there a step of a score is a large part of a probability
        assert distance(got, exact) < 0.03
    if case.S and case.D and case.B and case.H:
        want, rounding = expected(case, arrays, masks)
        # the last bits of a mean of keys, and of a score in a product with the largest code, decide some codes
        assert (np.abs(got - want) <= rounding + 2e-3 * np.abs(arrays[2]).max(initial=0)).all()


def check(case):
    arrays, masks = case.qkv(), case.masks()
    got = attend(case, arrays, masks, precision="int8").numpy()
    want, rounding = expected(case, arrays, masks)
    assert (np.abs(got - want) <= rounding + 2e-3).all() and distance(got, oracle(case, arrays, masks, np.float64)) < 0.03


def test_everything_without_a_softcap():
    check(Case("int8", B=2, H=4, Hkv=2, L=17, S=150, D=80, Dv=72, is_causal=True, causal_alignment="lower_right",
               window_size=(120, -1), scale=0.2, bool_mask=(2, 1, 17, 150), kv_lengths=True))


def test_a_window_may_begin_at_any_key():
    check(Case("int8-window", B=1, H=1, L=5, S=150, D=16, window_size=(22, 0), causal_alignment="lower_right"))


def test_codes_and_scales_are_the_cpus(device):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 5, 70), np.float32)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2] = 0, np.nan, x[0, 0, 2] * np.float32(1e-42)
    minus, factor = rng.standard_normal((2, 3, 70), np.float32), np.float32(0.3)
    for options, given in (({}, x), (dict(factor=factor, minus=seen(minus)), (x + minus[:, :, None]) * factor)):
        out, scale = seen(np.full((2, 3, 5, 96), 9, np.int8)), seen(np.zeros((2, 3, 5), np.float32))
        host.store_rows(seen(x), out, scale, 0, up=96, rule="dynamic", **options)
        with np.errstate(invalid="ignore"):
            want, scales = codes(given)
        want[0, 0, 1] = 0
        np.testing.assert_array_equal(scale.owner.numpy(), scales[..., 0])
        np.testing.assert_array_equal(out.owner.numpy()[..., :70], want)
        assert not out.owner.numpy()[..., 70:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_what_is_behind_a_mask_stays_there(bad):
    q, k, v = Case("behind", B=1, H=2, L=5, S=40, D=16).qkv()
    keep = np.arange(40) % 7 != 3
    clean = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), put(keep), precision="int8").numpy()
    k[:, :, 3], v[:, :, 10] = bad, bad
    for mask in (keep, np.where(keep, np.float32(0), np.float32(-np.inf)).reshape(1, 40)):
        got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), put(mask), precision="int8").numpy()
        np.testing.assert_array_equal(got, clean)
    v[:, :, 3] = np.nan
    causal = edgeattn.scaled_dot_product_attention(*(put(x[:, :, :5]) for x in (q, np.abs(q), v)), is_causal=True,
                                                   precision="int8").numpy()
    assert np.isfinite(causal[:, :, :3]).all() and np.isnan(causal[:, :, 3:]).all()


@pytest.mark.parametrize("strong", [0.3, 0.6])
def test_a_strong_key_takes_no_weight_from_the_others(strong):
    """Nor do those win any: what is divided by is what was multiplied, and every 64 keys have a range of their own."""
    rng, keys, size = np.random.default_rng(4), 1024, 16
    q = np.zeros((1, 1, 3, size), np.float32)
    q[..., 0] = np.sqrt(size)
    k = rng.standard_normal((1, 1, keys, size), np.float32) * np.float32(0.01)
    k[..., 0] = 0
    k[0, 0, 100, 0] = np.log(strong / (1 - strong) * (keys - 1))
    v = 1 + rng.standard_normal((1, 1, keys, size), np.float32) * np.float32(0.3)
    v[0, 0, 100] = rng.standard_normal(size)
    for values, most in ((np.ones_like(v), 1e-5), (v, 0.05)):
        got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, values)), precision="int8").numpy()
        want = reference.attention(q, k, values)[0]
        assert np.abs(got - want).max() < most * np.abs(want).max()


@pytest.mark.parametrize("low", [-1e9, float(np.finfo(np.float32).min)])
def test_a_row_of_one_huge_finite_mask_is_the_mean_of_the_values(low):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 8), np.float32) for n in (7, 70, 70))
    v *= np.exp(rng.standard_normal((1, 2, 70, 1), np.float32))  # ranges of their own
    mask = np.zeros((7, 70), np.float32)
    mask[3:] = low
    mask[5, 20:] = -np.inf
    got = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v, mask)), precision="int8").numpy()
    want = reference.attention(q, k, v, bias=np.where(mask == np.float32(low), 0, mask), scale=0.0)[0]
    assert np.abs(got - want)[:, :, 3:].max() < 0.01 * np.abs(v).max()


def test_an_offset_that_all_keys_share_changes_little():
    q, k, v = Case("offset", B=1, H=2, L=9, S=70, D=32).qkv()
    offset = 30 * np.random.default_rng(2).standard_normal((1, 2, 1, 32)).astype(np.float32)
    exact = reference.attention(q, k, v)[0]
    plain, moved = (edgeattn.scaled_dot_product_attention(*map(put, (q, keys, v)), precision="int8").numpy()
                    for keys in (k, k + offset))
    assert distance(moved, exact) < 1.3 * distance(plain, exact)


@long_form
@pytest.mark.parametrize("name", ["cross-17-33", "bool-full", "one-query-257", "long"])
def test_as_the_cpu(name):
    case = next(case for case in CASES if case.name == name)
    arrays, masks = case.qkv(), case.masks()
    got = attend(case, arrays, masks, precision="int8").numpy()
    mask = masks["keep"]
    cpu = edgeattn.scaled_dot_product_attention(*arrays, mask, precision="int8")
    _, rounding = expected(case, arrays, masks)
    assert (np.abs(got - cpu) <= 2 * rounding + 2e-3).all()  # each rounds its bytes at the largest score it knows of


def test_errors():
    q, k, v = Case("errors", B=1, H=2, L=3, S=3, D=4).qkv()
    with pytest.raises(ValueError, match="softcap must be left out with precision='int8', got 2.0"):
        edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), softcap=2.0, precision="int8")
    with pytest.raises(TypeError, match="query must be float32 with precision='int8' on CUDA, got dtype float16"):
        edgeattn.scaled_dot_product_attention(*(put(x.astype(np.float16)) for x in (q, k, v)), precision="int8")
