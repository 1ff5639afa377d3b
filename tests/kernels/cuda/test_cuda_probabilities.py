"""Probabilities, added keys, gates, and caches with a window or fixed scales on the GPU, in the emulator."""
import dataclasses

import numpy as np
import pytest
import reference
from cases import CASES
from cuda_emulated import long_form
from test_cuda_float32 import EXTRA, SMALLER, attend, put
from test_cuda_layers import as_held, parameters

import edgeattn
import quant

pytestmark = pytest.mark.usefixtures("device")
ALL = {case.name: dataclasses.replace(case, **SMALLER.get(case.name, {})) for case in [*CASES, *EXTRA]}
SHORT = ("cross-17-33", "everything", "decode-split", "band-tiles", "lengths-lower", "bool-full", "pieces")


def wanted(case, arrays, masks):
    """(weights, result) by dtype, float64 and float32."""
    permitted = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"], causal=case.is_causal,
        alignment=case.causal_alignment or "upper_left", window=case.window_size, lengths=masks["lengths"])
    found = [reference.attention(*arrays, permitted, masks["bias"], scale=case.scale, softcap=case.softcap, dtype=dtype)
             for dtype in (np.float64, np.float32)]
    return zip(*found, strict=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SHORT else [long_form]) for n in ALL])
def test_probabilities(name):
    case = ALL[name]
    arrays, masks = case.qkv(), case.masks()
    result, weights = attend(case, arrays, masks, return_weights=True)
    results, probabilities = wanted(case, arrays, masks)
    reference.assert_as_accurate(result.numpy(), *results)
    exact, plain = probabilities
    if case.D > 64:  # a score is one chain of D products: docs/cuda.md
        plain = exact + 2 * (plain - exact)
    reference.assert_as_accurate(weights.numpy(), exact, plain)
    assert not weights.numpy()[probabilities[0] == 0].any()


def test_probabilities_with_the_log_of_the_sum_and_in_other_precisions():
    case = ALL["cross-17-33"]
    arrays, masks = case.qkv(), case.masks()
    _, alone = attend(case, arrays, masks, return_lse=True)
    result, weights, lse = attend(case, arrays, masks, return_weights=True, return_lse=True)
    np.testing.assert_allclose(lse.numpy(), alone.numpy(), rtol=1e-6)
    for precision in ("float16", "tf32"):
        _, near = attend(case, arrays, masks, return_weights=True, precision=precision)
        np.testing.assert_allclose(near.numpy(), weights.numpy(), atol=2e-3)
        np.testing.assert_allclose(near.numpy().sum(-1), 1, atol=1e-5)  # of the same scores as their sum
        assert (near.numpy() != weights.numpy()).any()
    _, half = attend(case, [x.astype(np.float16) for x in arrays], masks, return_weights=True)
    assert half.numpy().dtype == np.float16
    np.testing.assert_allclose(half.numpy(), weights.numpy(), atol=2e-3)


def test_nan_shows_where_it_is_seen():
    q, k, v = ALL["length-9"].qkv()
    k[0, 0, 4] = np.nan
    weights = edgeattn.scaled_dot_product_attention(*map(put, (q, k, v)), is_causal=True, return_weights=True)[1].numpy()
    assert np.isnan(weights[0, 0, 4:]).any(-1).all() and np.isfinite(weights[0, 0, :4]).all()
    assert not weights[0, 0][np.triu_indices(9, 1)].any()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_by_hand(weights, x, permitted, dtype, bias=None, keys=None):
    """(result, weights) of a layer of `parameters`, 2 heads and 1 for keys; `keys` are those of x unless given."""
    def linear(x, name):
        return x.astype(dtype) @ weights[f"{name}_weight"].astype(dtype).T + weights[f"{name}_bias"].astype(dtype)

    B, L, _ = x.shape
    q, k, v = (linear(x, n).reshape(B, L, h, -1).swapaxes(1, 2) for n, h in (("q", 2), ("k", 1), ("v", 1)))
    k, v = (k, v) if keys is None else keys
    if "bias_k" in weights:
        k, v = (np.concatenate([x, np.broadcast_to(weights[name].astype(dtype), (B, 1, 1, x.shape[3]))], 2)
                for x, name in ((k, "bias_k"), (v, "bias_v")))
        permitted = np.concatenate([permitted, np.ones((*permitted.shape[:3], 1), bool)], 3)
    if weights.get("add_zero_attn"):
        k, v = (np.concatenate([x, np.zeros((B, 1, 1, x.shape[3]), dtype)], 2) for x in (k, v))
        permitted = np.concatenate([permitted, np.ones((*permitted.shape[:3], 1), bool)], 3)
    context, probabilities = reference.attention(q, k, v, permitted, bias, scale=1 / np.sqrt(8), dtype=dtype)
    context = context.swapaxes(1, 2).reshape(B, L, -1)
    if "gate_weight" in weights:
        context = context * sigmoid(linear(x, "gate"))
    return (linear(context, "out") if "out_weight" in weights else context), probabilities


def as_accurate(got, want):
    """As in test_cuda_layers."""
    want, plain = (np.asarray(x) for x in want)
    allowed = 5 * np.abs(plain - want).max() + 4 * np.spacing(np.float32(np.abs(want).max()))
    assert got.shape == want.shape and np.abs(got - want).max() <= allowed


def with_extras(rng, provider):
    weights = parameters(rng)
    if "keys" in provider:
        weights |= {"bias_k": rng.standard_normal(8, np.float32), "bias_v": rng.standard_normal(12, np.float32),
                    "add_zero_attn": True}
    if "gate" in provider:
        weights |= {"gate_weight": rng.standard_normal((24, 24), np.float32),
                    "gate_bias": rng.standard_normal(24, np.float32)}
    if "heads" in provider:
        del weights["out_weight"], weights["out_bias"]
    return weights


@pytest.mark.parametrize("provider", [
    (), pytest.param(("keys",), marks=long_form), pytest.param(("gate",), marks=long_form), ("keys", "gate", "heads")], ids="-".join)
def test_layers(provider):
    rng = np.random.default_rng(1)
    weights = with_extras(rng, provider)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    x, keep = rng.standard_normal((2, 9, 24), np.float32), rng.random((2, 2, 9, 9)) < 0.6
    keep[1, 0, 3] = False
    want = [layer_by_hand(weights, x, keep & np.tri(9, dtype=bool), dtype) for dtype in (np.float64, np.float32)]
    results, probabilities = zip(*want, strict=True)
    result, got = layer.to("cuda")(put(x), attn_mask=put(keep), is_causal=True, need_weights=True)
    as_accurate(result.numpy(), results)
    as_accurate(got.numpy(), probabilities)
    alone = layer.to("cuda")(put(x), attn_mask=put(keep), is_causal=True).numpy()
    as_accurate(alone, results)
    there, mean = layer.to("cuda")(x.astype(np.float64), attn_mask=keep, is_causal=True, need_weights=True,
                                   average_attn_weights=True)
    assert there.dtype == mean.dtype == np.float64
    as_accurate(there, results)
    as_accurate(mean, [each.mean(1) for each in probabilities])
    one, of_one = layer.to("cuda")(x[1], attn_mask=keep[1], is_causal=True, need_weights=True)
    np.testing.assert_array_equal(one, result.numpy()[1])
    np.testing.assert_array_equal(of_one, got.numpy()[1])


@pytest.mark.parametrize("provider", [(), ("keys",), ("gate",)], ids="-".join)
def test_dynamic_layers(provider):
    rng = np.random.default_rng(2)
    weights = with_extras(rng, provider)
    layer = quant.quantize(edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1), scheme="dynamic").to("cuda")
    x = rng.standard_normal((2, 9, 24), np.float32)
    want, probabilities = layer_by_hand(weights, x, np.broadcast_to(np.tri(9, dtype=bool), (2, 2, 9, 9)), np.float64)
    result, got = layer(put(x), is_causal=True, need_weights=True)
    for ours, exact in ((result, want), (layer(put(x), is_causal=True), want), (got, probabilities)):
        assert np.linalg.norm(ours.numpy() - exact) < 0.03 * np.linalg.norm(exact)


def test_keys_and_weights_of_nothing():
    rng = np.random.default_rng(3)
    weights = with_extras(rng, ("keys",))
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1).to("cuda")
    result, got = layer(rng.standard_normal((1, 3, 24), np.float32), np.zeros((1, 0, 24), np.float32), need_weights=True)
    assert got.shape == (1, 2, 3, 2) and np.isfinite(result).all()
    bare = edgeattn.MultiHeadAttention(2, **parameters(rng), num_kv_heads=1).to("cuda")
    _, none = bare(put(np.ones((1, 3, 24), np.float32)), put(np.zeros((1, 0, 24), np.float32)), need_weights=True,
                   average_attn_weights=True)
    assert none.shape == (1, 3, 0)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    q, k, v = (put(np.zeros((1, 2, 3, n), np.float32)) for n in (4, 4, 0))
    result, got, lse = edgeattn.scaled_dot_product_attention(q, k, v, return_weights=True, return_lse=True)
    assert result.shape == (1, 2, 3, 0)
    np.testing.assert_allclose(got.numpy(), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(lse.numpy(), np.log(3), rtol=1e-6)


FIXED = (0.03, 0.03)


@pytest.mark.parametrize(("dtype", "scales", "scheme", "provider"), [
    ("float32", None, "float32", ("keys", "gate")), ("int8", FIXED, "dynamic", ()),
    *(pytest.param(*rest, marks=long_form) for rest in (
        ("int8", None, "float32", ()), ("int8", None, "dynamic", ("keys",)), ("int8", FIXED, "float32", ("gate",))))])
def test_a_window_is_seen_and_no_more(dtype, scales, scheme, provider):
    rng = np.random.default_rng(4)
    weights = with_extras(rng, provider)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    if scheme == "dynamic":
        layer = quant.quantize(layer, scheme="dynamic")
    placed = layer.to("cuda")
    x, keep = rng.standard_normal((1, 22, 24), np.float32), rng.random((22, 22)) < 0.8
    results, probabilities = [], np.zeros((1, 2, 22, 22 + 2 * ("keys" in provider)), np.float32)
    cache = edgeattn.KVCache(1, 1, 12, 8, value_dim=12, dtype=dtype, scales=scales, window=7).to("cuda")
    for begin, end in ((0, 10), (10, 21), (21, 22)):  # the second in two pieces, and tokens move
        result, got = placed(put(x[:, begin:end]), kv_cache=cache, is_causal=True, need_weights=True,
                             attn_mask=put(np.ascontiguousarray(keep[begin:end, :end])))
        results.append(result.numpy())
        probabilities[:, :, begin:end, :end] = got.numpy()[..., :end]
        probabilities[:, :, begin:end, 22:] = got.numpy()[..., end:]
    assert cache.length == 22 and cache.start >= 22 - 12
    seen = np.broadcast_to(keep & np.tri(22, dtype=bool) & ~np.tri(22, k=-7, dtype=bool), (1, 2, 22, 22))
    want, exact = layer_by_hand(weights, x, seen, np.float64)
    near = 1e-5 if dtype == scheme == "float32" else 0.03
    for ours, theirs in ((np.concatenate(results, 1), want), (probabilities, exact)):
        assert np.linalg.norm(ours - theirs) < near * np.linalg.norm(theirs)
    assert not probabilities[..., :22][~seen].any()


def test_what_a_cache_with_a_window_holds():
    rng = np.random.default_rng(5)
    k, v = rng.standard_normal((2, 2, 30, 6), np.float32), rng.standard_normal((2, 2, 30, 5), np.float32)
    for dtype, scales in (("float32", None), ("int8", None), ("int8", (0.02, 0.05))):
        gpu = edgeattn.KVCache(2, 2, 15, 6, value_dim=5, dtype=dtype, window=11, scales=scales).to("cuda")
        for begin, end in ((0, 5), (5, 15), (15, 16), (16, 20), (20, 25)):
            gpu.append(put(k[:, :, begin:end].copy()), put(v[:, :, begin:end].copy()))
        held = slice(gpu.start, 25)
        assert 10 <= 25 - gpu.start <= 15
        for ours, given, scale in zip(gpu.held(), (k, v), scales or (None, None), strict=True):
            given = given[:, :, held]
            fixed = None if scale is None else np.clip(np.rint(given / np.float32(scale)), -127, 127) * np.float32(scale)
            np.testing.assert_array_equal(ours, as_held(given, dtype) if scale is None else fixed)
        q, mask = rng.standard_normal((2, 4, 2, 6), np.float32), rng.standard_normal((2, 25), np.float32)
        result, got = gpu.attend(put(q), attn_mask=put(mask), is_causal=True, return_weights=True)
        bounds = reference.visible(2, 4, 2, 25, causal=True, alignment="lower_right", window=(10, -1))
        rows = [np.zeros((2, 2, 25, n), np.float32) for n in (6, 5)]
        for row, some in zip(rows, gpu.held(), strict=True):
            row[:, :, held] = some
        want, exact = reference.attention(q, *rows, bounds, mask, scale=1 / np.sqrt(6))
        np.testing.assert_allclose(result.numpy(), want, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(got.numpy(), exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a chunk of 6 tokens needs a capacity of window - 1"):
        gpu.append(put(k[:, :, :6].copy()), put(v[:, :, :6].copy()))
    gpu.append(put(np.full((2, 2, 1, 6), np.inf, np.float32)), put(np.full((2, 2, 1, 5), np.nan, np.float32)))
    keys, values = gpu.held()
    assert (keys[:, :, -1] == np.float32(127) * np.float32(0.02)).all() and not values[:, :, -1].any()
