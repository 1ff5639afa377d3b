"""Static int8 attention in .tflite files as people write it by hand: masks, shared heads, products the other way round."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tflite_graphs as graphs
from runtimes import each_runtime

import edgeattn
import quant
from edgeattn.files.tflite import read_tflite
from edgeattn.files.tflite_file import parse
from edgeattn.quantized import (
    AddMask,
    QuantizedLinear,
    Requantize,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Operator
from quant.describe import describe_file
from quant.export.tflite import serialize, write_tflite
from quant.runtimes import RUNTIMES

OF_BYTES = "^the .tflite bytes: "
L = 6


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def products(graph):
    return [i for i, operator in enumerate(graph.operators) if operator.name == "BATCH_MATMUL"]


def of(graph, name):
    """The number of the first operator of a name."""
    return [operator.name for operator in graph.operators].index(name)


def replace_tensor(graph, number, **fields):
    graph.tensors[number] = dataclasses.replace(graph.tensors[number], **fields)


def check_bytes(rng, file, layer, name, **options):
    x = rng.integers(-128, 128, (2, L, 8)).astype(np.int8)
    np.testing.assert_array_equal(layer.run_int8(x), RUNTIMES[name].run(file, [x], **options)[0])


# -- masks

def filled(rng, fill=-128):
    """Scores made to fit a mask's quantization, and masked: masked_fill, where."""
    after = TensorQuantization(np.float32(0.21), 5)
    return graphs.random_layer(rng, score_ops=(Requantize(after), SelectMask(np.tri(L, dtype=bool), fill)))


@each_runtime
@pytest.mark.parametrize("scale", [0.21, 0.11, 39.2])  # the last: by another rule than XNNPACK's
def test_scores_made_to_fit_a_mask_are_the_runtime_s(rng, name, scale):
    ops = (Requantize(TensorQuantization(np.float32(scale), 5)), SelectMask(np.tri(L, dtype=bool)))
    file = serialize(graphs.converted(graphs.random_layer(rng, score_ops=ops), 2, L, L))
    with pytest.warns(UserWarning, match="from code to code") if scale > 6 else contextlib.nullcontext():
        layer = read_tflite(file, arithmetic=name)
    assert [type(op) for op in layer.score_ops] == [Requantize, SelectMask]
    check_bytes(rng, file, layer, name)


def test_they_are_written_saved_and_told(rng, tmp_path):
    layer = filled(rng)
    path = tmp_path / "a.tflite"
    path.write_bytes(write_tflite(layer, sequence_length=L))
    edgeattn.save(layer, tmp_path / "a.safetensors")
    x = rng.integers(-128, 128, (2, L, 8)).astype(np.int8)
    for read in (edgeattn.load(path), edgeattn.load(tmp_path / "a.safetensors")):
        assert read.score_ops[0] == layer.score_ops[0]
        np.testing.assert_array_equal(read.run_int8(x), layer.run_int8(x))
    assert "Requantize, output scale 0.20999999" in " ".join(map(str, describe_file(path)))


def test_a_condition_computed_of_constants(rng):
    layer = filled(rng)
    graph = graphs.converted(layer, 2, L, L)
    at = of(graph, "SELECT_V2")
    keep = graph.operators[at].inputs[0]
    numbers = graph.constant("numbers", graph.tensors[keep].data.astype(np.float32))
    computed = graph.activation("keep", graph.tensors[keep].shape, np.bool_)
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(computed, *graph.operators[at].inputs[1:]))
    graph.operators.insert(0, Operator("CAST", (numbers,), (computed,)))
    read = read_tflite(serialize(graph))
    np.testing.assert_array_equal(read.score_ops[1].keep.reshape(L, L), np.tri(L, dtype=bool))


def masked_by_an_input(rng, kind):
    """(file, layer without that mask): a mask that is an input of the graph."""
    after = TensorQuantization(np.float32(0.2), -3)
    mask = TensorQuantization(np.float32(0.07), 9)
    plain = AddMask(np.full((1, 1, L, L), mask.zero_point, np.int8), mask, after) if kind == "ADD" else SelectMask(
        np.ones((1, 1, L, L), bool))
    layer = graphs.random_layer(rng, score_ops=(plain,))
    graph = graphs.converted(layer, 2, L, L)
    operator = graph.operators[of(graph, kind)]
    number = operator.inputs[1 if kind == "ADD" else 0]
    replace_tensor(graph, number, data=None)
    graph.inputs.append(number)
    return serialize(graph), layer, graph.tensors[number]


@pytest.mark.parametrize("kind", ["ADD", "SELECT_V2"])
@each_runtime
def test_a_mask_of_an_input_is_a_call_s(rng, name, kind):
    file, _, mask = masked_by_an_input(rng, kind)
    with pytest.warns(UserWarning, match=OF_BYTES + "the scores are masked by '(mask|condition)', .* Pass the mask to each call"):
        layer = read_tflite(file, arithmetic=name)
    x = rng.integers(-128, 128, (2, L, 8)).astype(np.int8)
    nothing = np.full(mask.shape, 9, np.int8) if kind == "ADD" else np.ones(mask.shape, np.bool_)
    np.testing.assert_array_equal(layer.run_int8(x), RUNTIMES[name].run(file, [x, nothing])[0])


def test_a_mask_of_the_queries_is_refused(rng):
    layer = graphs.random_layer(rng, score_ops=graphs.converted_score_ops(rng, L, L)[1:])
    graph = graphs.converted(layer, 2, L, L)
    at = of(graph, "ADD")
    scores, _ = graph.operators[at].inputs
    query = graph.operators[products(graph)[0]].inputs[0]
    like = graph.tensors[scores]
    made = graph.activation("of queries", like.shape, np.int8, TensorQuantization(like.scale[0], 0))
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(scores, made))
    graph.operators.insert(at, Operator("LOGISTIC", (query,), (made,)))
    with pytest.raises(ValueError, match="masks of scores to be computed of inputs; 'of queries' is of what FULLY_CONNECTED"):
        read_tflite(serialize(graph))


def test_minus_infinity_added_to_scores_is_refused(rng):
    layer = graphs.random_layer(rng, score_ops=graphs.converted_score_ops(rng, L, L)[1:])
    graph = graphs.converted(layer, 2, L, L)
    replace_tensor(graph, graph.operators[of(graph, "ADD")].inputs[1], scale=np.full(1, 1e36, np.float32))
    with pytest.raises(ValueError, match="ADD of the mask 'mask' .* runtimes end the process: .* by masked_fill or where"):
        read_tflite(serialize(graph))


# -- layouts

def turn_context(graph):
    """Values times probabilities, as einsum's order of letters makes it: v' p'."""
    at = products(graph)[1]
    probabilities, value = graph.operators[at].inputs
    context = graph.operators[at].outputs[0]
    graph.operators[at] = Operator("BATCH_MATMUL", (value, probabilities), (context,), {"adj_x": True, "adj_y": True}, 2)
    B, H, length, size = graph.tensors[context].shape
    replace_tensor(graph, context, shape=(B, H, size, length))
    back = graph.operators[at + 1]
    assert back.name == "TRANSPOSE"
    axes = graph.constant("axes back", np.array([0, 3, 1, 2], np.int32))
    graph.operators[at + 1] = dataclasses.replace(back, inputs=(context, axes))


@each_runtime
def test_values_on_the_left_of_probabilities(rng, name):
    layer = graphs.random_layer(rng, Dv=5)
    assert layer.tensors["value"].zero_point
    graph = graphs.converted(layer, 2, L, L)
    turn_context(graph)
    file = serialize(graph)
    check_bytes(rng, file, read_tflite(file, arithmetic=name), name)
    spoiled = graph.operators[products(graph)[1]]
    spoiled.options["adj_y"] = False  # L keys and L queries: LiteRT takes it
    with pytest.raises(ValueError, match="expected the probabilities to be one side of a BATCH_MATMUL with the values"):
        read_tflite(serialize(graph))


def test_values_on_the_left_whose_zero_point_is_0(rng):
    """XNNPACK rounds by what is on the right, where a layer has the values."""
    graph = graphs.converted(graphs.random_layer(rng, zero_points=False), 2, L, L)
    turn_context(graph)
    file = serialize(graph)
    for name in ("litert", "litert-arm"):
        with pytest.raises(ValueError, match=f"zero point 0 on its left .* '{name}' rounds .* arithmetic='litert-builtin'"):
            read_tflite(file, arithmetic=name)
    check_bytes(rng, file, read_tflite(file, arithmetic="litert-builtin"), "litert-builtin")


def share_heads(graph, role, groups):
    """Keys or values of ``groups`` heads each, by BROADCAST_TO."""
    at = products(graph)[0 if role == "key" else 1]
    source = graph.operators[at].inputs[1]
    transposed = next(i for i, each in enumerate(graph.operators) if source in each.outputs)
    reshaped = graph.operators[transposed].inputs[0]
    projected = next(each for each in graph.operators if reshaped in each.outputs).inputs[0]
    B, H, S, D = graph.tensors[source].shape
    q = TensorQuantization(graph.tensors[source].scale[0], int(graph.tensors[source].zero_point[0]))

    def numbers(*values):
        return graph.constant(f"numbers {len(graph.tensors)}", np.array(values, np.int32))

    def made(*shape):
        return graph.activation(f"shared {len(graph.tensors)}", shape, np.int8, q)

    few = H // groups
    cut = [made(B, S, few, D), made(B, few, S, D), made(B, few, 1, S, D), made(B, few, groups, S, D)]
    new = [Operator("RESHAPE", (projected, numbers(B, S, few, D)), (cut[0],), {"new_shape": (B, S, few, D)}),
           Operator("TRANSPOSE", (cut[0], numbers(0, 2, 1, 3)), (cut[1],), {}, 2),
           Operator("RESHAPE", (cut[1], numbers(B, few, 1, S, D)), (cut[2],), {"new_shape": (B, few, 1, S, D)}),
           Operator("BROADCAST_TO", (cut[2], numbers(B, few, groups, S, D)), (cut[3],), {}, 2),
           Operator("RESHAPE", (cut[3], numbers(B, H, S, D)), (source,), {"new_shape": (B, H, S, D)})]
    graph.operators[transposed - 1: transposed + 1] = new


def test_shared_heads(rng):
    H, groups = 4, 2
    layer = graphs.random_layer(rng, H=H)
    linears = dict(layer.linears)
    order = np.repeat(np.arange(H // groups), groups)[:, None] * 4 + np.arange(4)
    for role in ("key", "value"):
        linears[role] = QuantizedLinear(*(
            getattr(linears[role], name)[order.ravel()] for name in ("weight", "scale", "bias")))
    whole = StaticMultiHeadAttention(H, linears, layer.tensors)
    graph = graphs.converted(whole, 2, L, L, graphs.Form(key_transposed=False))
    for role in ("key", "value"):
        number = next(i for i, each in enumerate(graph.operators) if each.name == "FULLY_CONNECTED"
                      and graph.tensors[each.inputs[1]].name == f"{role}_weight")
        _, weight, bias = graph.operators[number].inputs
        for each, name in ((weight, "weight"), (bias, "bias")):
            few = H // groups * 4
            data = getattr(layer.linears[role], name)[:few]
            replace_tensor(graph, each, data=data, shape=data.shape, scale=layer.linears[role].scale[:few] * np.float32(
                1 if name == "weight" else layer.input_of(role).scale), zero_point=np.zeros(few, np.int64))
        output = graph.operators[number].outputs[0]
        replace_tensor(graph, output, shape=(*graph.tensors[output].shape[:-1], H // groups * 4))
        share_heads(graph, role, groups)
    file = serialize(graph)
    read = read_tflite(file, arithmetic="litert-reference")
    assert read.num_heads == H
    np.testing.assert_array_equal(read.linears["key"].weight, whole.linears["key"].weight)
    if RUNTIMES["litert-reference"].available() is None:
        check_bytes(rng, file, read, "litert-reference")


def test_queries_of_a_part_of_the_rows(rng):
    """The first token asks: another query than the keys, where a graph is no self-attention."""
    layer = graphs.random_layer(rng)
    graph = graphs.converted(layer, 2, L, L)
    x = graph.inputs[0]
    q = TensorQuantization(graph.tensors[x].scale[0], int(graph.tensors[x].zero_point[0]))
    first = graph.activation("first", (2, 1, 8), np.int8, q)
    begin, size = (graph.constant(name, np.array(values, np.int32)) for name, values in (
        ("begin", (0, 0, 0)), ("size", (2, 1, 8))))
    at = next(i for i, each in enumerate(graph.operators) if each.name == "FULLY_CONNECTED")
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(first, *graph.operators[at].inputs[1:]))
    graph.operators.insert(at, Operator("SLICE", (x, begin, size), (first,), {}, 2))
    shapes = {(2, L, 8): (2, 1, 8), (2, L, 2, 4): (2, 1, 2, 4), (2, 2, L, 4): (2, 2, 1, 4), (2, 2, L, L): (2, 2, 1, L)}
    keys = [each for i in (of_role(graph, "key"), of_role(graph, "value")) for each in i]
    for number, tensor in enumerate(graph.tensors):
        if tensor.data is None and number not in (x, *keys) and tensor.shape in shapes:
            replace_tensor(graph, number, shape=shapes[tensor.shape])
    for operator in graph.operators:
        if operator.name == "RESHAPE":
            shape = graph.tensors[operator.outputs[0]].shape
            replace_tensor(graph, operator.inputs[1], data=np.array(shape, np.int32), shape=(len(shape),))
    file = serialize(graph)
    with pytest.raises(ValueError, match="input of the query projection to be all of 'query_input' .* block=0 reads"):
        read_tflite(file)
    read = read_tflite(file, block=0, arithmetic="litert-reference")
    assert read.sources == (0, 1, 1)
    if RUNTIMES["litert-reference"].available() is None:
        given = rng.integers(-128, 128, (2, L, 8)).astype(np.int8)
        want = RUNTIMES["litert-reference"].run(file, [given])[0]
        np.testing.assert_array_equal(read.run_int8(given[:, :1], given), want.reshape(2, 1, 8))


def of_role(graph, role):
    """The tensors between a projection and its product."""
    at = next(i for i, each in enumerate(graph.operators) if each.name == "FULLY_CONNECTED"
              and graph.tensors[each.inputs[1]].name == f"{role}_weight")
    found = list(graph.operators[at].outputs)
    for operator in graph.operators[at + 1:]:
        if operator.name in ("RESHAPE", "TRANSPOSE") and operator.inputs[0] == found[-1]:
            found.append(operator.outputs[0])
    return found


# -- what is refused, and the way out

def spoil_reshape(graph):
    operator = graph.operators[of(graph, "RESHAPE")]
    replace_tensor(graph, operator.inputs[1], data=np.array([2, L, 4, 2], np.int32))


def as_one_matrix(graph):
    at = products(graph)[0]
    left, right = graph.operators[at].inputs
    graph.operators[at] = Operator("FULLY_CONNECTED", (left, right, -1), graph.operators[at].outputs, {
        "keep_num_dims": True}, 5)


def in_16_bits(graph):
    replace_tensor(graph, graph.operators[of(graph, "SOFTMAX")].outputs[0], dtype=np.dtype(np.int16))


REFUSED = {
    "a shape that disagrees": (spoil_reshape, r"RESHAPE gives .* shape \(2, 6, 2, 4\); expected \(2, 6, 4, 2\)"),
    "a product of two matrices": (as_one_matrix, "found FULLY_CONNECTED, as converters .* convert with a batch of 2"),
    "16 bits": (in_16_bits, "to be int8; found int16: activations of 16 bits have no layer; quantize to 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_way_out(rng, case):
    spoil, message = REFUSED[case]
    graph = graphs.converted(graphs.random_layer(rng), 2, L, L)
    read_tflite(serialize(graph))
    spoil(graph)
    with pytest.raises(ValueError, match=f"{OF_BYTES}.*{message}"):
        read_tflite(serialize(graph))


def test_numbers_of_each_head_are_refused(rng):
    before = TensorQuantization(np.float32(0.02), 3)
    layer = graphs.random_layer(rng, query_ops=(graphs.random_scaling(rng, before),))
    graph = graphs.converted(layer, 2, L, L)
    factor = graph.operators[of(graph, "MUL")].inputs[1]
    replace_tensor(graph, factor, shape=(1, 2, 1, 1), data=np.array([3, 4], np.int8).reshape(1, 2, 1, 1))
    with pytest.raises(ValueError, match="by one number; found 2 numbers: read the float file .* quant.quantize it"):
        read_tflite(serialize(graph))


@pytest.mark.parametrize("kind", ["static", "float"])
def test_tokens_before_the_batch_are_told(rng, tmp_path, kind):
    """As nn.MultiheadAttention has them unless told otherwise."""
    layer = graphs.random_layer(rng)
    if kind == "float":
        path = quant.export(edgeattn.MultiHeadAttention(2, *(rng.standard_normal((8, 8), np.float32) for _ in range(4))),
                            tmp_path / "a.tflite", sequence_length=L)
        graph = parse(path.read_bytes(), "a.tflite")
    else:
        graph = graphs.converted(layer, 1, L, L)
    read_tflite(serialize(graph))
    for number in (*graph.inputs, *graph.outputs):
        replace_tensor(graph, number, shape=(L, 1, 8))
    for operator in graph.operators:
        if operator.outputs[0] in graph.outputs and operator.name == "RESHAPE":
            replace_tensor(graph, operator.inputs[1], data=np.array((L, 1, 8), np.int32))
        if operator.name == "FULLY_CONNECTED" and operator.inputs[0] in graph.inputs:
            replace_tensor(graph, operator.outputs[0], shape=(L, 1, 8))
    if kind == "float":
        last = graph.operators[-1]
        rows = graph.activation("rows", (1, L, 8), np.float32)
        shape = graph.constant("tokens first", np.array((L, 1, 8), np.int32))
        graph.operators[-1] = dataclasses.replace(last, outputs=(rows,))
        graph.operators.append(Operator("RESHAPE", (rows, shape), last.outputs))
    with pytest.warns(UserWarning, match=r"rows have the shape \(tokens, batch, features\) .*, \(6, 1, 8\): give calls \(batch"):
        read_tflite(serialize(graph))
