"""The static layer itself: its parameters' checks, masks, empty and NaN inputs, copies, files."""
import copy
import pickle
import re

import numpy as np
import pytest
from arrays import cosine
from static_made import SOURCES, codes, make
from workbench import as_batch, random_call, random_input

import edgeattn
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.kernels.cpu.quantize import Quantizer
from edgeattn.quantized import (
    AddMask,
    MulConstant,
    QuantizedLinear,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from quant.trace import read_calls, static_trace


@pytest.fixture(scope="module")
def pair():
    return make()


@pytest.fixture(scope="module")
def static(pair):
    return pair[1]


# -- the second implementation -----------------------------------------------------------------------------------------

def last(trace):
    if "output" in trace:
        return trace["output"]
    context = trace["context"].transpose(0, 2, 1, 3)
    return context.reshape(*context.shape[:2], -1)


@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("masked", ["no mask", "call", "carried", "both", "converter"])
def test_the_trace_equals_the_kernels(arithmetic, sources, masked):
    layer, q = make(len(masked), sources, Dv=5, output=masked != "call")
    q = q.with_arithmetic(arithmetic)
    inputs = random_call(layer, sources, 7)
    (B, L), S = inputs[0].shape[:2], inputs[-1].shape[1]
    rng = np.random.default_rng(3)
    masks = {"attn_mask": rng.random((B, 4, L, S)) < 0.6} if masked in ("call", "both") else {}
    if masked in ("carried", "both"):
        q = q.with_mask(rng.random((1, 1, L, S)) < 0.7).with_mask(rng.random((B, 1, 1, S)) < 0.8)
    if masked == "converter":
        scaled = TensorQuantization(0.03, -3)
        q = q._replace(score_ops=(
            MulConstant(99, TensorQuantization(0.01, 0), scaled),
            AddMask(rng.choice(np.int8([-128, 127]), (1, 1, L, S)), TensorQuantization(0.02, 127), scaled)))
    call, = read_calls(layer, [as_batch(inputs, **masks)], "test")
    trace = static_trace(q, call)
    names = [q.tensors[f"{name}_input"].quantize(x) for name, x in zip(("query", "key", "value"), inputs, strict=False)]
    np.testing.assert_array_equal(q.run_int8(*names, **masks), last(trace))


# -- probabilities, windows --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("form", ["plain", "carried", "converter"])
def test_probabilities_come_with_the_same_bytes(arithmetic, sources, form):
    layer, q = make(2, sources, Dv=5)
    q = q.with_arithmetic(arithmetic)
    inputs = random_call(layer, sources, 7)
    (B, L), S = inputs[0].shape[:2], inputs[-1].shape[1]
    keep = np.random.default_rng(3).random((B, 4, L, S)) < 0.6
    if form == "carried":
        q = q.with_mask(keep)
    if form == "converter":
        scaled = TensorQuantization(0.03, -3)
        q = q._replace(score_ops=(MulConstant(99, TensorQuantization(0.01, 0), scaled),))
    given = [q.quantize_input(x, name) for name, x in zip(("query", "key", "value"), inputs, strict=False)]
    masks = {"attn_mask": keep} if form == "plain" else {}
    result, probabilities = q.run_int8(*given, **masks, need_weights=True)
    np.testing.assert_array_equal(result, q.run_int8(*given, **masks))
    assert probabilities.dtype == np.int8 and probabilities.shape == (B, 4, L, S)
    if form == "plain":
        assert (probabilities[~keep] == -128).all()
    real, weights = q(*inputs, **masks, need_weights=True)
    np.testing.assert_array_equal(real, q(*inputs, **masks))
    np.testing.assert_array_equal(weights * 256 - 128, probabilities)
    _, mean = q(*inputs, **masks, need_weights=True, average_attn_weights=True)
    np.testing.assert_allclose(mean, weights.mean(1), atol=1e-7)
    _, alone = q.run_int8(*(x[0] for x in given), **{k: m[0] for k, m in masks.items()}, need_weights=True) if (
        form == "plain") else (None, probabilities[0])
    np.testing.assert_array_equal(alone, probabilities[0])


@pytest.mark.parametrize("window", [(0, 0), (3, -1), (-1, 2), (5, 1)])
def test_windows_are_explicit_masks(static, window):
    x, i = codes(1, 2, 40, 32), np.arange(40)
    distance = i - i[:, None]
    keep = (distance >= -window[0] if window[0] >= 0 else True) & (distance <= window[1] if window[1] >= 0 else True)
    np.testing.assert_array_equal(static.run_int8(x, window_size=window), static.run_int8(x, attn_mask=keep))
    real = static.dequantize_output(x[..., :1])  # any floats
    real = np.repeat(real, 32, axis=-1)
    np.testing.assert_array_equal(static(real, window_size=window), static(real, attn_mask=keep))


@pytest.mark.parametrize("S", [500, 513, 600, 4096, 5000])
def test_rows_of_many_equal_scores_are_what_the_rules_say(S):
    # where a row sums up to 512 the runtimes with gemmlowp's softmax abort; all probabilities are 0 then
    q = make(sources=(0, 1, 1), masked=False)[1]
    x, memory = codes(0, 1, 2, 32), np.tile(codes(1, 1, 1, 32), (1, S, 1))
    for arithmetic in KERNEL_SETS:
        q = q.with_arithmetic(arithmetic)
        result, probabilities = q.run_int8(x, memory, need_weights=True)
        np.testing.assert_array_equal(q.run_int8(x, memory), result, err_msg=arithmetic)
        assert np.unique(probabilities).tolist() == [-127 if S <= 512 else -128]


# -- masks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
def test_a_row_without_a_key_is_a_context_of_zero(static, arithmetic):
    q = static.with_arithmetic(arithmetic)
    x = codes(0, 2, 6, 32)
    mask = np.ones((2, 1, 6, 6), bool)
    mask[0, :, 3] = False
    got = q.run_int8(x, attn_mask=mask)
    zero = np.full((1, 32), q.tensors["context"].zero_point, np.int8)
    expected = Int8Ops(q).linear(zero, q.linears["output"], "output")
    np.testing.assert_array_equal(got[0, 3], expected[0])
    full = q.run_int8(x)
    mask[0, :, 3] = True
    np.testing.assert_array_equal(q.run_int8(x, attn_mask=mask), full)
    np.testing.assert_array_equal(np.delete(got[0], 3, 0), np.delete(full[0], 3, 0))


def test_a_row_without_a_key_is_zeros_without_an_output_projection():
    _, q = make(2, output=False)
    got = q(random_input(0, 2, 6, 32), key_padding_mask=np.array([[False] * 6, [True] * 6]))
    assert (got[0] == 0).all()
    assert (got[1] != 0).any()


@pytest.mark.parametrize("sources", SOURCES[1:])
def test_masked_keys_are_never_touched(sources):
    layer, q = make(3, sources)
    inputs = [codes(i, *x.shape) for i, x in enumerate(random_call(layer, sources))]
    padding = np.array([[True] * 9, [True] * 4 + [False] * 5])
    masked = q.run_int8(*inputs, key_padding_mask=padding)
    short = q.run_int8(inputs[0][1:], *(x[1:, :4] for x in inputs[1:]))
    np.testing.assert_array_equal(masked[1:], short)
    for x in inputs[1:]:
        x[1, 4:] = -x[1, 4:]
    np.testing.assert_array_equal(q.run_int8(*inputs, key_padding_mask=padding), masked)


def test_masks_agree_however_they_are_said(static):
    x = codes(1, 2, 7, 32)
    causal = static.run_int8(x, is_causal=True)
    np.testing.assert_array_equal(static.run_int8(x, attn_mask=np.tri(7, dtype=bool)), causal)
    padding = np.arange(7) < np.array([[3], [7]])
    np.testing.assert_array_equal(static.run_int8(x, key_padding_mask=padding),
                                  static.run_int8(x, attn_mask=padding[:, None, None]))
    np.testing.assert_array_equal(static.run_int8(x[0], key_padding_mask=padding[0], is_causal=True),
                                  static.run_int8(x[:1], key_padding_mask=padding[:1], is_causal=True)[0])


def test_carried_masks_combine(static):
    x = codes(2, 1, 8, 32)
    a, b = np.tri(8, dtype=bool), np.arange(8) < 5
    np.testing.assert_array_equal(static.with_mask(a).with_mask(b).run_int8(x), static.with_mask(a & b).run_int8(x))
    np.testing.assert_array_equal(static.with_mask(np.ones((8, 8), bool)).run_int8(x), static.run_int8(x))
    np.testing.assert_array_equal(static.with_mask(b).with_mask(a).run_int8(x), static.with_mask(a & b).run_int8(x))


def test_a_layer_without_room_carries_no_mask():
    _, q = make(4, masked=False)
    assert q.mask_margin == 0
    with pytest.raises(ValueError, match="mask needs a layer that was calibrated with masks.*pass the mask to each"):
        q.with_mask(np.tri(5, dtype=bool))
    q.run_int8(codes(0, 1, 5, 32), is_causal=True)


# -- shapes and dtypes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("B,L,S", [(0, 4, 4), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("output", [True, False])
def test_empty_axes(B, L, S, output):
    _, q = make(5, (0, 1, 1), output=output)
    got = q.run_int8(codes(0, B, L, 32), codes(1, B, S, 32))
    assert got.shape == (B, L, 32)
    if S == 0:
        zero = q.run_int8(codes(0, B, L, 32), codes(1, B, 3, 32), attn_mask=np.zeros((L, 3), bool))
        np.testing.assert_array_equal(got, zero)
    assert q(random_input(0, B, L, 32), random_input(1, B, S, 32)).shape == (B, L, 32)


def test_inputs_without_a_batch_axis_and_in_any_layout(static):
    x = codes(3, 2, 5, 32)
    expected = static.run_int8(x)
    np.testing.assert_array_equal(static.run_int8(x[1]), expected[1])
    before = x.copy()
    np.testing.assert_array_equal(static.run_int8(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(static.run_int8(np.repeat(x, 2, -1)[..., ::2]), expected)
    x.flags.writeable = False
    np.testing.assert_array_equal(static.run_int8(x), expected)
    np.testing.assert_array_equal(x, before)


def test_out_takes_the_result(static):
    x = codes(4, 2, 5, 32)
    out = np.zeros((2, 5, 32), np.int8)
    assert static.run_int8(x, out=out) is out
    expected = static.run_int8(x)
    np.testing.assert_array_equal(out, expected)
    assert static.run_int8(x, out=x) is x
    np.testing.assert_array_equal(x, expected)
    real = random_input(0, 2, 5, 32)
    out = np.zeros((2, 5, 32), np.float32)
    assert static(real, out=out) is out
    np.testing.assert_array_equal(out, static(real))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_floats_out(static, dtype):
    x = random_input(0, 2, 5, 32).astype(dtype)
    got = static(x)
    assert got.dtype == dtype
    expected = static.dequantize_output(static.run_int8(static.quantize_input(x)))
    np.testing.assert_array_equal(got, expected.astype(dtype))


@pytest.mark.parametrize("zero_point", [-128, -7, 0, 127])
def test_one_pass_gives_the_codes_and_reals_of_the_quantization(zero_point):
    tensor = TensorQuantization(0.037, zero_point)
    x = np.arange(-70_000, 70_001, dtype=np.float32) * np.float32(0.037 / 256)  # every tie, and beyond either end
    x = np.concatenate([x, np.float32([np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0])]).reshape(1, -1)
    quantizer = Quantizer(tensor.scale, tensor.zero_point)
    got, some_nan = quantizer.to_codes(x)
    np.testing.assert_array_equal(got, tensor.quantize(x))
    assert not some_nan
    every = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    np.testing.assert_array_equal(quantizer.to_reals(every), tensor.dequantize(every))
    for at in (0, 63, -1):
        spoiled = x[:, :1000].copy()
        spoiled[0, at] = np.nan
        assert quantizer.to_codes(spoiled)[1]


def test_nan_goes_where_it_may_be_seen(pair):
    layer, q = pair
    x = random_input(0, 2, 6, 32)
    clean = q(x, is_causal=True)
    x[1, 4, 7] = np.nan
    with np.errstate(invalid="ignore"):
        expected = np.isnan(layer(x, is_causal=True))
    got = q(x, is_causal=True)
    np.testing.assert_array_equal(np.isnan(got), expected)
    np.testing.assert_array_equal(got[~expected], clean[~expected])
    padding = np.array([[True] * 6, [True] * 4 + [False] * 2])
    assert np.isnan(q(x, key_padding_mask=padding)[1]).any(-1).tolist() == [False] * 4 + [True, False]
    assert np.isnan(q.with_mask(np.tri(6, dtype=bool))(x)[1]).any(-1).tolist() == [False] * 4 + [True, True]
    assert np.isnan(q(x[1], is_causal=True)).any(-1).tolist() == [False] * 4 + [True, True]


def test_infinite_and_huge_inputs_saturate(static):
    x = random_input(0, 1, 4, 32)
    big = np.where(x > 0, np.float32(np.inf), np.float32(-3e38))
    np.testing.assert_array_equal(static(big), static(np.where(x > 0, np.float32(1e6), np.float32(-1e6))))


# -- copies and files --------------------------------------------------------------------------------------------------

def test_with_arithmetic_changes_nothing_else(static):
    masked = static.with_mask(np.tri(5, dtype=bool))
    for name in KERNEL_SETS:
        other = masked.with_arithmetic(name)
        assert other.arithmetic == name
        assert (other.tensors, other.sources, other.score_ops, other.mask_margin) == (
            masked.tensors, masked.sources, masked.score_ops, masked.mask_margin)
        assert all(other.linears[linear] is masked.linears[linear] for linear in masked.linears)
    assert masked.arithmetic == "litert"
    with pytest.raises(ValueError, match="arithmetic must be one of 'litert'.*got 'xnn'"):
        masked.with_arithmetic("xnn")


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("form", [{}, {"bias": False}, {"output": False}, {"Dv": 5, "Hkv": 2}])
def test_layers_round_trip_bit_for_bit(tmp_path, sources, form):
    layer, q = make(7, sources, **form)
    path = tmp_path / "q.safetensors"
    inputs = [codes(i, *x.shape) for i, x in enumerate(random_call(layer, sources))]
    L, S = inputs[0].shape[1], inputs[-1].shape[1]
    mask = np.random.default_rng(0).random((1, 1, L, S)) < 0.5
    one, two = TensorQuantization(0.1, 3), TensorQuantization(0.2, -128)
    other = q._replace(score_ops=(MulConstant(np.int8(5), one, two), AddMask(codes(5, L, S), one, two)),
                       mask_margin=None)
    for saved in (q, q.with_arithmetic("tflm"), q.with_mask(mask), other):
        edgeattn.save(saved, path)
        loaded = edgeattn.load(path)
        assert loaded.tensors == saved.tensors
        assert list(loaded.tensors) == list(saved.tensors)
        for name in ("arithmetic", "sources", "mask_margin", "lowest_single_score", "num_heads"):
            assert getattr(loaded, name) == getattr(saved, name)
        for name, linear in saved.linears.items():
            for part in ("weight", "scale", "bias"):
                a, b = getattr(linear, part), getattr(loaded.linears[name], part)
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.dtype == b.dtype
                    np.testing.assert_array_equal(a, b)
        assert [type(op) for op in loaded.score_ops] == [type(op) for op in saved.score_ops]
        np.testing.assert_array_equal(loaded.run_int8(*inputs), saved.run_int8(*inputs))


STATES = [
    (lambda c, t: c["tensors"].pop("scores"), "tensors must hold the quantization of 'scores'"),
    (lambda c, t: c["tensors"].update(more=[1.0, 0]), "tensors has an unexpected entry 'more'"),
    (lambda c, t: c["tensors"].update(probabilities=[1 / 256, 0]), "probabilities must have the scale 1/256"),
    (lambda c, t: c["tensors"].update(key=[float("nan"), 0]), "scale must be finite, got nan"),
    (lambda c, t: c["tensors"].update(key=[0.1, 128]), r"zero_point must lie in \[-128, 127\]; got 128"),
    (lambda c, t: c["tensors"].update(key=[0.1, 1.5]), "'float' object cannot be interpreted as an integer"),
    (lambda c, t: c.update(tensors=[1]), "tensors must be an object"),
    (lambda c, t: c.update(query_ops=[{"op": "Relu"}]), r"query_ops\[0\] must be MulConstant"),
    (lambda c, t: c.update(key_ops=["a"]), "score_ops, query_ops and key_ops lists of objects"),
    (lambda c, t: c.update(score_ops=["a"]), "score_ops, query_ops and key_ops lists of objects"),
    (lambda c, t: c.update(score_ops=[{"op": "Relu"}]), r"score_ops\[0\] must be MulConstant, AddMask, SelectMask, Requantize"),
    (lambda c, t: c.update(score_ops=[{"op": "SelectMask", "fill": 0}]), "keep"),
    (lambda c, t: c.update(sources=[0, 1, 0]), "sources must be one of"),
    (lambda c, t: c.update(num_heads=3), "num_heads = 3 does not fit projections"),
    (lambda c, t: c.pop("arithmetic"), "'arithmetic'"),
    (lambda c, t: t.pop("key.weight"), "weight"),
    (lambda c, t: t.pop("query.scale"), "scale"),
    (lambda c, t: t.update({"more.weight": t["key.weight"], "more.scale": t["key.scale"]}), "unexpected entry 'more'"),
    (lambda c, t: t.update({"key.weight": np.full((32, 32), -128, np.int8)}), r"weight must lie in \[-127, 127\]"),
]


@pytest.mark.parametrize("lie,match", STATES)
def test_lying_states_are_refused(static, lie, match):
    config, tensors = static.to_state()
    config = {**config, "tensors": dict(config["tensors"])}
    lie(config, tensors)
    with pytest.raises((TypeError, ValueError, KeyError), match=match):
        StaticMultiHeadAttention.from_state(config, tensors)


# -- refusals ----------------------------------------------------------------------------------------------------------

CALLS = [
    ({"query": np.zeros((2, 5, 32))}, TypeError, r"query must be int8; got float64 \(floats go to the call itself\)"),
    ({"query": np.zeros(32, np.int8)}, ValueError, r"query must be \(B, L, E\) or \(L, E\); got shape \(32,\)"),
    ({"query": np.zeros((1, 2, 5, 32), np.int8)}, ValueError, r"query must be \(B, L, E\) or \(L, E\)"),
    ({"query": np.zeros((5, 31), np.int8)}, ValueError, r"query must have 32 features in its last axis; got .*31\)"),
    ({"query": codes(0, 5, 32), "key": codes(0, 5, 32)}, ValueError,
     "key must be left out: this layer was quantized with query as its key"),
    ({"query": codes(0, 5, 32), "value": codes(0, 5, 32)}, ValueError, "value must be left out"),
    ({"query": None}, ValueError, "query is required"),
    ({"query": codes(0, 5, 32), "attn_mask": np.zeros((5, 5), np.float32)}, TypeError,
     r"attn_mask must be bool for int8 \(True = attend\), got dtype float32; pass numpy.asarray\(attn_mask\) == 0 if "
     r"0 means attend and -inf blocked, != 0 if 1 means attend; layers of quant.quantize\(layer, scheme='dynamic'\)"),
    ({"query": codes(0, 5, 32), "attn_mask": np.ones((5, 5), int)}, TypeError,
     r"got dtype int64; pass numpy.asarray\(attn_mask\) != 0 if 1 means attend, == 0 if 1 means blocked"),
    ({"query": codes(0, 5, 32), "attn_mask": np.ones((4, 5), bool)}, ValueError, "attn_mask must broadcast"),
    ({"query": codes(0, 5, 32), "key_padding_mask": np.ones((1, 5), bool)}, ValueError, "key_padding_mask must have"),
    ({"query": codes(0, 5, 32), "is_causal": 1}, TypeError, "is_causal must be True or False"),
    ({"query": codes(0, 5, 32), "out": np.zeros((5, 32), np.float32)}, TypeError, "out must have dtype int8"),
    ({"query": codes(0, 5, 32), "out": np.zeros((1, 5, 32), np.int8)}, ValueError, r"out must have shape \(5, 32\)"),
    ({"query": codes(0, 5, 32), "out": [1]}, TypeError, "out must be a numpy.ndarray, got list"),
]


@pytest.mark.parametrize("arguments,error,match", CALLS)
def test_bad_int8_calls_are_refused(static, arguments, error, match):
    with pytest.raises(error, match=match):
        static.run_int8(**arguments)


@pytest.mark.parametrize("arguments, error, match", [
    ({"softcap": 5.0}, ValueError, r"softcap must be 0 for a static int8 layer: .*scheme='dynamic'\) take it"),
    ({"softcap": True}, TypeError, "softcap must be a real number, got True"),
    ({"alibi_slopes": np.ones(4, np.float32)}, ValueError, "alibi_slopes must be None for a static int8 layer: "),
])
def test_what_static_layers_lack_is_refused_by_name(static, arguments, error, match):
    x = np.zeros((5, 32), np.float32)
    static(x, softcap=0.0, alibi_slopes=None)
    static(x, softcap=0)
    with pytest.raises(error, match=match):
        static(x, **arguments)


def test_bad_cross_attention_calls_are_refused():
    layer, q = make(8, (0, 1, 2), kdim=20, vdim=24)
    query, key, value = (codes(i, *x.shape) for i, x in enumerate(random_call(layer, (0, 1, 2))))
    with pytest.raises(ValueError, match="key is required: this layer was quantized with a key of its own"):
        q.run_int8(query)
    with pytest.raises(ValueError, match="value is required"):
        q.run_int8(query, key)
    with pytest.raises(ValueError, match="key must have 20 features"):
        q.run_int8(query, value, key)
    with pytest.raises(ValueError, match="key must have as many axes as query, 3; got shape"):
        q.run_int8(query, key[0], value)
    with pytest.raises(ValueError, match="must share the batch, and key and value their length"):
        q.run_int8(query, key, value[:, :3])
    with pytest.raises(ValueError, match="must share the batch, and key and value their length"):
        q.run_int8(query[:1], key, value)
    with pytest.raises(ValueError, match="causal_alignment is needed"):
        q.run_int8(query, key, value, is_causal=True)


def test_the_same_input_may_be_named_again():
    layer, q = make(9, (0, 1, 1))
    query, key = (codes(i, *x.shape) for i, x in enumerate(random_call(layer, (0, 1, 1))))
    np.testing.assert_array_equal(q.run_int8(query, key, key), q.run_int8(query, key))
    with pytest.raises(ValueError, match="value must be left out: this layer was quantized with key as its value"):
        q.run_int8(query, key, key.copy())


def test_bad_float_calls_are_refused(static):
    with pytest.raises(TypeError, match=r"query must be a float array; got int8 \(codes go to run_int8\)"):
        static(codes(0, 5, 32))
    with pytest.raises(TypeError, match="query must be a float16, float32 or float64 array, got dtype int64"):
        static(np.zeros((5, 32), np.int64))
    with pytest.raises(TypeError, match="out must have dtype float32"):
        static(random_input(0, 5, 32), out=np.zeros((5, 32)))


def test_masks_that_do_not_fit_are_refused(static):
    with pytest.raises(TypeError, match=r"mask must be bool \(True = attend\); got float64"):
        static.with_mask(np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"keep must broadcast to \(B, H, L, S\); got shape \(1, 1, 1, 5, 5\)"):
        static.with_mask(np.ones((1, 1, 1, 5, 5), bool))
    for shape in ((7, 5, 5), (0, 5), (2, 0, 5, 5)):
        with pytest.raises(ValueError, match=rf"mask must broadcast to \(B, H, L, S\) with H = 4 and no empty axis; got shape "
                                             rf"{re.escape(str(shape))}"):
            static.with_mask(np.ones(shape, bool))
    masked = static.with_mask(np.ones((5, 5), bool))
    with pytest.raises(ValueError, match=r"mask must broadcast to .*; got shape \(6, 6\) beside \(5, 5\)"):
        masked.with_mask(np.ones((6, 6), bool))
    with pytest.raises(ValueError, match=r"masks in score_ops must broadcast to \(B, H, L, S\) with H = 4 .* \(3, 1, 5\)"):
        static._replace(score_ops=(SelectMask(np.ones((3, 1, 5), bool)),))
    with pytest.raises(ValueError, match=r"the mask this layer carries has shape \(1, 1, 5, 5\), which does not "
                                         r"broadcast to \(B, H, L, S\) = \(1, 4, 6, 6\)"):
        masked.run_int8(codes(0, 6, 32))


PARTS = [
    (lambda: QuantizedLinear(np.zeros((2, 3)), np.float32(1)), TypeError, "weight must be int8; got float64"),
    (lambda: QuantizedLinear(np.zeros(3, np.int8), np.float32(1)), ValueError, "weight must be .out_features"),
    (lambda: QuantizedLinear(np.zeros((2, 3), np.int8), np.float32([1, 0])), ValueError, "positive and finite"),
    (lambda: QuantizedLinear(np.zeros((2, 3), np.int8), 1.0), TypeError, "scale must be float32"),
    (lambda: QuantizedLinear(np.zeros((2, 3), np.int8), np.float32(1), np.zeros(2)), TypeError, "bias must be int32"),
    (lambda: QuantizedLinear(np.zeros((2, 3), np.int8), np.float32(1), np.zeros(3, np.int32)), ValueError,
     r"bias must have shape \(2,\); got \(3,\)"),
    (lambda: SelectMask(np.ones((2, 2))), TypeError, "keep must be bool; got float64"),
    (lambda: SelectMask(np.ones((2, 2), bool), 128), ValueError, r"fill must lie in \[-128, 127\]; got 128"),
    (lambda: AddMask(np.zeros((2, 2)), None, None), TypeError, "codes must be int8; got float64"),
    (lambda: MulConstant(-129, None, None), ValueError, r"code must lie in \[-128, 127\]; got -129"),
    (lambda: TensorQuantization(0.0, 0), ValueError, "scale must be positive and finite, within .*; got 0.0"),
]


@pytest.mark.parametrize("build,error,match", PARTS)
def test_bad_parts_are_refused(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_parts_stay_as_they_were_made():
    one, same, other = TensorQuantization(0.5, 3), TensorQuantization(0.5, 3), TensorQuantization(0.5, 4)
    linear = QuantizedLinear(np.ones((2, 3), np.int8), np.ones(2, np.float32))
    assert one == same != other and len({one, same, other}) == 2 and one != (0.5, 3) and linear != copy.copy(linear)
    assert re.fullmatch(r"TensorQuantization\(scale=.*0\.5\)?, zero_point=3\)", repr(one))
    for part, name in ((one, "scale"), (linear, "bias"), (linear, "other")):
        with pytest.raises(AttributeError, match=f"cannot set {name}: {type(part).__name__} stays"):
            setattr(part, name, 1)
    with pytest.raises(AttributeError, match="cannot delete scale"):
        del one.scale
    for part in (one, MulConstant(3, one, other)):
        assert pickle.loads(pickle.dumps(part)) == copy.deepcopy(part) == part
    with pytest.raises(TypeError, match="zero_point"):
        TensorQuantization(1.0)


def test_bad_layers_are_refused(static):
    def change(**changes):
        return static._replace(**changes)

    q = static.linears
    wide = QuantizedLinear(np.zeros((32, 16), np.int8), np.float32(1))
    with pytest.raises(ValueError, match="linears must hold 'query', 'key', 'value'; 'key' is missing"):
        change(linears={"query": q["query"], "value": q["value"]})
    with pytest.raises(ValueError, match="the key projection takes 16 features; the query projection of the same"):
        change(linears={**q, "key": wide})
    with pytest.raises(ValueError, match="the output projection takes 16 features; the heads give 32"):
        change(linears={**q, "output": wide})
    with pytest.raises(ValueError, match="mask_margin must be finite"):
        change(mask_margin=float("inf"))
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        change(num_heads=2.0)
    nine = tuple(SelectMask(np.arange(5) < 3, fill) for fill in range(9))
    with pytest.raises(ValueError, match="score_ops distinguish 512 kinds of position; at most 256 are supported"):
        change(score_ops=nine)


def test_close_to_float_under_every_kernel_set(pair):
    layer, q = pair
    x = random_input(77, 2, 12, 32)
    for name in KERNEL_SETS:
        assert cosine(q.with_arithmetic(name)(x, is_causal=True), layer(x, is_causal=True)) > 0.998
