"""Reading .tflite files: ours, other converters', damaged ones and those that hold something else."""

import dataclasses
import struct
import warnings

import flatbuffers
import numpy as np
import pytest
import tflite_graphs as graphs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runtimes import each_runtime
from tflite_graphs import Form

from edgeattn.files.tflite import read_tflite
from edgeattn.files.tflite_file import parse
from edgeattn.quantized import AddMask, MulConstant, SelectMask, StaticMultiHeadAttention, TensorQuantization
from edgeattn.tflite_schema import IDENTIFIER, Graph, Operator, Tensor
from quant.export import tflite
from quant.export.tflite import serialize, write_tflite
from quant.runtimes import RUNTIMES


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def assert_same_layer(read, layer):
    """Every parameter, bit for bit."""
    assert (read.num_heads, read.head_dim, read.value_dim) == (
        layer.num_heads,
        layer.head_dim,
        layer.value_dim,
    )
    assert read.sources == layer.sources
    assert read.tensors == layer.tensors
    assert read.linears.keys() == layer.linears.keys()
    for name, linear in layer.linears.items():
        found = read.linears[name]
        np.testing.assert_array_equal(found.weight, linear.weight)
        np.testing.assert_array_equal(found.scale.view(np.int32), linear.scale.view(np.int32))
        assert (found.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            np.testing.assert_array_equal(found.bias, linear.bias)
    assert [type(op) for op in read.score_ops] == [type(op) for op in layer.score_ops]
    for found, op in zip(read.score_ops, layer.score_ops, strict=True):
        if isinstance(op, MulConstant):
            assert found == op
        elif isinstance(op, AddMask):
            assert (found.mask, found.output) == (op.mask, op.output)
            np.testing.assert_array_equal(np.broadcast_to(found.codes, op.codes.shape), op.codes)
        else:
            assert found.fill == op.fill
            np.testing.assert_array_equal(*np.broadcast_arrays(found.keep, op.keep))


@pytest.mark.parametrize("sources", [(0, 0, 0), (0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize("H, Dv", [(1, 4), (1, 3), (3, 4), (2, 5)])
@pytest.mark.parametrize("projected, zero_points, bias", [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("ops", ["none", "converted", "select"])
def test_what_is_written_is_read(rng, sources, H, Dv, projected, zero_points, bias, ops):
    B, L, S = 2, 5, 7 if max(sources) else 5
    score_ops = {"none": (), "converted": graphs.converted_score_ops(rng, L, S),
                 "select": (SelectMask(rng.random((B, H, L, S)) < 0.7),)}[ops]
    layer = graphs.random_layer(
        rng,
        H=H,
        Dv=Dv,
        sources=sources,
        projected=projected,
        zero_points=zero_points,
        bias=bias,
        score_ops=score_ops,
    )
    data = write_tflite(layer, batch=B, sequence_length=L, key_length=S if max(sources) else None)
    read = read_tflite(data, arithmetic="tflm")
    assert read.arithmetic == "tflm"
    assert_same_layer(read, layer)
    again = write_tflite(read, batch=B, sequence_length=L, key_length=S if max(sources) else None)
    assert again == data


def test_reads_a_path(rng, tmp_path):
    layer = graphs.random_layer(rng)
    (tmp_path / "layer.tflite").write_bytes(write_tflite(layer, sequence_length=3))
    assert_same_layer(read_tflite(tmp_path / "layer.tflite"), layer)
    assert_same_layer(read_tflite(str(tmp_path / "layer.tflite")), layer)


FORMS = {
    "TensorFlow": Form(),
    "two-dimensional projections": Form(keep_num_dims=False),
    "keys as they lie": Form(key_transposed=False),
    "values transposed": Form(value_transposed=True),
    "batch and heads merged": Form(merged_heads=True, key_transposed=False),
    "constants first": Form(scores_first=False),
    "all at once": Form(False, True, True, True, False),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("mask", ["add", "select"])
def test_other_forms_give_the_same_layer_and_the_same_bytes(rng, form, mask):
    L = S = 6
    scale, add = graphs.converted_score_ops(rng, L, S)
    layer = graphs.random_layer(
        rng, Dv=5, score_ops=(scale, add if mask == "add" else SelectMask(np.tri(L, dtype=bool)))
    )
    data = serialize(graphs.converted(layer, 2, L, S, form))
    read = read_tflite(data)
    assert_same_layer(read, layer)
    runtime = RUNTIMES["litert-reference"]
    if runtime.available() is None:
        x = rng.integers(-128, 128, (2, L, 8)).astype(np.int8)
        np.testing.assert_array_equal(
            runtime.run(data, [x])[0], read.with_arithmetic("litert-reference").run_int8(x)
        )


@pytest.mark.parametrize("sources", [(0, 0, 0), (0, 1, 1), (0, 1, 2)])
def test_float_edges_are_left_out(rng, sources):
    layer = graphs.random_layer(rng, sources=sources)
    assert_same_layer(
        read_tflite(
            serialize(graphs.converted(layer, 2, 5, 6 if max(sources) else 5, Form(float_edges=True)))
        ),
        layer,
    )


def packed(graph, cut):
    """The three projections as one, cut again by SLICE or SPLIT."""
    products = [op for op in graph.operators if op.name == "FULLY_CONNECTED"][:3]
    tensors = graph.tensors
    weights, biases = ([tensors[op.inputs[i]] for op in products] for i in (1, 2))
    source, rows = products[0].inputs[0], tensors[products[0].outputs[0]].shape[:-1]
    sizes = [len(each.data) for each in weights]
    of = TensorQuantization(tensors[products[0].outputs[0]].scale[0], 0)
    whole = graph.activation("packed", (*rows, sum(sizes)), np.int8, of)
    operands = [source, graph.constant("weights", np.concatenate([each.data for each in weights]),
                                       channel_scale=np.concatenate([each.scale for each in weights])),
                graph.constant("biases", np.concatenate([each.data for each in biases]),
                               channel_scale=np.concatenate([each.scale for each in biases]))]
    made = [Operator("FULLY_CONNECTED", tuple(operands), (whole,), {"keep_num_dims": True}, 5)]
    outputs = tuple(op.outputs[0] for op in products)
    for number in outputs:
        tensors[number] = dataclasses.replace(
            tensors[number], scale=np.full(1, of.scale), zero_point=np.zeros(1, np.int64))
    if cut == "SPLIT":
        made.append(Operator("SPLIT", (graph.constant("axis", np.array(2, np.int32)), whole), outputs, {"num_splits": 3}, 2))
    else:
        for i, number in enumerate(outputs):
            bounds = [graph.constant(f"{part}{i}", np.array(values, np.int32)) for part, values in (
                ("begin", (0, 0, sum(sizes[:i]))), ("size", (-1, rows[1], sizes[i])))]
            made.append(Operator("SLICE", (whole, *bounds), (number,), {}, 2))
    at = graph.operators.index(products[0])
    graph.operators = [*graph.operators[:at], *made, *(op for op in graph.operators[at:] if op not in products)]


@pytest.mark.parametrize("cut", ["SLICE", "SPLIT"])
def test_packed_projections_are_cut(rng, cut):
    """What heads are made of: moves that requantize aside, for all three have one scale."""
    layer = graphs.random_layer(rng, zero_points=False)
    layer = layer._replace(tensors=layer.tensors | dict.fromkeys(("query", "key", "value"), layer.tensors["query"]))
    graph = graphs.converted(layer, 2, 5, 5)
    packed(graph, cut)
    assert_same_layer(read_tflite(serialize(graph)), layer)


def test_constants_behind_the_flatbuffer_are_read(rng, monkeypatch):
    """As ai-edge-quantizer writes those of 256 KiB and more."""
    layer = graphs.random_layer(rng)
    model = tflite._model({"serving_default": graphs.converted(layer, 2, 5, 5)})
    monkeypatch.setitem(tflite._SCALAR_METHODS, "uint64", "PrependUint64Slot")
    behind, data = b"", b""
    for _ in range(2):  # the second time where the file ends is known
        builder, behind_before, behind = flatbuffers.Builder(1024), len(data), b""
        buffers = []
        for buffer in model["buffers"]:
            raw = np.ascontiguousarray(buffer["data"]).tobytes() if buffer else b""
            buffers.append(buffer if len(raw) < 64 else {"offset": 2 + behind_before + len(behind), "size": len(raw)})
            behind += raw if len(raw) >= 64 else b""
        builder.Finish(tflite._write_table(builder, "Model", model | {"buffers": buffers}), IDENTIFIER)
        data = bytes(builder.Output())
    data += b"  " + behind
    assert len(behind) >= 4 * 64
    assert_same_layer(read_tflite(data), layer)
    with pytest.raises(ValueError, match="truncated or damaged: the values of tensor"):
        read_tflite(data[:-3])


# -- graphs that are something else

def rename(graph, old, new):
    graph.operators = [
        op if op.name != old else type(op)(new, op.inputs, op.outputs, {}, 1) for op in graph.operators
    ]


def change(graph, name, **fields):
    """Replace fields of the tensor whose name begins with ``name``."""
    number = next(i for i, tensor in enumerate(graph.tensors) if tensor.name.startswith(name))
    graph.tensors[number] = Tensor(**{**vars(graph.tensors[number]), **fields})


def change_options(graph, name, **options):
    for op in graph.operators:
        if op.name == name:
            op.options.update(options)


def swap_heads(graph):
    """Split the features as (D, H), where attention has (H, D)."""
    number = next(i for i, op in enumerate(graph.operators) if op.name == "TRANSPOSE")
    shape = graph.tensors[graph.operators[number].inputs[0]].shape
    axes = graph.operators[number].inputs[1]
    graph.tensors[axes] = Tensor("axes", (4,), np.dtype(np.int32), np.array([0, 3, 1, 2], np.int32))
    output = graph.operators[number].outputs[0]
    old = graph.tensors[output]
    graph.tensors[output] = Tensor(**{**vars(old), "shape": (shape[0], shape[3], shape[1], shape[2])})


def output_twice(graph):
    graph.outputs = graph.outputs * 2


def output_probabilities_too(graph):
    graph.outputs = [*graph.outputs, next(op.outputs[0] for op in graph.operators if op.name == "SOFTMAX")]


def add_unused_operator(graph):
    x = graph.inputs[0]
    y = graph.activation("unused", graph.tensors[x].shape, np.int8, TensorQuantization(0.1, 0))
    graph.operator("MUL", [x, x], y, None, 2)


def add_unused_input(graph):
    graph.inputs.append(graph.activation("extra", (1,), np.int8, TensorQuantization(0.1, 0)))


def add_softmax(graph):
    x = graph.outputs[0]
    y = graph.activation("more", graph.tensors[x].shape, np.int8, graphs.PROBABILITIES)
    graph.operator("SOFTMAX", [x], y, {"beta": 1.0}, 2)


REFUSED = {
    "no softmax": (
        lambda g: rename(g, "SOFTMAX", "DEQUANTIZE"),
        "expected one attention block, so one SOFTMAX; found 0",
    ),
    "another softmax": (add_softmax, "expected one reader of tensor 'reshape.*'; found 1 and the graph's output"),
    "unused operator": (
        add_unused_operator,
        r"expected one attention block and nothing else; found MUL \(operator \d+\) besides it; block=0 reads",
    ),
    "unused input": (
        add_unused_input,
        "expected every graph input to feed a projection; found 'extra' unused",
    ),
    "two outputs": (output_twice, "expected the attention's result, .* to be the graph's one output"),
    "probabilities given too": (
        output_probabilities_too,
        "expected one reader of tensor 'softmax.*the graph's output",
    ),
    "fused activation": (
        lambda g: change_options(g, "FULLY_CONNECTED", fused_activation_function=1),
        r"FULLY_CONNECTED has a fused activation function \(1\); expected none",
    ),
    "shuffled weights": (
        lambda g: change_options(g, "FULLY_CONNECTED", weights_format=1),
        "expected plain weights in the query projection; found format 1",
    ),
    "softmax temperature": (
        lambda g: change_options(g, "SOFTMAX", beta=0.5),
        "expected SOFTMAX with beta 1; found 0.5",
    ),
    "probabilities transposed": (
        lambda g: change_options(g, "BATCH_MATMUL", adj_x=True),
        "expected the probabilities to be one side of a BATCH_MATMUL with the values; found BATCH_MATMUL of them in",
    ),
    "heads split otherwise": (swap_heads, "expected .* found"),
    "weight per tensor": (
        lambda g: change(g, "query_weight", scale=np.ones(1, np.float32), zero_point=np.zeros(1, np.int64)),
        "expected 'query_weight' quantized per output channel, 8 scales along axis 0; found 1",
    ),
    "weight along the inputs": (lambda g: change(g, "query_weight", channel_axis=1), "8 along axis 1"),
    "asymmetric weight": (
        lambda g: change(g, "key_weight", zero_point=np.ones(8, np.int64)),
        "expected 'key_weight' quantized symmetrically",
    ),
    "unquantized weight": (lambda g: change(g, "key_weight", scale=None, zero_point=None), "found no scale"),
    "float bias": (
        lambda g: change(g, "key_bias", data=np.zeros(8, np.float32), dtype=np.dtype(np.float32)),
        (
            "expected the bias of the key projection, tensor 'key_bias', to be a constant of int32; found"
            " float32"
        ),
    ),
    "short bias": (
        lambda g: change(g, "key_bias", data=np.zeros(3, np.int32), shape=(3,)),
        r"expected the bias of the key projection to have shape \(8,\); found \(3,\)",
    ),
    "unquantized input": (
        lambda g: change(g, "query_input", scale=None, zero_point=None),
        "expected the input of the query projection, tensor 'query_input', to have a scale and zero point",
    ),
    "uint8 input": (lambda g: change(g, "query_input", dtype=np.dtype(np.uint8)), "to be int8; found uint8"),
    "two scales": (
        lambda g: change(g, "query_input", scale=np.ones(2, np.float32), zero_point=np.zeros(2, np.int64)),
        "expected one scale for the input",
    ),
    "scale of 0": (
        lambda g: change(g, "query_input", scale=np.zeros(1, np.float32)),
        "expected a scale between .* found 0.0",
    ),
    "scale of NaN": (lambda g: change(g, "query_input", scale=np.full(1, np.nan, np.float32)), "found nan"),
    "zero point of 200": (
        lambda g: change(g, "query_input", zero_point=np.array([200])),
        r"must lie in \[-128, 127\]; got 200",
    ),
    "scale of a projection that only a mask has": (
        lambda g: change(g, "query_input", scale=np.full(1, 1e30, np.float32)),
        r"expected a scale between 9e-19 and 1e\+18 for .* found .*e\+(29|30)",
    ),
    "scale beyond a mask's": (
        lambda g: change(g, "mask", scale=np.full(1, 3e36, np.float32)),
        r"expected a scale between 9e-19 and 3e\+36 for the constant of ADD, tensor 'mask'; found 3",
    ),
    "scales far apart": (
        lambda g: change(g, "query_input", scale=np.full(1, 1e9, np.float32)),
        "expected input scales over output scale below 256 in the query projection",
    ),
    "probabilities on another grid": (
        lambda g: change(g, "softmax", zero_point=np.array([0])),
        "expected probabilities of scale 1/256 and zero point -128",
    ),
    "reshape that requantizes": (
        lambda g: change(g, "reshape", zero_point=np.array([77])),
        "RESHAPE changes the quantization",
    ),
    "vast activation": (
        lambda g: change(g, "fully_connected", shape=(2**20, 2**20, 8)),
        "expected 1 to 4194304 in a file of this size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_graphs_are_refused(rng, case):
    spoil, message = REFUSED[case]
    layer = graphs.random_layer(rng, score_ops=graphs.converted_score_ops(rng, 5, 5))
    graph = graphs.converted(layer, 2, 5, 5)
    read_tflite(serialize(graph))
    spoil(graph)
    with pytest.raises(ValueError, match=f"^the .tflite bytes: .*{message}"):
        read_tflite(serialize(graph))


def test_a_float_softmax_alone_is_no_attention(tmp_path):
    graph = Graph()
    graph.inputs = [graph.activation("x", (2, 3), np.float32)]
    graph.outputs = [graph.activation("y", (2, 3), np.float32)]
    graph.operator("SOFTMAX", graph.inputs, graph.outputs[0], {"beta": 1.0})
    path = tmp_path / "float.tflite"
    path.write_bytes(serialize(graph))
    with pytest.raises(ValueError, match=r"float\.tflite: the scores of Softmax node 'y' must be a product"):
        read_tflite(path)


LOWEST = np.float32(np.finfo(np.float32).max / 255)  # the scale of a range down to float32's lowest number
OF_BYTES = "^the .tflite bytes: "


def with_mask_in_the_range(rng, mask_scale, out_scale, *, scores=None, arithmetic="litert"):
    """A layer whose scores get a causal mask added."""
    codes = np.where(np.tri(6, dtype=bool)[None, None], 127, -128).astype(np.int8)
    ops = AddMask(codes, TensorQuantization(mask_scale, 127), TensorQuantization(out_scale, 120)),
    layer = graphs.random_layer(rng)
    tensors = layer.tensors if scores is None else {**layer.tensors, "scores": TensorQuantization(scores, 127)}
    return StaticMultiHeadAttention(layer.num_heads, layer.linears, tensors, score_ops=ops, arithmetic=arithmetic)


@pytest.mark.parametrize("mask_scale,out_scale,scores", [
    (1e9 / 255, 1e9 / 255, None), (1e4 / 255, 1e4 / 255, None), (2.0**107, 2.0**107, None), (LOWEST, LOWEST, LOWEST)])
@each_runtime
def test_masks_in_the_range_of_the_scores_give_the_runtime_s_bytes(rng, name, mask_scale, out_scale, scores):
    if scores is not None and name not in ("litert", "litert-arm", "tflm"):  # whose ADD ends the process
        with pytest.raises(ValueError, match="AddMask must have an output scale below"):
            with_mask_in_the_range(rng, mask_scale, out_scale, scores=scores, arithmetic=name)
        return
    layer = with_mask_in_the_range(rng, mask_scale, out_scale, scores=scores, arithmetic=name)
    file = serialize(graphs.converted(layer, 1, 6, 6))
    with pytest.warns(UserWarning, match=OF_BYTES + "the scores, .* from code to code, .* Bytes are the runtime's"):
        read = read_tflite(file, arithmetic=name)
    x = rng.integers(-128, 128, (1, 6, 8)).astype(np.int8)
    expected, = RUNTIMES[name].run(file, [x])
    np.testing.assert_array_equal(read.run_int8(x), expected)
    np.testing.assert_array_equal(read.run_int8(x, need_weights=True)[0], expected)


@pytest.mark.parametrize("arithmetic", ["litert", "litert-builtin", "litert-reference", "tflite-runtime"])
def test_an_add_that_ends_its_runtime_is_refused(rng, arithmetic):
    file = serialize(graphs.converted(with_mask_in_the_range(rng, LOWEST, LOWEST, arithmetic="tflm"), 1, 6, 6))
    with pytest.warns(UserWarning, match="Bytes are the runtime's"):
        read_tflite(file, arithmetic="tflm")
    with pytest.raises(ValueError, match=OF_BYTES + r"AddMask must have an output scale below 2\*\*108, .* pass it to each"):
        read_tflite(file, arithmetic=arithmetic)


def test_select_that_fills_with_another_quantization_is_refused(rng):
    layer = graphs.random_layer(rng, score_ops=(SelectMask(np.tri(5, dtype=bool)),))
    graph = graphs.converted(layer, 1, 5, 5)
    change(graph, "fill", scale=np.full(1, 7, np.float32))
    with pytest.raises(ValueError, match="expected SELECT_V2 to keep the scores' quantization"):
        read_tflite(serialize(graph))


# -- damaged files

def masked_file():
    rng = np.random.default_rng(8)
    score_ops = (*graphs.converted_score_ops(rng, 4, 4), SelectMask(np.tri(4, dtype=bool)))
    return write_tflite(graphs.random_layer(rng, score_ops=score_ops), sequence_length=4)


MASKED_FILE = masked_file()


@pytest.mark.parametrize(
    "data", [b"", b"TFL3", b"\x08\x00\x00\x00TFL2" + bytes(40), b"PK\x03\x04" + bytes(100)]
)
def test_other_files_are_refused(data):
    with pytest.raises(ValueError, match=r"is not a .tflite file: expected the identifier 'TFL3' at byte 4, found '"):
        read_tflite(data)


def test_every_truncation_is_refused():
    data = MASKED_FILE.rstrip(b"\0")  # without its padding the file still reads
    assert len(MASKED_FILE) - len(data) < 16
    read_tflite(data)
    for length in range(len(data) % 5, len(data), 5):
        with pytest.raises(ValueError, match="^the .tflite bytes: "):
            read_tflite(data[:length])


def test_wrong_argument_is_refused():
    with pytest.raises(
        TypeError, match="path_or_bytes must be a path or the bytes of a .tflite file; got int"
    ):
        read_tflite(3)
    with pytest.raises(FileNotFoundError):
        read_tflite("there is no such file.tflite")


def test_wrong_arithmetic_is_refused():
    with pytest.raises(ValueError, match="arithmetic must be one of"):
        read_tflite(MASKED_FILE, arithmetic="exact")


def test_lying_buffer_length_is_refused():
    graph = graphs.converted(graphs.random_layer(np.random.default_rng(1)), 1, 4, 4)
    change(graph, "value_weight", shape=(8, 9))
    with pytest.raises(
        ValueError, match=r"'value_weight' has a buffer of 64 bytes; its shape \(8, 9\) of int8 takes 72"
    ):
        read_tflite(serialize(graph))


def test_negative_shape_is_refused():
    graph = graphs.converted(graphs.random_layer(np.random.default_rng(1)), 1, 4, 4)
    change(graph, "softmax", shape=(1, -2, 4, 4))
    with pytest.raises(
        ValueError, match=r"has shape \[1, -2, 4, 4\]; expected at most 8 axes, none negative"
    ):
        read_tflite(serialize(graph))


def message_of(data):
    try:
        read_tflite(bytes(data))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("number", [9999, -7, 2**31 - 1])
@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_tensor_number_out_of_range_is_refused(role, number):
    graph = graphs.converted(graphs.random_layer(np.random.default_rng(1)), 1, 4, 4)
    data = serialize(graph)
    vector = struct.pack("<Ii", 1, getattr(graph, role)[0])
    messages = []
    for position in range(0, len(data) - 8, 4):
        if data[position:position + 8] == vector:
            messages.append(message_of(data[:position + 4] + struct.pack("<i", number) + data[position + 8:]))
    assert any(
        f"the graph's {role} name tensor {number}; the file has tensors 0 to" in text for text in messages
    )


@pytest.mark.parametrize("number", [9999, -2])
def test_operand_out_of_range_is_refused(number):
    graph = graphs.converted(graphs.random_layer(np.random.default_rng(1)), 1, 4, 4)
    op = graph.operators[3]
    graph.operators[3] = type(op)(op.name, (number, *op.inputs[1:]), op.outputs, op.options, op.version)
    with pytest.raises(ValueError, match=f"inputs of {op.name} name tensor {number}"):
        read_tflite(serialize(graph))


def test_left_out_operand_is_refused():
    graph = graphs.converted(graphs.random_layer(np.random.default_rng(1)), 1, 4, 4)
    for number, op in enumerate(graph.operators):
        if op.name == "BATCH_MATMUL":
            graph.operators[number] = type(op)(
                op.name, (op.inputs[0], -1), op.outputs, op.options, op.version
            )
    with pytest.raises(ValueError, match="BATCH_MATMUL lacks an input"):
        read_tflite(serialize(graph))


@settings(max_examples=500, deadline=None)
@example([(3595, 34)])  # what the mask adds changes no score by a step: read, with a warning
@given(st.lists(st.tuples(st.integers(0, len(MASKED_FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_layer_or_a_value_error(changes):
    data = bytearray(MASKED_FILE)
    for position, value in changes:
        data[position] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a mask that other bytes left without a code
            layer = read_tflite(bytes(data))
    except ValueError as error:
        assert str(error).startswith("the .tflite bytes: ")
    else:
        assert layer.num_heads >= 1


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, len(MASKED_FILE) // 4 - 1),
    st.sampled_from([0, 1, 4, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 16, 0x7FC00000]),
)
def test_changed_words_give_a_layer_or_a_value_error(word, value):
    data = bytearray(MASKED_FILE)
    data[4 * word:4 * word + 4] = struct.pack("<I", value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            read_tflite(bytes(data))
    except ValueError as error:
        assert str(error).startswith("the .tflite bytes: ")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_behind_the_identifier_give_a_value_error(tail):
    with pytest.raises(ValueError, match="^noise: "):
        parse(b"\x10\x00\x00\x00TFL3" + tail, "noise")
