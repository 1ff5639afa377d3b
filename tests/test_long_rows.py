"""int8 products on rows that are hard for bytes: a few strong keys among many, sinks, huge masks, NaN, padding."""
import functools

import numpy as np
import pytest
import reference

import edgeattn
import quant
from edgeattn import scaled_dot_product_attention

attend = functools.partial(scaled_dot_product_attention, precision="int8")
HUGE = (-1e9, float(np.finfo(np.float32).min), 1e30)
NAN_BITS = (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)  # quiet, full of ones, with a sign, signalling


def relative_error(got, wanted):
    return np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()


def distance(got, wanted):
    return np.sqrt(((got - wanted) ** 2).sum() / (wanted**2).sum())


def strong_and_weak(keys, strong, places, rng):
    """q (1, 1, 1, 32), k whose keys at `places` have the weight `strong` together, v with a part common to the others."""
    q, k = np.zeros((1, 1, 1, 32), np.float32), rng.standard_normal((1, 1, keys, 32)) * 0.01
    q[..., 0] = np.sqrt(32)
    k[..., 0] = 0
    k[..., places, 0] = np.log(strong / (1 - strong) * (keys - len(places)) / len(places))
    v = rng.standard_normal((1, 1, keys, 32)) * 0.3
    v[..., :16] += 1
    v[:, :, places] = rng.standard_normal((len(places), 32))
    return q, k.astype(np.float32), v.astype(np.float32)


@pytest.mark.parametrize("keys", [64, 200, 256, 257, 520, 1024, 4096, 16384])
def test_strong_keys_take_no_weight_from_many_weak_ones(keys):
    rng = np.random.default_rng(keys)
    middle = keys // 2
    for places in ([0], [keys - 1], [middle, middle + 1, middle + 2], rng.choice(keys, max(1, keys // 64), False)):
        for strong in (0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.995):
            q, k, v = strong_and_weak(keys, strong, places, rng)
            assert relative_error(attend(q, k, np.ones_like(v)), np.ones(1)) < 0.05
            assert relative_error(attend(q, k, v), reference.attention(q, k, v)[0]) < 0.1, (places, strong)


def test_weak_keys_keep_their_weight_behind_masks_and_in_windows():
    rng = np.random.default_rng(1)
    q, k, v = strong_and_weak(1000, 0.6, [500, 620], rng)
    keep = rng.random((1, 1, 1, 1000)) < 0.5
    keep[..., [500, 620]] = True
    for masks, visible in (
            ({"attn_mask": keep}, keep),
            ({"window_size": (579, 0), "causal_alignment": "lower_right"}, np.arange(1000) >= 420)):
        visible = np.broadcast_to(visible, (1, 1, 1, 1000))
        assert relative_error(attend(q, k, v, **masks), reference.attention(q, k, v, visible)[0]) < 0.1
        assert relative_error(attend(q, k, np.ones_like(v), **masks), np.ones(1)) < 0.05


@pytest.mark.parametrize("size", [1, 1e-3, 3e-5])
@pytest.mark.parametrize("keys", [64, 600])
def test_a_strong_key_with_a_small_value_weighs_what_it_weighs(keys, size):
    # a sink: nearly all weight, next to no value, so that what it adds to the context is less than a byte
    rng = np.random.default_rng(keys)
    q, k, v = (rng.standard_normal((1, 1, n, 32)).astype(np.float32) for n in (64, keys, keys))
    q[..., 0], k[..., 0], k[:, :, 0] = np.sqrt(32), 0, 0
    k[:, :, 0, 0] = np.log(9 * keys)
    v[:, :, 0] *= size
    assert distance(attend(q, k, v), reference.attention(q, k, v)[0]) < 0.03


def test_a_dynamic_layer_keeps_the_weight_of_weak_keys():
    rng = np.random.default_rng(4)
    eye = np.eye(32, dtype=np.float32)
    layer = edgeattn.MultiHeadAttention(2, q_weight=eye, k_weight=eye, v_weight=eye)
    x = (rng.standard_normal((1, 1024, 32)) * 0.3).astype(np.float32)
    x[..., [0, 16]] = 1
    x[0, 0, [0, 16]] = (np.log(1024) + 0.4) * 4
    x[..., 8:16] += 1
    x[..., 24:] += 1
    x[0, 0, 8:16] = x[0, 0, 24:] = 0
    heads = x.reshape(1, 1024, 2, 16).swapaxes(1, 2)
    wanted = reference.attention(heads, heads, heads)[0].swapaxes(1, 2).reshape(x.shape)[:, 1:]
    got = quant.quantize(layer, scheme="dynamic")(x)[:, 1:]
    assert relative_error(got, wanted) < 0.1  # the codes of a key of size 30, before any probability, cost 0.06


def test_a_query_does_not_depend_on_the_queries_beside_it():
    # however a window cuts the keys of a tile of queries, each query's keys are rounded in the same blocks
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (70, 700, 700))
    k[:, :, 160:256] = 0  # no mean is taken from these
    for masks in ({"window_size": (450, -1), "causal_alignment": "lower_right"},
                  {"window_size": (-1, 475), "causal_alignment": "upper_left"}):  # the last ends beyond a block
        whole = attend(q, k, v, **masks)
        for cut in (1, 5, 22, 33, 37):
            part = slice(cut, None) if masks["causal_alignment"] == "lower_right" else slice(cut)
            np.testing.assert_array_equal(attend(q[:, :, part], k, v, **masks), whole[:, :, part])


# -- masks of one huge number ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", [7, 40, 600])
@pytest.mark.parametrize("huge", HUGE)
def test_a_row_under_one_huge_mask_is_the_mean_of_the_values(keys, huge):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 3, n, 8)).astype(np.float32) for n in (9, keys, keys))
    v[:, :, ::3] *= 20  # scales that differ, which a huge mask must not swallow
    mask = np.zeros((9, keys), np.float32)
    mask[3:] = huge
    mean = np.broadcast_to(v.astype(np.float64).mean(2, keepdims=True), (2, 3, 6, 8))
    got = attend(q, k, v, mask)
    assert relative_error(got[:, :, 3:], mean) < 0.02 * np.sqrt(keys)  # the mean is smaller than what is rounded
    assert distance(got[:, :, :3], reference.attention(q, k, v)[0][:, :, :3]) < 0.03
    mask[3:, : keys // 2] = -np.inf
    mean = np.broadcast_to(v[:, :, keys // 2 :].astype(np.float64).mean(2, keepdims=True), (2, 3, 6, 8))
    assert relative_error(attend(q, k, v, mask)[:, :, 3:], mean) < 0.02 * np.sqrt(keys)


def test_some_keys_far_below_others_have_no_weight():
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, 2, 600, 16)).astype(np.float32) for _ in range(3))
    keep = np.arange(600) % 5 != 0
    keep[:300] = False
    for huge in (-1e9, float(np.finfo(np.float32).min)):
        low = attend(q, k, v, np.where(keep, np.float32(0), np.float32(huge)))
        assert distance(low, reference.attention(q, k, v, np.broadcast_to(keep, (1, 2, 600, 600)))[0]) < 0.03


def test_layers_and_caches_under_a_huge_mask():
    rng = np.random.default_rng(6)
    weights = {f"{name}_weight": rng.standard_normal((32, 32)).astype(np.float32) / 6 for name in ("q", "k", "v")}
    layer = edgeattn.MultiHeadAttention(4, **weights)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((1, 11, 32)).astype(np.float32)
    for huge in HUGE:
        mask = np.zeros((11, 11), np.float32)
        mask[:4] = huge
        wanted = np.broadcast_to((x[0] @ weights["v_weight"].T).mean(0), (1, 4, 32))
        assert relative_error(dynamic(x, attn_mask=mask)[:, :4], wanted) < 0.06
        assert relative_error(layer(x, attn_mask=mask, need_weights=True)[0][:, :4], wanted) < 1e-5
        cache = edgeattn.KVCache.for_layer(dynamic, 1, 11, dtype="int8")
        assert relative_error(dynamic(x, attn_mask=mask, kv_cache=cache)[:, :4], wanted) < 0.06
        k, v = (rng.standard_normal((1, 2, 11, 16)).astype(np.float32) for _ in range(2))
        cache = edgeattn.KVCache(1, 2, 11, 16, dtype="int8")
        cache.append(k, v)
        got = cache.attend(k[:, :, :1], attn_mask=np.full((1, 11), huge, np.float32), position=10)
        assert relative_error(got, cache.held()[1].mean(2, keepdims=True)) < 1e-5


# -- NaN, and values of any size -------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", NAN_BITS, ids=hex)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_of_any_payload_is_seen(which, bits):
    rng = np.random.default_rng(7)
    arrays = [rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3)]
    arrays[which].view(np.uint32)[0, 1, 5, 3] = bits
    got = attend(*arrays)
    seen = np.zeros(got.shape[:3], bool)
    seen[0, 1, 5 if which == 0 else slice(None)] = True
    np.testing.assert_array_equal(np.isnan(got).all(-1), seen)
    np.testing.assert_array_equal(np.isnan(got).any(-1), seen)
    x = rng.standard_normal((1, 40, 32)).astype(np.float32)
    x.view(np.uint32)[0, 5, 3] = bits
    weights = {f"{name}_weight": rng.standard_normal((32, 32)).astype(np.float32) for name in ("q", "k", "v")}
    dynamic = quant.quantize(edgeattn.MultiHeadAttention(4, **weights), scheme="dynamic")
    assert np.isnan(dynamic(x)).all() and np.isfinite(dynamic(x, is_causal=True)[:, :5]).all()


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-19, 1e-10, 1e10, 1e20, 1e30, 3e37])
def test_values_of_any_size_keep_their_proportions(size):
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((1, 2, 300, 16)).astype(np.float32) for _ in range(3))
    v[:, :, 7] = 0  # no value, and all of its weight
    k[:, :, 7] = q.mean(2) * 3
    plain = attend(q, k, v)
    got = attend(q, k, (v * np.float32(size)).astype(np.float32))
    assert distance(got.astype(np.float64) / size, plain) < 0.01


def test_the_largest_values_do_not_overflow():
    rng = np.random.default_rng(11)
    q, k = (rng.standard_normal((1, 2, 300, 16)).astype(np.float32) for _ in range(2))
    v = rng.uniform(-3.2e38, 3.2e38, q.shape).astype(np.float32)
    v[:, 1, 100:200] = 1  # beside them as good as nothing
    assert distance(attend(q, k, v).astype(np.float64), reference.attention(q, k, v)[0]) < 0.03


# -- an offset of the keys, behind masks that hide the first ----------------------------------------------------------

@pytest.mark.parametrize("padding", [0, 31, 32, 40, 63, 100, 160])
@pytest.mark.parametrize("kind", ["keep", "infinite", "huge", "band", "queries"])
def test_the_mean_is_of_keys_that_are_seen_wherever_they_stand(padding, kind):
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((1, 2, 200, 16)).astype(np.float32) for _ in range(3))
    offset = 50 * rng.standard_normal((1, 2, 1, 16)).astype(np.float32)
    keep = np.arange(200) >= padding
    masks = {
        "keep": {"attn_mask": keep}, "infinite": {"attn_mask": np.where(keep, np.float32(0), np.float32(-np.inf))},
        "huge": {"attn_mask": np.where(keep, np.float32(0), np.float32(-1e9))},
        "band": {"window_size": (199 - padding, -1), "causal_alignment": "lower_right"},
        "queries": {"attn_mask": np.broadcast_to(keep, (1, 2, 200, 200))}}[kind]
    if kind == "band":
        q = q[:, :, -1:]
    wanted = scaled_dot_product_attention(q, k, v, **masks)
    plain, moved = (distance(attend(q, keys, v, **masks), wanted) for keys in (k, k + offset))
    assert moved < 1.6 * plain + 0.002  # a single key may stand for all: its own bytes then lie in a wider range


@pytest.mark.parametrize("padding", [40, 63, 100])
def test_a_layer_under_left_padding_does_not_see_an_offset_of_its_keys(padding):
    rng = np.random.default_rng(10)
    weights = {f"{name}_weight": rng.standard_normal((64, 64)).astype(np.float32) / 8 for name in ("q", "k", "v")}
    layer = edgeattn.MultiHeadAttention(4, **weights)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 150, 64)).astype(np.float32)
    x[..., 0] = 12  # in all tokens, so in all keys
    real = np.arange(150) >= np.array([[0], [padding]])
    wanted = layer(x, key_padding_mask=real)
    got = dynamic(x, key_padding_mask=real)
    alone = dynamic(x[1:, padding:])
    error = [distance(got[b, padding:], wanted[b, padding:]) for b in (0, 1)]
    assert error[1] < 1.5 * distance(alone[0], layer(x[1:, padding:])[0]) and error[0] < 0.06
    np.testing.assert_array_equal(got[1], dynamic(x[1:], key_padding_mask=real[1:])[0])  # each batch entry for itself
