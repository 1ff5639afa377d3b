"""Dynamic int8 attention some of whose input features stay float32."""

import copy

import numpy as np
import pytest
from arrays import numbers

import edgeattn
import quant
from edgeattn.quantized import DynamicMultiHeadAttention

LARGE = [2, 7, 11, 30]  # features that are a hundred times the others


def float_layer(E=45, H=4, Hkv=2, D=8, Dv=6, **options):
    sizes = {"q": H * D, "k": Hkv * D, "v": Hkv * Dv}
    return edgeattn.MultiHeadAttention(
        H, **{f"{name}_weight": weight(size, E, name) for name, size in sizes.items()}, out_weight=weight(E, H * Dv, "o"),
        **{f"{name}_bias": numbers(size) for name, size in {**sizes, "out": E}.items()}, num_kv_heads=Hkv, **options)


def weight(outputs, inputs, name):
    made = numbers(outputs, inputs, seed=ord(name)) / np.float32(np.sqrt(inputs))
    if name != "o":
        made[:, LARGE] /= 50  # what residual streams have: large features, whose weights are not
    return made


def dynamic_layers(layer):
    """In dynamic int8: alone, and as a layer of an encoder, which has its large features apart."""
    E = layer.embed_dim
    feed_forward = edgeattn.FeedForward(edgeattn.Linear(numbers(8, E)), edgeattn.Linear(numbers(E, 8)))
    norm = numbers(E)
    norm[LARGE] *= 100
    encoder = edgeattn.TransformerEncoder([edgeattn.TransformerEncoderLayer(
        layer, feed_forward, edgeattn.LayerNorm(norm), edgeattn.LayerNorm(np.ones(E)), norm_first=True)])
    found = quant.quantize(encoder, scheme="dynamic").layers[0].attention
    assert found.outlier_columns.tolist() == LARGE
    return quant.quantize(layer, scheme="dynamic"), found


def tokens(*shape):
    x = numbers(*shape)
    x[..., LARGE] *= 100
    return x


def error(exact, got):
    return np.linalg.norm(exact.astype(np.float64) - got) / np.linalg.norm(exact.astype(np.float64))


@pytest.mark.parametrize(("E", "H", "Hkv", "length"), [(45, 4, 2, 33), (64, 4, 4, 7), (40, 2, 1, 1), (35, 3, 3, 70)])
def test_large_features_cost_the_others_no_digits(E, H, Hkv, length):
    layer, x = float_layer(E, H, Hkv), tokens(2, length, E)
    without, apart = dynamic_layers(layer)
    padding = np.arange(length) < np.array([[length], [max(1, length // 2)]])
    for masks in ({}, {"is_causal": True}, {"key_padding_mask": padding}, {"attn_mask": numbers(length, length)}):
        exact = layer(x, **masks)
        assert error(exact, apart(x, **masks)) < min(0.03, error(exact, without(x, **masks)) / 4)


@pytest.mark.parametrize("positions", [{}, {"rotary": edgeattn.RotaryEmbedding(8)}, {"k_norm": edgeattn.LayerNorm(np.ones(8))}])
def test_other_inputs_and_the_ways_operation_by_operation_are_the_same_layer(positions, tmp_path):
    layer, x, memory = float_layer(**positions), tokens(2, 9, 45), tokens(2, 12, 45)
    _, apart = dynamic_layers(layer)
    assert error(layer(x, memory, memory[..., ::-1]), apart(x, memory, memory[..., ::-1])) < 0.3  # large ones elsewhere
    assert error(layer(x, memory), apart(x, memory)) < 0.02
    whole, _ = apart(x, need_weights=True)
    assert error(whole, apart(x)) < 0.02
    cache = edgeattn.KVCache.for_layer(apart, 2, 9)
    steps = np.concatenate([apart(x[:, i:i + 1], kv_cache=cache, is_causal=True) for i in range(9)], 1)
    assert error(layer(x, is_causal=True), steps) < 0.02
    kept = apart.project_kv(memory)
    np.testing.assert_array_equal(apart(x, kept), apart(x, memory))
    edgeattn.save(apart, tmp_path / "layer.safetensors")
    for other in (edgeattn.load(tmp_path / "layer.safetensors"), copy.deepcopy(apart)):
        np.testing.assert_array_equal(other(x), apart(x))
    assert edgeattn.load(tmp_path / "layer.safetensors") == apart


def test_a_token_gives_the_same_bytes_alone_and_what_is_not_finite_stays_where_it_is():
    _, apart = dynamic_layers(float_layer())
    x, memory = tokens(1, 20, 45), tokens(1, 40, 45)
    whole = apart(x, memory)
    for i in (0, 7, 19):
        np.testing.assert_array_equal(apart(x[:, i:i + 1], memory), whole[:, i:i + 1])
    x[0, 3, LARGE[0]], x[0, 5, 0] = np.inf, np.nan
    got = apart(x, memory)
    assert np.isnan(got[0, [3, 5]]).any(-1).all()
    others = np.delete(np.arange(20), [3, 5])
    np.testing.assert_array_equal(got[:, others], whole[:, others])


def test_compare_knows_the_weights_that_are_apart():
    layer = float_layer()
    _, apart = dynamic_layers(layer)
    report = quant.compare(layer, apart, [tokens(2, 9, 45)])
    assert report.tensors["output"].cosine > 0.999
    changed = {name: array + 1 for name, array in apart.outlier_weights.items()}
    with pytest.raises(ValueError, match="outlier_weights"):
        quant.compare(layer, rebuilt(apart, outlier_weights=changed), [tokens(2, 9, 45)])


def rebuilt(layer, **changes):
    given = {"outlier_columns": layer.outlier_columns, "outlier_weights": layer.outlier_weights} | changes
    return DynamicMultiHeadAttention(layer.num_heads, layer.weights, layer.biases, num_kv_heads=layer.num_kv_heads, **given)


@pytest.mark.parametrize(("changes", "words"), [
    ({"outlier_columns": [45, 44, 43, 42]}, "outlier_columns must lie between 0 and 44"),
    ({"outlier_columns": [4, 7, 4, 1]}, r"outlier_columns must name each once, got \[4 7 4 1\]"),
    ({"outlier_columns": [1, 2, 3, 4, 5]}, "outlier_columns must be at most 4 inputs"),
    ({"outlier_columns": None}, "outlier_columns must name the inputs"),
    ({"outlier_weights": {}}, r"outlier_weights must be of query, key, value; got \[\]"),
    ({"outlier_columns": [1]}, r"outlier_weights of query must have shape \(32, 1\); got \(32, 4\)"),
])
def test_bad_outliers_are_refused(changes, words):
    _, apart = dynamic_layers(float_layer())
    with pytest.raises(ValueError, match=words):
        rebuilt(apart, **changes)


def test_inputs_of_different_widths_have_none_apart():
    made = quant.quantize(edgeattn.MultiHeadAttention(1, *(numbers(4, n) for n in (6, 6, 5))), scheme="dynamic")
    apart = {name: np.zeros((4, 1), np.float32) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="must be left out where query, key and value have inputs of different widths, got 6"):
        rebuilt(made, outlier_columns=[1], outlier_weights=apart)
