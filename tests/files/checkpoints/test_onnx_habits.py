"""from_onnx of attention in the forms that people write by hand, against onnx's own evaluation of the graph.

What is no attention layer, though it looks like one, is refused or told: never is a layer returned in silence that gives
something else.
"""

import numpy as np
import pytest
from test_checkpoints_onnx import B, D, E, Graph, H, L, random
from test_onnx_encoders import (
    IDS,
    attention,
    feed_forward,
    hidden,
    layer,
    norm_apart,
    norm_node,
    number,
    open_axes,
    read,
    rms_apart,
    seeded,
    traced_for_one_length,
)
from test_onnx_softmax import attend, heads, output, scores

from edgeattn import ImageEncoder, LayerNorm, MultiHeadAttention, RMSNorm, TextEncoder, TransformerEncoder

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")


def parts():
    """A graph, and its queries, keys turned and values (B, H, L, D)."""
    graph = Graph(x=random(B, L, E))
    return graph, heads(graph), heads(graph, (0, 2, 3, 1)), heads(graph)


def test_heads_that_are_cut_into_the_batch_and_put_together_again():
    graph = Graph(x=random(B, L, E))
    q, k, v = (graph.add("Concat", *graph.add("Split", graph.linear("x", random(E, H * D) + i), outputs=H, axis=2, num_outputs=H),
                         axis=0) for i in range(3))
    context = attend(graph, q, graph.add("Transpose", k, perm=[0, 2, 1]), v)
    joined = graph.add("Concat", *graph.add("Split", context, outputs=H, axis=0, num_outputs=H), axis=2)
    found = graph.check(graph.linear(joined, random(H * D, 8), random(8)))
    assert (found.num_heads, found.output_dim) == (H, 8)


def test_what_heads_are_multiplied_by_and_have_added_is_in_the_output_projection():
    graph, q, k, v = parts()
    context = graph.add("Mul", attend(graph, q, k, v), random(H, 1, 1))
    graph.check(output(graph, graph.add("Add", context, random(H, 1, D))))


def test_a_map_that_mixes_tokens_is_refused():
    """Heads that nobody turned back before they are put together."""
    graph, q, k, v = parts()
    mixed = graph.add("Reshape", attend(graph, q, k, v), np.array([B, L, H * D]))
    with pytest.raises(ValueError, match="MatMul node '' must take the 4 heads of a token side by side, .* mixes tokens"):
        MultiHeadAttention.from_onnx(graph.model(graph.linear(mixed, random(H * D, 8))))


@pytest.mark.parametrize("follower", ["gate", "norm", "values"])
def test_what_stands_in_front_of_the_output_projection_is_told(follower):
    graph, q, k, v = parts()
    context = attend(graph, q, k, v)
    context = graph.add("Add", context, v) if follower == "values" else context
    rows = graph.join(context, H * D)
    if follower == "gate":
        rows = graph.add("Mul", rows, graph.add("Sigmoid", graph.linear("x", random(E, H * D))))
    elif follower == "norm":
        rows = graph.add("LayerNormalization", rows, random(H * D))
    kind = {"gate": "Mul", "norm": "LayerNormalization", "values": "Add"}[follower]
    with pytest.warns(UserWarning, match=f"gives goes into {kind} node '', which is not part of the layer"):
        found = MultiHeadAttention.from_onnx(graph.model(graph.linear(rows, random(H * D, 8))))
    assert found.output_dim == H * D


def test_queries_of_other_rows_than_keys_are_told():
    """DETR's positions, added to queries and keys alone; the first token, which asks all others."""
    graph = Graph(x=random(B, L, E))
    placed = graph.add("Add", "x", random(L, E))
    q, k, v = (graph.split(graph.linear(source, random(E, H * D) + i), H, D) for i, source in enumerate((placed, placed, "x")))
    model = graph.model(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    with pytest.warns(UserWarning, match=f"takes queries of '{placed}', keys of '{placed}' and values of 'x'; pass each"):
        found = MultiHeadAttention.from_onnx(model)
    rows = graph.inputs["x"] + random(L, E)
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(found(rows, rows, graph.inputs["x"]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["ble,ehd->bhld", "ble,hde->blhd"])
def test_einsum_of_weights_by_heads(order):
    graph = Graph(x=random(B, L, E))
    shape = (E, H, D) if order.startswith("ble,ehd") else (H, D, E)
    q, k, v = (graph.add("Einsum", "x", random(*shape) + np.float32(i / 4), equation=order) for i in range(3))
    letters = order[-4:]
    scores = graph.add("Einsum", q, k, equation=f"{letters},{letters.replace('l', 'm')}->bhlm")
    weights = graph.add("Softmax", graph.add("Mul", scores, np.array(D**-0.5, np.float32)), axis=-1)
    context = graph.add("Einsum", weights, v, equation=f"bhlm,{letters.replace('l', 'm')}->{letters}")
    graph.check(graph.add("Einsum", context, random(H, D, 8), equation=f"{letters},hde->ble"))


def test_einsum_of_keys_that_all_heads_share():
    graph = Graph(x=random(B, L, E))
    q = heads(graph)
    k, v = (graph.linear("x", random(E, D) + i) for i in range(2))
    scores = graph.add("Einsum", q, k, equation="bhid,bjd->bhij")
    weights = graph.add("Softmax", graph.add("Mul", scores, np.array(D**-0.5, np.float32)), axis=-1)
    found = graph.check(output(graph, graph.add("Einsum", weights, v, equation="bhij,bjd->bhid")))
    assert (found.num_heads, found.num_kv_heads) == (H, 1)


def test_a_node_that_hides_a_shape_is_named():
    graph, q, k, v = parts()
    highest = graph.add("TopK", graph.add("MatMul", q, k), np.array([2]), outputs=2)[0]
    context = graph.add("MatMul", graph.add("Softmax", graph.add("Add", highest, highest)), v)
    with pytest.raises(ValueError, match=r"must be known .* what TopK node '' gives of .* is not followed"):
        MultiHeadAttention.from_onnx(graph.model(output(graph, context)))


def test_a_mask_of_the_diagonal():
    graph, q, k, v = parts()
    square = graph.add("ConstantOfShape", np.array([L, L]), value=onnx.numpy_helper.from_array(np.zeros(1, np.float32)))
    mask = graph.add("Mul", graph.add("EyeLike", square, dtype=1), np.array(-1e4, np.float32))
    scores = graph.add("Add", graph.add("Mul", graph.add("MatMul", q, k), np.array(D**-0.5, np.float32)), mask)
    found = graph.check(output(graph, graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)))
    assert found.position_bias is not None


# -- whole encoders ------------------------------------------------------------------------------------


def beside(graph, x, seed=0):
    """A layer whose feed-forward network is beside attention, of the same norm."""
    rows = norm_node(graph, x, 1 + 0.3 * seeded(8, seed=seed), seeded(8, seed=seed))
    one, other = attention(graph, rows, seed), feed_forward(graph, rows, seed + 6)
    return one, other, x


@pytest.mark.parametrize("order", ["attention, network, residual", "attention, residual, network"])
def test_a_network_beside_attention_is_refused_as_such(order):
    graph = Graph(x=seeded(2, 5, 8))
    x = "x"
    for seed in (0, 20):
        one, other, x = beside(graph, x, seed)
        order_of = {"attention": one, "network": other, "residual": x}
        first, second, third = (order_of[name] for name in order.split(", "))
        x = graph.add("Add", graph.add("Add", first, second), third)
    with pytest.raises(ValueError, match="has a feed-forward network, or another map, beside it, .*GPT-NeoX.*reads attention alone"):
        TransformerEncoder.from_onnx(graph.model(x))


def test_layers_without_a_network_are_refused_as_such():
    graph = Graph(x=seeded(2, 5, 8))
    x = "x"
    for seed in (0, 20):
        x = graph.add("Add", x, attention(graph, norm_node(graph, x, seeded(8, seed=seed), seeded(8)), seed))
    with pytest.raises(ValueError, match="between Softmax node '' and Softmax node '' there must be a feed-forward network, got none"):
        TransformerEncoder.from_onnx(graph.model(x))


def test_residuals_that_are_multiplied_are_refused_as_such():
    graph = Graph(x=seeded(2, 5, 8))
    total = graph.add("Add", graph.add("Mul", "x", number(1.5)), attention(graph, "x", 0))
    x = norm_node(graph, total, seeded(8), seeded(8))
    x = norm_node(graph, graph.add("Add", x, feed_forward(graph, x, 6)), seeded(8), seeded(8))
    with pytest.raises(ValueError, match="the residual of Softmax node '' must be what goes in, got Mul node '', which multiplies it"):
        TransformerEncoder.from_onnx(graph.model(x))


@pytest.mark.parametrize("times", ["Mul", "Div"])
@pytest.mark.filterwarnings("error")
def test_embeddings_that_are_multiplied(times):
    """By sqrt(E), as the first Transformer had them; positions are stored sines."""
    graph = Graph(input_ids=IDS)
    root = number(8**0.5 if times == "Mul" else 8**-0.5)
    tokens = graph.add(times, graph.add("Gather", 0.3 * seeded(30, 8), "input_ids"), root)
    x = layer(graph, graph.add("Add", tokens, seeded(5, 8)))
    model = graph.model(x)
    text = TextEncoder.from_onnx(model)
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(text, IDS, np.ones_like(IDS)), wanted.reshape(-1, 8), rtol=1e-4, atol=2e-5)


def test_an_activation_is_named_of_a_graph_that_was_traced_for_one_length():
    """Not the shapes, which are unknown for other lengths."""
    _, model = traced_for_one_length("batch", lambda graph, x: graph.add("Mul", x, graph.add("Tanh", graph.add("Softplus", x))))
    with pytest.raises(ValueError, match="there must be an activation of features, got Softplus node"):
        TransformerEncoder.from_onnx(model)


# -- norms of queries and keys, added keys, half precision ---------------------------------------------


@pytest.mark.parametrize("norm", [norm_node, norm_apart, rms_apart])
def test_norms_of_heads(norm):
    """Behind the maps; the norm of queries takes what scores are multiplied by."""
    graph = Graph(x=random(B, L, E))
    q, k = (norm(graph, graph.split(graph.linear("x", random(E, H * D) + i, random(H * D)), H, D),
                 1 + random(D) / 4, random(D)) for i in range(2))
    v = graph.split(graph.linear("x", random(E, H * D) + 2), H, D)
    context = attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v, scale=0.3)
    found = graph.check(output(graph, context))
    assert type(found.q_norm) is type(found.k_norm) is (RMSNorm if norm is rms_apart else LayerNorm)


def test_a_norm_over_all_heads_is_refused_as_such():
    graph = Graph(x=random(B, L, E))
    q, k, v = (graph.linear("x", random(E, H * D) + i) for i in range(3))
    q, k = (norm_node(graph, each, random(H * D), random(H * D)) for each in (q, k))
    q, k, v = (graph.split(each, H, D) for each in (q, k, v))
    model = graph.model(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    with pytest.raises(ValueError, match="must be normed over the features of a head, 3, .* over 12: a norm over all heads"):
        MultiHeadAttention.from_onnx(model)


def test_keys_that_are_added_are_refused_as_such():
    """bias_k and bias_v of torch.nn.MultiheadAttention."""
    graph = Graph(x=random(B, L, E))
    q, k, v = (graph.split(graph.linear("x", random(E, H * D) + i), H, D) for i in range(3))
    k, v = (graph.add("Concat", each, np.float32(random(B, H, 1, D)), axis=2) for each in (k, v))
    model = graph.model(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    with pytest.raises(ValueError, match=r"got 6 rows of which 1 are constants: .*add_zero_attn.*from_torch"):
        MultiHeadAttention.from_onnx(model)


def test_scores_with_a_second_product_behind_a_gather_are_refused():
    """DeBERTa's: positions gathered from a product of the queries with a table are no mask of a call's."""
    graph, q, k, v = parts()
    relative = graph.add("MatMul", q, random(D, L))
    gathered = graph.add("GatherElements", relative, np.broadcast_to(np.arange(L), (B, H, L, L)).copy(), axis=3)
    total = graph.add("Add", graph.add("MatMul", q, k), gathered)
    model = graph.model(output(graph, graph.add("MatMul", graph.add("Softmax", total, axis=-1), v)))
    with pytest.raises(ValueError, match="got 'value.*' .of a GatherElements node. added, which is computed of these: .*DeBERTa"):
        MultiHeadAttention.from_onnx(model)


def test_norms_of_rows_that_are_laid_out_in_one_axis():
    """As OPT reshapes them in front of its feed-forward networks."""
    graph = Graph(x=seeded(2, 5, 8))
    x = "x"
    for seed in (0, 20):
        x = graph.add("Add", x, attention(graph, norm_node(graph, x, 1 + seeded(8, seed=seed) / 4, seeded(8)), seed))
        rows = graph.add("Reshape", x, np.array([-1, 8]))
        fed = feed_forward(graph, norm_node(graph, rows, 1 + seeded(8, seed=seed + 1) / 4, seeded(8)), seed + 6)
        x = graph.add("Reshape", graph.add("Add", rows, fed), np.array([2, -1, 8]))
    read(graph, x)


# -- models of texts and images, positions brought to another size -------------------------------------


@pytest.mark.parametrize(("sizes", "options"), [
    ((5, 4), {"mode": "cubic"}), ((2, 7), {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}),
    ((5, 2), {"mode": "linear"}), ((6, 1), {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}),
    ((6, 6), {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    ((3, 3), {"mode": "cubic", "cubic_coeff_a": -0.5})], ids=str)
@pytest.mark.filterwarnings("error")
def test_positions_that_are_resized(sizes, options):
    """As DINOv2's exported, whose table is for another number of patches."""
    graph = Graph(pixels=seeded(2, 3, 4 * sizes[0], 4 * sizes[1]))
    patches = graph.add("Conv", "pixels", 0.3 * seeded(8, 3, 4, 4), seeded(8), strides=[4, 4], kernel_shape=[4, 4])
    table = graph.add("Resize", seeded(1, 8, 3, 3), "", "", np.array([1, 8, *sizes]), **options)
    rows = graph.add("Transpose", graph.add("Reshape", graph.add("Add", patches, table), np.array([2, 8, -1])), perm=[0, 2, 1])
    model = graph.model(layer(graph, rows, norm_first=True))
    image = ImageEncoder.from_onnx(model)
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(image(graph.inputs["pixels"]), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("error")
def test_a_model_of_texts_and_images_has_an_encoder_of_each():
    """As CLIP's: what is computed of the ids, and what of the pixels."""
    graph = Graph(pixels=seeded(2, 3, 8, 8), input_ids=IDS)
    patches = graph.add("Conv", "pixels", 0.3 * seeded(8, 3, 4, 4), seeded(8), strides=[4, 4], kernel_shape=[4, 4])
    rows = graph.add("Transpose", graph.add("Reshape", patches, np.array([2, 8, -1])), perm=[0, 2, 1])
    seen = layer(graph, rows, norm_first=True)
    read_of = layer(graph, graph.add("Gather", seeded(30, 8), "input_ids"), 20)
    both = graph.add("MatMul", graph.add("ReduceMean", read_of, np.array([1]), keepdims=0),
                     graph.add("Transpose", graph.add("ReduceMean", seen, np.array([1]), keepdims=0), perm=[1, 0]))
    model = graph.model(both)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (seen, read_of))
    _, images, texts = onnx.reference.ReferenceEvaluator(model).run(None, graph.inputs)
    np.testing.assert_allclose(ImageEncoder.from_onnx(model)(graph.inputs["pixels"]), images, rtol=1e-4, atol=2e-5)
    text = TextEncoder.from_onnx(model)
    np.testing.assert_allclose(hidden(text, IDS, np.ones_like(IDS)), texts.reshape(-1, 8), rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="another encoder, .*TextEncoder.from_onnx and ImageEncoder.from_onnx read"):
        TransformerEncoder.from_onnx(model)


# -- codes, halves, sound, what stands behind ----------------------------------------------------------


def test_codes_that_a_quantizer_makes_of_shared_weights():
    """As onnxruntime's QOperator format has them: shared weights are an Identity, which a QuantizeLinear takes."""
    graph = Graph(x=random(B, L, E))
    scale, zero = np.array(0.02, np.float32), np.array(7, np.int8)
    maps = [random(E, H * D) / 4 + np.float32(i / 8) for i in range(3)]
    given = graph.add("QuantizeLinear", "x", scale, zero)

    def linear(weight):
        codes = graph.add("QuantizeLinear", graph.add("Identity", weight), scale, zero)
        made = graph.add("QLinearMatMul", given, scale, zero, codes, scale, zero, scale, zero)
        return graph.split(graph.add("DequantizeLinear", made, scale, zero), H, D)

    q, k, v = map(linear, maps)
    context = attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)
    found = MultiHeadAttention.from_onnx(graph.model(output(graph, context)))
    for name, weight in zip(("q_weight", "k_weight", "v_weight"), maps, strict=True):
        np.testing.assert_array_equal(getattr(found, name), weight.T)


def test_softmax_is_found_among_quantizers():
    """Of a mask that many nodes make, each between quantizers."""
    graph, q, k, v = parts()
    scale, zero = np.array(0.1, np.float32), np.array(0, np.int8)

    def rounded(x):
        return graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, scale, zero), scale, zero)

    bias = graph.add("Sum", *(graph.add("Identity", "x") for _ in range(60)))
    bias = graph.add("Unsqueeze", graph.add("ReduceSum", bias, np.array([2]), keepdims=0), np.array([1]))
    total = rounded(graph.add("Add", graph.add("Unsqueeze", bias, np.array([1])), rounded(rounded(graph.add("MatMul", q, k)))))
    model = graph.model(output(graph, graph.add("MatMul", graph.add("Softmax", total, axis=-1), v)))
    with pytest.warns(UserWarning, match="adds .* to its scores; pass it, if it masks"):
        MultiHeadAttention.from_onnx(model)


def test_gelu_whose_root_is_in_half_precision():
    def gelu(graph, x):
        root = number(float(np.float16(2**0.5)))
        one = graph.add("Add", graph.add("Erf", graph.add("Div", x, root)), number(1))
        return graph.add("Mul", graph.add("Mul", x, one), number(0.5))

    graph = Graph(x=seeded(2, 5, 8))
    x = layer(graph, "x", activation=gelu)
    graph.constant(np.zeros(1, np.float16))  # as other weights of such a file are
    found = TransformerEncoder.from_onnx(graph.model(x))
    assert found.layers[0].feed_forward.activation == "gelu"


def test_positions_computed_of_what_is_attended_are_no_mask():
    """As WavLM gates its positions."""
    graph = Graph(x=seeded(2, 5, 8))
    rows = norm_node(graph, "x", seeded(8), seeded(8))
    gate = graph.add("Sigmoid", graph.add("ReduceMean", graph.add("Mul", rows, seeded(8)), np.array([2]), keepdims=1))
    mask = graph.add("Mul", graph.add("Unsqueeze", gate, np.array([1])), seeded(1, 2, 5, 5))
    total = graph.add("Add", "x", attention(graph, rows, 0, mask))
    x = graph.add("Add", total, feed_forward(graph, norm_node(graph, total, seeded(8), seeded(8)), 6))
    with pytest.raises(ValueError, match="of a Sigmoid node. added, which is computed of these"):
        TransformerEncoder.from_onnx(graph.model(x))


def test_sound_of_any_length():
    """Convolutions in front make a token of many samples, so that a few are none: as Wav2Vec2's exported."""
    graph = Graph(x=seeded(2, 1, 2000))
    frames = graph.add("Conv", "x", seeded(8, 1, 400) / 20, strides=[320], kernel_shape=[400])
    model = graph.model(layer(graph, graph.add("Transpose", frames, perm=[0, 2, 1]), norm_first=True))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "samples"
    with pytest.warns(UserWarning, match="what the model computes before"):
        assert TransformerEncoder.from_onnx(model).embed_dim == 8


def test_what_is_behind_a_text_encoder_and_no_pooling_is_told():
    """BERT's pooler, a classifier: encode() would give something else than the model."""
    graph = Graph(input_ids=IDS)
    x = layer(graph, graph.add("Gather", seeded(30, 8), "input_ids"))
    first = graph.add("Gather", x, np.array(0), axis=1)
    model = graph.model(graph.add("Tanh", graph.linear(first, seeded(8, 8))))
    with pytest.warns(UserWarning, match="the model gives .*, which is neither what its encoder gives, .* nor a pooling of it"):
        TextEncoder.from_onnx(model)


@pytest.mark.parametrize("habit", ["highest score first", "nan_to_num", "divided by the sum"])
@pytest.mark.filterwarnings("error")
def test_what_changes_no_softmax(habit):
    graph, q, k, v = parts()
    total = scores(graph, q, k)
    if habit == "highest score first":
        total = graph.add("Sub", total, graph.add("ReduceMax", total, np.array([-1]), keepdims=1))
    weights = graph.add("Softmax", total, axis=-1)
    if habit == "nan_to_num":
        finite = graph.add("Where", graph.add("IsNaN", weights), number(0), weights)
        infinite = graph.add("And", graph.add("IsInf", finite), graph.add("Greater", finite, number(0)))
        weights = graph.add("Where", infinite, number(3e38), finite)
    elif habit == "divided by the sum":
        total = graph.add("Add", graph.add("ReduceSum", weights, np.array([-1]), keepdims=1), number(1e-9))
        weights = graph.add("Div", weights, total)
    graph.check(output(graph, graph.add("MatMul", weights, v)))


def test_probabilities_that_are_changed_are_refused():
    graph, q, k, v = parts()
    weights = graph.add("Mul", graph.add("Softmax", scores(graph, q, k), axis=-1), graph.add("Sigmoid", graph.add("ReduceMax", q, np.array([-1]))))
    with pytest.raises(ValueError, match="the probabilities of Softmax node '' must be"):
        MultiHeadAttention.from_onnx(graph.model(output(graph, graph.add("MatMul", weights, v))))


def test_positions_that_begin_anew_in_long_texts_are_refused():
    graph = Graph(input_ids=IDS)
    length = graph.add("Squeeze", graph.add("Shape", "input_ids", start=1, end=2))
    index = graph.add("Mod", graph.add("Range", np.array(0), length, np.array(1)), np.array(7))
    x = graph.add("Add", graph.add("Gather", seeded(30, 8), "input_ids"), graph.add("Gather", seeded(12, 8), index))
    with pytest.raises(ValueError, match="must gather by positions one after the other, got another rule in texts of 12 tokens"):
        TextEncoder.from_onnx(open_axes(graph.model(layer(graph, x)), "b", "l"))


@pytest.mark.filterwarnings("error")
def test_one_layer_of_several_is_causal():
    """By a window of its own: is_causal of a call is for all layers."""
    graph = Graph(x=seeded(2, 5, 8))
    mask = np.where(np.tril(np.ones((5, 5), bool)), 0, -1e9).astype(np.float32)
    encoder = read(graph, layer(graph, layer(graph, "x", mask=mask), 20))
    assert [each.window_size for each in encoder.layers] == [(-1, 0), (-1, -1)]
    graph = Graph(input_ids=IDS)
    model = graph.model(layer(graph, layer(graph, graph.add("Gather", seeded(30, 8), "input_ids"), mask=mask), 20))
    assert not TextEncoder.from_onnx(model).is_causal
