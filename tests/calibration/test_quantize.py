"""From ranges to int8: what quantize promises of the parameters it chooses, and of the accuracy they give."""
import numpy as np
import pytest
from arrays import cosine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from workbench import as_batch, random_call, random_input, random_layer

import edgeattn
import quant
from edgeattn.files.tflite import read_tflite
from quant.export.tflite import write_tflite
from quant.quantize import MASK_MARGIN, quantize_linear
from quant.runtimes import RUNTIMES

FORMS = {
    "self": ({}, (0, 0, 0)), "value is key": ({}, (0, 1, 1)), "three inputs": ({}, (0, 1, 2)),
    "other widths": ({"kdim": 20, "vdim": 24}, (0, 1, 2)), "grouped": ({"Hkv": 2}, (0, 0, 0)),
    "one kv head": ({"Hkv": 1, "Dv": 5}, (0, 1, 1)), "no biases": ({"bias": False}, (0, 0, 0)),
    "no output projection": ({"output": False, "Dv": 6}, (0, 0, 0)), "value size": ({"Dv": 11}, (0, 1, 2)),
    "one head": ({"H": 1, "D": 16}, (0, 0, 0)), "neither": ({"bias": False, "output": False}, (0, 1, 2)),
}


def quantized(layer, sources=(0, 0, 0), *, calls=20, **masks):
    batches = [as_batch(random_call(layer, sources, 10 * seed), **masks) for seed in range(calls)]
    return quant.quantize(layer, quant.calibrate(layer, batches))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_layer_stays_close_to_float(form):
    options, sources = FORMS[form]
    layer = random_layer(1, **options)
    q = quantized(layer, sources)
    inputs = random_call(layer, sources, 99)
    expected = layer(*inputs)
    got = q(*inputs)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert cosine(got, expected) > 0.998
    assert q.sources == sources
    assert ("output" in q.linears) == (layer.out_weight is not None)
    assert all((linear.bias is None) == (name == "key" or not options.get("bias", True))
               for name, linear in q.linears.items())
    assert q.tensors["key"].zero_point == q.tensors["value"].zero_point == 0
    assert (q.head_dim, q.value_dim, q.kdim, q.vdim) == (layer.head_dim, layer.value_dim, layer.kdim, layer.vdim)
    for linear in q.linears.values():
        assert np.abs(linear.weight.astype(int)).max(1).min() == 127  # every channel uses its range


def test_weights_are_within_half_a_step():
    layer = random_layer(2)
    q = quantized(layer)
    for name, weight in (("query", layer.q_weight), ("key", layer.k_weight), ("value", layer.v_weight),
                         ("output", layer.out_weight)):
        linear = q.linears[name]
        scale = linear.scale / (np.float32(layer.scale) if name == "query" else 1)
        real = weight * (np.float32(layer.scale) if name == "query" else 1)
        assert linear.weight.dtype == np.int8
        np.testing.assert_allclose(linear.weight * linear.scale[:, None], real,
                                   atol=float(linear.scale.max()) * 0.501)
        np.testing.assert_allclose(scale, np.abs(weight).max(1) / 127, rtol=1e-6)


@pytest.mark.parametrize("D", [1, 3, 8, 16])
def test_the_scores_scale_is_folded_and_changes_no_code(D):
    layer = random_layer(3, D=D)
    calibration = quant.calibrate(layer, [random_input(0, 2, 9, 32)])
    q = quant.quantize(layer, calibration)
    low, high = calibration.range("query")
    fold = np.float32(1 / np.sqrt(D))
    plain = quantize_linear(layer.q_weight, layer.q_bias, q.tensors["query_input"].scale)
    np.testing.assert_array_equal(q.linears["query"].weight, plain.weight)
    np.testing.assert_array_equal(q.linears["query"].bias, plain.bias)
    np.testing.assert_array_equal(q.linears["query"].scale, plain.scale * fold)
    assert q.tensors["query"].scale == np.float32((high - low) / 255) * fold
    assert q.score_ops == ()


def test_grouped_heads_are_repeated():
    layer = random_layer(4, H=6, Hkv=2, Dv=5)
    q = quantized(layer)
    assert q.num_heads == q.num_kv_heads == 6
    for name, size in (("key", 8), ("value", 5)):
        heads = q.linears[name].weight.reshape(6, size, 32)
        for h in range(6):
            np.testing.assert_array_equal(heads[h], heads[h // 3 * 3])
        assert (heads[0] != heads[3]).any()
    biases = q.linears["value"].bias.reshape(6, 5)
    for h in range(6):
        np.testing.assert_array_equal(biases[h], biases[h // 3 * 3])


@pytest.mark.parametrize("options,sources", [({}, (0, 0, 0)), ({"Hkv": 2}, (0, 1, 1)), ({"kdim": 20}, (0, 1, 2))])
@pytest.mark.parametrize("size", [0.3, 200, 1e6])
def test_a_key_bias_changes_nothing(options, sources, size):
    # it adds the same to all scores of a query: softmax does not see it, and no int8 range shall
    layer = random_layer(4, **options)
    _, tensors = layer.to_state()
    bias = np.random.default_rng(0).normal(0, size, len(layer.k_weight)).astype(np.float32)
    with_bias, without = (edgeattn.MultiHeadAttention(4, **{**tensors, "k_bias": b}, num_kv_heads=options.get("Hkv"))
                          for b in (bias, None))
    calls = [as_batch(random_call(layer, sources, seed)) for seed in (0, 10)]
    a, b = (quant.quantize(made, quant.calibrate(made, calls)) for made in (with_bias, without))
    assert a.tensors == b.tensors
    for name, linear in a.linears.items():
        np.testing.assert_array_equal(linear.weight, b.linears[name].weight)
        np.testing.assert_array_equal(linear.scale, b.linears[name].scale)
        np.testing.assert_array_equal(linear.bias, b.linears[name].bias)
    inputs = random_call(layer, sources, 20)
    np.testing.assert_array_equal(a(*inputs), b(*inputs))


# -- one linear layer --------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-45, 19), st.floats(-45, 25), st.floats(-18, 17))
def test_codes_stay_in_range_for_any_magnitudes(seed, weight_power, bias_power, input_power):
    assume(bias_power < input_power + 26)  # beyond, no scale within 2**60 holds the bias
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((4, 6)) * 10.0**weight_power).astype(np.float32)
    weight[1] = 0
    bias = (rng.standard_normal(4) * 10.0**bias_power).astype(np.float32)
    bias[2] = 0
    scale = np.float32(10.0**input_power)
    linear = quantize_linear(weight, bias, scale)
    assert (np.abs(linear.weight.astype(int)) <= 127).all()
    assert (np.abs(linear.bias.astype(np.int64)) <= 2**30 * 1.01).all()
    np.testing.assert_allclose(linear.bias * (float(scale) * linear.scale.astype(np.float64)), bias.astype(np.float64),
                               atol=float(scale) * float(linear.scale.max()) * 0.51, rtol=1e-6)


def test_a_huge_bias_widens_its_channel_alone():
    weight = np.full((2, 3), 0.5, np.float32)
    linear = quantize_linear(weight, np.array([0.1, 1e6], np.float32), np.float32(1e-3))
    assert linear.scale[0] == np.float32(0.5 / 127)
    assert linear.bias[1] == pytest.approx(2**30, rel=1e-6)
    np.testing.assert_allclose(linear.bias * (1e-3 * linear.scale.astype(np.float64)), [0.1, 1e6], rtol=1e-4)


def test_a_channel_of_zeros_takes_the_largest_scale():
    weight = np.array([[1, -3], [0, 0], [2, 1]], np.float32)
    linear = quantize_linear(weight, None, np.float32(1))
    np.testing.assert_array_equal(linear.scale, np.float32([3 / 127, 3 / 127, 2 / 127]))
    np.testing.assert_array_equal(linear.weight[1], 0)


def test_a_layer_of_zeros_runs():
    zeros = {name: np.zeros((16, 16), np.float32) for name in ("q_weight", "k_weight", "v_weight", "out_weight")}
    layer = edgeattn.MultiHeadAttention(2, **zeros, out_bias=np.ones(16, np.float32))
    q = quant.quantize(layer, quant.calibrate(layer, [random_input(0, 1, 4, 16)]))
    np.testing.assert_allclose(q(random_input(1, 1, 4, 16)), 1, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-25, 1e-8, 1e-3, 1e8])
def test_extreme_inputs_are_quantized(scale):
    layer = random_layer(5, bias=False)
    x = random_input(0, 2, 6, 32) * np.float32(scale)
    q = quant.quantize(layer, quant.calibrate(layer, [x]))
    got = q(x)
    assert np.isfinite(got).all()
    if 1e-8 <= scale <= 1:  # beyond, rows attend to one key, and int8 cannot tell the largest of two near scores
        assert cosine(got, layer(x)) > 0.998


# -- masks -------------------------------------------------------------------------------------------------------------

def masks_of(kind, B, L):
    lengths = np.random.default_rng(L).integers(1, L + 1, (B, 1, 1, 1))
    return {"causal": np.tri(L, dtype=bool), "padding": np.arange(L) < lengths,
            "both": np.tri(L, dtype=bool) & (np.arange(L) < lengths)}[kind]


@pytest.mark.parametrize("kind", ["causal", "padding", "both"])
@pytest.mark.parametrize("L", [8, 33, 96])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_keep_their_accuracy(kind, L, seed):
    layer = random_layer(seed)
    mask = masks_of(kind, 2, L)
    calls = [{"query": x, "attn_mask": mask} for x in random_input(seed, 20, 2, L, 32)]
    q = quant.quantize(layer, quant.calibrate(layer, calls))
    x = random_input(100 + seed, 2, L, 32)
    expected = layer(x, attn_mask=mask)
    assert q.mask_margin == MASK_MARGIN
    assert cosine(q(x, attn_mask=mask), expected) > 0.998
    assert cosine(q.with_mask(mask)(x), expected) > 0.998


def test_a_naive_range_would_lose_it():
    # why the margin exists: -1e4 or the like inside the scores' range, as other quantizers have it
    layer = random_layer(0)
    mask = np.tri(33, dtype=bool)
    q = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "attn_mask": mask}
                                                      for x in random_input(0, 4, 2, 33, 32)]))
    wide = q._replace(tensors={**q.tensors, "scores": edgeattn.quantized.TensorQuantization(1e4 / 255, 127)})
    x = random_input(100, 2, 33, 32)
    assert cosine(wide.with_mask(mask)(x), layer(x, attn_mask=mask)) < 0.9


def test_the_scores_range_reaches_the_margin_below_the_lowest_row_maximum():
    layer = random_layer(6)
    x = random_input(0, 2, 16, 32)
    masked = quant.calibrate(layer, [{"query": x, "is_causal": True}])
    t = quant.quantize(layer, masked).tensors["scores"]
    assert float(t.dequantize(-128)) == pytest.approx(masked.lowest_row_maximum - MASK_MARGIN, abs=float(t.scale))
    assert float(t.dequantize(127)) == pytest.approx(masked.range("scores")[1], abs=float(t.scale))
    # without masks the range is what was seen, and no more than the margin deep
    free = quant.calibrate(layer, [x])
    t = quant.quantize(layer, free).tensors["scores"]
    assert float(t.dequantize(-128)) == pytest.approx(free.range("scores")[0], abs=float(t.scale))
    steep = quant.calibrate(layer, [x * 5])
    t = quant.quantize(layer, steep).tensors["scores"]
    assert steep.range("scores")[0] < steep.lowest_row_maximum - MASK_MARGIN - 1
    assert float(t.dequantize(-128)) == pytest.approx(min(0, steep.lowest_row_maximum - MASK_MARGIN),
                                                      abs=float(t.scale))


def steep_first_token(seed):
    """A call whose first token sees itself alone, at a score far below all others, which sees no other query."""
    x = random_input(seed, 2, 12, 32)
    x[:, 0] *= 4
    mask = np.tri(12, dtype=bool)
    mask[1:, 0] = False
    return {"query": x, "attn_mask": mask}


def opposed_layer(seed):
    """A layer whose tokens score themselves low: keys are minus queries."""
    made = random_layer(seed, bias=False)
    return edgeattn.MultiHeadAttention(4, made.q_weight, -made.q_weight, made.v_weight, made.out_weight)


def test_a_mask_that_leaves_a_single_key_finds_room_for_it():
    layer = opposed_layer(0)
    calls = [steep_first_token(seed) for seed in range(10)]
    q = quant.quantize(layer, quant.calibrate(layer, calls))
    call = steep_first_token(50)
    mask, expected = call["attn_mask"], layer(**call)
    low, lowest = float(q.tensors["scores"].dequantize(-128)), q.lowest_single_score
    assert lowest < low < -MASK_MARGIN  # such scores set no range where the mask is given to the call
    assert cosine(q(**call), expected) > 0.998
    carried = q.with_mask(mask)
    assert float(carried.tensors["scores"].dequantize(-128)) == pytest.approx(
        lowest - MASK_MARGIN, abs=float(carried.tensors["scores"].scale))
    assert cosine(carried(call["query"])[:, :1], expected[:, :1]) > 0.998
    # without that the one key weighs as much as all that are masked
    squeezed = carried._replace(tensors=q.tensors)
    assert cosine(squeezed(call["query"])[:, :1], expected[:, :1]) < 0.9
    # a mask without such rows leaves the range as it is, also one with rows of none
    for other in (mask | (np.arange(12) < 2), mask & (np.arange(12) > 1)[:, None] & (np.arange(12) != 2)[:, None]):
        assert (other.sum(-1) != 1).all()
        assert q.with_mask(other).tensors == q.tensors
    # two masks together may
    both = q.with_mask(np.arange(12) < 6).with_mask(np.arange(12) > 4)
    assert both.tensors["scores"] == carried.tensors["scores"]


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_other_observers_give_working_layers(observer):
    layer = random_layer(7)
    calls = [{"query": x, "is_causal": True} for x in random_input(0, 20, 2, 24, 32)]
    q = quant.quantize(layer, quant.calibrate(layer, calls, observer=observer))
    x = random_input(50, 2, 24, 32)
    assert cosine(q(x, is_causal=True), layer(x, is_causal=True)) > 0.998
    assert q.tensors["key"].zero_point == q.tensors["value"].zero_point == 0


# -- refusals ----------------------------------------------------------------------------------------------------------

def test_bad_arguments_are_refused():
    layer = random_layer(8)
    calibration = quant.calibrate(layer, [random_input(0, 1, 5, 32)])
    with pytest.raises(TypeError, match="layer must be a float MultiHeadAttention, TransformerEncoder, .*; got NoneType"):
        quant.quantize(None, calibration)
    with pytest.raises(ValueError, match="scheme must be 'static' or 'dynamic'; got 'int4'"):
        quant.quantize(layer, calibration, scheme="int4")
    with pytest.raises(TypeError, match=r"calibration must be a quant.Calibration .*run quant.calibrate.*got NoneType; "
                                        "scheme='dynamic' needs none$"):
        quant.quantize(layer)
    with pytest.raises(ValueError, match="calibration was made with another layer"):
        quant.quantize(random_layer(9), calibration)
    with pytest.raises(ValueError, match="arithmetic must be one of 'litert'.*got 'fast'"):
        quant.quantize(layer, calibration, arithmetic="fast")
    with pytest.raises(ValueError, match="arithmetic must be one of 'litert'.*got 'fast'"):
        quant.quantize(layer, scheme="dynamic", arithmetic="fast")
    with pytest.raises(TypeError, match="calibration must be left out, or a quant.Calibration.*got int"):
        quant.quantize(layer, 3, scheme="dynamic")
    with pytest.raises(ValueError, match="attention must be left out for an attention layer.*got 'float32'"):
        quant.quantize(layer, scheme="dynamic", attention="float32")


def scaled_layer(factor):
    made = random_layer(0, bias=False)
    return edgeattn.MultiHeadAttention(made.num_heads, made.q_weight * np.float32(factor),
                                       made.k_weight * np.float32(factor), made.v_weight, made.out_weight)


@pytest.mark.parametrize("weight,data", [(1e-4, 1.0), (1.0, 1e-6), (0.0, 1.0), (1e-12, 1e-6), (1.0, 1e8)])
def test_layers_of_any_magnitude_run_in_every_runtime(weight, data):
    # gemmlowp's softmax aborts the process on a scale below 2**-26, and readers refuse scales beyond 2**60
    rng = np.random.default_rng(0)
    made = scaled_layer(weight)
    x = (rng.standard_normal((1, 9, made.embed_dim)) * data).astype(np.float32)
    static = quant.quantize(made, quant.calibrate(made, [x]))
    file = write_tflite(static, batch=1, sequence_length=9)
    codes = static.quantize_input(x)
    np.testing.assert_array_equal(read_tflite(file).run_int8(codes), static.run_int8(codes))
    for name, runtime in RUNTIMES.items():
        if runtime.available() is None:
            np.testing.assert_array_equal(runtime.run(file, [codes])[0], static.with_arithmetic(name).run_int8(codes))


def test_values_beyond_int8_scales_are_refused_by_name():
    rng = np.random.default_rng(0)
    made = random_layer(0)
    x = (rng.standard_normal((1, 9, made.embed_dim)) * 1e12).astype(np.float32)
    with pytest.raises(ValueError, match="calibration saw scores values up to .*; int8 scales end at 2..60"):
        quant.quantize(made, quant.calibrate(made, [x]))
