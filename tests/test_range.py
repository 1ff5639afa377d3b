"""What float32 holds is computed right, however large or small: values, scores, masks, scales."""
import numpy as np
import pytest
import reference
from arrays import numbers

import quant
from edgeattn import KVCache, MultiHeadAttention
from edgeattn import scaled_dot_product_attention as attend

H, D = 2, 16
LARGEST = np.finfo(np.float32).max


def qkv(L=70, S=150, Dv=D, heads=H):
    return numbers(1, heads, L, D), numbers(1, heads, S, D, seed=1), numbers(1, heads, S, Dv, seed=2)


def signs(*shape, seed=5):
    return np.sign(numbers(*shape, seed=seed))


def check(got, *arguments, **options):
    """Compare with the formula, both sides in units of the largest result."""
    oracle, plain = (reference.attention(*arguments, dtype=dtype, **options)[0] for dtype in (np.float64, np.float32))
    unit = max(np.abs(oracle).max(), np.finfo(np.float64).tiny)
    reference.assert_as_accurate(got / unit, oracle / unit, plain / unit)


@pytest.mark.parametrize("size", [1e19, 1e37, 1e38, 3.4e38])
@pytest.mark.parametrize("Dv", [5, 16, 37])
@pytest.mark.parametrize("sharper", [1, 9])
def test_values_whose_sum_is_none(size, Dv, sharper):
    q, k, _ = qkv()
    q *= np.float32(sharper)
    for v in (np.full((1, H, 150, Dv), size, np.float32), np.float32(size) * signs(1, H, 150, Dv)):
        permitted = np.tril(np.ones((70, 150), bool), 80)
        check(attend(q, k, v), q, k, v)
        check(attend(q, k, v, is_causal=True, causal_alignment="lower_right"), q, k, v, permitted)
        check(attend(q, k, v, permitted), q, k, v, permitted)
        check(attend(q, k, v, softcap=2.0), q, k, v, softcap=2.0)
        check(attend(q, k, v, return_weights=True)[0], q, k, v)
    np.testing.assert_allclose(attend(q, k, np.full_like(v, LARGEST)), LARGEST, rtol=1e-6)


@pytest.mark.parametrize("out", [False, True])
def test_values_of_layers(out):
    weights = [numbers(H * D, 24, seed=s) / 5 for s in range(2)]
    value = np.float32(4e37) * numbers(H * D, 24, seed=3) / 5
    output = 0.01 * np.abs(numbers(8, H * D, seed=4)) if out else None
    made = MultiHeadAttention(H, *weights, value, output)
    parameters = dict(q_weight=weights[0], k_weight=weights[1], v_weight=value)
    if out:
        parameters["out_weight"] = output
    x = numbers(2, 100, 24)
    keep = np.tril(np.ones((100, 100), bool))
    for options, permitted in (({}, None), ({"is_causal": True}, keep), ({"attn_mask": keep}, keep)):
        oracle, plain = (reference.multi_head_attention(parameters, H, x, x, x, permitted, dtype=dtype)[0] / 1e38
                         for dtype in (np.float64, np.float32))
        reference.assert_as_accurate(made(x, **options) / 1e38, oracle, plain)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("size", [1e-28, 1e37, 3.4e38])
@pytest.mark.parametrize("groups", [1, 6])
def test_values_in_caches(dtype, size, groups):
    cache = KVCache(1, H, 300, D, dtype=dtype)
    cache.append(numbers(1, H, 300, D), np.float32(size) * signs(1, H, 300, D))
    q = numbers(1, H * groups, 1, D, seed=7)
    k, v = cache.held()
    oracle = reference.attention(q, k, v)[0]
    np.testing.assert_allclose(cache.attend(q) / np.float64(size), oracle / size, rtol=0, atol=2e-6)
    q = numbers(1, H * groups, 5, D, seed=7)
    permitted = np.tril(np.ones((5, 300), bool), 295)
    np.testing.assert_allclose(cache.attend(q, is_causal=True) / np.float64(size),
                               reference.attention(q, k, v, permitted)[0] / size, rtol=0, atol=2e-6)


def test_small_values_under_low_scores():
    """Powers of scores far below zero, and values, are each small: their products are no normal float32."""
    q, k, v = np.full((1, 1, 40, D), 3, np.float32), np.full((1, 1, 50, D), -2.5, np.float32), qkv(S=50, heads=1)[2]
    k += 0.01 * numbers(1, 1, 50, D)
    for options in ({}, {"is_causal": True, "causal_alignment": "upper_left"}):
        wanted = attend(q, k, v, **options)
        np.testing.assert_allclose(wanted, attend(q, k, v, return_weights=True, **options)[0], rtol=0, atol=1e-5)
        for size in np.float32([2.0**-67, 2.0**-93]):
            np.testing.assert_array_equal(attend(q, k, size * v, **options), size * wanted)


def test_what_weighs_nothing_adds_nothing():
    q, k, v = qkv()
    v[:, :, 3] = 1e34
    far = np.zeros((70, 150), np.float32)
    far[:, 3] = -1000
    check(attend(q, k, v, far), q, k, v, bias=far)
    cache = KVCache(1, H, 300, D)
    k, v = np.concatenate([k, k], 2), np.concatenate([v, v], 2)
    k[:, :, 3::150] = -1000 * np.sign(q[:, :, :1])
    cache.append(k, v)
    check(cache.attend(q[:, :, :1]), q[:, :, :1], k, v)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e38, 2.3e38, 3e38, LARGEST, 1e300])
def test_masks_of_any_size(size, dtype):
    if dtype is np.float32:
        size = min(size, float(LARGEST))
    q, k, v = qkv(S=40)
    for chosen, mask in (([5], {5: size}), ([5, 7], {5: size, 7: size}),
                         ([s for s in range(40) if s != 5], {5: -size}), ([7], {5: -size, 7: size})):
        added = np.zeros((1, 40), dtype)
        for s, bias in mask.items():
            added[:, s] = bias
        keys = [np.ascontiguousarray(x[:, :, chosen]) for x in (k, v)]
        wanted = attend(q, *keys) if len(chosen) > 2 else keys[1].mean(2, keepdims=True).repeat(70, axis=2)
        for result in (attend(q, k, v, added), attend(q, k, v, added.repeat(70, axis=0), is_causal=False),
                       attend(q, k, v, added, softcap=50.0) if len(chosen) < 3 else wanted):
            np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-6)
        rough = attend(q, k, v, added, precision="int8")
        assert np.abs(rough - wanted).max() < 0.1
        np.testing.assert_allclose(attend(q, k, v, added, return_weights=True)[0], wanted, rtol=0, atol=1e-6)


def test_masks_beyond_the_bound_are_alike():
    """A mask is taken as at most 2.3e38, whichever way the call is computed."""
    q, k, v = qkv(S=2)
    for mask in ([3.2e38, 2.5e38], [-3.2e38, -2.5e38]):
        mask = np.float32([mask])
        for result in (attend(q, k, v, mask), attend(q, k, v, mask, return_weights=True)[0]):
            np.testing.assert_allclose(result, v.mean(2, keepdims=True).repeat(70, axis=2), rtol=0, atol=1e-6)


def test_masks_of_any_size_in_layers():
    made = MultiHeadAttention(H, *(numbers(H * D, 24, seed=s) / 5 for s in range(3)))
    x, mask = numbers(1, 40, 24), np.zeros((40, 40), np.float32)
    mask[:, 5] = 3e38
    only = np.arange(40) == 5
    np.testing.assert_allclose(made(x, attn_mask=mask), made(x, attn_mask=only[None]), rtol=0, atol=1e-6)
    dynamic = quant.quantize(made, scheme="dynamic")
    np.testing.assert_allclose(dynamic(x, attn_mask=mask), dynamic(x, attn_mask=only[None]), rtol=0, atol=0.1)


def test_infinite_masks_are_no_number():
    q, k, v = qkv(S=40)
    mask = np.zeros((70, 40), np.float32)
    mask[3, 5] = np.inf
    for result in (attend(q, k, v, mask), attend(q, k, v, mask, return_weights=True)[0]):
        assert np.isnan(result[:, :, 3]).all() and np.isfinite(result[:, :, :3]).all()


@pytest.mark.parametrize("scale", [3.4e38, -2.5e38, 1e30, 1e7, 1e-19, 1e-40, -1e-44])
def test_scales_of_any_size(scale):
    q, k, v = qkv()
    split = np.float32(10.0 ** -(np.log10(abs(scale)) / 2))
    q, k = q * split, k * split
    for options, permitted in (({}, None), ({"is_causal": True, "causal_alignment": "upper_left"},
                                            np.tril(np.ones((70, 150), bool)))):
        np.testing.assert_allclose(attend(q, k, v, scale=scale, **options),
                                   reference.attention(q, k, v, permitted, scale=scale)[0], rtol=0, atol=2e-6)
    for dtype in ("float32", "int8"):
        cache = KVCache(1, H, 150, D, dtype=dtype)
        cache.append(k, v)
        stored = cache.held()
        np.testing.assert_allclose(cache.attend(q[:, :, :1], scale=scale),
                                   reference.attention(q[:, :, :1], *stored, scale=scale)[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"scale must be 0, or from 1e-18 to 1000000.0 in size, with precision='int8'"):
        attend(q, k, v, scale=scale, precision="int8")


@pytest.mark.parametrize("softcap", [1e-30, 1e-20, 1e20, 3.4e38])
def test_softcaps_of_any_size(softcap):
    q, k, v = qkv()
    check(attend(q, k, v, softcap=softcap), q, k, v, softcap=softcap)
    made = MultiHeadAttention(H, *(numbers(H * D, 24, seed=s) / 5 for s in range(3)))
    x = numbers(1, 40, 24)
    wanted = made(x) if softcap > 1 else made(x, attn_mask=np.zeros((40, 40), np.float32), softcap=1e-7)
    np.testing.assert_allclose(made(x, softcap=softcap), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e19, 2.5e19, 3e30])
def test_scores_of_any_size(size):
    """The formula in float32 has infinite scores from 1.8e19 on; sums in float64 have none."""
    q, k, v = qkv()
    q, k = np.float32(size) * q, np.float32(size) * k
    most = np.arange(150) % 7 != 3
    for options, permitted in (({}, None), ({"attn_mask": most[None]}, most)):
        oracle = reference.attention(q, k, v, permitted)[0]
        for result in (attend(q, k, v, **options), attend(q, k, v, return_weights=True, **options)[0]):
            np.testing.assert_allclose(result, oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [1, 64, 140, 150])
def test_a_key_whose_score_is_minus_infinity_is_not_there(hidden):
    q, k, v = qkv()
    q = np.abs(q)
    k[:, :, :hidden, 0] = -np.inf
    left = [np.ascontiguousarray(x[:, :, hidden:]) for x in (k, v)]
    wanted = attend(q, *left)
    everything = np.ones((70, 150), bool)
    for options in ({}, {"attn_mask": everything}, {"window_size": (200, 200), "causal_alignment": "upper_left"}):
        np.testing.assert_allclose(attend(q, k, v, **options), wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(attend(q, k, v, return_weights=True, **options)[0], wanted, rtol=0, atol=1e-6)
    cache = KVCache(1, H, 150, D)
    cache.append(k, v)
    np.testing.assert_allclose(cache.attend(q[:, :, :1]), wanted[:, :, :1], rtol=0, atol=1e-6)


def test_what_float32_cannot_hold_is_infinite():
    q, k, v = (x.astype(np.float64) for x in qkv())
    assert np.isinf(attend(q, k, np.full_like(v, 1e300))).all()
    half = qkv()[2].astype(np.float16)
    assert np.isfinite(attend(*(x.astype(np.float16) for x in (q, k)), half)).all()
