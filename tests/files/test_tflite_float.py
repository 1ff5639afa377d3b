"""Float and hybrid attention of .tflite files, as float32 layers: those that this project writes, bit for bit."""

import dataclasses
import re

import numpy as np
import pytest
from arrays import numbers as random

import edgeattn
import quant
from edgeattn.files.tflite import read_tflite
from edgeattn.files.tflite_file import parse
from edgeattn.tflite_schema import Operator
from quant.export.tflite import serialize

E, H, D, L = 24, 4, 6, 5
X = random(2, L, E, seed=9)
OF_BYTES = "^the .tflite bytes: "


def layer(heads=H, kv_heads=None, size=D, out=True, bias=True, **options):
    widths = [heads * size, *[(kv_heads or heads) * size] * 2]
    weights = {f"{role}_weight": random(n, E, seed=i) / 5 for i, (role, n) in enumerate(zip("qkv", widths, strict=True))}
    if bias:
        weights |= {f"{role}_bias": random(n, seed=5 + i) for i, (role, n) in enumerate(zip("qkv", widths, strict=True))}
    if out:
        weights |= {"out_weight": random(E, widths[0], seed=3) / 5, "out_bias": random(E, seed=4)}
    return edgeattn.MultiHeadAttention(heads, **weights, num_kv_heads=kv_heads, **options)


def norm(kind, seed):
    weight = 1 + random(D, seed=seed) / 8
    return edgeattn.RMSNorm(weight) if kind == "rms" else edgeattn.LayerNorm(weight, random(D, seed=seed + 1) / 8)


LAYERS = {
    "plain": lambda: layer(),
    "no bias": lambda: layer(bias=False),
    "one head": lambda: layer(heads=1, size=E),
    "shared heads": lambda: layer(kv_heads=2),
    "no output projection": lambda: layer(out=False),
    "rotary": lambda: layer(rotary=edgeattn.RotaryEmbedding(D)),
    "norms": lambda: layer(q_norm=norm("layer", 1), k_norm=norm("layer", 3)),
    "RMS norms": lambda: layer(q_norm=norm("rms", 1), k_norm=norm("rms", 3)),
    "position bias": lambda: layer(position_bias=random(H, L, L)),
}


def exported(of, path, **options):
    return quant.export(of, path / "a.tflite", sequence_length=L, **{"batch": 2, **options})


def graph_of(path):
    return parse(path.read_bytes(), "a.tflite")


def change(graph, operator, **fields):
    """Put other fields into the first operator of a name."""
    at = [each.name for each in graph.operators].index(operator)
    graph.operators[at] = dataclasses.replace(graph.operators[at], **fields)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", LAYERS)
def test_our_own_read_back(tmp_path, case, batch):
    made = LAYERS[case]()
    read = edgeattn.load(exported(made, tmp_path, batch=batch))
    assert type(read) is edgeattn.MultiHeadAttention and read.num_heads == made.num_heads
    np.testing.assert_allclose(read(X), made(X), rtol=0, atol=2e-6 * np.abs(made(X)).max())
    for name in ("v_weight", "v_bias", "out_weight", "out_bias"):
        if case != "shared heads":
            np.testing.assert_array_equal(getattr(read, name), getattr(made, name))


def test_masks_are_told(tmp_path):
    made = layer()
    with pytest.warns(UserWarning, match="is causal; pass is_causal=True") as told:
        read = edgeattn.load(exported(made, tmp_path, mask="causal"))
    assert told[0].filename == __file__
    np.testing.assert_allclose(read(X, is_causal=True), made(X, is_causal=True), rtol=0, atol=1e-5)


def test_hybrid_files_are_the_float_layer_of_their_weights(tmp_path):
    made = quant.quantize(layer(), scheme="dynamic")
    with pytest.warns(UserWarning, match="int8 weights, and a runtime that quantizes the rows"):
        read = edgeattn.load(exported(made, tmp_path))
    tensors = made.to_state()[1]
    for role, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
        want = tensors[f"{name}.weight"].astype(np.float32) * tensors[f"{name}.scale"][:, None]
        np.testing.assert_allclose(getattr(read, f"{role}_weight"), want, rtol=1e-6 if role == "q" else 0, atol=0)


def test_blocks_of_an_encoder(tmp_path):
    from whole_models import encoder

    made = encoder()
    path = quant.export(made, tmp_path / "a.tflite", sequence_length=L)
    x = random(1, L, made.layers[0].attention.q_weight.shape[1])
    for i, each in enumerate(made.layers):
        read = edgeattn.load(path, block=i)
        np.testing.assert_allclose(read(x), each.attention(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected one attention block, so one SOFTMAX; found 2: choose one by block="):
        edgeattn.load(path)
    one = edgeattn.TransformerEncoder(made.layers[:1])
    with pytest.raises(ValueError, match="expected attention alone.*block=0"):
        edgeattn.load(quant.export(one, tmp_path / "b.tflite", sequence_length=L))


def test_arithmetic_is_of_int8(tmp_path):
    with pytest.raises(ValueError, match="a.tflite: arithmetic='litert' applies to int8 layers; its attention is float32"):
        edgeattn.load(exported(layer(), tmp_path), arithmetic="litert")


REFUSED = {
    "an unknown operator": (lambda graph: change(graph, "TRANSPOSE", name="QUANTIZE"), "; QUANTIZE, which is not read, gives"),
    "an activation": (lambda graph: change(graph, "FULLY_CONNECTED", options={
        "fused_activation_function": 3, "weights_format": 0, "keep_num_dims": True}), "fused activation function \\(3\\)"),
    "a ReLU of queries": (lambda graph: change(graph, "FULLY_CONNECTED", options={
        "fused_activation_function": 1, "weights_format": 0, "keep_num_dims": True}), "must come from a MatMul"),
    "shuffled weights": (lambda graph: change(graph, "FULLY_CONNECTED", options={
        "fused_activation_function": 0, "weights_format": 1, "keep_num_dims": True}), "FULLY_CONNECTED has 3 inputs and format 1"),
    "keys not turned": (lambda graph: change(graph, "BATCH_MATMUL", options={"adj_x": True, "adj_y": True}), "."),
    "another permutation": (lambda graph: graph.tensors.__setitem__(
        number := next(each for each in graph.operators if each.name == "TRANSPOSE").inputs[1],
        dataclasses.replace(graph.tensors[number], data=np.array([0, 1, 2, 3], np.int32))), "TRANSPOSE gives .* shape"),
    "another shape": (lambda graph: graph.tensors.__setitem__(
        number := next(each for each in graph.operators if each.name == "RESHAPE").inputs[1],
        dataclasses.replace(graph.tensors[number], data=np.array([2, H, L, D], np.int32))), "RESHAPE to .* expected them to agree"),
    "a scale of infinity": (lambda graph: change(graph, "SOFTMAX", options={"beta": 3e38}), "NaN or infinity in q_weight"),
    "a negative beta": (lambda graph: change(graph, "SOFTMAX", options={"beta": -1.0}), "SOFTMAX with a positive beta; found -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(tmp_path, case):
    spoil, message = REFUSED[case]
    graph = graph_of(exported(layer(), tmp_path))
    read_tflite(serialize(graph))
    spoil(graph)
    with pytest.raises(ValueError, match=OF_BYTES + f".*{message}"):
        read_tflite(serialize(graph))


def test_a_beta_scales_the_scores(tmp_path):
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    change(graph, "SOFTMAX", options={"beta": 0.5})
    read = read_tflite(serialize(graph))
    np.testing.assert_allclose(read.q_weight, made.q_weight / 2, rtol=1e-6)
    np.testing.assert_array_equal(read.k_weight, made.k_weight)


def test_probabilities_on_the_right(tmp_path):
    made = layer(heads=1, size=E)
    graph = graph_of(exported(made, tmp_path))
    at = [i for i, each in enumerate(graph.operators) if each.name == "BATCH_MATMUL"][1]
    probabilities, values = graph.operators[at].inputs
    context = graph.operators[at].outputs[0]
    perm = graph.constant("perm", np.array([0, 2, 1], np.int32))
    turned, product = (graph.activation(name, shape, np.float32) for name, shape in (("vt", (2, E, L)), ("ct", (2, E, L))))
    graph.operators[at: at + 1] = [
        Operator("TRANSPOSE", (values, perm), (turned,)),
        Operator("BATCH_MATMUL", (turned, probabilities), (product,), {"adj_x": False, "adj_y": True}),
        Operator("TRANSPOSE", (product, perm), (context,))]
    np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=1e-5)


def test_constants_that_share_bytes_cost_no_more_than_the_file(tmp_path):
    graph = graph_of(exported(layer(), tmp_path))
    last = graph.outputs[0]
    for i in range(80):  # a constant of 2 MiB each, of one buffer
        number = len(graph.tensors)
        graph.tensors.append(dataclasses.replace(
            graph.tensors[last], name=f"c{i}", shape=(1 << 19,), data=np.zeros(1 << 19, np.float32)))
        graph.tensors.append(dataclasses.replace(graph.tensors[last], name=f"y{i}", shape=(1 << 19,)))
        graph.operators.append(Operator("ADD", (number, number), (number + 1,), {"fused_activation_function": 0}))
    with pytest.raises(ValueError, match=re.escape("must be no larger than the file")):
        read_tflite(serialize(graph))
