"""from_onnx of attention that is taken apart: found from its Softmax, against onnx's own evaluation of the graph."""

import numpy as np
import pytest
from test_checkpoints_onnx import B, D, E, Graph, H, L, random

from edgeattn import MultiHeadAttention

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
from onnx import helper  # noqa: E402


def scores(graph, q, k_turned, *, scale=D**-0.5):
    return graph.add("Mul", graph.add("MatMul", q, k_turned), np.array(scale, np.float32))


def attend(graph, q, k_turned, v, **options):
    return graph.add("MatMul", graph.add("Softmax", scores(graph, q, k_turned, **options), axis=-1), v)


def output(graph, context):
    return graph.linear(graph.join(context, H * D), random(H * D, 8), random(8))


def heads(graph, perm=(0, 2, 1, 3), count=H):
    value = graph.linear("x", np.float32(random(E, count * D) + len(graph.nodes) / 40), random(count * D))
    return graph.add("Transpose", graph.add("Reshape", value, np.array([B, L, count, D])), perm=list(perm))


@pytest.mark.parametrize("sides", ["after", "both", "on one", "none"])
def test_scale_on_any_side(sides):
    graph = Graph(x=random(B, L, E))
    q, k, v = heads(graph), heads(graph, (0, 2, 3, 1)), heads(graph)
    if sides == "both":
        root = np.array(D**-0.25, np.float32)
        q, k = graph.add("Mul", q, root), graph.add("Mul", root, k)
    if sides == "on one":
        q = graph.add("Div", q, np.array(D**0.5, np.float32))
    graph.check(output(graph, attend(graph, q, k, v, scale=D**-0.5 if sides == "after" else 1.0)))


@pytest.mark.parametrize("cut", ["Split", "Slice", "Gather"])
def test_packed_projections(cut):
    graph = Graph(x=random(B, L, E))
    packed = graph.add("Reshape", graph.linear("x", random(E, 3 * H * D), random(3 * H * D)), np.array([B, L, 3, H, D]))
    packed = graph.add("Transpose", packed, perm=[2, 0, 3, 1, 4])
    if cut == "Split":
        parts = [graph.add("Squeeze", each, np.array([0])) for each in graph.add("Split", packed, outputs=3, axis=0, num_outputs=3)]
    elif cut == "Slice":
        parts = [graph.add("Squeeze", graph.add("Slice", packed, np.array([i]), np.array([i + 1]), np.array([0])), np.array([0]))
                 for i in range(3)]
    else:
        parts = [graph.add("Gather", packed, np.array(i), axis=0) for i in range(3)]
    q, k, v = parts
    layer = graph.check(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    assert (layer.num_heads, layer.num_kv_heads) == (H, H)


def test_heads_that_share_keys():
    graph = Graph(x=random(B, L, E))
    q = heads(graph)
    k, v = (graph.add("Reshape", graph.add("Expand", graph.add("Unsqueeze", heads(graph, count=2), np.array([2])),
                                           np.array([B, 2, H // 2, L, D])), np.array([B, H, L, D])) for _ in range(2))
    layer = graph.check(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    assert (layer.num_heads, layer.num_kv_heads) == (H, 2)


def test_batch_and_heads_on_one_axis_and_length_first():
    """As torch.nn.MultiheadAttention computes it."""
    graph = Graph(x=random(B, L, E))
    turned = graph.add("Transpose", "x", perm=[1, 0, 2])
    q, k, v = (graph.add("Transpose", graph.add("Reshape", graph.linear(turned, random(E, H * D) + i, random(H * D)),
                                                np.array([L, B * H, D])), perm=[1, 0, 2]) for i in range(3))
    context = attend(graph, q, graph.add("Transpose", k, perm=[0, 2, 1]), v)
    rows = graph.add("Reshape", graph.add("Transpose", context, perm=[1, 0, 2]), np.array([L * B, H * D]))
    result = graph.add("Reshape", graph.add("Gemm", rows, random(8, H * D), random(8), transB=1), np.array([L, B, 8]))
    graph.check(graph.add("Transpose", result, perm=[1, 0, 2]))


def test_einsum():
    graph = Graph(x=random(B, L, E))
    q, k, v = (graph.add("Reshape", graph.linear("x", random(E, H * D) + i), np.array([B, L, H, D])) for i in range(3))
    product = graph.add("Mul", graph.add("Einsum", q, k, equation="blhd,bshd->bhls"), np.array(D**-0.5, np.float32))
    context = graph.add("Einsum", graph.add("Softmax", product), v, equation="bhls,bshd->blhd")
    graph.check(graph.linear(graph.add("Reshape", context, np.array([B, L, H * D])), random(H * D, 8)))


def test_constant_causal_masks_are_told_and_biases_are_kept():
    for bias in (np.triu(np.full((L, L), -np.inf, np.float32), 1), random(H, L, L)):
        graph = Graph(x=random(B, L, E))
        q, k, v = heads(graph), heads(graph, (0, 2, 3, 1)), heads(graph)
        context = graph.add("MatMul", graph.add("Softmax", graph.add("Add", scores(graph, q, k), bias)), v)
        model = graph.model(output(graph, context))
        if np.isinf(bias).any():
            with pytest.warns(UserWarning, match="is causal; pass is_causal=True"):
                MultiHeadAttention.from_onnx(model)
        else:
            layer = MultiHeadAttention.from_onnx(model)
            np.testing.assert_array_equal(layer.position_bias.rows(0, L, L), bias)


def test_a_mask_that_is_an_input_is_told():
    graph = Graph(x=random(B, L, E), mask=random(B, 1, 1, L))
    q, k, v = heads(graph), heads(graph, (0, 2, 3, 1)), heads(graph)
    context = graph.add("MatMul", graph.add("Softmax", graph.add("Add", scores(graph, q, k), "mask")), v)
    with pytest.warns(UserWarning, match="adds 'mask' to its scores; pass it"):
        MultiHeadAttention.from_onnx(graph.model(output(graph, context)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embeddings_are_found(interleaved):
    graph, size, base = Graph(x=random(B, L, E)), 4, 500.0
    angles = np.arange(L)[:, None] * base ** (-np.arange(0, size, 2) / size)
    spread = np.repeat(angles, 2, 1) if interleaved else np.concatenate([angles, angles], 1)

    def turned(x):
        if interleaved:
            pairs = graph.add("Reshape", x, np.array([B, H, L, size // 2, 2]))
            first, second = (graph.add("Slice", pairs, np.array([i]), np.array([i + 1]), np.array([4])) for i in range(2))
            other = graph.add("Reshape", graph.add("Concat", graph.add("Neg", second), first, axis=4), np.array([B, H, L, size]))
        else:
            first, second = graph.add("Split", x, np.array([size // 2] * 2), outputs=2, axis=3)
            other = graph.add("Concat", graph.add("Neg", second), first, axis=-1)
        return graph.add("Add", graph.add("Mul", x, np.cos(spread).astype("f")), graph.add("Mul", other, np.sin(spread).astype("f")))

    def split(i):
        value = graph.linear("x", random(E, H * size) + i, random(H * size))
        return graph.add("Transpose", graph.add("Reshape", value, np.array([B, L, H, size])), perm=[0, 2, 1, 3])

    q, k, v = turned(split(0)), graph.add("Transpose", turned(split(1)), perm=[0, 1, 3, 2]), split(2)
    layer = MultiHeadAttention.from_onnx(graph.model(attend(graph, q, k, v, scale=0.5)))
    assert (layer.rotary.rotary_embedding_dim, layer.rotary.interleaved) == (size, interleaved)
    np.testing.assert_allclose(layer.rotary.base, base, rtol=1e-3)
    np.testing.assert_allclose(layer.k_weight, (random(E, H * size) + 1).T, rtol=1e-6)
    np.testing.assert_allclose(layer.k_bias, random(H * size), rtol=1e-6)


def test_int8_weights_times_scale():
    """QuantizeLinear and DequantizeLinear are passed, and DynamicQuantizeLinear with MatMulInteger."""
    codes = np.random.default_rng(0).integers(-100, 100, (E, H * D)).astype(np.int8)
    scale = np.linspace(0.01, 0.02, H * D, dtype=np.float32)
    graph = Graph(x=random(B, L, E))
    coded, factor, zero = graph.add("DynamicQuantizeLinear", "x", outputs=3)

    def dynamic():
        sums = graph.add("Cast", graph.add("MatMulInteger", coded, codes, zero), to=onnx.TensorProto.FLOAT)
        return graph.add("Mul", sums, graph.add("Mul", factor, scale))

    def static():
        return graph.add("MatMul", "x", graph.add("DequantizeLinear", codes, scale, np.zeros(H * D, np.int8), axis=1))

    q, k, v = (graph.add("Transpose", graph.add("Reshape", value, np.array([B, L, H, D])), perm=list(perm))
               for value, perm in ((dynamic(), (0, 2, 1, 3)), (static(), (0, 2, 3, 1)), (dynamic(), (0, 2, 1, 3))))
    layer = MultiHeadAttention.from_onnx(graph.model(output(graph, attend(graph, q, k, v))))
    for weight in (layer.q_weight, layer.k_weight, layer.v_weight):
        np.testing.assert_allclose(weight, (codes * scale).T, rtol=1e-6)


def test_open_axes():
    """As exporters write shapes: of x's, taken apart and put together."""
    graph = Graph(x=random(B, L, E))
    batch, length = (graph.add("Shape", "x", start=i, end=i + 1) for i in range(2))
    shape = graph.add("Concat", batch, length, np.array([H]), np.array([D]), axis=0)
    q, k, v = (graph.add("Transpose", graph.add("Reshape", graph.linear("x", random(E, H * D) + i), shape), perm=perm)
               for i, perm in enumerate(([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])))
    model = graph.model(output(graph, attend(graph, q, k, v)))
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", "l", E]))
    np.testing.assert_array_equal(MultiHeadAttention.from_onnx(model).q_weight, random(E, H * D).T)


def test_weights_of_something_else_than_keys_are_refused():
    """A sink beside the keys, and a mask of probabilities: of a layer neither is part."""
    for form, message in (("sink", r"over the keys alone, 5, got 6 numbers in a row: an attention sink"),
                          ("masked", "must be multiplied by the values as they are"),
                          ("scaled", "must be multiplied by the values as they are")):
        graph = Graph(x=random(B, L, E), mask=random(B, 1, 1, L) > 0)
        q, k, v = heads(graph), heads(graph, (0, 2, 3, 1)), heads(graph)
        rows = scores(graph, q, k)
        if form == "sink":
            rows = graph.add("Concat", rows, random(B, H, L, 1), axis=-1)
        weights = graph.add("Softmax", rows, axis=-1)
        if form == "sink":
            weights = graph.add("Slice", weights, np.array([0]), np.array([L]), np.array([-1]))
        elif form == "scaled":
            context = graph.add("FusedMatMul", weights, v, domain="com.microsoft", alpha=0.5)
        else:
            weights = graph.add("Where", "mask", np.array(0, np.float32), weights)
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention.from_onnx(graph.model(output(graph, context if form == "scaled" else graph.add("MatMul", weights, v))))


def test_a_softmax_of_something_else_is_no_attention():
    graph = Graph(x=random(B, L, E))
    result = graph.linear(graph.add("Softmax", graph.linear("x", random(E, E))), random(E, E))
    with pytest.raises(ValueError, match="must hold attention: found no Softmax between two products"):
        MultiHeadAttention.from_onnx(graph.model(result))
