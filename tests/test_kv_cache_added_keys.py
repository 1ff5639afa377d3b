"""Caches of layers whose keys are more than the tokens': added keys, and biases that int8 keys do not hold."""
import numpy as np
import pytest
from arrays import cosine, numbers
from cache_cases import CHUNKS, DV, HKV, LENGTH, B, D, E, H, cache, layer, through

import quant
from edgeattn import KVCache, scaled_dot_product_attention, sliding_window

ADDED_KEYS = {
    "bias": {"bias_k": numbers(HKV * D, seed=7), "bias_v": numbers(HKV * DV, seed=8)},
    "zeros": {"add_zero_attn": True},
    "both": {"bias_k": numbers(HKV * D, seed=7), "bias_v": numbers(HKV * DV, seed=8), "add_zero_attn": True},
}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("added", ADDED_KEYS)
def test_added_keys_stand_behind_the_cached_tokens(added, window):
    made, x = layer(**ADDED_KEYS[added]), numbers(B, LENGTH, E)
    bounds = {"is_causal": True, "window_size": sliding_window(window) if window else (-1, -1)}
    whole, whole_weights = made(x, need_weights=True, **bounds)
    for chunks in CHUNKS.values():
        result = through(cache(79, window=window), made, x, chunks, is_causal=True)
        np.testing.assert_allclose(result, whole, atol=2e-6)
    target = cache(79, window=window)
    through(target, made, x[:, :-2], [17, 21], is_causal=True)
    result, weights = made(x[:, -2:], kv_cache=target, is_causal=True, need_weights=True)
    np.testing.assert_allclose(result, whole[:, -2:], atol=2e-6)
    np.testing.assert_allclose(weights, whole_weights[:, :, -2:], atol=1e-6)
    assert weights.shape[-1] == LENGTH + made.extra_keys
    assert (weights[..., LENGTH:] > 0).all()


def with_key_bias(size, scheme="float", **changes):
    """A layer whose key bias is large in a few channels, as Qwen2's are, and the layer without."""
    bias = numbers(HKV * D, seed=7)
    bias[::5] *= size
    return [quant.quantize(made, scheme="dynamic") if scheme == "dynamic" else made
            for made in (layer(k_bias=bias, **changes), layer(**changes))]


@pytest.mark.parametrize("scheme", ["float", "dynamic"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [1, 200, 400])
def test_an_int8_cache_does_not_hold_what_softmax_does_not_see(scheme, window, size):
    made, without = with_key_bias(size, scheme)
    x = numbers(B, LENGTH, E, seed=9)
    expected = without(x, is_causal=True, window_size=sliding_window(window or LENGTH))
    results = [through(KVCache.for_layer(made, B, 46, dtype="int8", window=window), made, x, chunks, is_causal=True)
               for chunks in CHUNKS.values()]
    assert cosine(results[0], expected) > 0.9995
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("scheme", ["float", "dynamic"])
@pytest.mark.parametrize("arguments", [{"softcap": 5.0}, {"need_weights": True}, {"alibi_slopes": np.ones(H) / 9},
                                       {"need_weights": True, "softcap": 5.0},
                                       {"attn_mask": np.arange(LENGTH) % 3 > 0, "softcap": 5.0}])
@pytest.mark.parametrize("added", [{}, {"add_zero_attn": True}])
def test_a_key_bias_is_there_where_it_shows(scheme, arguments, added):
    made, _ = with_key_bias(20, scheme, **added)
    x = numbers(B, LENGTH, E, seed=9)
    results = [made(x, is_causal=True, **arguments),
               made(x, is_causal=True, kv_cache=KVCache.for_layer(made, B, LENGTH, dtype="int8"), **arguments)]
    for plain, cached in zip(*([result] if isinstance(result, np.ndarray) else result for result in results),
                             strict=True):
        assert cosine(cached, plain) > 0.999


def test_a_cache_holds_whole_keys_whoever_filled_it():
    made, without = with_key_bias(400)
    x, bias = numbers(B, LENGTH, E, seed=9), made.k_bias.reshape(HKV, 1, D)
    target = KVCache.for_layer(made, B, LENGTH, dtype="int8")
    made(x[:, :9], kv_cache=target, softcap=3.0)
    bare = KVCache.for_layer(without, B, LENGTH, dtype="int8")
    without(x[:, :9], kv_cache=bare)
    np.testing.assert_allclose(target.held()[0], bare.held()[0] + bias, rtol=1e-3)
    # others read and write it as if the bias were in it
    key, value = bare.held()
    query = numbers(B, H, 9, D, seed=10)
    expected = scaled_dot_product_attention(query, key + bias, value, softcap=2.0, enable_gqa=True)
    np.testing.assert_allclose(target.attend(query, softcap=2.0), expected, atol=0.02)
    target.append(key + bias, value)
    np.testing.assert_allclose(target.held()[0][:, :, 9:], key + bias, rtol=1e-3)
    assert cosine(target.attend(query), scaled_dot_product_attention(query, key, value, enable_gqa=True)) > 0.999
    # an emptied one belongs to the next
    for empty in (target.reset, lambda: target.truncate(0)):
        empty()
        without(x, kv_cache=target)
        bare.reset()
        without(x, kv_cache=bare)
        for got, wanted in zip(target.held(), bare.held(), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("window", [None, 7])
def test_added_keys_and_an_int8_cache_give_the_same_bits_whatever_the_chunks(window):
    made, x = layer(**ADDED_KEYS["both"]), numbers(B, LENGTH, E)
    results = [
        through(cache(46, dtype="int8", window=window), made, x, chunks, is_causal=True) for chunks in CHUNKS.values()]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    bounds = sliding_window(window) if window else (-1, -1)
    np.testing.assert_allclose(results[0], made(x, is_causal=True, window_size=bounds), atol=0.05)


def test_an_added_key_is_all_that_a_query_without_tokens_sees():
    made, x = layer(**ADDED_KEYS["bias"]), numbers(B, 1, E)
    result = made(x, kv_cache=cache(), key_padding_mask=np.zeros((B, 1), bool))
    value = np.repeat(ADDED_KEYS["bias"]["bias_v"].reshape(HKV, DV), H // HKV, axis=0).ravel()
    np.testing.assert_allclose(result[:, 0], np.tile(made.out_weight @ value + made.out_bias, (B, 1)), atol=1e-6)
