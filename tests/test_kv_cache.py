"""KVCache: what it holds, that chunking does not change results, and what it refuses."""
import itertools

import numpy as np
import pytest
import reference
from arrays import numbers
from cache_cases import CHUNKS, DV, HKV, LENGTH, B, D, E, H, cache, layer, qkv, streamed, through

import quant
from edgeattn import KVCache, SelfAttention, scaled_dot_product_attention, sliding_window


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_of_a_float_cache_are_as_accurate_as_the_whole(chunks, window):
    q, k, v = qkv()
    visible = reference.visible(B, H, LENGTH, LENGTH, causal=True, window=(-1 if window is None else window - 1, 0))
    oracle, plain = (reference.attention(q, k, v, visible, dtype=dtype)[0] for dtype in (np.float64, np.float32))
    result = streamed(cache(79, window=window), q, k, v, CHUNKS[chunks], is_causal=True)
    reference.assert_as_accurate(result, oracle, plain)


@pytest.mark.parametrize(("window", "capacities"), [(None, (40, 50)), (7, (46, 64, 100)), (1, (40,))])
def test_chunks_of_an_int8_cache_give_the_same_bits(window, capacities):
    q, k, v = qkv()
    results = [
        streamed(cache(capacity, dtype="int8", window=window), q, k, v, chunks, is_causal=True, softcap=softcap)
        for softcap in (0.0, 3.0) for capacity in capacities for chunks in CHUNKS.values()]
    for group in (results[: len(results) // 2], results[len(results) // 2 :]):
        for result in group:
            np.testing.assert_array_equal(result, group[0])
    assert window == 1 or not np.array_equal(results[0], results[-1])


@pytest.mark.parametrize("window", [None, 7])
def test_int8_chunks_with_masks_give_the_same_bits(window):
    q, k, v = qkv()
    padding = np.ones((B, LENGTH), bool)
    padding[0, :5] = False
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])

    def run(chunks):
        target, results, at = cache(46, dtype="int8", window=window), [], 0
        for n in chunks:
            target.append(k[:, :, at : at + n], v[:, :, at : at + n])
            at += n
            results.append(target.attend(
                q[:, :, at - n : at], is_causal=True, key_padding_mask=padding[:, :at], alibi_slopes=slopes))
        return np.concatenate(results, axis=2)

    whole = run(CHUNKS["whole"])
    for chunks in CHUNKS.values():
        np.testing.assert_array_equal(run(chunks), whole)
    bounds = window and sliding_window(window)
    exact = scaled_dot_product_attention(
        q, k, v, padding[:, None, None], is_causal=True, enable_gqa=True, alibi_slopes=slopes,
        window_size=bounds or (-1, -1))
    np.testing.assert_allclose(whole, exact, atol=0.05)
    assert (whole[0, :, :5] == 0).all()


def test_int8_attention_is_attention_over_codes_times_scales():
    q, k, v = qkv()
    target = cache(dtype="int8")
    result = streamed(target, q, k, v, [LENGTH], is_causal=True)
    keys, values = target.held()
    visible = reference.visible(B, H, LENGTH, LENGTH, causal=True)
    oracle, plain = (
        reference.attention(q, keys, values, visible, dtype=dtype)[0] for dtype in (np.float64, np.float32))
    reference.assert_as_accurate(result, oracle, plain)
    for stored, given in ((keys, k), (values, v)):
        step = np.abs(given).max(-1, keepdims=True) / 127
        assert (np.abs(stored - given) <= step * 0.5001).all()
        assert (np.abs(stored - given) > step * 0.3).any()


@pytest.mark.parametrize("window", [None, 7])
def test_fixed_scales_stand_for_those_of_every_token(window):
    q, k, v = qkv()
    scales = (float(np.abs(k).max()) / 100, float(np.abs(v).max()) / 127)
    results = [streamed(cache(79, dtype="int8", scales=scales, window=window), q, k, v, chunks, is_causal=True)
               for chunks in CHUNKS.values()]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    target = cache(79, dtype="int8", scales=scales)
    target.append(k, v)
    for held, given, scale in zip(target.held(), (k, v), scales, strict=True):
        np.testing.assert_allclose(held, np.clip(np.rint(given / np.float32(scale)), -127, 127) * np.float32(scale))
    keys, values = target.held()
    bounds = sliding_window(window) if window else (-1, -1)
    exact = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True, window_size=bounds)
    np.testing.assert_allclose(results[0], exact, atol=1e-5)
    assert target.nbytes < cache(79, dtype="int8").nbytes
    with pytest.raises(ValueError, match="value must be finite for a cache with fixed scales"):
        target.append(k[:, :, :1], np.full_like(v[:, :, :1], np.inf))
    assert target.length == LENGTH


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_refuse_what_fixed_scales_cannot_keep_and_saturate_the_rest(dynamic):
    made, x = layer(), numbers(B, 6, E)
    made = quant.quantize(made, scheme="dynamic") if dynamic else made
    target = cache(9, dtype="int8", scales=(0.05, 1e-30))
    made(x[:, :2], kv_cache=target)
    spoiled = x.copy()
    spoiled[0, 3, 2] = np.nan
    with pytest.raises(ValueError, match="key must be finite for a cache with fixed scales"):
        made(spoiled, kv_cache=target)
    assert target.length == 2
    spoiled[0, 3, 2] = 1e30
    assert np.isfinite(made(spoiled, kv_cache=target)).all()


def test_a_cache_for_a_layer():
    made = layer()
    for dtype in ("float32", "int8"):
        target = KVCache.for_layer(made, B, 40, dtype=dtype, window=9)
        assert (target.dtype, target.window, target.num_kv_heads, target.head_dim, target.value_dim) == (
            dtype, 9, HKV, D, DV)
    np.testing.assert_array_equal(
        made(numbers(B, 4, E), kv_cache=KVCache.for_layer(made, B, 9)), made(numbers(B, 4, E), kv_cache=cache(9)))


def test_int8_rows_of_zeros_and_tiny_numbers_are_zeros():
    target = KVCache(1, 1, 2, 4, dtype="int8")
    key = np.array([[[[0, 0, 0, 0], [1e-37, 0, 0, 0]]]], np.float32)
    target.append(key, key)
    assert (target.held()[0] == 0).all()
    assert (target.attend(np.ones((1, 1, 1, 4), np.float32)) == 0).all()


@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 100])
def test_int8_codes_are_the_nearest_to_each_row_over_its_scale(size):
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((2, 3, 9, size)) * 10.0 ** rng.integers(-30, 30, (2, 3, 9, 1))).astype(np.float32)
    x[0, 0, :3] = np.array([[0], [1e-37], [5]])  # the second with a scale that float32 holds only in part
    x[0, 0, 3] = np.resize([127, 0.5, 1.5, -2.5], size)  # ties
    holder = KVCache(2, 3, 12, size, dtype="int8")
    holder.append(x[:, :, :4], x[:, :, :4])
    holder.append(x[:, :, 4:], x[:, :, 4:])
    scale = np.abs(x).max(-1) / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 0
    codes = np.rint(x / np.where(scale > 0, scale, np.float32(1))[..., None]).astype(np.int8)
    for held in holder.held():
        np.testing.assert_array_equal(held, codes * scale[..., None])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(dtype, bad):
    q, k, v = qkv()
    k[0, 0, 10, 3] = v[1, 1, 20, 2] = bad
    for chunks in CHUNKS.values():
        result = streamed(cache(dtype=dtype, capacity=80, window=5), q, k, v, chunks, is_causal=True)
        if np.isnan(bad) or dtype == "int8":
            assert np.isnan(result[0, :2, 10:15]).all()
            assert np.isnan(result[1, 2:, 20:25]).any(axis=-1).all()
        assert np.isfinite(result[0, :, :10]).all()
        assert np.isfinite(result[0, 2:]).all()
        assert np.isfinite(result[:, :, 25:]).all()
        assert np.isfinite(result[1, :2]).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("window", "capacity"), [(None, 40), (7, 7), (7, 9), (7, 100)])
def test_a_layer_streams_what_it_computes_at_once(dtype, window, capacity):
    made, x = layer(), numbers(B, LENGTH, E)
    whole = made(x, is_causal=True, window_size=(-1, -1) if window is None else sliding_window(window))
    results = [
        through(cache(capacity, dtype=dtype, window=window), made, x, chunks, is_causal=True)
        for chunks in CHUNKS.values()]
    for result in results:
        np.testing.assert_allclose(result, whole, atol=3e-6 if dtype == "float32" else 0.1)
        if dtype == "int8":
            np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("scheme", ["float", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("changes", [{}, {"out_weight": None, "out_bias": None}])
def test_a_token_alone_gives_the_bits_of_the_call_with_every_check(scheme, dtype, changes):
    made, x = layer(**changes), numbers(B, 9, E)
    made = made if scheme == "float" else quant.quantize(made, scheme="dynamic")
    for window in (None, 4):
        short, checked = (KVCache.for_layer(made, B, 9, dtype=dtype, window=window) for _ in range(2))
        got = through(short, made, x, [1] * 9, is_causal=True)
        # float64 of the same values needs a conversion, and so every check
        expected = through(checked, made, x.astype(np.float64), [1] * 9, is_causal=True)
        np.testing.assert_array_equal(got, expected)
        for array, other in zip(short._storage(), checked._storage(), strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_streamed_layer_is_as_accurate_as_plain_float32():
    made, x = layer(), numbers(B, LENGTH, E)
    tensors = {name: getattr(made, name) for name in
               ("q_weight", "q_bias", "k_weight", "v_weight", "out_weight", "out_bias")}
    visible = reference.visible(B, H, LENGTH, LENGTH, causal=True)
    oracle, plain = (
        reference.multi_head_attention(tensors, H, x, x, x, visible, num_kv_heads=HKV, dtype=dtype)[0]
        for dtype in (np.float64, np.float32))
    for chunks in CHUNKS.values():
        reference.assert_as_accurate(through(cache(), made, x, chunks, is_causal=True), oracle, plain)


@pytest.mark.parametrize("capacity", [7, 12, 40])
def test_weights_and_masks_of_a_streamed_layer(capacity):
    made, x = layer(), numbers(B, LENGTH, E)
    keep = np.random.default_rng(3).random((B, 1, LENGTH, LENGTH)) < 0.7
    padding = np.ones((B, LENGTH), bool)
    padding[1, :9] = False
    arguments = dict(is_causal=True, need_weights=True)
    whole, weights = made(
        x, attn_mask=keep, key_padding_mask=padding, window_size=sliding_window(7), **arguments)
    target, at = cache(capacity, window=7), 0
    for n in CHUNKS["uneven"]:
        rows = slice(at, at + n)
        at += n
        result, part = made(
            x[:, rows], attn_mask=keep[:, :, rows, :at], key_padding_mask=padding[:, :at], kv_cache=target, **arguments)
        np.testing.assert_allclose(result, whole[:, rows], atol=3e-6)
        np.testing.assert_allclose(part, weights[:, :, rows, :at], atol=1e-6)
        assert (part.sum(-1).round(5) <= 1).all()
    assert (weights[1, :, 8] == 0).all()


def test_queries_see_the_whole_chunk_unless_causal():
    made, x = layer(), numbers(B, 10, E)
    target = cache()
    made(x[:, :4], kv_cache=target)
    late = made(x[:, 4:], kv_cache=target)
    np.testing.assert_allclose(late, made(x)[:, 4:], atol=3e-6)


def test_cross_attention_appends_once_and_then_nothing():
    made, x, y = layer(), numbers(B, 5, E), numbers(B, 9, E, seed=9)
    target = cache()
    expected = made(x, y)
    np.testing.assert_allclose(made(x[:, :2], y, kv_cache=target), expected[:, :2], atol=3e-6)
    np.testing.assert_allclose(made(x[:, 2:], y[:, :0], kv_cache=target), expected[:, 2:], atol=3e-6)
    assert target.length == 9


def test_unbatched_and_single_head_layers():
    made = SelfAttention(*(numbers(6, 6, seed=i) for i in range(4)))
    x = numbers(5, 6)
    target = KVCache(1, 1, 5, 6)
    rows = [made(x[i : i + 1], is_causal=True, kv_cache=target, out=np.empty((1, 6), np.float32)) for i in range(5)]
    np.testing.assert_allclose(np.concatenate(rows), made(x, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 4])
def test_truncated_tokens_are_forgotten(dtype, window):
    q, k, v = qkv()
    other_k, other_v = qkv(seed=50)[1:]
    target, clean = (cache(dtype=dtype, window=window) for _ in range(2))
    streamed(target, q, k, v, [20])
    target.append(other_k[:, :, :6], other_v[:, :, :6])
    target.truncate(20)
    streamed(clean, q, k, v, [20])
    for one in (target, clean):
        one.append(k[:, :, 20:25], v[:, :, 20:25])
    assert target.length == len(target) == 25
    np.testing.assert_array_equal(
        target.attend(q[:, :, 20:25], is_causal=True), clean.attend(q[:, :, 20:25], is_causal=True))
    target.reset()
    assert (target.length, target.start) == (0, 0)
    np.testing.assert_array_equal(
        streamed(target, q, k, v, [20], is_causal=True), streamed(cache(dtype=dtype, window=window), q, k, v, [20], is_causal=True))


def test_truncating_back_to_the_last_append_always_works():
    q, k, v = qkv()
    for capacity, first, second in itertools.product((4, 6, 9), (1, 3), (1, 3)):
        target, at = cache(capacity, window=4), 0
        while at + first + second <= LENGTH:
            for n in (first, min(second, capacity - 3)):
                before = target.length
                target.append(k[:, :, at : at + min(n, capacity - 3)], v[:, :, at : at + min(n, capacity - 3)])
                target.truncate(before)
                target.append(k[:, :, at : at + min(n, capacity - 3)], v[:, :, at : at + min(n, capacity - 3)])
                at = target.length
            result = target.attend(q[:, :, at - 1 : at])
            np.testing.assert_allclose(result, scaled_dot_product_attention(
                q[:, :, at - 1 : at], k[:, :, max(at - 4, 0) : at], v[:, :, max(at - 4, 0) : at], enable_gqa=True), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_storage_is_allocated_once(dtype):
    q, k, v = qkv()
    target = cache(9, dtype=dtype, window=5)
    assert target.nbytes == B * HKV * 9 * ((D + DV) * 4 if dtype == "float32" else D + DV + 8)
    before = [array.ctypes.data for array in target._storage()]
    streamed(target, q, k, v, [1, 5] * 6, is_causal=True)
    assert [array.ctypes.data for array in target._storage()] == before
    assert target.length == 36
    assert target.length - target.start <= 9


def test_held_are_copies_of_the_last_tokens():
    q, k, v = qkv()
    target = cache(6, window=4)
    streamed(target, q, k, v, [2] * 10)
    keys, values = target.held()
    np.testing.assert_array_equal(keys, k[:, :, target.start : 20])
    np.testing.assert_array_equal(values, v[:, :, target.start : 20])
    keys[:] = 0
    assert (target.held()[0] != 0).any()


def test_attend_takes_positions_windows_scale_and_out():
    q, k, v = qkv()
    target = cache()
    target.append(k, v)
    keep = reference.visible(B, H, 3, LENGTH, causal=True, window=(4, 0), lengths=[13] * B, alignment="lower_right")
    expected = scaled_dot_product_attention(q[:, :, :3], k, v, keep, scale=0.3, softcap=2.0, enable_gqa=True)
    out = np.empty((B, H, 3, DV), np.float32)
    result = target.attend(
        q[:, :, :3], is_causal=True, window_size=(4, -1), scale=0.3, softcap=2.0, position=10, out=out)
    assert result is out
    np.testing.assert_allclose(out, expected, atol=1e-6)
    again, weights = target.attend(
        q[:, :, :3], is_causal=True, window_size=(4, -1), scale=0.3, softcap=2.0, position=10, return_weights=True)
    np.testing.assert_allclose(again, expected, atol=1e-6)
    assert ((weights > 0) == keep).all()
    assert target.attend(q[:, :, :3].astype(np.float16)).dtype == np.float16


@pytest.mark.parametrize("window_size", [(20, -1), (12, 0)])
def test_windows_reach_back_from_positions_far_behind_the_cache(window_size):
    q, k, v = qkv()
    target, windowed = cache(), cache(40, window=window_size[0] + 1)
    for each in (target, windowed):
        each.append(k[:, :, :5], v[:, :, :5])
    position = 13 if window_size[1] == -1 else 14
    seen = np.arange(5) >= position - window_size[0]
    assert seen.any()
    expected = scaled_dot_product_attention(q[:, :, :1], k[:, :, :5], v[:, :, :5], seen, enable_gqa=True)
    for result in (target.attend(q[:, :, :1], position=position, window_size=window_size),
                   windowed.attend(q[:, :, :1], position=position)):
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_empty_cache_and_no_queries_give_zeros_and_nothing(dtype):
    target = cache(dtype=dtype)
    query = numbers(B, H, 1, D)
    assert (target.attend(query, position=0) == 0).all()
    assert (target.attend(numbers(B, H, 3, D), position=0, is_causal=True) == 0).all()
    assert target.attend(query[:, :, :0]).shape == (B, H, 0, DV)
    assert layer()(numbers(B, 0, E), kv_cache=target).shape == (B, 0, E)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_inputs_are_taken_in_any_layout_and_never_changed(dtype):
    q, k, v = qkv()
    plain = streamed(cache(dtype=dtype), q, k, v, [LENGTH], is_causal=True)
    strange = [np.asfortranarray(q), k[..., ::-1].copy()[..., ::-1], v.astype(">f4")]
    copies = [array.copy() for array in strange]
    for array in strange:
        array.flags.writeable = False
    np.testing.assert_array_equal(streamed(cache(dtype=dtype), *strange, [LENGTH], is_causal=True), plain)
    for array, copy in zip(strange, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_repr():
    assert repr(cache(9, window=5)) == (
        "KVCache(batch=2, num_kv_heads=2, capacity=9, head_dim=8, value_dim=6, dtype='float32', scales=None, "
        "window=5, length=0)")


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"scales": (1, 1)}, ValueError, "scales must be None for a cache of dtype 'float32', .*; pass dtype='int8'"),
    ({"scales": 1.0, "dtype": "int8"}, TypeError, "scales must be two numbers, of the keys and of the values, got 1.0"),
    ({"scales": (1, 0), "dtype": "int8"}, ValueError, r"scales must be positive, got \(1, 0\)"),
    ({"scales": (1, "a"), "dtype": "int8"}, TypeError, "scales must be a real number, got 'a'"),
    ({"capacity": 2.5}, TypeError, "capacity must be an integer, got 2.5"),
    ({"dtype": "float16"}, ValueError, "dtype must be 'float32' or 'int8', got 'float16'"),
    ({"dtype": np.uint8}, ValueError, "dtype must be 'float32' or 'int8', got <class 'numpy.uint8'>"),
    ({"dtype": np.floating}, ValueError, "dtype must be 'float32' or 'int8', got <class 'numpy.floating'>"),
    ({"dtype": np.dtype(">f4")}, ValueError, "dtype must be 'float32' or 'int8', got dtype"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"window": 9, "capacity": 8}, ValueError, "capacity must be at least window = 9, got 8; twice the window"),
])
def test_bad_caches_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        cache(**changes)


@pytest.mark.parametrize("dtype", [np.int8, np.dtype(np.int8), np.dtype("int8").type])
def test_a_dtype_may_be_numpys(dtype):
    assert cache(9, dtype=dtype).dtype == "int8"


def test_bad_chunks_are_refused_and_change_nothing():
    q, k, v = qkv()
    target = cache(9)
    target.append(k[:, :, :5], v[:, :, :5])
    for key, value, error, message in (
        (k[0], v, ValueError, r"key must have shape \(B, Hkv, n, size\) = \(2, 2, n, 8\), .* got key \(2, 40, 8\)"),
        (k, v[:, :, :5], ValueError, r"value must have shape .* = \(2, 2, n, 6\), .* value \(2, 2, 5, 6\)"),
        (k.astype(int), v, TypeError, "key must be a float16, float32 or float64 array, got dtype int64"),
        (k[:, :, :5], v[:, :, :5], ValueError,
         "cache is full: its capacity is 9 tokens, it holds 5, and 5 more came; truncate or reset it"),
    ):
        with pytest.raises(error, match=message):
            target.append(key, value)
    assert target.length == 5
    ring = cache(9, window=5)
    ring.append(k[:, :, :9], v[:, :, :9])
    with pytest.raises(ValueError, match=r"a chunk of 6 tokens needs a capacity of window - 1 \+ 6 = 10, got 9; append at most 5"):
        ring.append(k[:, :, :6], v[:, :, :6])
    with pytest.raises(ValueError, match="a chunk of 6 tokens needs a capacity of"):
        layer()(numbers(B, 6, E), kv_cache=ring)  # each query sees the later ones: the chunk cannot be cut
    assert ring.length == 9


def test_bad_truncations_are_refused():
    q, k, v = qkv()
    target = cache(8, window=5)
    streamed(target, q, k, v, [4] * 5)
    for length, error, message in (
        (21, ValueError, "length must lie between 0 and the cache's length 20, got 21"),
        (-1, ValueError, "length must lie between 0 and the cache's length 20, got -1"),
        (1.5, TypeError, "length must be an integer, got 1.5"),
        (15, ValueError, r"length must be at least 16, or 0 after reset\(\): older tokens than position 12 .* got 15"),
    ):
        with pytest.raises(error, match=message):
            target.truncate(length)
    target.truncate(16)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"query": numbers(B, H, 3, D + 1)}, ValueError, r"query must have shape \(B, H, L, D\) = \(2, H, L, 8\), got \(2, 4, 3, 9\)"),
    ({"query": numbers(B, 3, 3, D)}, ValueError, r"query must have a multiple of the cache's 2 key/value heads, got \(2, 3, 3, 8\)"),
    ({"query": numbers(B, H, 6, D)}, ValueError, "position must be at least 0, and below 2.*, got -1 for L = 6 queries and a cache of length 5; append"),
    ({"position": 1.0}, TypeError, "position must be an integer, got 1.0"),
    ({"softcap": -1.0}, ValueError, r"softcap must be 0 \(off\), or positive"),
    ({"scale": "1"}, TypeError, "scale must be a real number, got '1'"),
    ({"return_weights": 1}, TypeError, "return_weights must be True or False, got 1"),
    ({"window_size": 3}, TypeError, r"window_size must be two integers \(left, right\)"),
    ({"attn_mask": np.ones((3, 4), bool)}, ValueError, r"attn_mask must broadcast to \(..., H, L, S\) = \(2, 4, 3, 5\)"),
    ({"key_padding_mask": np.ones((B, 3), bool)}, ValueError, r"key_padding_mask must have shape \(..., S\) = \(2, 5\)"),
    ({"out": np.empty((B, H, 3, D), np.float32)}, ValueError, r"out must have shape \(2, 4, 3, 6\)"),
])
def test_bad_queries_are_refused_by_name(changes, error, message):
    for window in (None, 4):
        target = cache(window=window)
        target.append(*(array[:, :, :5] for array in qkv()[1:]))
        with pytest.raises(error, match=message):
            target.attend(**{"query": numbers(B, H, 3, D), **changes})


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"kv_cache": "yes"}, TypeError, "kv_cache must be an edgeattn.KVCache, got str"),
    ({"kv_cache": KVCache(B, H, 9, D)}, ValueError, r"kv_cache must have the layer's .* \(2, 8, 6\), got \(4, 8, 8\)"),
    ({"kv_cache": KVCache(B + 1, HKV, 9, D, value_dim=DV)}, ValueError, "query must have the cache's batch, B = 3, got"),
    ({"causal_alignment": "upper_left"}, ValueError, "causal_alignment must be None with kv_cache, .* got 'upper_left'"),
    ({"attn_mask": np.ones((4, 5), bool)}, ValueError, r"attn_mask must broadcast to .* \(2, 4, 4, 4\)"),
    ({"softcap": -1.0}, ValueError, r"softcap must be 0 \(off\), or positive"),
])
def test_bad_calls_of_a_layer_leave_the_cache_alone(arguments, error, message):
    target = cache()
    with pytest.raises(error, match=message):
        layer()(numbers(B, 4, E), **{"kv_cache": target, **arguments})
    assert target.length == 0


def test_a_cache_stopped_while_it_moves_tokens_is_empty(monkeypatch):
    cache = KVCache(1, 1, 6, 4, window=5)
    cache.append(np.ones((1, 1, 6, 4), np.float32), np.ones((1, 1, 6, 4), np.float32))

    def stopped():
        yield cache._keys
        raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(cache, "_storage", stopped)
        cache.append(np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, 1, 4), np.float32))
    assert cache.length == 0
    cache.append(np.zeros((1, 1, 2, 4), np.float32), np.full((1, 1, 2, 4), 3, np.float32))
    assert (cache.attend(np.ones((1, 1, 1, 4), np.float32)) == 3).all()
