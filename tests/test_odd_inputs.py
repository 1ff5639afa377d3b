"""What is no argument at all: refused by TypeError or ValueError with the argument's name, wherever it is given."""

import numpy as np
import pytest
from workbench import random_input, random_layer

import edgeattn
import quant

LAYER = random_layer(0, E=6, H=2, D=4, Dv=4)
DYNAMIC = quant.quantize(LAYER, scheme="dynamic")
X = random_input(0, 2, 5, 6)
CALIBRATION = quant.calibrate(LAYER, [X])
STATIC = quant.quantize(LAYER, CALIBRATION)
Q, K, V = random_input(1, 3, 2, 2, 5, 4)


class Unwilling:
    """Has no array form, as a tensor on another device."""

    def __array__(self, *arguments, **options):
        raise RuntimeError("cannot be converted")


# None of these is right anywhere; arrays have the shape that queries have.
ODD = {
    "ragged lists": [[1.0, 2.0], [3.0]],
    "objects": np.full((2, 5, 6), None),
    "text": "abc",
    "bytes": b"abc",
    "a mapping": {"a": 1},
    "complex numbers": np.ones((2, 5, 6), complex),
    "records": np.zeros((2, 5, 6), [("a", "f4")]),
    "dates": np.zeros((2, 5, 6), "M8[s]"),
    "long doubles": np.ones((2, 5, 6), np.longdouble),
    "text in an array": np.array(["a", "b"]),
    "a masked array": np.ma.masked_array(np.ones((2, 5, 6), "f"), np.ones((2, 5, 6), bool)),
    "what has no array form": Unwilling(),
    "a function": len,
    "an empty list": [],
    "a number beyond all": 10**400,
}


def full_cache():
    cache = edgeattn.KVCache(2, 2, 9, 4)
    cache.append(K, V)
    return cache


MASKS = "attn_mask is_causal causal_alignment window_size"
CALLS = {
    "scaled_dot_product_attention": (
        edgeattn.scaled_dot_product_attention, {"query": Q, "key": K, "value": V},
        f"{MASKS} scale enable_gqa softcap kv_lengths alibi_slopes return_weights return_lse precision out"),
    "MultiHeadAttention": (
        LAYER, {"query": X}, f"key {MASKS} key_padding_mask softcap alibi_slopes kv_cache need_weights "
        "average_attn_weights out"),
    "torch masks": (LAYER.call_with_torch_masks, {"query": X}, "key attn_mask key_padding_mask is_causal need_weights"),
    "dynamic": (
        DYNAMIC, {"query": X}, f"key {MASKS} key_padding_mask softcap alibi_slopes kv_cache need_weights "
        "average_attn_weights out"),
    "static": (
        STATIC, {"query": X}, f"{MASKS} key_padding_mask softcap alibi_slopes kv_cache need_weights "
        "average_attn_weights out"),
    "run_int8": (
        STATIC.run_int8, {"query": STATIC.quantize_input(X)}, f"{MASKS} key_padding_mask kv_cache need_weights out"),
    "with_mask": (STATIC.with_mask, {"mask": None}, ""),
    "KVCache": (
        edgeattn.KVCache, {"batch": 1, "num_kv_heads": 1, "capacity": 3, "head_dim": 4}, "value_dim dtype scales window"),
    "for_layer": (edgeattn.KVCache.for_layer, {"layer": LAYER, "batch": 1, "capacity": 3}, "dtype window"),
    "append": (full_cache().append, {"key": K[:, :, :1], "value": V[:, :, :1]}, ""),
    "attend": (full_cache().attend, {"query": Q}, "attn_mask is_causal scale softcap window_size alibi_slopes position out"),
    "truncate": (full_cache().truncate, {"length": 1}, ""),
    "apply_rotary_embedding": (
        edgeattn.apply_rotary_embedding, {"x": Q, "cos": np.ones((2, 5, 2), "f"), "sin": np.ones((2, 5, 2), "f")},
        "position_ids interleaved rotary_embedding_dim"),
    "a layer": (
        edgeattn.MultiHeadAttention, {"num_heads": 2, **{f"{n}_weight": np.ones((8, 6), "f") for n in "qkv"}},
        "out_weight q_bias k_bias v_bias out_bias num_kv_heads bias_k bias_v add_zero_attn"),
    "calibrate": (quant.calibrate, {"layer": LAYER, "batches": [X]}, "observer"),
    "quantize": (quant.quantize, {"layer": LAYER, "calibration": CALIBRATION}, "scheme arithmetic"),
    "compare": (quant.compare, {"layer": LAYER, "quantized": STATIC, "batches": [X]}, ""),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_argument_is_refused_by_its_name(call):
    function, given, others = CALLS[call]
    for argument in (*given, *others.split()):
        for what, value in ODD.items():
            with pytest.raises((TypeError, ValueError), match=argument):
                function(**{**given, argument: value})
                pytest.fail(f"{argument} took {what}")


def test_a_masked_array_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"query must be a plain array, got a numpy.ma.MaskedArray; pass query.filled"):
        LAYER(ODD["a masked array"])


@pytest.mark.parametrize("function", [LAYER, DYNAMIC, STATIC])
def test_subclasses_lists_and_scalars_of_numpy_are_arrays(function):
    class Own(np.ndarray):
        pass

    wanted = function(X)
    for given in (X.view(Own), X.tolist(), list(X), X.astype(">f4")):
        np.testing.assert_allclose(function(given), wanted, atol=1e-6)
    assert type(function(X.view(Own))) is np.ndarray


@pytest.mark.parametrize("function", [LAYER, DYNAMIC, STATIC])
def test_values_beyond_float32_and_float16_do_what_floats_do(function):
    wide = np.full((1, 2, 6), 1e300)
    with np.errstate(all="raise"):
        result = function(wide)
    assert result.dtype == np.float64
    if function is STATIC:  # saturates
        assert np.isfinite(result).all()
    half = function(np.full((1, 2, 6), 6e4, np.float16))
    assert half.dtype == np.float16


def test_out_may_be_the_memory_that_is_read():
    backwards = X[:, ::-1]
    wanted = LAYER(backwards.copy())
    memory = X.copy()
    np.testing.assert_array_equal(LAYER(memory[:, ::-1], out=memory), wanted)
    q = np.concatenate((Q, Q), axis=-1)  # keys and result overlap in part
    wanted = edgeattn.scaled_dot_product_attention(q[..., :4].copy(), K, V)
    np.testing.assert_array_equal(
        edgeattn.scaled_dot_product_attention(q[..., :4], K, V, out=q[..., 2:6]), wanted)
    for place in range(3):  # the whole of an input, or of a mask
        given = [Q.copy(), K.copy(), V.copy()]
        wanted = edgeattn.scaled_dot_product_attention(*given)
        np.testing.assert_array_equal(edgeattn.scaled_dot_product_attention(*given, out=given[place]), wanted)
    mask = np.zeros((*Q.shape[:2], Q.shape[2], K.shape[2]), np.float32)
    mask[..., 1:, 0] = -np.inf
    wanted = edgeattn.scaled_dot_product_attention(Q, K, V, mask)
    out = mask.reshape(-1)[:wanted.size].reshape(wanted.shape)
    np.testing.assert_array_equal(edgeattn.scaled_dot_product_attention(Q, K, V, mask, out=out), wanted)


def test_what_fits_once_is_still_asked_of_the_next_call():
    """Shapes that were checked before are not checked again; options and values are."""
    attend = edgeattn.scaled_dot_product_attention
    q, k = np.repeat(Q[:, :1], 2, 1), K[:, :1]
    attend(q, k, V[:, :1], enable_gqa=True, is_causal=True, causal_alignment="lower_right", window_size=(2, 1))
    for changes, message in (
            ({"enable_gqa": 1}, "enable_gqa must be True or False"), ({"enable_gqa": False}, "pass enable_gqa=True"),
            ({"is_causal": 1}, "is_causal must be True or False"), ({"window_size": (2.0, 1.0)}, "window_size must be two"),
            ({"attn_mask": np.ones((Q.shape[2], K.shape[2]), int)}, "attn_mask must be a bool array")):
        with pytest.raises((TypeError, ValueError), match=message):
            attend(q, k, V[:, :1], **{"enable_gqa": True, **changes})


@pytest.mark.parametrize("function", [LAYER, DYNAMIC, STATIC, STATIC.run_int8])
@pytest.mark.parametrize("batched", [True, False])
def test_a_result_in_out_is_the_one_without(function, batched):
    codes = function == STATIC.run_int8
    x = STATIC.quantize_input(X) if codes else X
    x = x if batched else x[0]
    sees = random_input(5, 5, 5) > 0
    for masks in ({}, {"is_causal": True}, {"attn_mask": sees}, {"key_padding_mask": np.ones(x.shape[:-1], bool)},
                  {"window_size": [1, 1]}, {"attn_mask": sees.tolist()}):
        wanted = function(x, **masks)
        assert wanted.shape == x.shape and wanted.dtype == x.dtype
        wide = np.zeros((*x.shape[:-1], 12), x.dtype)
        for out in (np.empty_like(x), np.empty_like(x, order="F"), wide[..., ::2], wide[..., 3:9]):
            assert function(x, **masks, out=out) is out
            np.testing.assert_array_equal(out, wanted)
        for place in (slice(None), slice(None, None, -1)):  # over the input, in its order and against it
            memory = x.copy()
            np.testing.assert_array_equal(function(memory, **masks, out=memory[place]), wanted)
    memory = np.zeros(x.size, x.dtype)
    mask = memory[:25].view(bool)[:25].reshape(5, 5)
    mask[...] = sees
    wanted = function(x, attn_mask=sees)
    for given in (mask, memoryview(mask)):
        mask[...] = sees
        np.testing.assert_array_equal(function(x, attn_mask=given, out=memory.reshape(x.shape)), wanted)
    padding = memory[:25].view(bool)[:x[..., 0].size].reshape(x.shape[:-1])
    for given in (padding, memoryview(padding)):
        padding[...] = True
        padding[..., 3] = False
        wanted = function(x, key_padding_mask=padding.copy())
        np.testing.assert_array_equal(function(x, key_padding_mask=given, out=memory.reshape(x.shape)), wanted)
    if function != STATIC and function != STATIC.run_int8:
        with pytest.raises(TypeError, match="out must have dtype float32"):
            function(x, out=np.empty_like(x, np.float64))
    for out, message in ((np.empty((*x.shape[:-1], 7), x.dtype), "out must have shape"),
                         (np.empty((1, *x.shape), x.dtype), "out must have shape")):
        with pytest.raises(ValueError, match=message):
            function(x, out=out)
    out = np.empty_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        function(x, out=out)
