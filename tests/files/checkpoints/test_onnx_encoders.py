"""from_onnx of whole encoders: small graphs in every form of norm and activation, against onnx's own evaluation.

Layers are computed with NumPy: what is read is in question, not what kernels make of it. Fused operators of
com.microsoft, which onnx does not evaluate, stand for a graph of ONNX nodes with the same weights.
"""

import contextlib
import warnings

import numpy as np
import pytest
from test_checkpoints_onnx import Graph

from edgeattn import ImageEncoder, TextEncoder, TransformerEncoder
from edgeattn.executors.numpy import NumpyOps

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

B, L, E, H, F = 2, 5, 8, 2, 12
D = E // H
CLOSE = dict(rtol=1e-4, atol=2e-5)
EPS = 1e-3


def seeded(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def number(value):
    return np.array(value, np.float32)


# -- norms, as graphs write them -----------------------------------------------------------------------


def norm_node(graph, x, weight, bias):
    return graph.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=EPS)


def norm_apart(graph, x, weight, bias):
    centred = graph.add("Sub", x, graph.add("ReduceMean", x, np.array([-1])))
    variance = graph.add("ReduceMean", graph.add("Pow", centred, number(2)), np.array([-1]))
    root = graph.add("Sqrt", graph.add("Add", variance, number(EPS)))
    return graph.add("Add", graph.add("Mul", graph.add("Div", centred, root), weight), bias)


def norm_by_products(graph, x, weight, bias):
    """With x * x for its power, and 1 / root."""
    centred = graph.add("Sub", x, graph.add("ReduceMean", x, np.array([2])))
    variance = graph.add("ReduceMean", graph.add("Mul", centred, centred), np.array([-1]))
    root = graph.add("Reciprocal", graph.add("Sqrt", graph.add("Add", number(EPS), variance)))
    return graph.add("Add", bias, graph.add("Mul", centred, graph.add("Mul", root, weight)))


def rms_apart(graph, x, weight, _):
    mean = graph.add("ReduceMean", graph.add("Mul", x, x), np.array([-1]))
    return graph.add("Mul", weight, graph.add("Div", x, graph.add("Sqrt", graph.add("Add", mean, number(EPS)))))


NORMS = [norm_node, norm_apart, norm_by_products, rms_apart]

# -- activations ---------------------------------------------------------------------------------------


def gelu_apart(graph, x):
    one = graph.add("Add", graph.add("Erf", graph.add("Div", x, number(2**0.5))), number(1))
    return graph.add("Mul", graph.add("Mul", x, one), number(0.5))


def gelu_halved_first(graph, x):
    one = graph.add("Add", graph.add("Erf", graph.add("Mul", x, number(0.5**0.5))), number(1))
    return graph.add("Mul", x, graph.add("Mul", number(0.5), one))


def gelu_tanh_apart(graph, x):
    cube = graph.add("Mul", graph.add("Pow", x, number(3)), number(0.044715))
    inner = graph.add("Mul", graph.add("Add", x, cube), number((2 / np.pi) ** 0.5))
    one = graph.add("Add", graph.add("Tanh", inner), number(1))
    return graph.add("Mul", graph.add("Mul", number(0.5), x), one)


ACTIVATIONS = {
    "gelu": [lambda g, x: g.add("Gelu", x), gelu_apart, gelu_halved_first],
    "gelu_tanh": [lambda g, x: g.add("Gelu", x, approximate="tanh"), gelu_tanh_apart],
    "relu": [lambda g, x: g.add("Relu", x), lambda g, x: g.add("Max", x, number(0)), lambda g, x: g.add("Clip", x, number(0))],
    "silu": [lambda g, x: g.add("Mul", x, g.add("Sigmoid", x)),
             lambda g, x: g.add("Div", x, g.add("Add", g.add("Exp", g.add("Neg", x)), number(1)))],
}
FORMS = [(name, form) for name, forms in ACTIVATIONS.items() for form in forms]


def gelu_node(graph, x):
    return graph.add("Gelu", x)


# -- layers --------------------------------------------------------------------------------------------


def dense(graph, x, inputs, outputs, seed, gemm=False):
    weight, bias = seeded(inputs, outputs, seed=seed) * 0.5, seeded(outputs, seed=seed)
    if not gemm:
        return graph.linear(x, weight, bias)
    rows = graph.add("Gemm", graph.add("Reshape", x, np.array([-1, inputs])), weight.T.copy(), bias, transB=1)
    return graph.add("Reshape", rows, np.array([B, L, outputs]))


def attention(graph, x, seed, mask=None):
    q, k, v = (graph.split(dense(graph, x, E, E, seed + i), H, D) for i in range(3))
    scores = graph.add("Mul", graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2])), number(D**-0.5))
    scores = scores if mask is None else graph.add("Add", scores, mask)
    context = graph.join(graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v), E)
    return dense(graph, context, E, E, seed + 3)


def feed_forward(graph, x, seed, activation=gelu_node, gemm=False):
    return dense(graph, activation(graph, dense(graph, x, E, F, seed, gemm)), F, E, seed + 1, gemm)


def layer(graph, x, seed=0, norm=norm_node, norm_first=False, feed=feed_forward, mask=None, **options):
    norms = [lambda x, i=i: norm(graph, x, 1 + 0.3 * seeded(E, seed=seed + i), seeded(E, seed=seed + i)) for i in (4, 5)]
    if norm_first:
        x = graph.add("Add", x, attention(graph, norms[0](x), seed, mask))
        return graph.add("Add", feed(graph, norms[1](x), seed + 6, **options), x)
    x = norms[0](graph.add("Add", attention(graph, x, seed, mask), x))
    return norms[1](graph.add("Add", x, feed(graph, x, seed + 6, **options)))


def computed(encoder, x, **masks):
    with encoder.prepared(x.shape[:-1], **masks) as sequences:
        return encoder.forward(NumpyOps(), x.reshape(-1, x.shape[-1]), sequences).reshape(x.shape)


def read(graph, output, opset=23):
    """The encoder, which must give what onnx gives of the graph."""
    model = graph.model(output, opset)
    encoder = TransformerEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"]), wanted, **CLOSE)
    return encoder


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, norm_first):
    graph = Graph(x=seeded(B, L, E))
    x = layer(graph, layer(graph, "x", 0, norm, norm_first), 20, norm, norm_first)
    x = norm(graph, x, seeded(E), seeded(E)) if norm_first else x
    encoder = read(graph, x)
    assert len(encoder.layers) == 2 and (encoder.norm is not None) == norm_first
    found = encoder.layers[1].norm2
    assert type(found).__name__ == ("RMSNorm" if norm is rms_apart else "LayerNorm") and found.eps == EPS
    np.testing.assert_array_equal(found.weight, 1 + 0.3 * seeded(E, seed=25))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_activations(name, form):
    graph = Graph(x=seeded(B, L, E))
    assert read(graph, layer(graph, "x", activation=form)).layers[0].feed_forward.activation == name


@pytest.mark.parametrize("packed", [False, True])
def test_gates(packed):
    def feed(graph, x, seed):
        if packed:
            gate, up = graph.add("Split", dense(graph, x, E, 2 * F, seed), outputs=2, axis=-1, num_outputs=2)
        else:
            gate, up = dense(graph, x, E, F, seed), dense(graph, x, E, F, seed + 1)
        return dense(graph, graph.add("Mul", graph.add("Gelu", gate), up), F, E, seed + 2)

    graph = Graph(x=seeded(B, L, E))
    found = read(graph, layer(graph, "x", feed=feed, norm_first=True)).layers[0].feed_forward
    assert found.gate is not None
    np.testing.assert_array_equal(found.gate.weight, (seeded(E, F * (1 + packed), seed=6) * 0.5)[:, :F].T)


def test_gemm_between_reshapes():
    graph = Graph(x=seeded(B, L, E))
    read(graph, layer(graph, "x", gemm=True, activation=gelu_apart))


def test_tokens_that_change_places_are_refused():
    def feed(graph, x, seed):
        turned = graph.add("Slice", feed_forward(graph, x, seed), np.array([-1]), np.array([-9]), np.array([1]), np.array([-1]))
        return turned

    graph = Graph(x=seeded(B, L, E))
    with pytest.raises(ValueError, match="must be added to what it was given, as a residual; got Slice node"):
        TransformerEncoder.from_onnx(graph.model(layer(graph, "x", feed=feed)))


def test_layers_without_a_norm_in_front():
    """As ModernBERT's first."""
    graph = Graph(x=seeded(B, L, E))
    x = graph.add("Add", "x", attention(graph, "x", 0))
    x = graph.add("Add", x, feed_forward(graph, norm_apart(graph, x, seeded(E), seeded(E)), 9))
    found = read(graph, layer(graph, x, 20, norm_first=True)).layers
    assert found[0].norm1 is None and found[0].norm_first and found[1].norm1 is not None


def test_what_is_in_front_and_behind_is_left():
    graph = Graph(x=seeded(B, L, E))
    x = layer(graph, graph.add("Relu", "x"))
    graph.inputs["x"] = np.abs(graph.inputs["x"])
    model = graph.model(graph.add("Softmax", graph.linear(x, seeded(E, 3))))
    with pytest.warns(UserWarning, match=f"the encoder takes 'value0_0' and gives '{x}'; what the model computes") as told:
        encoder = TransformerEncoder.from_onnx(model)
    assert told[0].filename == __file__
    model.graph.output[0].name = x
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"]),
                               ReferenceEvaluator(model).run(None, graph.inputs)[0], **CLOSE)


def test_masks_of_all_layers_are_told_once():
    graph = Graph(x=seeded(B, L, E), mask=np.zeros((B, 1, 1, L), np.float32))
    model = graph.model(layer(graph, layer(graph, "x", mask="mask"), 20, mask="mask"))
    with pytest.warns(UserWarning, match="attention adds 'mask' to its scores; pass it") as told:
        TransformerEncoder.from_onnx(model)
    assert len(told) == 1


# -- forms that files have been seen in ----------------------------------------------------------------


def heads(graph, x, seed):
    return [graph.split(dense(graph, x, E, E, seed + i), H, D) for i in range(3)]


def attended(graph, seed, q, k, v, masked=lambda graph, scores: scores):
    scores = graph.add("Mul", graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2])), number(D**-0.5))
    context = graph.add("MatMul", graph.add("Softmax", masked(graph, scores), axis=-1), v)
    return dense(graph, graph.join(context, E), E, E, seed + 3)


def around(graph, attend, seed=0):
    x = norm_node(graph, graph.add("Add", "x", attend), seeded(E, seed=seed), seeded(E, seed=seed))
    return norm_node(graph, graph.add("Add", x, feed_forward(graph, x, seed + 6)), seeded(E), seeded(E))


def places(graph, scores, axis):
    length = graph.add("Gather", graph.add("Shape", scores), np.array(-1))
    return graph.add("Unsqueeze", graph.add("Range", np.array(0), length, np.array(1)), np.array([axis]))


def later(graph, scores):
    return graph.add("Less", places(graph, scores, 1), places(graph, scores, 0))


def of_table(graph, scores):
    """GPT's: times a table of ones, minus 1e4 where that is 0."""
    length = graph.add("Shape", scores, start=3, end=4)
    both = graph.add("Concat", length, length, axis=0)
    table = graph.add("Slice", np.tril(np.ones((1, 1, 16, 16), np.float32)), np.array([0, 0]), both, np.array([2, 3]))
    return graph.add("Sub", graph.add("Mul", scores, table), graph.add("Mul", number(1e4), graph.add("Sub", number(1), table)))


CAUSAL = {
    "where seen": lambda g, s: g.add("Where", g.add("Not", later(g, s)), s, number(-np.inf)),
    "where not seen": lambda g, s: g.add("Where", later(g, s), number(-1e9), s),
    "times a table": of_table,
    "kept finite": lambda g, s: g.add("Max", g.add("Add", s, g.add("Mul", g.add("Cast", later(g, s), to=1), number(-3e38))), number(-3.4e38)),
}


@pytest.mark.parametrize("form", CAUSAL.values(), ids=CAUSAL)
def test_causal_masks_that_take_the_place_of_scores(form):
    graph = Graph(x=seeded(B, L, E))
    model = open_axes(graph.model(around(graph, attended(graph, 0, *heads(graph, "x", 0), form))), "b", "l")
    with pytest.warns(UserWarning, match="attention is causal; pass is_causal=True"):
        encoder = TransformerEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"], is_causal=True), wanted, **CLOSE)


def test_a_mask_of_bool_that_is_added_is_refused():
    """torch writes it of GPT-2 at opset 23; onnxruntime does not take it either."""
    graph = Graph(x=seeded(B, L, E))
    scores = around(graph, attended(graph, 0, *heads(graph, "x", 0), lambda g, s: g.add("Add", s, later(g, s))))
    with pytest.raises(ValueError, match="Add node .* must take numbers, got a mask of bool, .*export for another opset"):
        TransformerEncoder.from_onnx(graph.model(scores))


def by_einsum(graph, seed):
    """As Keras writes it: weights (E, H, D), and (H, D, E) of the output."""
    def weights(i):
        return seeded(E, E, seed=seed + i) * 0.5

    q, k, v = (graph.add("Add", graph.add("Einsum", "x", weights(i).reshape(E, H, D), equation="abc,cde->abde"),
                         seeded(E, seed=seed + i).reshape(H, D)) for i in range(3))
    scores = graph.add("Einsum", graph.add("Mul", q, number(D**-0.5)), k, equation="aecd,abcd->aceb")
    context = graph.add("Einsum", graph.add("Softmax", scores, axis=-1), v, equation="aceb,abcd->aecd")
    return graph.add("Add", graph.add("Einsum", context, weights(3).reshape(H, D, E), equation="abcd,cde->abe"), seeded(E, seed=seed + 3))


def pointwise(graph, x, inputs, outputs, seed):
    """A map as a convolution of one token."""
    weight = (seeded(inputs, outputs, seed=seed) * 0.5).T[:, :, None].copy()
    return graph.add("Conv", x, weight, seeded(outputs, seed=seed), kernel_shape=[1])


def by_convolutions(graph, seed):
    columns = graph.add("Transpose", "x", perm=[0, 2, 1])
    q, k, v = (graph.split(graph.add("Transpose", pointwise(graph, columns, E, E, seed + i), perm=[0, 2, 1]), H, D) for i in range(3))
    scores = graph.add("Mul", graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2])), number(D**-0.5))
    context = graph.join(graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v), E)
    made = pointwise(graph, graph.add("Transpose", context, perm=[0, 2, 1]), E, E, seed + 3)
    return graph.add("Transpose", made, perm=[0, 2, 1])


def shared_by_tile(graph, seed):
    q = graph.split(dense(graph, "x", E, E, seed), H, D)
    k, v = (graph.add("Tile", graph.split(dense(graph, "x", E, D, seed + i), 1, D), np.array([1, H, 1, 1])) for i in (1, 2))
    return attended(graph, seed, q, k, v)


@pytest.mark.parametrize("form", [by_einsum, by_convolutions, shared_by_tile])
def test_projections(form):
    graph = Graph(x=seeded(B, L, E))
    model = open_axes(graph.model(around(graph, form(graph, 0))), "b", "l")
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(computed(TransformerEncoder.from_onnx(model), graph.inputs["x"]), wanted, **CLOSE)


def test_networks_of_convolutions():
    def feed(graph, x, seed):
        inner = pointwise(graph, graph.add("Transpose", x, perm=[0, 2, 1]), E, F, seed)
        return graph.add("Transpose", pointwise(graph, graph.add("Gelu", inner), F, E, seed + 1), perm=[0, 2, 1])

    graph = Graph(x=seeded(B, L, E))
    read(graph, layer(graph, layer(graph, "x", feed=feed), 20, feed=feed))


def test_gelu_of_features_that_are_scaled_first():
    """0.5 x and x / sqrt(2): neither is what GELU is of."""
    def form(graph, x):
        upper = graph.add("Add", graph.add("Erf", graph.add("Div", x, graph.add("Sqrt", number(2)))), number(1))
        return graph.add("Mul", graph.add("Mul", number(0.5), x), upper)

    graph = Graph(x=seeded(B, L, E))
    assert read(graph, layer(graph, "x", activation=form)).layers[0].feed_forward.activation == "gelu"


@pytest.mark.parametrize(("kind", "alpha"), [("QuickGelu", 1.702), ("Swish", 1.0)])
def test_fused_sigmoids(kind, alpha):
    def fused(graph, x):
        return graph.add(kind, x, domain="com.microsoft" if kind == "QuickGelu" else "", alpha=alpha)

    def plain(graph, x):
        return graph.add("Mul", x, graph.add("Sigmoid", graph.add("Mul", x, number(alpha))))

    first, second = (TransformerEncoder.from_onnx(graph.model(layer(graph, "x", activation=form)))
                     for form in (fused, plain) for graph in [Graph(x=seeded(B, L, E))])
    np.testing.assert_allclose(computed(first, seeded(B, L, E)), computed(second, seeded(B, L, E)), **CLOSE)


STEP = number(0.05), np.array(128, np.uint8)


def in_codes(kind):
    """An operator of onnxruntime's QOperator format, between codes; its shape is asked of the reals."""
    def form(graph, *values):
        codes = [part for value in values for part in (graph.add("QuantizeLinear", value, *STEP), *STEP)]
        made = graph.add(f"QLinear{kind}", *codes, *STEP, domain="com.microsoft")
        shape = graph.add("Shape", graph.add("DequantizeLinear", made, *STEP))
        return graph.add("Reshape", graph.add("DequantizeLinear", made, *STEP), shape)
    return form


def test_operators_upon_codes():
    def built(add, activation):
        graph = Graph(x=seeded(B, L, E))
        x = norm_node(graph, add(graph, "x", attended(graph, 0, *heads(graph, "x", 0))), seeded(E), seeded(E))
        x = norm_node(graph, add(graph, x, feed_forward(graph, x, 6, activation)), seeded(E), seeded(E))
        return TransformerEncoder.from_onnx(open_axes(graph.model(x), "b", "l"))

    first = built(in_codes("Add"), lambda g, x: in_codes("Mul")(g, x, in_codes("Sigmoid")(g, x)))
    second = built(lambda g, a, b: g.add("Add", a, b), lambda g, x: g.add("Mul", x, g.add("Sigmoid", x)))
    np.testing.assert_array_equal(computed(first, seeded(B, L, E)), computed(second, seeded(B, L, E)))


def test_images_whose_patches_are_of_codes():
    """QLinearConv and QLinearConcat; the bias has the steps of both."""
    graph = Graph(pixels=seeded(B, 3, 8, 12))
    weight, scales = np.random.default_rng(3).integers(-99, 99, (E, 3, 4, 4)).astype(np.int8), np.abs(seeded(E)) / 99 + number(1e-3)
    bias = np.arange(E, dtype=np.int32) * 9
    codes = graph.add("QLinearConv", graph.add("QuantizeLinear", "pixels", *STEP), *STEP, weight, scales, np.zeros(E, np.int8),
                      *STEP, bias, strides=[4, 4], kernel_shape=[4, 4])
    rows = graph.add("Transpose", graph.add("Reshape", codes, np.array([B, E, -1])), perm=[0, 2, 1])
    token = graph.add("QuantizeLinear", seeded(B, 1, E) * 0, *STEP)
    rows = graph.add("QLinearConcat", *STEP, token, *STEP, rows, *STEP, axis=1, domain="com.microsoft")
    rows = graph.add("Add", graph.add("DequantizeLinear", rows, *STEP), seeded(1, 7, E))
    image = ImageEncoder.from_onnx(graph.model(layer(graph, rows, norm_first=True)))
    np.testing.assert_allclose(image.embedding.projection.weight, (weight * scales[:, None, None, None]).reshape(E, -1), rtol=1e-6)
    np.testing.assert_allclose(image.embedding.projection.bias, bias * scales * 0.05, rtol=1e-6)
    assert image.embedding.first_tokens == 1


def test_biases_of_distances_are_relative_positions():
    """Whatever table they are of: the numbers of each distance, the same from some on."""
    numbers = seeded(H, 13)
    numbers[:, :3], numbers[:, -3:] = numbers[:, :1], numbers[:, -1:]

    def biased(graph, scores):
        apart = graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1))
        index = graph.add("Add", graph.add("Clip", apart, np.array(-6), np.array(6)), np.array(6))
        return graph.add("Add", scores, graph.add("Gather", numbers, index, axis=1))

    graph = Graph(x=seeded(B, 9, E))
    model = open_axes(graph.model(around(graph, attended(graph, 0, *heads(graph, "x", 0), biased))), "b", "l")
    encoder = TransformerEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"]), wanted, **CLOSE)
    assert encoder.layers[0].attention.position_bias.max_distance <= 7


@pytest.mark.parametrize("axis", [0, 1, "of codes"])
def test_tables_that_go_on_beyond_what_is_seen_are_told(axis):
    """As T5's of a distance that no model has: numbers of texts longer than those that are looked at are not known."""
    table = seeded(4, H)

    def biased(graph, scores):
        apart = graph.add("Abs", graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1)))
        index = graph.add("Min", graph.add("Div", apart, np.array(100)), np.array(3))
        if axis == "of codes":  # which become numbers behind what turns them, as quantize_dynamic leaves them
            codes = graph.add("Gather", np.int8(9 * table), index, axis=0)
            return graph.add("Add", scores, graph.add(
                "DequantizeLinear", graph.add("Transpose", codes, perm=[2, 0, 1]), number(0.1), np.array(3, np.int8)))
        rows = graph.add("Gather", table if axis == 0 else table.T.copy(), index, axis=axis)
        return graph.add("Add", scores, graph.add("Transpose", rows, perm=[2, 0, 1]) if axis == 0 else rows)

    graph = Graph(x=seeded(B, 9, E))
    model = open_axes(graph.model(around(graph, attended(graph, 0, *heads(graph, "x", 0), biased))), "b", "l")
    with pytest.warns(UserWarning, match="adds a mask or bias"):
        TransformerEncoder.from_onnx(model)


def test_rotary_angles_that_an_einsum_makes():
    """As lucidrains' and GPT-NeoX's, and torch.outer as TorchScript writes it."""
    graph = Graph(x=seeded(B, 9, E))
    frequencies = (500.0 ** (-np.arange(D // 2) / (D // 2))).astype(np.float32)

    def turned(x):
        rows = graph.add("Range", np.array(0), graph.add("Gather", graph.add("Shape", x), np.array(2)), np.array(1))
        angles = graph.add("Einsum", graph.add("Cast", rows, to=onnx.TensorProto.FLOAT), frequencies, equation="n , d -> n d")
        both = graph.add("Concat", angles, angles, axis=-1)
        a, b = (graph.add("Slice", x, np.array([i]), np.array([i + D // 2]), np.array([-1])) for i in (0, D // 2))
        other = graph.add("Concat", graph.add("Neg", b), a, axis=-1)
        return graph.add("Add", graph.add("Mul", x, graph.add("Cos", both)), graph.add("Mul", other, graph.add("Sin", both)))

    q, k, v = heads(graph, "x", 0)
    assert read(graph, around(graph, attended(graph, 0, turned(q), turned(k), v))).layers[0].attention.rotary.base == 500


def test_scores_with_a_cap_are_refused():
    graph = Graph(x=seeded(B, L, E))

    def capped(graph, scores):
        return graph.add("Mul", graph.add("Tanh", graph.add("Div", scores, number(3))), number(3))

    with pytest.raises(ValueError, match=r"caps its scores, for which an encoder has no place; MultiHeadAttention\.from_onnx"):
        TransformerEncoder.from_onnx(graph.model(around(graph, attended(graph, 0, *heads(graph, "x", 0), capped))))


# -- int8 ----------------------------------------------------------------------------------------------


QUICK = {"taken apart": lambda g, x: g.add("Mul", x, g.add("Sigmoid", g.add("Mul", x, number(1.702)))),
         "the other way round": lambda g, x: g.add("Mul", g.add("Sigmoid", g.add("Mul", number(1.702), x)), x)}


@pytest.mark.parametrize("form", QUICK.values(), ids=QUICK)
def test_quick_gelu_is_a_silu_whose_maps_take_its_factor(form):
    graph = Graph(x=seeded(B, L, E))
    model = graph.model(layer(graph, "x", activation=form))
    encoder = TransformerEncoder.from_onnx(model)
    assert encoder.layers[0].feed_forward.activation == "silu"
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(computed(encoder, graph.inputs["x"]), wanted, **CLOSE)


def quantized(model, weights):
    """The model with weights as int8 codes; around each product QuantizeLinear and DequantizeLinear, as tools write."""
    graph, nodes = onnx.GraphProto(), []
    graph.CopyFrom(model.graph)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            for i, name in enumerate(list(node.input)):
                array = stored.get(name)
                if array is None:
                    pair = ["fine", "lowest"] if made.get(name) == "Softmax" else ["step", "zero"]
                    nodes += [onnx.helper.make_node("QuantizeLinear", [name, *pair], [f"{name} q"]),
                              onnx.helper.make_node("DequantizeLinear", [f"{name} q", *pair], [f"{name} d"])]
                elif weights:
                    scale = np.float32(np.abs(array).max() / 127)
                    for part, value in (("codes", np.rint(array / scale).astype(np.int8)), ("scale", scale)):
                        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name} {part}"))
                    nodes.append(onnx.helper.make_node("DequantizeLinear", [f"{name} codes", f"{name} scale"], [f"{name} d"]))
                if array is None or weights:
                    node.input[i] = f"{name} d"
        nodes.append(node)
    graph.initializer.append(onnx.numpy_helper.from_array(number(0.05), "step"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.int8(0), "zero"))
    graph.initializer.append(onnx.numpy_helper.from_array(number(1 / 256), "fine"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.int8(-128), "lowest"))
    del graph.node[:]
    graph.node.extend(nodes)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import)


def test_files_with_quantizers_are_read_as_if_these_did_not_round():
    """What such a file gives differs from the encoder by the rounding of its quantizers, and by nothing else."""
    graph = Graph(x=0.5 * seeded(B, L, E))
    model = graph.model(layer(graph, "x"))
    coded = quantized(model, weights=True)
    encoder = TransformerEncoder.from_onnx(coded)
    rounding = ReferenceEvaluator(coded).run(None, graph.inputs)[0]
    for node in coded.graph.node:  # the same file, its quantizers of computed values put out of action
        if node.op_type == "QuantizeLinear" or node.input[0].endswith(" q"):
            node.op_type = "Identity"
            del node.input[1:]
    wanted = ReferenceEvaluator(coded).run(None, graph.inputs)[0]
    found = computed(encoder, graph.inputs["x"])
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert 1e-3 < np.abs(found - rounding).max() < 0.3


def test_positions_that_only_long_texts_show_are_no_part_of_static_int8():
    """Every value has codes here, so that nothing but the positions is in the way."""
    def biased(graph, scores):
        apart = graph.add("Sub", places(graph, scores, 0), places(graph, scores, 1))
        return graph.add("Add", scores, graph.add("Gather", seeded(H, 3), graph.add("Min", graph.add("Abs", apart), np.array(2)), axis=1))

    def plain(graph, scores):
        return scores

    for form in (plain, biased):
        graph = Graph(x=seeded(B, 9, E))
        model = quantized(graph.model(around(graph, attended(graph, 0, *heads(graph, "x", 0), form))), weights=True)
        nodes = []
        for node in model.graph.node:
            nodes.append(node)
            if node.op_type in ("MatMul", "Add", "Mul", "Gelu", "LayerNormalization") and node.output[0] not in (
                    each.name for each in model.graph.output):
                name = node.output[0]
                node.output[0] = f"{name} real"
                nodes += [onnx.helper.make_node("QuantizeLinear", [f"{name} real", "step", "zero"], [f"{name} all"]),
                          onnx.helper.make_node("DequantizeLinear", [f"{name} all", "step", "zero"], [name])]
        coded = onnx.ModelProto()
        coded.CopyFrom(model)
        del coded.graph.node[:]
        coded.graph.node.extend(nodes)
        coded = open_axes(coded, "b", "l")
        if form is plain:
            TransformerEncoder.from_onnx(coded, scheme="static")
        else:
            with pytest.raises(ValueError, match="has positions of its own, which static int8 has not"):
                TransformerEncoder.from_onnx(coded, scheme="static")


def test_a_relu_that_quantizers_left_to_the_lowest_code():
    """onnxruntime's take it out where no code behind it is negative."""
    def built(activation):
        graph = Graph(x=seeded(B, L, E))
        return TransformerEncoder.from_onnx(graph.model(layer(graph, "x", activation=activation)))

    def coded(kind, lowest):
        step = number(0.02), np.array(lowest, kind)
        return lambda g, x: g.add("DequantizeLinear", g.add("QuantizeLinear", x, *step), *step)

    wanted = computed(built(lambda g, x: g.add("Relu", x)), seeded(B, L, E))
    for kind, lowest in ((np.int8, -128), (np.uint8, 0)):
        np.testing.assert_array_equal(computed(built(coded(kind, lowest)), seeded(B, L, E)), wanted)
    with pytest.raises(ValueError, match="got nothing: the nearest"):
        built(coded(np.int8, 0))


# -- refusals ------------------------------------------------------------------------------------------

HARD = [("HardSwish", lambda g, x: g.add("HardSwish", x)), ("Tanh", lambda g, x: g.add("Tanh", x))]


@pytest.mark.parametrize(("name", "form"), HARD)
def test_other_activations_are_refused_by_what_comes_nearest(name, form):
    graph = Graph(x=seeded(B, L, E))
    with pytest.raises(ValueError, match=r"there must be gelu, gelu_tanh, relu or silu, .*the nearest is \w+, from which"):
        TransformerEncoder.from_onnx(graph.model(layer(graph, "x", activation=form)))


@pytest.mark.parametrize(("build", "message"), [
    (lambda g: g.linear("x", seeded(E, E)), "it must have attention"),
    (lambda g: attention(g, "x", 0), "must be added to what it was given, as a residual; got nothing behind"),
    (lambda g: g.add("Add", "x", attention(g, "x", 0)), "there must be a feed-forward network"),
    (lambda g: layer(g, "x", norm=lambda g, x, w, b: g.add("Mul", x, w)),
     "there must be a LayerNormalization or RMSNormalization over the features, .*got Mul node"),
    (lambda g: layer(g, "x", norm=lambda g, x, w, b: g.add("LpNormalization", x)),
     "there must be a LayerNormalization or RMSNormalization"),
    (lambda g: g.add("Add", layer(g, "x"), layer(g, "x", 20)), "there must be a LayerNormalization|must be the sum"),
], ids=["none", "alone", "no network", "no norm", "another norm", "two branches"])
def test_other_graphs_are_refused_by_the_node(build, message):
    graph = Graph(x=seeded(B, L, E))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        TransformerEncoder.from_onnx(graph.model(build(graph)))


# -- text and images -----------------------------------------------------------------------------------

V, P = 30, 9
IDS = np.random.default_rng(1).integers(3, V, (B, L))
MASK = np.array([[1] * L, [1] * (L - 2) + [0] * 2])


def text_graph(*inputs, positions="slice"):
    given = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}
    graph = Graph(**{name: given[name] for name in ("input_ids", "attention_mask", *inputs)})
    x = graph.add("Gather", 0.5 * seeded(V, E), "input_ids")
    if "token_type_ids" in inputs:
        x = graph.add("Add", x, graph.add("Gather", 0.5 * seeded(2, E), "token_type_ids"))
    if positions == "slice":
        length = graph.add("Shape", "input_ids", start=1, end=2)
        index = graph.add("Slice", np.arange(P)[None], np.array([0]), length, np.array([1]))
    else:  # numbered from behind the id 1 of padding, as RoBERTa's
        real = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", np.array(1))), to=onnx.TensorProto.INT64)
        index = graph.add("Add", graph.add("Mul", graph.add("CumSum", real, np.array(1)), real), np.array(1))
    x = graph.add("Add", x, graph.add("Gather", 0.5 * seeded(P, E), index))
    x = norm_node(graph, x, 1 + 0.3 * seeded(E), seeded(E))
    wide = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT), np.array([1, 2]))
    mask = graph.add("Mul", graph.add("Sub", number(1), wide), number(-3.4e38))
    return graph, layer(graph, layer(graph, x, mask=mask), 20, mask=mask)


def open_axes(model, *names):
    """The model with open axes, as exporters write it."""
    for value in model.graph.input:
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dim.dim_param = name
    return model


def hidden(text, ids=IDS, mask=MASK):
    embedding, real = text.embedding, mask > 0
    with text.encoder.prepared(ids.shape, key_padding_mask=real, is_causal=text.is_causal) as sequences:
        rows = text.forward(NumpyOps(), ids.reshape(-1), embedding.positions(ids).reshape(-1), np.zeros(ids.size, int), sequences)
    return rows.reshape(*ids.shape, -1)[real]


@pytest.mark.parametrize("positions", ["slice", "padding"])
@pytest.mark.parametrize("inputs", [(), ("token_type_ids",)])
@pytest.mark.filterwarnings("error")
def test_texts(positions, inputs):
    graph, x = text_graph(*inputs, positions=positions)
    if positions == "padding":
        graph.inputs["input_ids"] = np.where(MASK, IDS, 1)
    model = open_axes(graph.model(x), "b", "l")
    text = TextEncoder.from_onnx(model)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(text, graph.inputs["input_ids"]), wanted[MASK > 0], **CLOSE)
    assert text.embedding.padding_id == (1 if positions == "padding" else None)
    assert text.embedding.longest == (P - 2 if positions == "padding" else P)
    assert (text.embedding.type_weight is not None) == bool(inputs) and text.pooling == "mean" and not text.normalize


def pooled(graph, x, kind):
    wide = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT), np.array([2]))
    if kind == "cls":
        return graph.add("Gather", x, np.array(0), axis=1)
    if kind == "max":
        return graph.add("ReduceMax", graph.add("Where", graph.add("Cast", wide, to=onnx.TensorProto.BOOL), x, number(-1e9)),
                         np.array([1]), keepdims=0)
    mean = graph.add("Div", graph.add("ReduceSum", graph.add("Mul", x, wide), np.array([1]), keepdims=0),
                     graph.add("ReduceSum", wide, np.array([1]), keepdims=0))
    if kind == "mean":
        return mean
    length = graph.add("Clip", graph.add("ReduceL2", mean, np.array([1]), keepdims=1), number(1e-12))
    return graph.add("Div", mean, length)


@pytest.mark.parametrize("kind", ["mean", "mean normalized", "cls", "max"])
def test_pooling_of_a_graph(kind):
    graph, x = text_graph()
    text = TextEncoder.from_onnx(open_axes(graph.model(pooled(graph, x, kind)), "b", "l"))
    assert (text.pooling, text.normalize) == (kind.split()[0], "normalized" in kind)


def test_causal_texts_and_windows():
    for seen, wanted in ((np.tril(np.ones((L, L), bool)), (True, (-1, -1))),
                         (np.abs(np.subtract.outer(np.arange(L), np.arange(L))) < 3, (False, (2, 2)))):
        graph = Graph(input_ids=IDS)
        x = graph.add("Gather", seeded(V, E), "input_ids")
        text = TextEncoder.from_onnx(graph.model(layer(graph, x, mask=np.where(seen, 0, -1e9).astype(np.float32))))
        assert (text.is_causal, text.encoder.layers[0].window_size) == wanted


def test_texts_that_are_none_are_refused():
    graph = Graph(x=seeded(B, L, E))
    with pytest.raises(ValueError, match="must begin with a Gather .*TransformerEncoder.from_onnx reads the layers alone"):
        TextEncoder.from_onnx(graph.model(layer(graph, "x")))


def fused_text():
    """`text_graph` in operators of onnxruntime."""
    def node(kind, *inputs, outputs=1, **options):
        return graph.add(kind, *inputs, outputs=outputs, domain="com.microsoft", **options)

    def skip(x, other, bias, seed):
        return node("SkipLayerNormalization", x, other, 1 + 0.3 * seeded(E, seed=seed), seeded(E, seed=seed), bias, epsilon=EPS)

    graph = Graph(input_ids=IDS, attention_mask=MASK.astype(np.int32), token_type_ids=np.zeros_like(IDS))
    x, lengths = node("EmbedLayerNormalization", "input_ids", "token_type_ids", 0.5 * seeded(V, E), 0.5 * seeded(P, E),
                      0.5 * seeded(2, E), 1 + 0.3 * seeded(E), seeded(E), "attention_mask", outputs=2, epsilon=EPS)
    for seed in (0, 20):
        weights = [(seeded(E, E, seed=seed + i) * 0.5, seeded(E, seed=seed + i)) for i in range(4)]
        packed, biases = (np.concatenate(parts, -1) for parts in zip(*weights[:3], strict=True))
        context = node("Attention", x, packed, biases, lengths, num_heads=H)
        x = skip(graph.add("MatMul", context, weights[3][0]), x, weights[3][1], seed + 4)
        inner = graph.add("MatMul", x, seeded(E, F, seed=seed + 6) * 0.5)
        inner = node("BiasGelu", inner, seeded(F, seed=seed + 6))
        inner = graph.add("MatMul", inner, seeded(F, E, seed=seed + 7) * 0.5)
        x = skip(inner, x, seeded(E, seed=seed + 7), seed + 5)
    return open_axes(graph.model(x), "b", "l")


@pytest.mark.filterwarnings("error")
def test_fused_operators_stand_for_their_nodes():
    graph, x = text_graph("token_type_ids")
    wanted = ReferenceEvaluator(graph.model(x)).run(None, graph.inputs)[0]
    np.testing.assert_allclose(hidden(TextEncoder.from_onnx(fused_text())), wanted[MASK > 0], **CLOSE)


@pytest.mark.parametrize("kind", ["FastGelu", "BiasGelu"])
def test_fused_activations(kind):
    def fused(graph, x):
        return graph.add(kind, x, seeded(F), domain="com.microsoft")

    def plain(graph, x):
        return graph.add("Gelu", graph.add("Add", x, seeded(F)), approximate="tanh" if kind == "FastGelu" else "none")

    first, second = (TransformerEncoder.from_onnx(graph.model(layer(graph, "x", activation=form)))
                     for form in (fused, plain) for graph in [Graph(x=seeded(B, L, E))])
    np.testing.assert_array_equal(computed(first, seeded(B, L, E)), computed(second, seeded(B, L, E)))


def image_graph(first=1, pads=(0, 0, 0, 0)):
    graph = Graph(pixels=seeded(B, 3, 8, 12))
    patches = graph.add("Conv", "pixels", 0.3 * seeded(E, 3, 4, 4), seeded(E), strides=[4, 4], kernel_shape=[4, 4], pads=list(pads))
    rows = graph.add("Transpose", graph.add("Reshape", patches, np.array([B, E, -1])), perm=[0, 2, 1])
    if first:
        rows = graph.add("Concat", graph.add("Expand", seeded(1, first, E), np.array([B, first, E])), rows, axis=1)
    return graph, rows


@pytest.mark.parametrize("first", [0, 1, 2])
def test_images(first):
    """With two first tokens also a norm in front of the layers, as CLIP has."""
    graph, rows = image_graph(first)
    rows = graph.add("Add", rows, seeded(1, first + 6, E))
    rows = norm_apart(graph, rows, 1 + 0.3 * seeded(E, seed=9), seeded(E, seed=9)) if first == 2 else rows
    x = layer(graph, layer(graph, rows, norm_first=True), 20, norm_first=True)
    model = graph.model(norm_node(graph, x, seeded(E), seeded(E)))
    image = ImageEncoder.from_onnx(model)
    embedding = image.embedding
    assert (embedding.patch_size, embedding.image_size, embedding.first_tokens) == ((4, 4), (8, 12), first)
    assert (embedding.norm is not None) == (first == 2)
    places = embedding.places(8, 12)
    with image.encoder.prepared((B, len(places))) as sequences:
        found = image.forward(NumpyOps(), embedding.patches(graph.inputs["pixels"]), places, B, sequences)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, **CLOSE)


def test_images_of_padded_patches_are_refused():
    graph, rows = image_graph(0, (2, 2, 2, 2))
    with pytest.raises(ValueError, match="Conv node '' must make patches of an input .* without padding"):
        ImageEncoder.from_onnx(graph.model(layer(graph, rows, norm_first=True)))


def test_tokenizers_are_found_beside_the_model(tmp_path):
    graph, x = text_graph()
    inner = tmp_path / "onnx"
    inner.mkdir()
    onnx.save(open_axes(graph.model(x), "b", "l"), inner / "model.onnx")
    (tmp_path / "modules.json").write_text('[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "p"}, '
                                           '{"type": "a.Normalize", "path": "n"}]')
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}, "truncation": {"max_length": 7}}')
    for options in ({}, {"tokenizer": tmp_path}):
        text = TextEncoder.from_onnx(inner / "model.onnx", **options)
        assert (text.pooling, text.normalize, text.max_length) == ("cls", True, 7) and text.tokenizer is not None
    with pytest.raises(NotADirectoryError, match=r"tokenizer must be a folder with a tokenizer.json"):
        TextEncoder.from_onnx(inner / "model.onnx", tokenizer=tmp_path / "none")
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "modules.json").unlink()
    assert TextEncoder.from_onnx(inner / "model.onnx").tokenizer is None


def test_windows_wider_than_a_few_tokens_are_seen():
    """Of a mask computed of the length, which leaves all keys of a short sequence."""
    graph = Graph(x=seeded(B, L, E))
    places = graph.add("Range", np.array(0), graph.add("Squeeze", graph.add("Shape", "x", start=1, end=2)), np.array(1))
    apart = graph.add("Abs", graph.add("Sub", graph.add("Unsqueeze", places, np.array([0])), graph.add("Unsqueeze", places, np.array([1]))))
    mask = graph.add("Where", graph.add("Less", apart, np.array(7)), number(0), number(-np.inf))
    encoder = TransformerEncoder.from_onnx(open_axes(graph.model(layer(graph, "x", mask=mask)), "b", "l"))
    assert encoder.layers[0].window_size == (6, 6)


def traced_for_one_length(first, activation=gelu_node):
    """As torch.nn.MultiheadAttention is exported: axes are open, and the keys' length is a constant of the trace."""
    length, graph = 7, Graph(x=seeded(*((7, B) if first == "length" else (B, 7)), E))
    turned = "x" if first == "length" else graph.add("Transpose", "x", perm=[1, 0, 2])
    batch = graph.add("Mul", graph.add("Shape", turned, start=1, end=2), np.array([H]))
    q, k, v = (graph.add("Transpose", graph.add("Reshape", dense(graph, turned, E, E, i), graph.add(
        "Concat", np.array([length]), batch, np.array([D]), axis=0)), perm=[1, 0, 2]) for i in range(3))
    scores = graph.add("Mul", graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 2, 1])), number(D**-0.5))
    context = graph.add("Transpose", graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v), perm=[1, 0, 2])
    given = graph.add("Shape", turned, start=1, end=2)
    rows = graph.add("Reshape", context, graph.add("Concat", np.array([length]), given, np.array([E]), axis=0))
    rows = dense(graph, rows, E, E, 3)
    rows = rows if first == "length" else graph.add("Transpose", rows, perm=[1, 0, 2])
    x = norm_node(graph, graph.add("Add", "x", rows), seeded(E), seeded(E))
    x = norm_node(graph, graph.add("Add", x, feed_forward(graph, x, 5, activation)), seeded(E), seeded(E))
    return graph, open_axes(graph.model(x), "a", "b")


@pytest.mark.parametrize("first", ["length", "batch"])
def test_graphs_that_were_traced_for_one_length(first):
    graph, model = traced_for_one_length(first)
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    tokens, wanted = (each.swapaxes(0, 1) if first == "length" else each for each in (graph.inputs["x"], wanted))
    np.testing.assert_allclose(computed(TransformerEncoder.from_onnx(model), tokens), wanted, **CLOSE)
