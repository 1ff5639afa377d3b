"""from_onnx of what models of other families write around their layers, against onnx's own evaluation of the graph."""

import warnings

import numpy as np
import pytest
from test_checkpoints_onnx import Graph
from test_onnx_encoders import (
    CLOSE,
    IDS,
    MASK,
    B,
    D,
    E,
    H,
    L,
    attended,
    computed,
    dense,
    heads,
    hidden,
    image_graph,
    layer,
    norm_node,
    number,
    open_axes,
    places,
    read,
    seeded,
)

from edgeattn import ImageEncoder, MultiHeadAttention, TextEncoder, TransformerEncoder
from edgeattn.cli_open import open_model
from edgeattn.executors.numpy import NumpyOps

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

V = 30


# -- masks of padding beside what belongs to the layers ------------------------------------------------


def masked_text(masked, length=9):
    """A model of ids and a mask of padding, whose one layer has `masked(graph, scores)`, and the mask added to it."""
    ids = np.random.default_rng(2).integers(3, V, (B, length))
    graph = Graph(input_ids=ids, attention_mask=np.ones_like(ids))
    x = norm_node(graph, graph.add("Gather", seeded(V, E), "input_ids"), 1 + 0.3 * seeded(E), seeded(E))
    wide = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT), np.array([1, 2]))
    padding = graph.add("Mul", graph.add("Sub", number(1), wide), number(-3.4e38))
    attention = attended(graph, 0, *heads(graph, x, 0), lambda g, s: g.add("Add", masked(g, s), padding))
    x = norm_node(graph, graph.add("Add", x, attention), seeded(E), seeded(E))
    network = dense(graph, graph.add("Relu", dense(graph, x, E, 7, 6)), 7, E, 7)
    x = norm_node(graph, graph.add("Add", x, network), seeded(E), seeded(E))
    return graph, attention, open_axes(graph.model(x), "b", "l")


def causal(graph, scores):
    later = graph.add("Less", places(graph, scores, 1), places(graph, scores, 0))
    return graph.add("Where", later, number(-1e9), scores)


def windowed(graph, scores):
    apart = graph.add("Abs", graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1)))
    return graph.add("Where", graph.add("Less", apart, np.array(3)), scores, number(-1e9))


def biased(graph, scores):
    apart = graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1))
    index = graph.add("Add", graph.add("Clip", apart, np.array(-6), np.array(6)), np.array(6))
    return graph.add("Add", scores, graph.add("Gather", seeded(H, 13), index, axis=1))


@pytest.mark.parametrize("form", [causal, windowed, biased])
def test_a_mask_of_padding_hides_nothing_that_belongs_to_an_encoder(form):
    """One sum of both is of a computed mask: what is not padding was told to be an argument of each call, and lost."""
    graph, _, model = masked_text(form)
    with pytest.warns(UserWarning) as told:
        encoder = TransformerEncoder.from_onnx(model)
    told = [str(each.message) for each in told]
    assert "'attention_mask' masks padding; pass key_padding_mask in each call" in told
    assert [text for text in told if "is causal" in text] == (
        ["attention is causal; pass is_causal=True in each call"] if form is causal else [])
    assert not [text for text in told if "adds" in text]
    text = TextEncoder.from_onnx(model)
    ids = graph.inputs["input_ids"]
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    found = computed(encoder, hidden_in_front(text, ids), is_causal=form is causal)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert (encoder.layers[0].attention.position_bias is not None) == (form is biased)


def hidden_in_front(text, ids):
    """What goes into the layers of a text encoder without positions."""
    rows = text.embedding.token_weight[ids]
    norm = text.embedding.norm
    centred = rows - rows.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps) * norm.weight + norm.bias).astype(np.float32)


def test_a_mask_of_padding_hides_no_causal_mask_of_one_layer():
    graph, attention, model = masked_text(causal)
    with pytest.warns(UserWarning) as told:
        MultiHeadAttention.from_onnx(graph.model(attention))
    told = [str(each.message) for each in told]
    assert any("is causal; pass is_causal=True" in text for text in told)
    assert any("'attention_mask' masks padding; pass key_padding_mask" in text for text in told)


def test_one_layer_has_what_only_longer_sequences_show():
    """A window wider than the few tokens that weights are read with, as ModernBERT's of 64 on each side; T5's bias."""
    def wide(graph, scores):
        apart = graph.add("Abs", graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1)))
        return graph.add("Where", graph.add("Less", apart, np.array(40)), scores, number(-1e9))

    graph, attention, _ = masked_text(wide)
    with pytest.warns(UserWarning) as told:
        MultiHeadAttention.from_onnx(open_axes(graph.model(attention), "b", "l"))
    assert any("has a window; pass window_size=(39, 39) in each call" in str(each.message) for each in told)
    graph, attention, _ = masked_text(biased)
    with pytest.warns(UserWarning) as told:
        found = MultiHeadAttention.from_onnx(open_axes(graph.model(attention), "b", "l"))
    assert found.position_bias is not None and not [each for each in told if "adds" in str(each.message)]


# -- heads that pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["stored", "repeated", "an operator's"])
def test_a_head_that_pools_by_stored_queries_is_no_layer(queries):
    """SigLIP's images end with one, in timm and, as pooler_output, in transformers."""
    graph, rows = image_graph(0)
    x = layer(graph, graph.add("Add", rows, seeded(1, 6, E)), norm_first=True)
    k, v = (dense(graph, x, E, H * D, 30 + i) for i in range(2))
    if queries == "an operator's":
        context = graph.add("Attention", seeded(B, 1, H * D), k, v, q_num_heads=H, kv_num_heads=H)
    else:
        probe = seeded(1, H, 1, D)
        if queries == "repeated":
            probe = graph.add("Expand", probe, graph.add("Concat", graph.add("Shape", x, start=0, end=1), np.array([H, 1, D]), axis=0))
        keys = graph.add("Transpose", graph.split(k, H, D), perm=[0, 1, 3, 2])
        scores = graph.add("Mul", graph.add("MatMul", probe, keys), number(D**-0.5))
        context = graph.join(graph.add("MatMul", graph.add("Softmax", scores, axis=-1), graph.split(v, H, D)), H * D)
    model = graph.model(dense(graph, context, H * D, E, 33))
    image = ImageEncoder.from_onnx(model)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(x))
    wanted = ReferenceEvaluator(model).run([x], graph.inputs)[0]
    spots = image.embedding.places(8, 12)
    with image.encoder.prepared((B, len(spots))) as sequences:
        found = image.forward(NumpyOps(), image.embedding.patches(graph.inputs["pixels"]), spots, B, sequences)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, **CLOSE)


# -- positions -----------------------------------------------------------------------------------------


def test_a_bias_that_a_scatter_puts_together_is_a_constant():
    """As BEiT's of transformers: the numbers of pairs of patches are written into those of all pairs."""
    graph = Graph(x=seeded(B, L, E))

    def with_bias(graph, scores):
        size = graph.add("Cast", graph.add("Size", graph.add("Shape", scores)), to=onnx.TensorProto.FLOAT)  # 4 axes
        cells = np.stack(np.meshgrid(np.arange(H), np.arange(1, L), np.arange(1, L), indexing="ij"), -1)
        table = graph.add("ScatterND", seeded(H, L, L), cells, graph.add("Mul", seeded(H, L - 1, L - 1), size))
        return graph.add("Add", scores, table)

    x = norm_node(graph, graph.add("Add", "x", attended(graph, 0, *heads(graph, "x", 0), with_bias)), seeded(E), seeded(E))
    x = norm_node(graph, graph.add("Add", x, dense(graph, graph.add("Relu", dense(graph, x, E, 7, 6)), 7, E, 7)), seeded(E), seeded(E))
    assert read(graph, x).layers[0].attention.position_bias is not None


def test_rotary_tables_of_fewer_rows_than_are_looked_at():
    """Texts of 150 tokens would read beyond the table's end; shorter ones tell as much."""
    length, table = 9, 40
    ids = np.random.default_rng(2).integers(3, V, (B, length))
    angles = np.arange(table)[:, None] * 100.0 ** -(np.arange(D // 2) / (D // 2))
    graph = Graph(input_ids=ids)
    x = norm_node(graph, graph.add("Gather", seeded(V, E), "input_ids"), 1 + 0.3 * seeded(E), seeded(E))

    def turned(x):
        rows = graph.add("Range", np.array(0), graph.add("Gather", graph.add("Shape", x), np.array(2)), np.array(1))
        cosines, sines = (graph.add("Gather", np.concatenate([each(angles)] * 2, -1).astype(np.float32), rows) for each in (np.cos, np.sin))
        head = graph.add("Slice", x, np.array([0]), np.array([2 * (D // 2)]), np.array([-1]))
        rest = graph.add("Slice", x, np.array([2 * (D // 2)]), np.array([D]), np.array([-1]))
        a, b = (graph.add("Slice", head, np.array([i]), np.array([i + D // 2]), np.array([-1])) for i in (0, D // 2))
        other = graph.add("Concat", graph.add("Neg", b), a, axis=-1)
        both = graph.add("Add", graph.add("Mul", head, cosines), graph.add("Mul", other, sines))
        return graph.add("Concat", both, rest, axis=-1)

    q, k, v = heads(graph, x, 0)
    x = norm_node(graph, graph.add("Add", x, attended(graph, 0, turned(q), turned(k), v)), seeded(E), seeded(E))
    x = norm_node(graph, graph.add("Add", x, dense(graph, graph.add("Relu", dense(graph, x, E, 7, 6)), 7, E, 7)), seeded(E), seeded(E))
    model = open_axes(graph.model(x), "b", "l")
    text = TextEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(text, ids, np.ones_like(ids)), wanted.reshape(-1, E), **CLOSE)


def test_positions_that_were_stored_for_one_length():
    """open_clip's, whose slice of the table is a constant of the trace: of shorter texts they are its first rows."""
    graph = Graph(input_ids=IDS)
    table = 0.5 * seeded(L, E)
    x = graph.add("Add", graph.add("Gather", 0.5 * seeded(V, E), "input_ids"), table)
    model = open_axes(graph.model(layer(graph, x)), "b", "l")
    text = TextEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(text, IDS, np.ones_like(IDS)), wanted.reshape(-1, E), **CLOSE)
    np.testing.assert_array_equal(text.embedding.position_weight, table)


def test_positions_that_are_gathered_as_one_row():
    """M2M-100's, numbered as RoBERTa's, whose index and rows are reshaped."""
    ids = np.where(MASK, IDS, 1)
    graph = Graph(input_ids=ids, attention_mask=MASK)
    real = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", np.array(1))), to=onnx.TensorProto.INT64)
    index = graph.add("Add", graph.add("Mul", graph.add("CumSum", real, np.array(1)), real), np.array(1))
    rows = graph.add("Gather", 0.5 * seeded(L + 2, E), graph.add("Reshape", index, np.array([-1])))
    shape = graph.add("Concat", graph.add("Shape", "input_ids"), np.array([E]), axis=0)
    x = graph.add("Add", graph.add("Gather", 0.5 * seeded(V, E), "input_ids"), graph.add("Reshape", rows, shape))
    wide = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT), np.array([1, 2]))
    mask = graph.add("Mul", graph.add("Sub", number(1), wide), number(-3.4e38))
    model = open_axes(graph.model(layer(graph, x, mask=mask)), "b", "l")
    text = TextEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(text, ids), wanted[MASK > 0], **CLOSE)
    assert text.embedding.padding_id == 1


def test_embeddings_of_more_tables_are_refused_with_the_way_out():
    """LayoutLM's, of boxes."""
    graph = Graph(input_ids=IDS, box=np.zeros_like(IDS), kind=np.zeros_like(IDS))
    x = graph.add("Gather", seeded(V, E), "input_ids")
    for name in ("box", "kind"):
        x = graph.add("Add", x, graph.add("Gather", seeded(2, E), name))
    with pytest.raises(ValueError, match="one table of types, got a second one .*; TransformerEncoder.from_onnx reads the layers"):
        TextEncoder.from_onnx(graph.model(layer(graph, x)))


def test_rotary_embeddings_in_half_precision_have_the_base_of_the_float_model():
    """Of two digits, as bases are; one that is scaled for long texts is refused as ever, for only small angles show it."""
    size, ids = 32, np.random.default_rng(2).integers(3, V, (B, 9))
    frequencies = 160000.0 ** -(np.arange(size // 2) / (size // 2))

    def built(frequencies):
        graph = Graph(input_ids=ids)
        x = norm_node(graph, graph.add("Gather", seeded(V, E), "input_ids"), 1 + 0.3 * seeded(E), seeded(E))
        angles = (np.arange(9)[:, None].astype(np.float16) * frequencies.astype(np.float16)).astype(np.float32)
        cosines, sines = (graph.add("Cast", np.concatenate([each(angles)] * 2, -1).astype(np.float16), to=onnx.TensorProto.FLOAT)
                          for each in (np.cos, np.sin))

        def turned(x):
            a, b = (graph.add("Slice", x, np.array([i]), np.array([i + size // 2]), np.array([-1])) for i in (0, size // 2))
            return graph.add("Add", graph.add("Mul", x, cosines), graph.add("Mul", graph.add(
                "Concat", graph.add("Neg", b), a, axis=-1), sines))

        q, k, v = (graph.split(dense(graph, x, E, 2 * size, i), 2, size) for i in range(3))
        scores = graph.add("MatMul", turned(q), graph.add("Transpose", turned(k), perm=[0, 1, 3, 2]))
        weights = graph.add("Softmax", graph.add("Mul", scores, number(size**-0.5)), axis=-1)
        return graph.model(dense(graph, graph.join(graph.add("MatMul", weights, v), 2 * size), 2 * size, E, 3))

    assert MultiHeadAttention.from_onnx(built(frequencies)).rotary.base == 160000
    with pytest.raises(ValueError, match="cosines in half precision, which tell no base: export the float32 model"):
        MultiHeadAttention.from_onnx(built(np.where(frequencies < 1e-3, frequencies / 8, frequencies)))


def test_buckets_in_half_precision_are_those_of_the_float_model():
    """T5's, whose logarithm of 16 in half precision is too small, and so the bucket is that of 15."""
    table = seeded(32, H).astype(np.float16)

    def bucket(distance):
        far = abs(distance)
        far = far if far < 8 else min(8 + int(np.log(far / 8) / np.log(16) * 8 - (1e-3 if far in (16, 32) else 0)), 15)
        return far + 16 * (distance > 0)

    def with_bias(graph, scores):
        apart = graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1))
        index = graph.add("Gather", np.array([bucket(d) for d in range(-199, 200)]), graph.add("Add", apart, np.array(199)))
        rows = graph.add("Gather", graph.add("Cast", table, to=onnx.TensorProto.FLOAT), index)
        return graph.add("Add", scores, graph.add("Transpose", rows, perm=[2, 0, 1]))

    _, _, model = masked_text(with_bias)
    bias = TextEncoder.from_onnx(model).encoder.layers[0].attention.position_bias
    assert (bias.max_distance, bias.bidirectional) == (128, True)
    np.testing.assert_array_equal(bias.table, table.astype(np.float32))


# -- activations ---------------------------------------------------------------------------------------

TWICE = {"gelu": lambda g, x: g.add("Mul", x, g.add("Add", g.add("Erf", g.add("Div", x, number(2**0.5))), number(1))),
         "relu": lambda g, x: g.add("Mul", g.add("Relu", x), number(3))}


@pytest.mark.parametrize(("name", "form"), TWICE.items(), ids=TWICE)
def test_a_factor_behind_an_activation_goes_into_the_next_map(name, form):
    """onnxruntime moves GELU's half into the product behind it, as its alpha."""
    graph = Graph(x=seeded(B, L, E))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(graph, layer(graph, "x", activation=form)).layers[0].feed_forward.activation == name


# -- parts of a model ----------------------------------------------------------------------------------


def test_nodes_are_the_layers_of_one_part():
    """Another stage behind the first two layers; of those the last has no norm, for the one behind is the third's."""
    graph = Graph(x=seeded(B, L, E))
    middle = layer(graph, layer(graph, "x", norm_first=True), 20, norm_first=True)
    rows = graph.linear(layer(graph, middle, 40, norm_first=True), seeded(E, E), seeded(E))
    model = graph.model(layer(graph, rows, 60, norm_first=True))
    with pytest.raises(ValueError, match=r"must be the sum that the layer before gives, .*nodes=range\(\.\.\.\)\) the layers"):
        TransformerEncoder.from_onnx(model)
    with pytest.warns(UserWarning, match=f"the encoder takes 'x' and gives '{middle}'"):
        encoder = TransformerEncoder.from_onnx(model, nodes=range(2))
    assert len(encoder.layers) == 2 and encoder.norm is None
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(middle))
    wanted = ReferenceEvaluator(model).run([middle], graph.inputs)[0]
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"]), wanted, **CLOSE)
    for nodes in ([], [1, 0], [1, 4], [-1]):
        with pytest.raises(ValueError, match=r"nodes must be indices of attention nodes in their order, .*3: Softmax node"):
            TransformerEncoder.from_onnx(model, nodes=nodes)
    with pytest.raises(TypeError, match=r"nodes must be indices of attention nodes, as range\(6\), got x"):
        TransformerEncoder.from_onnx(model, nodes="x")


def test_layers_that_share_weights_through_identities():
    """As torch exports a layer that is applied again and again: more is read of each weight than it has numbers."""
    graph = Graph(x=seeded(B, L, E))
    model = graph.model(layer(graph, "x", norm_first=True))
    large = np.zeros((2**11, 2**11), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(large, "large"))
    copies = [onnx.helper.make_node("Identity", [f"copy{i - 1}" if i else "large"], [f"copy{i}"]) for i in range(48)]
    first = model.graph.node[0].input[1] if model.graph.node[0].op_type == "LayerNormalization" else None
    assert first is not None
    sums = [onnx.helper.make_node("Slice", ["copy47", "none", "width"], ["row"]),
            onnx.helper.make_node("Reshape", ["row", "flat"], ["zeros"]),
            onnx.helper.make_node("Add", [first, "zeros"], ["weight"])]
    for name, value in (("none", [0, 0]), ("width", [1, E]), ("flat", [E])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    nodes = [*copies, *sums, *model.graph.node]
    nodes[len(copies) + 3].input[1] = "weight"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert len(TransformerEncoder.from_onnx(model).layers) == 1


# -- patches -------------------------------------------------------------------------------------------


def test_patches_of_codes_that_are_made_in_each_call():
    """quantize_dynamic's: ConvInteger, whose sums a Cast and a Mul by both scales make real."""
    graph = Graph(pixels=seeded(B, 3, 8, 12))
    codes, scale, zero = graph.add("DynamicQuantizeLinear", "pixels", outputs=3)
    weight = np.random.default_rng(3).integers(0, 255, (E, 3, 4, 4)).astype(np.uint8)
    sums = graph.add("ConvInteger", codes, weight, zero, np.array(120, np.uint8), strides=[4, 4], kernel_shape=[4, 4])
    real = graph.add("Mul", graph.add("Cast", sums, to=onnx.TensorProto.FLOAT), graph.add("Mul", scale, number(0.01)))
    rows = graph.add("Reshape", graph.add("Add", real, seeded(1, E, 1, 1)), np.array([B, E, -1]))
    rows = graph.add("Add", graph.add("Transpose", rows, perm=[0, 2, 1]), seeded(1, 6, E))
    image = ImageEncoder.from_onnx(graph.model(layer(graph, rows, norm_first=True)))
    wanted = (weight.astype(np.float32) - 120) * number(0.01)
    np.testing.assert_allclose(image.embedding.projection.weight, wanted.reshape(E, -1), rtol=1e-6)
    np.testing.assert_allclose(image.embedding.places(8, 12), seeded(1, 6, E)[0] + seeded(1, E, 1, 1).reshape(E), rtol=1e-6)


# -- images of open sizes ------------------------------------------------------------------------------


def open_image(first, gathered=False, distances=False):
    """A model whose images are as wide and high as its table of positions, or of distances, has rows for: 12 by 12."""
    graph = Graph(pixels=seeded(B, 3, 12, 12))
    patches = graph.add("Conv", "pixels", 0.3 * seeded(E, 3, 4, 4), seeded(E), strides=[4, 4], kernel_shape=[4, 4])
    shape = graph.add("Concat", graph.add("Shape", patches, start=0, end=2), np.array([-1]), axis=0)
    rows = graph.add("Transpose", graph.add("Reshape", patches, shape), perm=[0, 2, 1])
    if first:
        size = graph.add("Concat", graph.add("Shape", rows, start=0, end=1), np.array([first, E]), axis=0)
        rows = graph.add("Concat", graph.add("Expand", seeded(1, first, E), size), rows, axis=1)
    table = seeded(1, first + 9, E)
    table = graph.add("Gather", table[0], np.arange(first + 9)) if gathered else table
    rows = graph.add("Add", rows, table)
    mask = seeded(1, H, first + 9, first + 9) if distances else None
    return graph, open_axes(graph.model(layer(graph, rows, norm_first=True, mask=mask)), "b", "c", "h", "w")


@pytest.mark.parametrize("options", [{"first": 0}, {"first": 1}, {"first": 5, "gathered": True}, {"first": 1, "distances": True}])
def test_images_of_open_sizes_are_as_large_as_positions_say(options):
    """Optimum leaves height and width open."""
    graph, model = open_image(**options)
    image = ImageEncoder.from_onnx(model)
    assert (image.embedding.image_size, image.embedding.first_tokens) == ((12, 12), options["first"])
    spots = image.embedding.places(12, 12)
    with image.encoder.prepared((B, len(spots))) as sequences:
        found = image.forward(NumpyOps(), image.embedding.patches(graph.inputs["pixels"]), spots, B, sequences)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, **CLOSE)


def test_commands_say_why_a_file_is_no_encoder(tmp_path):
    """Not only that it has several attention layers, of which none was chosen."""
    graph = Graph(x=seeded(B, L, E))
    model = graph.model(layer(graph, layer(graph, "x", activation=lambda g, x: g.add("Tanh", x)), 20))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"model.onnx: between MatMul .* there must be gelu, .*; and as one attention layer: node must be "
                                         r"given; attention nodes of .*1: Softmax node"):
        open_model(tmp_path / "model.onnx")
