"""from_onnx of attention in the forms that people write by hand, against onnx's own evaluation of the graph.

What is no attention layer, though it looks like one, is refused or told: never is a layer returned in silence that gives
something else.
"""

import numpy as np
import pytest
from test_checkpoints_onnx import B, D, E, Graph, H, L, random
from test_onnx_softmax import attend, heads, output

from edgeattn import MultiHeadAttention

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
    layer = graph.check(graph.linear(joined, random(H * D, 8), random(8)))
    assert (layer.num_heads, layer.output_dim) == (H, 8)


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
        layer = MultiHeadAttention.from_onnx(graph.model(graph.linear(rows, random(H * D, 8))))
    assert layer.output_dim == H * D


def test_queries_of_other_rows_than_keys_are_told():
    """DETR's positions, added to queries and keys alone; the first token, which asks all others."""
    graph = Graph(x=random(B, L, E))
    placed = graph.add("Add", "x", random(L, E))
    q, k, v = (graph.split(graph.linear(source, random(E, H * D) + i), H, D) for i, source in enumerate((placed, placed, "x")))
    model = graph.model(output(graph, attend(graph, q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), v)))
    with pytest.warns(UserWarning, match=f"takes queries of '{placed}', keys of '{placed}' and values of 'x'; pass each"):
        layer = MultiHeadAttention.from_onnx(model)
    rows = graph.inputs["x"] + random(L, E)
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(layer(rows, rows, graph.inputs["x"]), wanted, rtol=1e-4, atol=1e-5)


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
    layer = graph.check(output(graph, graph.add("Einsum", weights, v, equation="bhij,bjd->bhid")))
    assert (layer.num_heads, layer.num_kv_heads) == (H, 1)


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
    layer = graph.check(output(graph, graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)))
    assert layer.position_bias is not None
