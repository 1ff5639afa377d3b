"""Queries and keys that a MUL by a constant scales, as other converters write q * scale: the runtimes' bytes."""

import dataclasses
import json

import numpy as np
import pytest
import tflite_graphs as graphs
from runtimes import each_runtime

import edgeattn
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.files.safetensors_file import read_safetensors
from edgeattn.files.tflite import read_tflite
from edgeattn.quantized import SOURCES, MulConstant, QuantizedLinear, SelectMask, TensorQuantization
from quant.export.tflite import serialize, write_tflite
from quant.runtimes import RUNTIMES

FORMS = (graphs.Form(), graphs.Form(merged_heads=True, scores_first=False), graphs.Form(key_transposed=False),
         graphs.Form(keep_num_dims=False, value_transposed=True))


def scaled_layer(seed, *, symmetric=False, both=None, **options):
    """A layer of random parameters whose queries, keys or both go by MUL operators."""
    rng = np.random.default_rng(seed)
    layer = graphs.random_layer(rng, zero_points=not symmetric, **options)
    # small scores, so that many keys weigh something and a step of a code shows
    of = layer.linears["query"]
    small = {name: TensorQuantization(layer.tensors[name].scale * np.float32(0.1), layer.tensors[name].zero_point)
             for name in ("query", "scores")}
    layer = layer._replace(
        tensors=layer.tensors | small,
        linears=layer.linears | {"query": QuantizedLinear(of.weight, of.scale * np.float32(0.1), of.bias)})

    def chain(name):
        first = graphs.random_scaling(rng, layer.tensors[name], symmetric=symmetric)
        return (first,) if seed % 2 else (first, graphs.random_scaling(rng, first.output, symmetric=symmetric))

    return layer._replace(query_ops=chain("query") if both or seed % 3 != 1 else (),
                          key_ops=chain("key") if both or seed % 3 != 2 else ())


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def inputs_of(layer, B, L, S):
    """Codes of as many inputs as the layer tells apart."""
    widths, lengths = (layer.embed_dim, layer.kdim, layer.vdim), (L, S, S)
    return [codes(source, B, lengths[source], widths[source]) for source in sorted(set(layer.sources))]


@pytest.mark.parametrize("seed", range(12))
@each_runtime
def test_bytes_are_those_of_the_runtime(name, seed):
    sources = SOURCES[seed % 3]
    B, L, S = 1 + seed % 2, 9, 13 if sources[1] else 9
    rng = np.random.default_rng(seed)
    H, D = (1, 2, 4)[seed % 3], (4, 7, 16, 20)[seed % 4]
    score_ops = ((), graphs.converted_score_ops(rng, L, S), (SelectMask(rng.random((1, 1, L, S)) < 0.7),))[seed // 2 % 3]
    layer = scaled_layer(seed, H=H, D=D, Dv=5, E=H * D, sources=sources, score_ops=score_ops).with_arithmetic(name)
    given = inputs_of(layer, B, L, S)
    file = serialize(graphs.converted(layer, B, L, S, FORMS[seed % 4]))
    expected = RUNTIMES[name].run(file, given)[0]
    read = read_tflite(file, arithmetic=name)
    assert (read.query_ops, read.key_ops) == (layer.query_ops, layer.key_ops)
    np.testing.assert_array_equal(read.run_int8(*given), expected)
    np.testing.assert_array_equal(read.run_int8(*given, need_weights=True)[0], expected)
    # and once more by the file that we write of it
    ours = write_tflite(read, batch=B, sequence_length=L, key_length=S if sources[1] else None)
    np.testing.assert_array_equal(RUNTIMES[name].run(ours, given)[0], expected)
    again = read_tflite(ours, arithmetic=name)
    assert (again.tensors, again.query_ops, again.key_ops) == (layer.tensors, layer.query_ops, layer.key_ops)


@each_runtime
def test_a_result_that_saturates(name):
    layer = scaled_layer(3, both=True, H=2, D=8, E=16).with_arithmetic(name)
    query, key = (MulConstant(op.code, op.constant, TensorQuantization(op.output.scale / 4, 20))
                  for op in (*layer.query_ops, *layer.key_ops))
    layer = layer._replace(query_ops=(query,), key_ops=(key,))
    for table in layer.projection_tables.values():
        assert {-128, 127} <= set(table.tolist())
        assert 0.1 < np.isin(table, (-128, 127)).mean() < 0.9
    x, = inputs_of(layer, 2, 11, 11)
    expected = RUNTIMES[name].run(serialize(graphs.converted(layer, 2, 11, 11)), [x])[0]
    np.testing.assert_array_equal(layer.run_int8(x), expected)
    assert (layer._replace(query_ops=(), key_ops=()).run_int8(x) != expected).any()


@each_runtime
def test_values_that_a_mul_scales_round_once(name):
    """Near the runtime's codes, and told; of queries and keys nothing is told."""
    rng = np.random.default_rng(0)
    layer = graphs.random_layer(rng, H=2, D=8, Dv=8, E=16)
    before, by = layer.tensors["value"], TensorQuantization(np.float32(0.003), 0)
    op = MulConstant(100, by, TensorQuantization(before.scale * np.float32(0.25), -4))
    file = serialize(graphs.converted(layer, 1, 9, 9, value_ops=[op]))
    with pytest.warns(UserWarning, match="the values are scaled by a MUL of their own, .* rounds once") as told:
        read = read_tflite(file, arithmetic=name)
    assert len(told) == 1
    x, = inputs_of(layer, 1, 9, 9)
    difference = np.abs(read.run_int8(x, need_weights=True)[0].astype(int) - RUNTIMES[name].run(file, [x])[0])
    assert difference.max() <= 3
    negative = MulConstant(-100, by, op.output)
    with pytest.raises(ValueError, match="expected MUL of the values by one positive number; found -0.3"):
        read_tflite(serialize(graphs.converted(layer, 1, 9, 9, value_ops=[negative])))


def test_a_number_for_each_feature_is_refused():
    layer = scaled_layer(3, both=True, H=2, D=8, E=16)
    graph = graphs.converted(layer, 1, 9, 9)
    number = next(i for i, tensor in enumerate(graph.tensors) if tensor.name == "factor")
    graph.tensors[number] = dataclasses.replace(graph.tensors[number], shape=(8,), data=np.arange(8, dtype=np.int8))
    with pytest.raises(ValueError, match="expected MUL of 'transpose_.*' by one number; found 8 numbers"):
        read_tflite(serialize(graph))


@pytest.mark.parametrize("H, D", [(1, 3), (3, 5), (2, 16), (2, 33), (12, 4), (4, 64)])
@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
def test_masks_lengths_batches_and_threads(arithmetic, H, D, many_threads):
    """Against the layer operation by operation, which need_weights computes with NumPy."""
    layer = scaled_layer(H + D, both=True, H=H, D=D, Dv=6, E=24).with_arithmetic(arithmetic)
    for B, L in ((1, 1), (2, 3), (1, 70), (3, 131)):
        x, rng = codes(L, B, L, 24), np.random.default_rng(L)
        for masks in ({}, {"is_causal": True}, {"attn_mask": rng.random((B, H, L, L)) < 0.7},
                      {"key_padding_mask": np.arange(L) < rng.integers(1, L + 1, (B, 1)), "window_size": (5, -1)}):
            expected = layer.run_int8(x, **masks, need_weights=True)[0]
            for count in (1, 3):
                many_threads(count)
                np.testing.assert_array_equal(layer.run_int8(x, **masks), expected)


@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
@pytest.mark.parametrize("seed", range(3))
def test_a_cache_holds_what_the_product_reads(arithmetic, seed):
    layer = scaled_layer(seed, symmetric=True, H=3, D=10, Dv=6, E=24).with_arithmetic(arithmetic)
    x = codes(seed, 2, 30, 24)
    expected = layer.run_int8(x, is_causal=True)
    for chunks in ([30], [1] * 30, [7, 1, 0, 22]):
        cache = edgeattn.KVCache.for_layer(layer, 2, 30)
        got = [layer.run_int8(part, kv_cache=cache, **({"is_causal": True} if part.shape[1] > 1 else {}))
               for part in np.split(x, np.cumsum(chunks)[:-1], axis=1)]
        np.testing.assert_array_equal(np.concatenate(got, axis=1), expected)
        assert cache.scales[0] == layer.product_tensors["key"].scale


def test_a_key_that_a_mul_moves_off_zero_has_no_cache():
    layer = scaled_layer(0, symmetric=True, H=2, D=4, E=8)
    op, = layer.key_ops[:1]
    layer = layer._replace(key_ops=(MulConstant(op.code, op.constant, TensorQuantization(op.output.scale, 3)),))
    with pytest.raises(ValueError, match="without a zero point for a cache; got 3 of its key"):
        edgeattn.KVCache.for_layer(layer, 1, 4)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_saved_is_loaded(seed, tmp_path):
    layer, path = scaled_layer(seed, H=2, D=4, E=8), tmp_path / "layer.safetensors"
    edgeattn.save(layer, path)
    loaded = edgeattn.load(path)
    assert (loaded.query_ops, loaded.key_ops) == (layer.query_ops, layer.key_ops)
    x = codes(seed, 2, 9, 8)
    np.testing.assert_array_equal(loaded.run_int8(x), layer.run_int8(x))
    # an older release, to whom they are unknown, says so instead of leaving them out; other files it reads as before
    assert json.loads(read_safetensors(path)[0]["edgeattn"])["format"] == 2
    edgeattn.save(layer._replace(query_ops=(), key_ops=()), path)
    header = json.loads(read_safetensors(path)[0]["edgeattn"])
    assert header["format"] == 1 and not {"query_ops", "key_ops"} & set(header["config"])


def test_what_is_no_mul_is_refused():
    layer = scaled_layer(0, H=2, D=4, E=8)
    with pytest.raises(TypeError, match="query_ops must be MulConstant; got SelectMask"):
        layer._replace(query_ops=(SelectMask(np.ones((1, 1, 1, 1), bool)),))
    one, large = TensorQuantization(1, 0), TensorQuantization(2.0**100, 0)
    for what, constant, output in (("constant", large, one), ("output", one, large)):
        with pytest.raises(ValueError, match=f"the scale of the {what} in key_ops must be positive and finite, within"):
            layer._replace(key_ops=(MulConstant(1, constant, output),))
    with pytest.raises(ValueError, match="key_ops must be at most 64 operators; got 65"):
        layer._replace(key_ops=(MulConstant(1, one, one),) * 65)


def test_keys_of_grouped_heads():
    """What several heads share is repeated in the projection, and so is what MUL makes of it."""
    layer = scaled_layer(2, both=True, H=4, D=8, E=32)
    linears = dict(layer.linears)
    for name in ("key", "value"):
        size, of = len(linears[name].weight) // 4, linears[name]
        which = np.repeat(np.arange(2), 2)[:, None] * size + np.arange(size)
        linears[name] = QuantizedLinear(of.weight[which.ravel()], of.scale[which.ravel()], of.bias[which.ravel()])
    layer, x = layer._replace(linears=linears), codes(1, 2, 20, 32)
    np.testing.assert_array_equal(layer.run_int8(x), layer.run_int8(x, need_weights=True)[0])
