"""The dynamic int8 layer: float in, float out, int8 inside."""

import numpy as np
import pytest
from arrays import cosine

import edgeattn
import quant
from edgeattn.kernels.cpu.projection_dynamic import DynamicProjection
from edgeattn.quantized import DynamicMultiHeadAttention, QuantizedLinear


def make(rng, H=4, Hkv=2, D=8, Dv=6, E=40, out=True, bias=True):
    def weight(o, i):
        return (rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32)

    def offset(o):
        return rng.normal(0, 0.2, o).astype(np.float32) if bias else None

    return edgeattn.MultiHeadAttention(
        H, weight(H * D, E), weight(Hkv * D, E), weight(Hkv * Dv, E), weight(E, H * Dv) if out else None,
        q_bias=offset(H * D), k_bias=offset(Hkv * D), v_bias=offset(Hkv * Dv), out_bias=offset(E) if out else None,
        num_kv_heads=Hkv)


@pytest.mark.parametrize("options", [{}, {"out": False}, {"bias": False}, {"Hkv": 4, "D": 16, "Dv": 16, "E": 64}])
@pytest.mark.parametrize("length", [1, 7, 33, 200])
def test_close_to_float_with_every_kind_of_mask(options, length):
    rng = np.random.default_rng(length)
    layer = make(rng, **options)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, length, layer.embed_dim)).astype(np.float32)
    padding = np.arange(length) < np.array([[length], [max(1, length // 2)]])
    for masks in ({}, {"is_causal": True}, {"key_padding_mask": padding},
                  {"attn_mask": rng.standard_normal((length, length)).astype(np.float32)}):
        assert cosine(layer(x, **masks), dynamic(x, **masks)) > 0.9995


@pytest.mark.parametrize("keys", [1, 5, 255, 300, 700])
@pytest.mark.parametrize("out", [True, False])
def test_one_query_and_many_keys(out, keys):
    """A lone query's context is a row, block of keys by block; it has the bits that it has among others."""
    rng = np.random.default_rng(keys)
    dynamic = quant.quantize(make(rng, D=32, Dv=32, out=out), scheme="dynamic")
    x, memory = (rng.standard_normal((2, length, 40)).astype(np.float32) for length in (3, keys))
    padding = np.arange(keys) < np.array([[keys], [keys // 2 + 1]])
    for masks in ({}, {"key_padding_mask": padding}):
        np.testing.assert_array_equal(dynamic(x[:, :1], memory, **masks), dynamic(x, memory, **masks)[:, :1])


def test_diffuse_long_rows_keep_their_weight():
    # where static int8 fails: probabilities of 1/2048 are nothing in multiples of 1/256
    rng = np.random.default_rng(0)
    layer = make(rng)
    x = (0.05 * rng.standard_normal((1, 2048, 40)) + 0.5).astype(np.float32)
    assert cosine(layer(x), quant.quantize(layer, scheme="dynamic")(x)) > 0.9995


def test_scale_of_a_token_does_not_matter_to_another():
    rng = np.random.default_rng(1)
    layer = make(rng)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((1, 20, 40)).astype(np.float32)
    x[0, 5] *= 1000
    memory = rng.standard_normal((1, 30, 40)).astype(np.float32)
    real, got = layer(x, memory), dynamic(x, memory)
    assert min(cosine(a, b) for a, b in zip(real[0], got[0], strict=True)) > 0.998


def test_dtypes_ranks_out_and_inputs_left_alone():
    rng = np.random.default_rng(3)
    dynamic = quant.quantize(make(rng), scheme="dynamic")
    x = rng.standard_normal((2, 5, 40)).astype(np.float32)
    before, expected = x.copy(), dynamic(x)
    np.testing.assert_array_equal(dynamic(x[1]), expected[1])
    np.testing.assert_array_equal(dynamic(x.astype(np.float64)), expected.astype(np.float64))
    np.testing.assert_array_equal(dynamic(np.asfortranarray(x)), expected)
    out = np.empty_like(expected)
    assert dynamic(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(x, before)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    rng = np.random.default_rng(4)
    dynamic = quant.quantize(make(rng), scheme="dynamic")
    x = rng.standard_normal((2, 5, 40)).astype(np.float32)
    path = tmp_path / "layer.safetensors"
    quant.export(dynamic, path)
    loaded = edgeattn.load(path)
    assert loaded.scheme == "dynamic"
    np.testing.assert_array_equal(loaded(x), dynamic(x))


def test_compare_reports_the_output():
    rng = np.random.default_rng(5)
    layer = make(rng)
    report = quant.compare(layer, quant.quantize(layer, scheme="dynamic"),
                           [{"query": rng.standard_normal((2, 9, 40)).astype(np.float32), "is_causal": True}])
    assert list(report.tensors) == ["output"] and report.tensors["output"].sqnr_db > 30
    assert "output" in str(report)


def test_refusals(tmp_path):
    layer = make(np.random.default_rng(6))
    dynamic = quant.quantize(layer, scheme="dynamic")
    with pytest.raises(ValueError, match="layer is dynamic"):
        quant.export(dynamic, tmp_path / "a.c", sequence_length=4)
    with pytest.raises(ValueError, match=r"missing \['value'\], unexpected \['gates'\]"):
        DynamicMultiHeadAttention(4, {**{k: v for k, v in dynamic.weights.items() if k != "value"},
                                      "gates": dynamic.weights["key"]}, {})
    with pytest.raises(ValueError, match="do not fit num_heads = 5"):
        DynamicMultiHeadAttention(5, dynamic.weights, {})
    with pytest.raises(ValueError, match=r"bias of query must have shape \(32,\); got \(3,\)"):
        DynamicMultiHeadAttention(4, dynamic.weights, {"query": np.zeros(3, np.float32)}, num_kv_heads=2)
    with pytest.raises(TypeError, match="query must be a float16, float32 or float64 array"):
        dynamic(np.zeros((1, 2, 40), np.int8))
    with pytest.raises(ValueError, match="scheme must be 'static' or 'dynamic'; got 'fp8'"):
        quant.quantize(layer, scheme="fp8")
    assert isinstance(dynamic.weights["query"], QuantizedLinear)


# -- what the fused kernel does not do -------------------------------------------------------------------------------

@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (33, 40), (64, 64), (7, 129), (4, 0), (0, 4)])
@pytest.mark.parametrize("tokens", [0, 1, 9, 33, 70])
def test_the_projection_alone_is_exact_integers_and_the_same_for_a_token_alone(outputs, inputs, tokens):
    rng = np.random.default_rng(outputs + inputs + tokens)
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    scale, bias = rng.uniform(0.5, 2, (2, outputs)).astype(np.float32)
    linear = DynamicProjection(codes, scale, bias)
    result = linear(x)
    step = np.abs(x).max(1, initial=0, keepdims=True) / np.float32(127)
    quantized = np.rint(x / np.where(step > 0, step, 1))
    wanted = quantized.astype(np.float64) @ codes.astype(np.float64).T * step * scale + bias
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5 * inputs)
    for t in range(tokens):
        np.testing.assert_array_equal(linear(x[t : t + 1]), result[t : t + 1])


def int8_projections(layer, dynamic, x):
    """A float layer and an input whose projections are those of the dynamic layer, but for rounding."""
    weights = {f"{short}_weight": linear.weight * linear.scale[:, None]
               for short, linear in zip(("q", "k", "v"), dynamic.weights.values(), strict=False)}
    changed = {**weights, **{f"{n}_bias": getattr(layer, f"{n}_bias") for n in "qkv"}}
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return edgeattn.MultiHeadAttention(layer.num_heads, **changed, num_kv_heads=layer.num_kv_heads), np.rint(x / step) * step


CALLS = {
    "weights": {"need_weights": True},
    "averaged": {"need_weights": True, "average_attn_weights": True, "is_causal": True},
    "softcap": {"softcap": 0.7},
    "softcap, slopes, window": {
        "softcap": 2.0, "alibi_slopes": np.float32([0.5, 0.25, 0.1, 0.0]), "window_size": (3, 1)},
}


@pytest.mark.parametrize("call", CALLS)
def test_between_the_projections_the_steps_are_float32(call):
    rng = np.random.default_rng(7)
    layer = make(rng, out=False)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 12, 40)).astype(np.float32)
    between, quantized = int8_projections(layer, dynamic, x)
    ours, theirs = dynamic(x, **CALLS[call]), between(quantized, **CALLS[call])
    for got, wanted in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, theirs)), strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arguments", [
    {"window_size": (4, 2)}, {"window_size": (0, -1), "is_causal": True},
    {"alibi_slopes": np.float32([1, 0.5, 0.25, 0.125])}, {"need_weights": True}, {"softcap": 1.0}], ids=str)
def test_every_argument_of_a_float_layer_is_taken(arguments):
    rng = np.random.default_rng(8)
    layer = make(rng)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 40, 40)).astype(np.float32)
    real, got = layer(x, **arguments), dynamic(x, **arguments)
    if "need_weights" in arguments:
        (real, real_weights), (got, weights) = real, got
        np.testing.assert_allclose(weights, real_weights, atol=0.02)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert cosine(real, got) > 0.9995
    assert cosine(real, dynamic(x)) < 0.9995 or "need_weights" in arguments or "softcap" in arguments


CHUNKS = ([30], [1] * 30, [7, 1, 0, 22])


def streamed(layer, x, chunks, **options):
    cache = edgeattn.KVCache(len(x), layer.num_kv_heads, 52, layer.head_dim, value_dim=layer.value_dim, **options)
    parts = np.split(x, np.cumsum(chunks)[:-1], axis=1)
    return np.concatenate([layer(part, kv_cache=cache, is_causal=True) for part in parts], axis=1)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_chunks_through_a_cache_are_the_whole(dtype, window):
    rng = np.random.default_rng(9)
    layer = make(rng)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 30, 40)).astype(np.float32)
    results = [streamed(dynamic, x, chunks, dtype=dtype, window=window) for chunks in CHUNKS]
    for result in results[1:]:
        if dtype == "int8":
            np.testing.assert_array_equal(result, results[0])
        else:
            # the output projection quantizes: a rounding of its input may become a step of 1/127
            np.testing.assert_allclose(result, results[0], atol=0.02)
    bounds = edgeattn.sliding_window(window) if window else (-1, -1)
    assert cosine(layer(x, is_causal=True, window_size=bounds), results[0]) > 0.999


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_the_same_bytes_whatever_the_chunks_and_the_whole_is_near(seed):
    rng = np.random.default_rng(seed)
    layer = make(rng)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 50, 40)).astype(np.float32)
    x[:, :33] *= 3  # whatever the first tokens are, no mean of theirs is left out of a cache
    results = []
    for _ in range(4):
        cuts = np.sort(rng.choice(np.arange(1, 50), rng.integers(0, 12), replace=False))
        results.append(streamed(dynamic, x, np.diff([0, *cuts, 50]), dtype="int8"))
        np.testing.assert_array_equal(results[-1], results[0])
    whole = dynamic(x, is_causal=True)
    assert not np.array_equal(whole, results[0])  # its attention has int8 products, that of the steps has none
    assert min(cosine(layer(x, is_causal=True), found) for found in (whole, results[0])) > 0.999


def test_added_keys_are_quantized_too(tmp_path):
    rng = np.random.default_rng(10)
    plain = make(rng)
    _, tensors = plain.to_state()
    layer = edgeattn.MultiHeadAttention(4, **tensors, num_kv_heads=2, bias_k=rng.standard_normal(16),
                                        bias_v=rng.standard_normal(12), add_zero_attn=True)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 6, 40)).astype(np.float32)
    assert cosine(layer(x, is_causal=True), dynamic(x, is_causal=True)) > 0.9995 > cosine(plain(x), dynamic(x))
    assert cosine(streamed(layer, x, [4, 2]), streamed(dynamic, x, [4, 2], dtype="int8")) > 0.999
    quant.export(dynamic, tmp_path / "layer.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "layer.safetensors")(x), dynamic(x))
    with pytest.raises(ValueError, match="bias_v must be given with bias_k"):
        DynamicMultiHeadAttention(4, dynamic.weights, {}, num_kv_heads=2, bias_k=np.zeros(16, np.float32))
    with pytest.raises(ValueError, match="layer must have no bias_k.* got 2 added keys; scheme='dynamic' takes them"):
        quant.calibrate(layer, [x])
