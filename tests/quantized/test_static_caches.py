"""Caches of static layers: chunks give the bytes of the whole."""
import itertools

import numpy as np
import pytest
from static_made import SOURCES, codes, make
from workbench import random_call, random_input

import edgeattn
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.quantized import MulConstant, TensorQuantization

CHUNKS = ([30], [1] * 30, [7, 1, 0, 22])


@pytest.fixture(scope="module")
def static():
    return make()[1]


@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
@pytest.mark.parametrize("window", [None, 6])
def test_chunks_through_a_cache_are_the_whole_bit_for_bit(static, arithmetic, window):
    q, x = static.with_arithmetic(arithmetic), codes(2, 2, 30, 32)
    padding = np.arange(30) >= np.array([[0], [4]])
    bounds = edgeattn.sliding_window(window) if window else (-1, -1)
    whole, whole_weights = q.run_int8(
        x, is_causal=True, key_padding_mask=padding, window_size=bounds, need_weights=True)
    for chunks in CHUNKS:
        for capacity in (35, 60):
            cache, at = edgeattn.KVCache.for_layer(q, 2, capacity, window=window), 0
            for n in chunks:
                part = slice(at, at + n)
                at += n
                result, weights = q.run_int8(
                    x[:, part], kv_cache=cache, is_causal=True, key_padding_mask=padding[:, :at], need_weights=True)
                np.testing.assert_array_equal(result, whole[:, part])
                np.testing.assert_array_equal(weights, whole_weights[:, :, part, :at])
            assert cache.length == 30


FORMS = {"odd": dict(H=3, D=5, Dv=7, E=21), "long heads": dict(H=2, D=20, Dv=72, E=70), "grouped": dict(Hkv=2),
         "without output": dict(output=False), "converter": {}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 9])
def test_a_cache_gives_the_bytes_of_the_steps(form, window):
    layer, q = make(3, **FORMS[form])
    if form == "converter":
        q = q._replace(score_ops=(MulConstant(99, TensorQuantization(0.01, 0), TensorQuantization(0.03, -3)),))
    B, L = 2, 80
    x, rng = codes(2, B, L, layer.embed_dim), np.random.default_rng(3)
    keep = rng.random((B, q.num_heads, L, L)) < 0.7
    keep[1, :, 3] = False
    for arithmetic, given in itertools.product(("litert", "tflm"), ({}, {"is_causal": True}, {"attn_mask": keep})):
        q = q.with_arithmetic(arithmetic)
        caches = [edgeattn.KVCache.for_layer(q, B, L, window=window) for _ in range(2)]
        at = 0
        for n in (1, 1, 1, 0, 30, 1, 1, 45):
            masks, part = dict(given), slice(at, at + n)
            at += n
            if "attn_mask" in masks:
                masks["attn_mask"] = keep[:, :, part, :at]
            got = q.run_int8(x[:, part], kv_cache=caches[0], **masks)
            steps, _ = q.run_int8(x[:, part], kv_cache=caches[1], need_weights=True, **masks)
            np.testing.assert_array_equal(got, steps)
        for array, other in zip(caches[0]._storage(), caches[1]._storage(), strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("sources", SOURCES[1:])
def test_keys_and_values_of_others_through_a_cache(sources):
    layer, q = make(4, sources, kdim=32 if sources == (0, 1, 1) else 20, vdim=32 if sources == (0, 1, 1) else 24)
    query, *others = (codes(i, *x.shape) for i, x in enumerate(random_call(layer, sources, L=40, S=33)))
    cache = edgeattn.KVCache.for_layer(q, 2, 33)
    nothing = q.run_int8(query, *(x[:, :0] for x in others), kv_cache=cache)
    np.testing.assert_array_equal(nothing, q.run_int8(query, *others, attn_mask=np.zeros((40, 33), bool)))
    for part in (slice(20), slice(20, 33), slice(33, 33)):
        got = q.run_int8(query, *(x[:, part] for x in others), kv_cache=cache)
        np.testing.assert_array_equal(got, q.run_int8(query, *(x[:, :part.stop] for x in others)))


def test_a_cache_on_two_threads_gives_the_same_bytes():
    layer, q = make(5, E=64, D=16)
    x, results = codes(2, 1, 400, 64), []
    for count in (1, 2):
        edgeattn.set_num_threads(count)
        try:
            cache = edgeattn.KVCache.for_layer(q, 1, 400)
            parts = [q.run_int8(part, kv_cache=cache, is_causal=True) for part in np.split(x, [170, 399], axis=1)]
        finally:
            edgeattn.set_num_threads(1)
        results.append(np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(results[0], q.run_int8(x, is_causal=True))


def test_a_window_shorter_than_a_chunk_takes_it_in_pieces(static):
    x = codes(3, 1, 30, 32)
    cache = edgeattn.KVCache.for_layer(static, 1, 8, window=4)
    np.testing.assert_array_equal(
        static.run_int8(x, kv_cache=cache, is_causal=True), static.run_int8(x, window_size=(3, 0)))


def test_floats_through_a_cache(static):
    q, x = static, random_input(1, 2, 9, 32)
    cache = edgeattn.KVCache.for_layer(q, len(x), x.shape[1])
    parts = [q(part, kv_cache=cache, is_causal=True) for part in (x[:, :3], x[:, 3:])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), q(x, is_causal=True))
    keys, values = cache.held()
    scales = q.tensors["key"].scale, q.tensors["value"].scale
    for held, scale in zip((keys, values), scales, strict=True):
        np.testing.assert_array_equal(np.rint(held / scale) * scale, held)
    cache.truncate(3)
    np.testing.assert_array_equal(q(x[:, 3:], kv_cache=cache, is_causal=True), parts[1])


def test_caches_that_do_not_fit_are_refused_and_left_alone(static):
    q, x = static, random_input(1, 2, 9, 32)
    B, L = x.shape[:2]
    good = edgeattn.KVCache.for_layer(q, B, L)
    sizes = (q.num_kv_heads, L, q.head_dim)
    for cache in (edgeattn.KVCache(B, *sizes, value_dim=q.value_dim, dtype="int8"),
                  edgeattn.KVCache(B, *sizes, value_dim=q.value_dim),
                  edgeattn.KVCache(B, *sizes, value_dim=q.value_dim, dtype="int8", scales=(1, 1))):
        with pytest.raises(ValueError, match=r"kv_cache must have this layer's scales .*KVCache.for_layer\(layer"):
            q(x, kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache needs a layer without a mask of its own"):
        q.with_mask(np.ones((L, L), bool))(x, kv_cache=good)
    with pytest.raises(ValueError, match="must hold no NaN with kv_cache"):
        q(np.where(np.arange(L)[:, None] == 1, np.float32(np.nan), x), kv_cache=good)
    with pytest.raises(ValueError, match="out must have shape"):
        q(x, kv_cache=good, out=np.empty((1, 1, 1), np.float32))
    with pytest.raises(ValueError, match="causal_alignment must be None with kv_cache"):
        q(x, kv_cache=good, causal_alignment="upper_left")
    with pytest.raises(TypeError, match="need_weights must be True or False, got 1"):
        q.run_int8(codes(0, *x.shape), need_weights=1)
    with pytest.raises(ValueError, match="dtype must be 'int8' for a static layer"):
        edgeattn.KVCache.for_layer(q, B, L, dtype="float32")
    with pytest.raises(TypeError, match="layer must be an attention layer, got dict"):
        edgeattn.KVCache.for_layer({}, B, L)
    assert good.length == 0
    asymmetric = q._replace(tensors={**q.tensors, "key": TensorQuantization(0.02, 3)})
    with pytest.raises(ValueError, match="keys and values without a zero point for a cache; got 3 of its key"):
        edgeattn.KVCache.for_layer(asymmetric, B, L)
