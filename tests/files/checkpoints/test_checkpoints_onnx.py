"""from_onnx: the layer around a node, against onnx's own evaluation of the whole graph.

onnx does not evaluate the operators of com.microsoft; those are written out here.
"""

import contextlib
import sys
import warnings

import numpy as np
import pytest

from edgeattn import MultiHeadAttention

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

B, L, S, E, H, D = 2, 5, 7, 6, 4, 3


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Graph:
    """Nodes and constants put together one by one; `inputs` names the graph's inputs and their arrays."""

    def __init__(self, **inputs):
        self.inputs, self.nodes, self.constants = inputs, [], {}

    def constant(self, array):
        name = f"constant{len(self.constants)}"
        self.constants[name] = array
        return name

    def add(self, kind, *inputs, outputs=1, **attributes):
        """A node; arrays among the inputs become constants. Returns the name of its output, or the names of all."""
        inputs = [self.constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        made = [f"value{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, made, **attributes))
        return made[0] if outputs == 1 else made

    def linear(self, value, weight, bias=None):
        value = self.add("MatMul", value, weight)
        return value if bias is None else self.add("Add", value, bias)

    def split(self, value, heads, size=-1):
        value = self.add("Reshape", value, np.array([0, 0, heads, size]))
        return self.add("Transpose", value, perm=[0, 2, 1, 3])

    def join(self, value, width=-1):
        value = self.add("Transpose", value, perm=[0, 2, 1, 3])
        return self.add("Reshape", value, np.array([0, 0, width]))

    def model(self, output, opset=23):
        """The model; which opset is meant is of no interest to the operators of com.microsoft."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.inputs.items()
        ]
        outputs = [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)]
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, constants)
        domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains)

    def check(self, output, opset=23, rtol=1e-4, **options):
        """Layer of the graph's one node; called with the graph's inputs it must give what onnx gives."""
        model = self.model(output, opset)
        layer = MultiHeadAttention.from_onnx(model)
        wanted = ReferenceEvaluator(model).run(None, self.inputs)[0]
        np.testing.assert_allclose(layer(*self.inputs.values(), **options), wanted, rtol=rtol, atol=1e-5)
        return layer


def cross():
    return Graph(query=random(B, L, E), key=random(B, S, E + 1), value=random(B, S, E + 2))


def projected(graph, kv_heads=H, value_dim=D, biased=True):
    """Names of the projections of a graph's three inputs."""
    widths = (H * D, kv_heads * D, kv_heads * value_dim)
    return [
        graph.linear(name, random(array.shape[-1], width), random(width) if biased else None)
        for (name, array), width in zip(graph.inputs.items(), widths, strict=True)
    ]


# -- Attention of ONNX ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_three_axes(opset, kv_heads, biased):
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"this onnx ends at opset {onnx.defs.onnx_opset_version()}; a newer one knows opset {opset}")
    graph = cross()
    context = graph.add(
        "Attention", *projected(graph, kv_heads, 2, biased), q_num_heads=H, kv_num_heads=kv_heads
    )
    layer = graph.check(graph.linear(context, random(H * 2, 8), random(8) if biased else None), opset)
    assert (layer.num_heads, layer.num_kv_heads, layer.value_dim, layer.output_dim) == (H, kv_heads, 2, 8)
    assert (layer.out_bias is not None) == biased


@pytest.mark.parametrize("known", ["heads", "size", "both"])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_four_axes(known, kv_heads):
    graph = cross()
    heads = [graph.split(name, n if known != "size" else -1, D if known != "heads" else -1)
             for name, n in zip(projected(graph, kv_heads), (H, kv_heads, kv_heads), strict=True)]
    graph.check(graph.linear(graph.join(graph.add("Attention", *heads), H * D), random(H * D, 8), random(8)))


def test_shapes_put_together_at_run_time():
    graph = Graph(x=random(B, L, E))
    length = graph.add("Shape", "x", start=0, end=2)
    shape = graph.add("Concat", length, np.array([H]), np.array([D]), axis=0)
    joined = graph.add("Concat", length, np.array([H * D]), axis=0)
    heads = []
    for i in range(3):
        value = graph.add("Reshape", graph.linear("x", random(E, H * D) + i, random(H * D)), shape)
        heads.append(graph.add("Transpose", value, perm=[0, 2, 1, 3]))
    value = graph.add("Transpose", graph.add("Attention", *heads), perm=[0, 2, 1, 3])
    graph.check(graph.linear(graph.add("Reshape", value, joined), random(H * D, 8)))


@pytest.mark.parametrize("sizes", [[12, 6, 6], [12, 12, 12], None])
def test_one_projection_split_in_three(sizes):
    graph = Graph(x=random(B, L, E))
    width = sum(sizes or [36])
    packed = graph.linear("x", random(E, width), random(width))
    sized = [np.array(sizes)] if sizes else []
    options = {} if sizes else {"num_outputs": 3}
    parts = graph.add("Split", packed, *sized, outputs=3, axis=-1, **options)
    kv_heads = (sizes or [12, 12, 12])[1] // D
    context = graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=kv_heads)
    graph.check(graph.linear(context, random(H * D, 8)))


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_b):
    """Gemm takes two axes, so exporters put a Reshape on either side."""
    graph = Graph(x=random(B, L, E))

    def gemm(value, inputs, outputs, **attributes):
        weight = random(outputs, inputs) if trans_b else random(inputs, outputs)
        value = graph.add("Reshape", value, np.array([-1, inputs]))
        value = graph.add("Gemm", value, weight, random(outputs), transB=trans_b, **attributes)
        return graph.add("Reshape", value, np.array([B, L, outputs]))

    parts = [gemm("x", E, H * D, alpha=0.5 + i, beta=2.0) for i in range(3)]
    context = graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=H)
    layer = graph.check(gemm(context, H * D, 8))
    assert layer.out_bias is not None


@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_a_scale_goes_into_the_queries(scale):
    graph = cross()
    graph.check(graph.add("Attention", *projected(graph), q_num_heads=H, kv_num_heads=H, scale=scale))


def test_the_usual_scale_leaves_the_weights_as_they_are():
    graph = cross()
    parts = projected(graph)
    layer = graph.check(graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=H, scale=1 / np.sqrt(D)))
    np.testing.assert_array_equal(layer.q_weight, random(E, H * D).T)


@pytest.mark.parametrize("kind", ["Mul", "Div"])
def test_numbers_on_the_way(kind):
    graph = cross()
    q, k, v = projected(graph)
    q = graph.add(kind, graph.split(q, H), np.array(2, np.float32))
    k = graph.split(graph.add(kind, k, np.array([0.5], np.float32)), H)
    v = graph.split(graph.add("Mul", np.array(3, np.float32), graph.add("Identity", v)), H)
    graph.check(graph.add("Transpose", graph.join(graph.add("Attention", q, k, v)), perm=[0, 1, 2]))


def test_transposed_and_computed_constants():
    graph = cross()
    weights = [graph.add("Transpose", random(H * D, a.shape[-1]), perm=[1, 0]) for a in graph.inputs.values()]
    parts = [graph.add("MatMul", name, weight) for name, weight in zip(graph.inputs, weights, strict=True)]
    out = graph.add("Constant", value=numpy_helper.from_array(random(H * D, 8)))
    context = graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=H)
    assert graph.check(graph.add("MatMul", context, out)).output_dim == 8


def test_half_precision_weights():
    graph = Graph(x=random(B, L, E).astype(np.float16))
    parts = [graph.add("MatMul", "x", random(E, H * D).astype(np.float16) + i) for i in range(3)]
    layer = MultiHeadAttention.from_onnx(graph.model(graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=H)))
    np.testing.assert_array_equal(layer.q_weight, random(E, H * D).astype(np.float16).T)


@pytest.mark.parametrize("follower", ["none", "Relu", "two", "computed weight", "bias of another shape"])
def test_what_is_no_output_projection_stays_outside(follower):
    graph = cross()
    context = graph.add("Attention", *projected(graph), q_num_heads=H, kv_num_heads=H)
    output = context
    if follower == "Relu":
        output = graph.add("Relu", context)
    elif follower == "two":
        output = graph.add("Add", graph.linear(context, random(H * D, 8)), graph.linear(context, random(H * D, 8)))
    elif follower == "computed weight":
        output = graph.add("MatMul", context, graph.add("Softplus", random(H * D, 8)))
    elif follower == "bias of another shape":
        output = graph.add("Add", graph.linear(context, random(H * D, 8)), random(L, 8))
    told = {"Relu": "Relu node", "two": "MatMul node", "computed weight": "MatMul node"}.get(follower)
    with contextlib.nullcontext() if told is None else pytest.warns(
            UserWarning, match=f"gives goes into {told} '', which is not part of the layer; the layer has no output"):
        layer = MultiHeadAttention.from_onnx(graph.model(output))
    assert layer.out_bias is None
    assert layer.output_dim == (8 if follower == "bias of another shape" else H * D)


def test_masks_are_told():
    graph = Graph(x=random(B, L, E))
    parts = [graph.linear("x", random(E, H * D) + i) for i in range(3)]
    output = graph.add("Attention", *parts, q_num_heads=H, kv_num_heads=H, is_causal=1)
    with pytest.warns(UserWarning, match="is causal; pass is_causal=True, causal_alignment='upper_left'") as told:
        layer = MultiHeadAttention.from_onnx(graph.model(output))
    assert told[0].filename == __file__
    wanted = ReferenceEvaluator(graph.model(output)).run(None, graph.inputs)[0]
    np.testing.assert_allclose(layer(graph.inputs["x"], is_causal=True), wanted, rtol=1e-4, atol=1e-5)


def test_windows_are_told():
    graph = cross()
    output = graph.add("Attention", *projected(graph), q_num_heads=H, kv_num_heads=H, left_window_size=2)
    with pytest.warns(UserWarning, match=r"has a window; pass window_size=\(2, -1\) in each call"):
        MultiHeadAttention.from_onnx(graph.model(output))


def test_a_cache_moves_the_causal_edge():
    graph = cross()
    past = [np.zeros((B, H, 2, D), np.float32)] * 2
    options = {"q_num_heads": H, "kv_num_heads": H, "is_causal": 1}
    output, *_ = graph.add("Attention", *projected(graph), "", *past, outputs=3, **options)
    with pytest.warns(UserWarning, match="causal_alignment='lower_right'"):
        MultiHeadAttention.from_onnx(graph.model(output))


# -- com.microsoft -------------------------------------------------------------------------------------


def attention(q, k, v, heads, scale, allowed):
    """(B, L, H * D) and so on in float64."""
    context = []
    for q_head, k_head, v_head in zip(*(np.split(np.float64(x), heads, axis=-1) for x in (q, k, v)), strict=True):
        scores = np.where(allowed, q_head @ k_head.swapaxes(-1, -2) * scale, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        context.append(scores / scores.sum(-1, keepdims=True) @ v_head)
    return np.concatenate(context, axis=-1)


@pytest.mark.parametrize("value_width", [H * D, H * 2])
@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
@pytest.mark.parametrize("causal", [0, 1])
def test_microsoft_attention(value_width, scale, causal):
    x, columns = random(B, L, E), 2 * H * D + value_width
    weight, bias, out = random(E, columns), random(columns), random(value_width, 8)
    graph = Graph(x=x)
    options = {"num_heads": H, "unidirectional": causal}
    options |= {} if scale is None else {"scale": scale}
    options |= {"qkv_hidden_sizes": [H * D, H * D, value_width]} if value_width != H * D else {}
    context = graph.add("Attention", "x", weight, bias, domain="com.microsoft", **options)
    output = graph.linear(context, out, random(8))
    with pytest.warns(UserWarning, match="is causal") if causal else contextlib.nullcontext():
        layer = MultiHeadAttention.from_onnx(graph.model(output))
    q, k, v = np.split(x @ weight + bias, [H * D, 2 * H * D], axis=-1)
    allowed = np.tril(np.ones((L, L), bool)) if causal else np.ones((L, L), bool)
    wanted = attention(q, k, v, H, scale or 1 / np.sqrt(D), allowed) @ out + random(8)
    np.testing.assert_allclose(layer(x, is_causal=bool(causal)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_microsoft_multi_head_attention(before, within):
    graph = cross()
    q, k, v = (x @ random(x.shape[-1], H * D) for x in graph.inputs.values())
    names = projected(graph, biased=before)
    bias = np.arange(3 * H * D, dtype=np.float32) / 10
    inside = np.split(bias, 3) if within else np.zeros((3, 1))
    q, k, v = (x + b + (random(H * D) if before else 0) for x, b in zip((q, k, v), inside, strict=True))
    names += [bias] if within else []
    layer = MultiHeadAttention.from_onnx(
        graph.model(graph.add("MultiHeadAttention", *names, domain="com.microsoft", num_heads=H))
    )
    wanted = attention(q, k, v, H, 1 / np.sqrt(D), np.ones((L, S), bool))
    np.testing.assert_allclose(layer(*graph.inputs.values()), wanted, rtol=1e-4, atol=1e-4)


# -- which node, which file ----------------------------------------------------------------------------


def two_nodes():
    graph = Graph(x=random(B, L, E))
    value = "x"
    for i in range(2):
        parts = [graph.linear(value, random(E, E) + i) for _ in range(3)]
        value = graph.add("Attention", *parts, q_num_heads=2, kv_num_heads=2, name=f"block{i}")
    return graph.model(value)


@pytest.mark.parametrize("node", ["block1", 1, np.int64(1)])
def test_nodes_by_name_and_index(node):
    layer = MultiHeadAttention.from_onnx(two_nodes(), node)
    np.testing.assert_array_equal(layer.q_weight, (random(E, E) + 1).T)


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (None, ValueError, "node must be given; attention nodes of the model: 0: Attention node 'block0', 1: "),
        ("block2", ValueError, "node must be one of these, got 'block2'; attention nodes of the model: 0: "),
        (2, ValueError, "node must be one of these, got 2"),
        (-1, ValueError, "node must be one of these, got -1"),
        (1.0, TypeError, "node must be a name or an index, got 1.0"),
        (True, TypeError, "node must be a name or an index, got True"),
    ],
)
def test_unclear_nodes_are_refused(node, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_onnx(two_nodes(), node)


def test_files(tmp_path):
    model = two_nodes()
    onnx.save(model, tmp_path / "whole.onnx")
    onnx.save(
        model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0
    )
    for name in ("whole.onnx", "apart.onnx"):
        layer = MultiHeadAttention.from_onnx(tmp_path / name, 1)
        np.testing.assert_array_equal(layer.q_weight, (random(E, E) + 1).T)
    content = (tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.onnx is not a whole .onnx file"):
        MultiHeadAttention.from_onnx(str(tmp_path / "cut.onnx"))
    with pytest.raises(FileNotFoundError):
        MultiHeadAttention.from_onnx(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="path_or_model must be a path or an onnx.ModelProto, got int"):
        MultiHeadAttention.from_onnx(3)


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx: pip install 'edgeattn\[checkpoints\]'"):
        MultiHeadAttention.from_onnx(tmp_path / "model.onnx")


# -- what is refused -----------------------------------------------------------------------------------


def refused(message, build, **options):
    graph = cross()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        MultiHeadAttention.from_onnx(graph.model(build(graph, **options)))


def plain_node(graph, parts, **options):
    return graph.add("Attention", *parts, **{"q_num_heads": H, "kv_num_heads": H, **options})


def test_no_attention_node():
    refused("the model must hold attention: found no Softmax between two products", lambda graph: graph.linear("query", random(E, 8)))


def test_softcaps_are_told():
    graph = cross()
    model = graph.model(plain_node(graph, projected(graph), softcap=0.5))
    with pytest.warns(UserWarning, match="caps its scores; pass softcap=0.5 in each call") as told:
        layer = MultiHeadAttention.from_onnx(model)
    assert told[0].filename == __file__
    wanted = ReferenceEvaluator(model).run(None, graph.inputs)[0]
    np.testing.assert_allclose(layer(*graph.inputs.values(), softcap=0.5), wanted, rtol=1e-4, atol=1e-5)


NO_MAP = "input 0 of Attention node '' must come from a MatMul or Gemm with constant weights, .*, got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph, value: "query", NO_MAP + "'query', an input of the graph"),
        (lambda graph, value: graph.add("Relu", value, name="r"), NO_MAP + "Relu node 'r'"),
        (lambda graph, value: graph.add("Add", value, random(L, H * D), name="a"), "the same bias for each token"),
        (lambda graph, value: graph.add("MatMul", "query", graph.add("Softplus", random(E, H * D)), name="w"),
         NO_MAP + "MatMul node 'w'"),
        # heads interleaved differently from what the attention node reads
        (lambda graph, value: graph.add("Reshape", graph.split(value, H), np.array([0, 0, -1])), "15 queries in 4 heads"),
        (lambda graph, value: graph.add("Reshape", graph.split(value, H), np.array([B, L, H * D])), "elements in another order"),
        (lambda graph, value: graph.add("Reshape", value, np.array([0, 0, H, D]), name="s"), "as one layout"),
    ],
)
def test_what_is_no_projection_is_refused(change, message):
    def build(graph):
        query, key, value = projected(graph, biased=False)
        return plain_node(graph, [change(graph, query), key, value])

    refused(message, build)


def test_mixed_layouts_are_refused():
    def build(graph):
        query, key, value = projected(graph)
        return plain_node(graph, [graph.split(query, H), key, value])

    refused(r"must have query, key and value as one layout", build)


def test_unknown_heads_are_refused():
    refused("must have q_num_heads and kv_num_heads", lambda g: g.add("Attention", *projected(g)))

    def unsplit(graph):
        return graph.add("Attention", *(graph.split(x, 0, 0) for x in projected(graph)))

    refused("the shape of 'value7_0', which a Transpose node makes, must be known", unsplit)


def test_projections_that_do_not_fit_are_refused():
    refused("12 outputs for 4 query heads, 12 for 3 key heads", lambda g: plain_node(g, projected(g), kv_num_heads=3))


def test_packed_inputs_are_refused():
    def build(graph):
        return graph.add("MultiHeadAttention", projected(graph)[0], domain="com.microsoft", num_heads=H)

    refused("must have inputs query, key and value apart, got packed ones", build)


def test_microsoft_weights_that_do_not_fit_are_refused():
    def build(graph, columns=36, **options):
        return graph.add(
            "Attention", "query", random(E, columns), random(36), domain="com.microsoft", num_heads=H, **options
        )

    refused(r"weights \(E, 12 \+ 12 \+ 12\) and one bias per column, got weights \(6, 37\)", build, columns=37)
    refused(r"weights \(E, 6 \+ 6 \+ 6\)", build, qkv_hidden_sizes=[6, 6, 6])
    refused("has do_rotary=1", build, do_rotary=1)
