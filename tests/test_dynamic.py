"""The dynamic int8 layer: float in, float out, int8 inside."""

import numpy as np
import pytest

import edgeattn
import quant
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


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return a @ b / np.sqrt((a @ a) * (b @ b))


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


def test_rows_without_a_key_empty_axes_and_nan_behind_a_mask():
    rng = np.random.default_rng(2)
    layer = make(rng)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((2, 6, 40)).astype(np.float32)
    nothing = dynamic(x, attn_mask=np.zeros((6, 6), bool))
    np.testing.assert_allclose(nothing, np.broadcast_to(layer.out_bias, nothing.shape), rtol=1e-6)
    np.testing.assert_allclose(dynamic(x, x[:, :0]), nothing, rtol=1e-6)
    assert dynamic(x[:, :0]).shape == (2, 0, 40) and dynamic(x[:0]).shape == (0, 6, 40)
    keep = np.array([True] * 4 + [False] * 2)
    memory = x.copy()
    memory[:, 4:] = np.nan
    assert np.isfinite(dynamic(x, memory, key_padding_mask=np.stack([keep, keep]))).all()


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
    with pytest.raises(ValueError, match="layer is dynamic, which only .safetensors files hold"):
        quant.export(dynamic, tmp_path / "a.tflite", sequence_length=4)
    with pytest.raises(ValueError, match=r"missing \['value'\], unexpected \['gate'\]"):
        DynamicMultiHeadAttention(4, {**{k: v for k, v in dynamic.weights.items() if k != "value"},
                                      "gate": dynamic.weights["key"]}, {})
    with pytest.raises(ValueError, match="do not fit num_heads = 5"):
        DynamicMultiHeadAttention(5, dynamic.weights, {})
    with pytest.raises(ValueError, match=r"bias of query must have shape \(32,\); got \(3,\)"):
        DynamicMultiHeadAttention(4, dynamic.weights, {"query": np.zeros(3, np.float32)}, num_kv_heads=2)
    with pytest.raises(TypeError, match="query must be a float16, float32 or float64 array"):
        dynamic(np.zeros((1, 2, 40), np.int8))
    with pytest.raises(ValueError, match="scheme must be 'static' or 'dynamic'; got 'fp8'"):
        quant.quantize(layer, scheme="fp8")
    assert isinstance(dynamic.weights["query"], QuantizedLinear)
