"""Float and hybrid attention of .tflite files, as float32 layers: those that this project writes, bit for bit."""

import dataclasses
import re

import flatbuffers
import numpy as np
import pytest
from arrays import numbers as random

import edgeattn
import quant
from edgeattn.files.tflite import read_tflite
from edgeattn.files.tflite_file import parse
from edgeattn.files.tflite_graph import CheckedGraph
from edgeattn.quantized import TensorQuantization
from edgeattn.tflite_schema import IDENTIFIER, Operator
from quant.export import tflite
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


# -- what stands on the way

def add_tensor(graph, name, shape, dtype=np.float32):
    return graph.activation(name, shape, dtype)


def numbers(graph, *values):
    return graph.constant(f"numbers {len(graph.tensors)}", np.array(values, np.int32))


def test_an_operator_that_is_not_known_stands_in_front_of_a_block(tmp_path):
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    x = graph.inputs[0]
    activated = add_tensor(graph, "activated", (2, L, E))
    graph.operators = [Operator("QUANTIZE", (x,), (activated,)), *(
        dataclasses.replace(each, inputs=tuple(activated if n == x else n for n in each.inputs))
        for each in graph.operators)]
    np.testing.assert_allclose(read_tflite(serialize(graph), block=0)(X), made(X), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected attention alone"):
        read_tflite(serialize(graph))


def test_what_stands_between_the_map_and_the_product_is_named(tmp_path):
    graph = graph_of(exported(layer(), tmp_path))
    at = [each.name for each in graph.operators].index("BATCH_MATMUL")
    queries = graph.operators[at].inputs[0]
    turned = add_tensor(graph, "turned", graph.tensors[queries].shape)
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(turned, *graph.operators[at].inputs[1:]))
    graph.operators.insert(at, Operator("QUANTIZE", (queries,), (turned,)))
    with pytest.raises(ValueError, match="the queries of .* must come from .*; QUANTIZE, which is not read, gives 'turned'"):
        read_tflite(serialize(graph))


@pytest.mark.parametrize("spoilt", [False, True])
def test_norms_with_the_mean_behind_the_division(tmp_path, spoilt):
    """x r + (0 - mean r), as litert-torch writes LayerNorm of the heads."""
    made = layer(q_norm=norm("layer", 1), k_norm=norm("layer", 3))
    graph = graph_of(exported(made, tmp_path))
    centred = [i for i, each in enumerate(graph.operators) if each.name == "SUB"]
    for at in centred[::-1]:
        x, mean = graph.operators[at].inputs
        difference = graph.operators[at].outputs[0]
        behind = next(i for i, each in enumerate(graph.operators) if each.name == "RSQRT" and i > at)
        r = graph.operators[behind].outputs[0]
        scaled = next(i for i, each in enumerate(graph.operators) if each.name == "MUL" and i > behind
                      and difference in each.inputs and r in each.inputs)
        shape, small = graph.tensors[x].shape, graph.tensors[mean].shape
        product, moved, left = (add_tensor(graph, f"{name} {at}", each) for name, each in (
            ("x r", shape), ("mean r", small), ("0 - mean r", small)))
        zero = graph.constant(f"zero {at}", np.array(0, np.float32))
        factor = mean if spoilt else r
        graph.operators[scaled: scaled + 1] = [
            Operator("MUL", (x, r), (product,)), Operator("MUL", (mean, factor), (moved,)),
            Operator("SUB", (zero, moved), (left,)), Operator("ADD", (product, left), graph.operators[scaled].outputs)]
    assert len(centred) == 2
    if spoilt:
        with pytest.raises(ValueError, match="the queries of .* must come from"):
            read_tflite(serialize(graph))
    else:
        np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=1e-5)


def test_convolutions_of_one_pixel_are_maps(tmp_path):
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    for at in [i for i, each in enumerate(graph.operators) if each.name == "FULLY_CONNECTED"][::-1]:
        x, weight, bias = graph.operators[at].inputs
        data = graph.tensors[weight].data
        kernel = graph.constant(f"kernel {at}", data.reshape(data.shape[0], 1, 1, data.shape[1]))
        (y,) = graph.operators[at].outputs
        image, result = (add_tensor(graph, f"{name} {at}", (2, 1, *graph.tensors[each].shape[1:]))
                         for name, each in (("image", x), ("result", y)))
        graph.operators[at: at + 1] = [
            Operator("RESHAPE", (x, numbers(graph, *graph.tensors[image].shape)), (image,)),
            Operator("CONV_2D", (image, kernel, bias), (result,), {"stride_w": 1, "stride_h": 1}),
            Operator("RESHAPE", (result, numbers(graph, *graph.tensors[y].shape)), (y,))]
    np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=1e-5)
    change(graph, "CONV_2D", options={"stride_w": 2, "stride_h": 1})
    with pytest.raises(ValueError, match="CONV_2D has a kernel of shape .* and no strides"):
        read_tflite(serialize(graph))


def test_queries_cut_and_put_together_again(tmp_path):
    """UNPACK, PACK, STRIDED_SLICE, GATHER, SQUEEZE: features in another order are another layer's, or the same."""
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    at = [each.name for each in graph.operators].index("BATCH_MATMUL")
    queries = graph.operators[at].inputs[0]
    B, heads, length, size = graph.tensors[queries].shape
    even, odd = (add_tensor(graph, name, (B, heads, length, size // 2)) for name in ("even", "odd"))
    packed = add_tensor(graph, "packed", (B, heads, length, size // 2, 2))
    parts = [add_tensor(graph, f"part {i}", (B, heads, length, size // 2)) for i in range(2)]
    again = add_tensor(graph, "again", (B, heads, length, size))
    masks = dict.fromkeys(("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"), 0)
    steps = numbers(graph, 1, 1, 1, 2)
    mixed = add_tensor(graph, "mixed", (B, heads, length, size))
    order = [2 * i for i in range(size // 2)] + [2 * i + 1 for i in range(size // 2)]
    back = np.argsort(order)
    new = [Operator("STRIDED_SLICE", (queries, numbers(graph, 0, 0, 0, 0), numbers(graph, B, heads, length, size), steps),
                    (even,), masks),
           Operator("STRIDED_SLICE", (queries, numbers(graph, 0, 0, 0, 1), numbers(graph, 0, 0, 0, 0), steps), (odd,),
                    masks | {"end_mask": 15}),
           Operator("PACK", (even, odd), (packed,), {"axis": -1, "values_count": 2}),
           Operator("UNPACK", (packed,), tuple(parts), {"axis": 4, "num": 2}),
           Operator("CONCATENATION", tuple(parts), (mixed,), {"axis": 3}),
           Operator("GATHER", (mixed, numbers(graph, *back)), (again,), {"axis": 3, "batch_dims": 0})]
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(again, *graph.operators[at].inputs[1:]))
    graph.operators[at:at] = new
    np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=1e-5)
    # features of queries alone in another order: other scores, another layer
    graph.operators[at] = dataclasses.replace(new[0], inputs=(queries, numbers(graph, 0, 0, 0, 1), new[0].inputs[2], steps))
    graph.operators[at + 1] = dataclasses.replace(new[1], inputs=(queries, numbers(graph, 0, 0, 0, 0), *new[1].inputs[2:]))
    other = read_tflite(serialize(graph))(X)
    assert np.abs(other - made(X)).max() > 1e-3
    swap = np.arange(size).reshape(-1, 2)[:, ::-1].ravel()
    weight, bias = (getattr(made, name).reshape(heads, size, -1)[:, swap].reshape(getattr(made, name).shape)
                    for name in ("q_weight", "q_bias"))
    names = ("k_weight", "v_weight", "out_weight", "k_bias", "v_bias", "out_bias")
    want = edgeattn.MultiHeadAttention(H, q_weight=weight, q_bias=bias, **{name: getattr(made, name) for name in names})
    np.testing.assert_allclose(other, want(X), rtol=0, atol=1e-5)


def test_shapes_that_are_computed_of_open_ones(tmp_path):
    """As Keras writes models of any batch: RESHAPE to what SHAPE gives, tensors with 1 where the batch stands."""
    made = layer()
    graph = graph_of(exported(made, tmp_path, batch=1))
    at = [each.name for each in graph.operators].index("RESHAPE")
    x, shape = graph.operators[at].inputs
    rank = len(graph.tensors[x].shape)
    measured = graph.activation("measured", (rank,), np.int32)
    first = graph.activation("first", (1,), np.int32)
    whole = graph.activation("whole", graph.tensors[shape].shape, np.int32)
    rest = numbers(graph, *graph.tensors[shape].data[1:])
    new = [Operator("SHAPE", (x,), (measured,)),
           Operator("SLICE", (measured, numbers(graph, 0), numbers(graph, 1)), (first,)),
           Operator("CONCATENATION", (first, rest), (whole,), {"axis": 0}),
           dataclasses.replace(graph.operators[at], inputs=(x, whole))]
    graph.operators[at: at + 1] = new
    np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=1e-5)
    output = graph.operators[at + 3].outputs[0]
    graph.tensors[output] = dataclasses.replace(graph.tensors[output], shape=(1, 1, 1, 1), is_open=True)
    checked = CheckedGraph(graph, "a.tflite", 2**20)  # a file's signature of the shape is not written here
    assert checked.tensor(output).shape == (1, L, H, D)
    assert checked.is_constant(whole)


def test_constants_in_half_precision(tmp_path):
    """DEQUANTIZE of float16, weights and the scale of the scores alike, as TensorFlow writes them."""
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    insert_scale(graph)
    for number, tensor in list(enumerate(graph.tensors)):
        if tensor.data is not None and tensor.dtype == np.float32:
            half = graph.constant(f"{tensor.name} half", tensor.data.astype(np.float16))
            graph.tensors[number] = dataclasses.replace(tensor, data=None)
            graph.operators.insert(0, Operator("DEQUANTIZE", (half,), (number,)))
    np.testing.assert_allclose(read_tflite(serialize(graph))(X), made(X), rtol=0, atol=5e-3)


def insert_scale(graph):
    """Scores times 1, by a constant."""
    at = [each.name for each in graph.operators].index("SOFTMAX")
    scores = graph.operators[at].inputs[0]
    scaled = add_tensor(graph, "scaled", graph.tensors[scores].shape)
    one = graph.constant("one", np.array(1, np.float32))
    graph.operators[at] = dataclasses.replace(graph.operators[at], inputs=(scaled,))
    graph.operators.insert(at, Operator("MUL", (scores, one), (scaled,)))


def test_a_float_softmax_of_codes_is_refused(tmp_path):
    graph = graph_of(exported(layer(), tmp_path))
    at = [each.name for each in graph.operators].index("SOFTMAX")
    scores = graph.operators[at].inputs[0]
    codes = graph.activation("codes", graph.tensors[scores].shape, np.int8, TensorQuantization(0.1, 0))
    reals = add_tensor(graph, "reals", graph.tensors[scores].shape)
    graph.operators[at: at + 1] = [
        Operator("QUANTIZE", (scores,), (codes,)), Operator("DEQUANTIZE", (codes,), (reals,)),
        dataclasses.replace(graph.operators[at], inputs=(reals,))]
    with pytest.raises(ValueError, match="its softmax is float32 of int8 scores, 'reals' .of DEQUANTIZE.: .* quant.quantize"):
        read_tflite(serialize(graph))


def written(model):
    """The bytes of a file that is given in the terms of its schema."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(tflite._write_table(builder, "Model", model), IDENTIFIER)
    return bytes(builder.Output())


def in_four_bits(graph, model):
    """The weights of the maps as codes of 4 bits, two a byte, scales of each feature; returns what they stand for."""
    stood_for = []
    for operator in [each for each in graph.operators if each.name == "FULLY_CONNECTED"]:
        tensor, weight = model["subgraphs"][0]["tensors"][operator.inputs[1]], graph.tensors[operator.inputs[1]].data
        scale = np.abs(weight).max(1) / np.float32(7)
        codes = np.rint(weight / scale[:, None]).astype(np.int8)
        stood_for.append(codes * scale[:, None])
        pairs = (codes.ravel().view(np.uint8) & 15).reshape(-1, 2)
        model["buffers"].append({"data": pairs[:, 0] | pairs[:, 1] << 4})
        tensor |= {"type": 17, "buffer": len(model["buffers"]) - 1, "quantization": {
            "scale": scale, "zero_point": np.zeros(len(scale), np.int64)}}
    return stood_for


def test_weights_of_4_bits(tmp_path):
    graph = graph_of(exported(layer(), tmp_path))
    model = tflite._model({"serving_default": graph})
    weights = in_four_bits(graph, model)
    with pytest.warns(UserWarning, match="has int8 weights"):
        read = read_tflite(written(model))
    for name, want in zip(("q_weight", "k_weight", "v_weight", "out_weight"), weights, strict=True):
        by = D**0.5 if name == "q_weight" else 1  # a file has the scale of the scores there
        np.testing.assert_allclose(getattr(read, name), want * np.float32(by), rtol=1e-6, atol=0)
    model["buffers"][-1] = {"data": model["buffers"][-1]["data"][:-1]}
    with pytest.raises(ValueError, match=r"has a buffer of 287 bytes; its shape \(24, 24\) of int8 takes 288"):
        read_tflite(written(model))


def test_weights_of_2_bits_and_of_blocks_are_refused(tmp_path):
    graph = graph_of(exported(layer(), tmp_path))
    number = next(each for each in graph.operators if each.name == "FULLY_CONNECTED").inputs[1]
    for change_of, message in (({"type": 19}, "of a type that is not read: weights may have 4 or 8 bits"),
                               ({"quantization": {"details_type": 2}}, "of a kind other than scale and zero point .in blocks")):
        model = tflite._model({"serving_default": graph})
        model["subgraphs"][0]["tensors"][number] |= change_of
        with pytest.raises(ValueError, match=message):
            read_tflite(written(model))


def test_several_signatures_are_told(tmp_path):
    path = quant.export(layer(), tmp_path / "a.tflite", sequence_length=[L, 2 * L])
    with pytest.raises(ValueError, match=f"expected one subgraph; found 2, signatures 'length_{L}', 'length_{2 * L}': convert one"):
        edgeattn.load(path)


def test_rows_that_a_block_takes_in_another_order_are_told(tmp_path):
    """As windows of an image: rows of two sequences, side by side."""
    made = layer()
    graph = graph_of(exported(made, tmp_path))
    x = graph.inputs[0]
    mixed, turned, regrouped = (add_tensor(graph, name, shape) for name, shape in (
        ("mixed", (2, L, E)), ("turned", (L, 2, E)), ("regrouped", (2, L, E))))
    graph.operators = [
        Operator("TRANSPOSE", (mixed, numbers(graph, 1, 0, 2)), (turned,)),
        Operator("RESHAPE", (turned, numbers(graph, 2, L, E)), (regrouped,)),
        *(dataclasses.replace(each, inputs=tuple(regrouped if n == x else n for n in each.inputs))
          for each in graph.operators)]
    graph.inputs = [mixed]
    with pytest.warns(UserWarning, match="the block takes the rows of 'mixed.*' in another order, as of windows: give calls"):
        read = read_tflite(serialize(graph), block=0)
    np.testing.assert_allclose(read(X), made(X), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected attention alone, and rows given in the order in which they came"):
        read_tflite(serialize(graph))
