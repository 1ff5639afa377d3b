"""ALiBi: the kernels compute it, to the bits of the mask that it stands for, and make no array of it."""
import tracemalloc

import numpy as np
import pytest
import reference
from arrays import numbers

import edgeattn
import quant
from edgeattn import KVCache, MultiHeadAttention, threads
from edgeattn import scaled_dot_product_attention as attend

H, D = 3, 8
SLOPES = np.float32([1, 0.3, 0])
SIZES = [(1, 33), (70, 70), (5, 130), (40, 3)]  # blocks of queries and of keys, whole and not


def biases(slopes, L, S, offsets):
    """(B, H, L, S) float32: what the slopes add, the first query at the offsets."""
    places = np.reshape(offsets, (-1, 1, 1, 1)) + np.arange(L)[:, None]
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * np.abs(places - np.arange(S)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("L", "S"), SIZES)
def test_bits_are_those_of_the_mask(L, S, alignment, precision):
    q, k, v = numbers(2, H, L, D), numbers(2, H, S, D, seed=1), numbers(2, H, S, D, seed=2)
    both = np.stack([SLOPES, SLOPES[::-1] * 2])
    lengths = np.array([S, max(S - 2, 1)])
    mask = numbers(L, S, seed=3)
    mask[:, S // 2] = -np.inf
    for slopes in (SLOPES, both):
        for options in ({}, {"window_size": (9, 4)}, {"is_causal": True}, {"kv_lengths": lengths}):
            ends = options.get("kv_lengths", np.array([S]))
            added = biases(slopes, L, S, ends - L if alignment == "lower_right" else 0)
            for given, whole in ((None, added), (mask, mask + added), (mask < 0, np.where(mask < 0, added, -np.inf))):
                options = dict(options, causal_alignment=alignment, precision=precision)
                got = attend(q, k, v, given, alibi_slopes=slopes, **options)
                np.testing.assert_array_equal(got, attend(q, k, v, whole, **options))


@pytest.mark.parametrize("made", ["float32", "dynamic"])
def test_layers(made):
    layer = MultiHeadAttention(H, *(numbers(H * D, 24, seed=s) / 5 for s in range(3)), numbers(24, H * D, seed=4))
    if made == "dynamic":
        layer = quant.quantize(layer, scheme="dynamic")
    x = numbers(2, 70, 24)
    mask = numbers(70, 70, seed=3)
    for given, masked in ((None, 0), (mask, mask)):
        whole = masked + biases(SLOPES, 70, 70, 0)
        np.testing.assert_array_equal(layer(x, alibi_slopes=SLOPES, attn_mask=given, is_causal=True),
                                      layer(x, attn_mask=whole, is_causal=True))
        for got, wanted in zip(layer(x, alibi_slopes=SLOPES, attn_mask=given, need_weights=True),
                               layer(x, attn_mask=whole, need_weights=True), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def test_added_keys_have_no_distance():
    layer = MultiHeadAttention(H, *(numbers(H * D, 24, seed=s) / 5 for s in range(3)), bias_k=numbers(H * D, seed=5),
                               bias_v=numbers(H * D, seed=6), add_zero_attn=True)
    x = numbers(2, 40, 24)
    np.testing.assert_array_equal(layer(x, alibi_slopes=SLOPES), layer(x, attn_mask=biases(SLOPES, 40, 40, 0)))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("queries", [1, 7])
def test_caches(dtype, queries):
    cache = KVCache(2, H, 64, D, dtype=dtype, window=30)
    cache.append(numbers(2, H, 50, D), numbers(2, H, 50, D, seed=1))
    q, columns = numbers(2, H, queries, D, seed=2), np.arange(50)
    whole = biases(SLOPES, queries, 50, 50 - queries)
    got, weights = cache.attend(q, alibi_slopes=SLOPES, is_causal=True, return_weights=True)
    np.testing.assert_allclose(got, cache.attend(q, attn_mask=whole, is_causal=True), rtol=0, atol=1e-6)
    np.testing.assert_allclose(cache.attend(q, alibi_slopes=SLOPES, is_causal=True), got, rtol=0, atol=1e-6)
    assert (weights[..., columns < 50 - queries - 29] == 0).all()
    whole = KVCache(2, H, 50, D, dtype=dtype)
    whole.append(numbers(2, H, 50, D), numbers(2, H, 50, D, seed=1))
    far = whole.attend(q, alibi_slopes=SLOPES / 2**20, position=2**31 - 1)  # all are as far, as far as int32 can say
    np.testing.assert_allclose(far, whole.attend(q), rtol=0, atol=1e-3)


def test_what_is_finite_hides_no_key():
    q, k, v = numbers(1, 1, 20, D), numbers(1, 1, 20, D, seed=1), numbers(1, 1, 20, D, seed=2)
    lowest = np.full((20, 20), np.finfo(np.float32).min)
    mean = v.mean(axis=2, keepdims=True).repeat(20, axis=2)
    for options in ({}, {"return_weights": True}):
        result = attend(q, k, v, lowest, alibi_slopes=np.float32([1]), **options)
        np.testing.assert_allclose(result[0] if options else result, mean, rtol=0, atol=1e-6)
        for slope in (3e38, -1e37):  # itself alone, or what is furthest
            result = attend(q, k, v, alibi_slopes=np.float32([slope]), is_causal=True, **options)
            wanted = v if slope > 0 else v[:, :, :1].repeat(20, axis=2)
            np.testing.assert_allclose((result[0] if options else result)[:, :, 4:7], wanted[:, :, 4:7], atol=1e-6)


def peak(call):
    threads.scratch.clear()
    call()
    threads.scratch.clear()
    tracemalloc.start()
    call()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


@pytest.mark.parametrize("kind", ["float32", "int8", "layer", "dynamic layer", "weights", "cache", "int8 cache"])
def test_no_array_of_all_pairs(kind):
    """12 heads and 2048 tokens: 192 MiB as an array."""
    heads, tokens = 12, 2048
    slopes = np.float32(2.0) ** -np.arange(1, heads + 1)
    x = numbers(1, heads, tokens, 4)
    if "layer" in kind:
        layer = MultiHeadAttention(heads, *(numbers(48, 48, seed=s) / 7 for s in range(4)))
        layer = quant.quantize(layer, scheme="dynamic") if kind == "dynamic layer" else layer
        rows = x.reshape(1, tokens, 48)

        def call(**options):
            return layer(rows, **options)
    elif "cache" in kind:
        cache = KVCache(1, heads, tokens, 4, dtype="int8" if "int8" in kind else "float32")
        cache.append(x, x)

        def call(**options):
            return cache.attend(x[:, :, -1:], **options)
    elif kind == "weights":
        def call(**options):  # the log of the sum takes the way of the probabilities, which fill as much themselves
            return attend(x[:, :, :256], x, x, return_lse=True, causal_alignment="lower_right", **options)
    else:
        def call(**options):
            return attend(x, x, x, precision=kind, **options)
    assert peak(lambda: call(alibi_slopes=slopes)) - peak(call) < 4 * 2**20


def test_against_the_formula():
    q, k, v = numbers(2, H, 70, D), numbers(2, H, 70, D, seed=1), numbers(2, H, 70, D, seed=2)
    oracle, plain = (reference.attention(q, k, v, bias=biases(SLOPES, 70, 70, 0), dtype=dtype)[0]
                     for dtype in (np.float64, np.float32))
    for count in (1, 2):
        threads.set_num_threads(count)
        reference.assert_as_accurate(edgeattn.scaled_dot_product_attention(q, k, v, alibi_slopes=SLOPES), oracle, plain)
    threads.set_num_threads(1)
