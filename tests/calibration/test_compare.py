"""The numbers of a report against plain NumPy, and its lints where they belong and nowhere else."""
import math

import numpy as np
import pytest
from workbench import as_batch, random_call, random_input, random_layer

import edgeattn
import quant
from quant.trace import float_trace, read_calls, static_trace


def make(layer, batches):
    return quant.quantize(layer, quant.calibrate(layer, batches))


def expected_numbers(real, got, low, high, step):
    noise = np.sum((real - got) ** 2)
    return (10 * math.log10(np.sum(real**2) / noise), np.sum(real * got) / math.sqrt(np.sum(real**2) * np.sum(got**2)),
            np.mean((real < low - step / 2) | (real > high + step / 2)))


@pytest.mark.parametrize("sources", [(0, 0, 0), (0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("output", [True, False])
def test_numbers_are_those_of_plain_numpy(sources, masked, output):
    layer = random_layer(1, Hkv=2, Dv=5, output=output)
    masks = {"key_padding_mask": np.arange(12 if sources[1] == 0 else 9) < np.array([[5], [7]])} if masked else {}
    batches = [as_batch(random_call(layer, sources, 10 * i), **masks) for i in range(4)]
    q = make(layer, batches[:1])
    report = quant.compare(layer, q, batches)
    traces = [(float_trace(layer, call), static_trace(q, call), call.permitted)
              for call in read_calls(layer, batches, "test")]
    assert list(report.tensors) == list(traces[0][0])
    for name, numbers in report.tensors.items():
        real, got = [], []
        for floats, codes, permitted in traces:
            keep = np.ones(floats[name].shape, bool)
            if permitted is not None and name == "scores":
                keep = permitted
            if permitted is not None and name in ("query", "probabilities", "context", "output", "query_input"):
                seen = permitted[:, 0].any(-1)  # padding is no query where it is no key
                keep = np.broadcast_to(seen[:, None, :, None] if keep.ndim == 4 else seen[..., None], keep.shape)
            if permitted is not None and name in ("key", "value", "key_input", "value_input"):
                seen = permitted[:, 0].any(1)  # the same for every head
                keep = np.broadcast_to(seen[:, None, :, None] if keep.ndim == 4 else seen[..., None], keep.shape)
            real.append(floats[name][keep] * (np.float32(layer.scale) if name == "query" else 1))
            t = q.tensors[name]
            got.append((codes[name][keep].astype(np.float64) - t.zero_point) * float(t.scale))
        t = q.tensors[name]
        low, high = (float(t.scale) * (code - t.zero_point) for code in (-128, 127))
        real, got = np.concatenate(real).astype(np.float64), np.concatenate(got)
        expected = expected_numbers(real, got, low, high, float(t.scale))
        assert (numbers.sqnr_db, numbers.cosine, numbers.saturation) == pytest.approx(expected, rel=1e-4), name
    for head, numbers in enumerate(report.heads):
        t = q.tensors["context"]
        rows = [slice(None) if permitted is None else permitted[:, 0].any(-1) for _, _, permitted in traces]
        real = np.concatenate([floats["context"][:, head][row].ravel() for (floats, _, _), row
                               in zip(traces, rows, strict=True)]).astype(np.float64)
        got = np.concatenate([t.dequantize(codes["context"][:, head][row]).ravel() for (_, codes, _), row
                              in zip(traces, rows, strict=True)])
        low, high = (float(t.dequantize(code)) for code in (-128, 127))
        assert (numbers.sqnr_db, numbers.cosine, numbers.saturation) == pytest.approx(
            expected_numbers(real, got, low, high, float(t.scale)), rel=1e-4)


def test_batches_may_be_cut_in_any_way():
    layer = random_layer(2)
    x = random_input(0, 8, 9, 32)
    q = make(layer, [x])
    whole, cut = quant.compare(layer, q, [x]), quant.compare(layer, q, [x[:3], x[3:]])
    for name in whole.tensors:
        assert whole.tensors[name].sqnr_db == pytest.approx(cut.tensors[name].sqnr_db)
    assert whole.lints == cut.lints == []


def test_a_carried_mask_holds_for_the_float_layer_too():
    layer = random_layer(3)
    mask = np.tri(12, dtype=bool)
    x = random_input(0, 6, 2, 12, 32)
    q = make(layer, [{"query": one, "attn_mask": mask} for one in x])
    carried = quant.compare(layer, q.with_mask(mask), x)
    called = quant.compare(layer, q, [{"query": one, "attn_mask": mask} for one in x])
    assert carried.tensors["output"].cosine > 0.998
    assert carried.tensors["output"].cosine == pytest.approx(called.tensors["output"].cosine, abs=1e-4)
    assert carried.tensors["scores"].cosine == pytest.approx(called.tensors["scores"].cosine, abs=1e-4)
    with pytest.raises(ValueError, match="the mask this layer carries has shape"):
        quant.compare(layer, q.with_mask(mask), [x[0, :, :5]])


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("masks", ["key_padding_mask", "attn_mask"])
def test_padding_does_not_count(scheme, masks):
    layer = random_layer(3)
    x, real = random_input(0, 3, 9, 32), np.arange(9) < np.array([[9], [4], [2]])
    q = make(layer, [x]) if scheme == "static" else quant.quantize(layer, scheme="dynamic")
    mask = {"key_padding_mask": real, "attn_mask": real[:, None, :, None] & real[:, None, None, :]}[masks]
    report = quant.compare(layer, q, [{"query": x, masks: mask}])
    alone = quant.compare(layer, q, [one[:n] for one, n in zip(x, (9, 4, 2), strict=True)])
    x[~real] = 1e3
    padded = quant.compare(layer, q, [{"query": x, masks: mask}])
    assert padded.lints == report.lints == alone.lints
    for name, numbers in alone.tensors.items():
        for other in (report, padded):
            assert other.tensors[name].cosine == pytest.approx(numbers.cosine, abs=1e-6), name
            assert other.tensors[name].saturation == pytest.approx(numbers.saturation, abs=1e-3), name


def test_a_key_bias_that_a_converter_kept_is_compared():
    layer = random_layer(4)
    x = random_input(0, 4, 12, 32)
    q = make(layer, [x])
    key = q.linears["key"]
    step = q.tensors["query_input"].scale * key.scale
    kept = edgeattn.quantized.QuantizedLinear(key.weight, key.scale, np.rint(layer.k_bias / step).astype(np.int32))
    report = quant.compare(layer, q._replace(linears={**q.linears, "key": kept}), [x])
    assert report.tensors["key"].cosine > 0.999
    assert report.tensors["scores"].cosine > 0.999


def test_scores_that_a_converter_scales_later_are_compared_before():
    layer = random_layer(4)
    x = random_input(0, 4, 12, 32)
    q = make(layer, [x])
    t, fold = q.tensors, np.float32(layer.scale)
    unfolded = q._replace(
        tensors={**t, "query": edgeattn.quantized.TensorQuantization(t["query"].scale / fold, t["query"].zero_point),
                 "scores": edgeattn.quantized.TensorQuantization(t["scores"].scale / fold, t["scores"].zero_point)},
        linears={**q.linears, "query": edgeattn.quantized.QuantizedLinear(
            q.linears["query"].weight, q.linears["query"].scale / fold, q.linears["query"].bias)},
        score_ops=(edgeattn.quantized.MulConstant(
            127, edgeattn.quantized.TensorQuantization(fold / 127, 0), t["scores"]),))
    ours, theirs = quant.compare(layer, q, [x]), quant.compare(layer, unfolded, [x])
    for name in ours.tensors:
        assert theirs.tensors[name].cosine == pytest.approx(ours.tensors[name].cosine, abs=1e-3), name


def test_queries_and_keys_that_a_converter_scales_are_compared_before():
    """As nn.MultiheadAttention does: each by the root of the scale."""
    layer, quantization = random_layer(4), edgeattn.quantized.TensorQuantization
    x = random_input(0, 4, 12, 32)
    q = make(layer, [x])
    t, fold = q.tensors, np.float32(layer.scale)
    root, query = np.sqrt(fold), quantization(t["query"].scale / fold, t["query"].zero_point)
    split = q._replace(
        tensors={**t, "query": query},
        linears={**q.linears, "query": edgeattn.quantized.QuantizedLinear(
            q.linears["query"].weight, q.linears["query"].scale / fold, q.linears["query"].bias)},
        **{f"{name}_ops": (edgeattn.quantized.MulConstant(
            127, quantization(root / 127, 0), quantization(of.scale * root, of.zero_point)),)
           for name, of in (("query", query), ("key", t["key"]))})
    ours, theirs = quant.compare(layer, q, [x]), quant.compare(layer, split, [x])
    for name in ours.tensors:
        assert theirs.tensors[name].cosine == pytest.approx(ours.tensors[name].cosine, abs=1e-3), name


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_another_layer_of_the_same_shape_is_refused(scheme):
    layer, other, x = random_layer(5, Hkv=2), random_layer(6, Hkv=2), random_input(0, 2, 9, 32)
    q = make(layer, [x]) if scheme == "static" else quant.quantize(layer, scheme="dynamic")
    assert quant.compare(layer, q, [x]).tensors["output"].cosine > 0.99
    with pytest.raises(ValueError, match=r"does not belong to layer: its query weights are off by up to .* steps of int8"):
        quant.compare(other, q, [x])
    _, tensors = layer.to_state()
    changed = tensors["out_weight"].copy()
    changed[3, 4] += np.abs(changed[3]).max() / 20
    near = edgeattn.MultiHeadAttention(4, **{**tensors, "out_weight": changed}, num_kv_heads=2)
    with pytest.raises(ValueError, match="its output weights are off by up to"):
        quant.compare(near, q, [x])


# -- lints -------------------------------------------------------------------------------------------------------------

def diffuse_layer():
    """Scores near 0: every row is spread over all keys."""
    rng = np.random.default_rng(0)
    return edgeattn.MultiHeadAttention(1, *(rng.standard_normal((8, 8)).astype(np.float32) * s for s in (.01, .01, 1)))


def lints(layer, calibration_batches, batches):
    return quant.compare(layer, make(layer, calibration_batches), batches).lints


@pytest.mark.parametrize("S,expected", [(32, False), (256, False), (384, True), (1024, True)])
def test_probability_underflow_is_reported_on_long_diffuse_rows(S, expected):
    # at 384 each probability rounds up to 1/256 and a row adds up to 1.5; at 1024 each rounds to nothing
    layer = diffuse_layer()
    query, key = random_input(0, 1, 4, 8), random_input(1, 1, S, 8)
    found = lints(layer, [{"query": query, "key": key}], [{"query": query, "key": key}])
    assert len(found) == expected
    if expected:
        assert found[0].startswith("probability underflow: the int8 probabilities of a row miss a sum of 1 by "
                                   f"{'50%' if S == 384 else '100%'} on average")


def test_long_rows_that_attend_to_few_keys_are_not_reported():
    layer = diffuse_layer()
    query, key = random_input(0, 1, 4, 8), random_input(1, 1, 1024, 8)
    call = {"query": query, "key": key, "attn_mask": np.arange(1024) < 10}
    assert lints(layer, [call], [call]) == []


def test_rows_without_keys_are_not_counted_as_underflow():
    layer = random_layer(5)
    call = {"query": random_input(0, 2, 6, 32), "key_padding_mask": np.array([[True] * 6, [False] * 6])}
    assert lints(layer, [call], [call]) == []


def test_saturation_is_reported_for_what_saturates():
    layer = random_layer(6)
    x = random_input(0, 4, 12, 32)
    assert lints(layer, [x], [x]) == []
    found = lints(layer, [x * 0.3], [x])
    assert any("of query_input lies outside its int8 range; calibrate on data like this" in lint for lint in found)
    assert all(lint.startswith("saturation: ") for lint in found)


def test_scores_cut_below_are_not_reported():
    # the range of steep scores ends where no row would notice, far above the lowest
    layer = random_layer(7)
    x = random_input(0, 4, 12, 32) * 3
    q = make(layer, [x])
    report = quant.compare(layer, q, [x])
    assert report.tensors["scores"].saturation > 0.05
    assert not any("of scores" in lint for lint in report.lints)


# -- the report --------------------------------------------------------------------------------------------------------

def test_the_report_is_a_table_without_colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    layer = random_layer(8)
    x = random_input(0, 4, 12, 32)
    report = quant.compare(layer, make(layer, [x * 0.3]), [x])
    text = str(report)
    assert "\x1b" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["output"] == ["output", f"{report.tensors['output'].sqnr_db:.1f}",
                              f"{report.tensors['output'].cosine:.5f}", f"{report.tensors['output'].saturation:.2%}"]
    assert text.count("context of head") == 4
    assert text.count("note: saturation") == len(report.lints)


def test_a_tensor_without_signal_has_no_ratio():
    zeros = [np.zeros((8, 8), np.float32)] * 3
    layer = edgeattn.MultiHeadAttention(2, *zeros)
    x = random_input(0, 2, 5, 8)
    report = quant.compare(layer, make(layer, [x]), [x])
    assert math.isnan(report.tensors["key"].sqnr_db)
    assert math.isnan(report.tensors["key"].cosine)
    assert report.tensors["query_input"].cosine > 0.999
    assert "nan" in str(report)


# -- refusals ----------------------------------------------------------------------------------------------------------

def test_bad_arguments_are_refused():
    layer = random_layer(9)
    x = random_input(0, 2, 5, 32)
    q = make(layer, [x])
    with pytest.raises(TypeError, match="layer must be a float MultiHeadAttention, TransformerEncoder, .*; got StaticMultiHeadAttention"):
        quant.compare(q, q, [x])
    with pytest.raises(TypeError, match="quantized must be a layer from quant.quantize; got MultiHeadAttention"):
        quant.compare(layer, layer, [x])
    with pytest.raises(ValueError, match="quantized does not belong to layer: num_heads is 4, the layer's is 2"):
        quant.compare(random_layer(9, H=2), q, [x])
    with pytest.raises(ValueError, match="quantized does not belong to layer: one of them has no output projection"):
        quant.compare(random_layer(9, output=False), q, [x])
    for batches in ([], [{"query": x, "key_padding_mask": np.zeros((2, 5), bool)}]):
        for int8 in (q, quant.quantize(layer, scheme="dynamic")):
            with pytest.raises(ValueError, match="batches must hold at least one query with a permitted key; got none"):
                quant.compare(layer, int8, batches)
    with pytest.raises(ValueError, match=r"query of batches\[1\] holds NaN"):
        quant.compare(layer, q, [x, x * np.float32(np.nan)])
    with pytest.raises(ValueError, match=r"batches\[0\] calls the layer with a query and a key; it was quantized for a "
                                         "query alone"):
        quant.compare(layer, q, [{"query": x, "key": x.copy()}])
