"""What the .tflite writer puts into a file, read back by the schema's own generated code, and what the file
computes.
"""

import sys

import numpy as np
import pytest
import tflite_graphs as graphs
from runtimes import each_runtime

import edgeattn
from edgeattn.files.paths import write_atomic
from edgeattn.files.tflite import read_tflite
from edgeattn.quantized import SelectMask
from quant.export.tflite import write_tflite
from quant.runtimes import RUNTIMES

schema = pytest.importorskip(
    "ai_edge_litert.schema_py_generated", reason="needs ai-edge-litert, which has the schema"
)
CODES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def model_of(data):
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))


def operators_of(model):
    return [
        (CODES[model.operatorCodes[op.opcodeIndex].builtinCode], model.operatorCodes[op.opcodeIndex].version)
        for op in model.subgraphs[0].operators
    ]


SPLIT = [("RESHAPE", 1), ("TRANSPOSE", 2)]
PROJECT = [("FULLY_CONNECTED", 5)]


def test_file_starts_with_the_identifier_and_is_repeatable(rng):
    layer = graphs.random_layer(rng)
    data = write_tflite(layer, sequence_length=5)
    assert data[4:8] == b"TFL3"
    assert data == write_tflite(layer, sequence_length=5)


def test_operators_of_a_masked_layer_and_their_versions(rng):
    layer = graphs.random_layer(rng, score_ops=graphs.converted_score_ops(rng, 5, 5)).with_mask(
        np.tri(5, dtype=bool)
    )
    model = model_of(write_tflite(layer, batch=2, sequence_length=5))
    assert operators_of(model) == (
        3 * (PROJECT + SPLIT)
        + [
            ("BATCH_MATMUL", 2),
            ("MUL", 2),
            ("ADD", 2),
            ("SELECT_V2", 1),
            ("SOFTMAX", 2),
            ("BATCH_MATMUL", 2),
            ("TRANSPOSE", 2),
            ("RESHAPE", 1),
        ]
        + PROJECT
    )
    for code in model.operatorCodes:
        assert code.deprecatedBuiltinCode == min(code.builtinCode, 127)


def test_one_head_needs_no_transposes(rng):
    model = model_of(write_tflite(graphs.random_layer(rng, H=1), sequence_length=5))
    assert (
        operators_of(model)
        == 3 * PROJECT + [("BATCH_MATMUL", 2), ("SOFTMAX", 2), ("BATCH_MATMUL", 2)] + PROJECT
    )


def test_without_an_output_projection_the_graph_ends_at_the_context(rng):
    model = model_of(write_tflite(graphs.random_layer(rng, H=2, Dv=3, projected=False), sequence_length=5))
    (output,) = model.subgraphs[0].outputs
    assert model.subgraphs[0].tensors[output].shape.tolist() == [1, 5, 6]
    assert operators_of(model)[-1] == ("RESHAPE", 1)


@pytest.mark.parametrize("sources, names, shapes", [
    ((0, 0, 0), ["input"], [[2, 5, 8]]),
    ((0, 1, 1), ["query_input", "key_input"], [[2, 5, 8], [2, 7, 9]]),
    ((0, 1, 2), ["query_input", "key_input", "value_input"], [[2, 5, 8], [2, 7, 9], [2, 7, 10]]),
])
def test_inputs_are_named_shaped_and_in_the_signature(rng, sources, names, shapes):
    layer = graphs.random_layer(rng, sources=sources)
    model = model_of(write_tflite(layer, batch=2, sequence_length=5, key_length=7 if max(sources) else None))
    graph = model.subgraphs[0]
    assert [graph.tensors[i].name.decode() for i in graph.inputs] == names
    assert [graph.tensors[i].shape.tolist() for i in graph.inputs] == shapes
    (signature,) = model.signatureDefs
    assert signature.signatureKey == b"serving_default"
    assert [(m.name.decode(), m.tensorIndex) for m in signature.inputs] == list(
        zip(names, graph.inputs, strict=True)
    )
    assert [(m.name, m.tensorIndex) for m in signature.outputs] == [(b"output", graph.outputs[0])]


def test_tensors_hold_the_layers_parameters(rng):
    layer = graphs.random_layer(rng)
    model = model_of(write_tflite(layer, sequence_length=5))
    tensors = {tensor.name.decode(): tensor for tensor in model.subgraphs[0].tensors}
    weight, bias = tensors["key/weight"], tensors["key/bias"]
    linear = layer.linears["key"]
    assert bytes(model.buffers[weight.buffer].data) == linear.weight.tobytes()
    assert weight.quantization.scale.tolist() == linear.scale.tolist()
    assert weight.quantization.zeroPoint.tolist() == [0] * 8
    assert (weight.quantization.quantizedDimension, weight.type) == (0, schema.TensorType.INT8)
    assert bytes(model.buffers[bias.buffer].data) == linear.bias.tobytes()
    assert bias.quantization.scale.tolist() == (layer.tensors["query_input"].scale * linear.scale).tolist()
    for name in ("query", "key", "value", "scores", "probabilities", "context", "output"):
        stored = tensors[name].quantization
        expected = layer.tensors[name]
        assert (stored.scale.tolist(), stored.zeroPoint.tolist()) == (
            [expected.scale],
            [expected.zero_point],
        ), name


def test_buffers_are_aligned_to_16_bytes_and_the_first_is_empty(rng):
    data = write_tflite(graphs.random_layer(rng, D=3, E=7), sequence_length=5)
    model = schema.Model.GetRootAs(data, 0)
    assert model.Buffers(0).DataLength() == 0
    base = np.frombuffer(data, np.uint8).ctypes.data
    assert model.BuffersLength() > 8
    for i in range(1, model.BuffersLength()):
        assert (model.Buffers(i).DataAsNumpy().ctypes.data - base) % 16 == 0


def float_layer(rng, H, num_kv_heads, D, Dv, E, kdim, vdim, projected, bias):
    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))

    def vector(n):
        return array(n) if bias else None

    return edgeattn.MultiHeadAttention(
        H,
        array(H * D, E),
        array(num_kv_heads * D, kdim),
        array(num_kv_heads * Dv, vdim),
        array(E, H * Dv) if projected else None,
        q_bias=vector(H * D),
        k_bias=vector(num_kv_heads * D),
        v_bias=vector(num_kv_heads * Dv),
        out_bias=vector(E) if projected else None,
        num_kv_heads=num_kv_heads,
    )


def float_reference(layer, inputs, mask=None):
    """Attention in float64, from its definition."""
    def project(x, weight, bias):
        return x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if bias is None else bias)

    def heads(x, count):
        return (
            x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3).repeat(layer.num_heads // count, axis=1)
        )

    query, key, value = inputs[0], inputs[min(1, len(inputs) - 1)], inputs[-1]
    q = heads(project(query, layer.q_weight, layer.q_bias), layer.num_heads)
    k = heads(project(key, layer.k_weight, layer.k_bias), layer.num_kv_heads)
    v = heads(project(value, layer.v_weight, layer.v_bias), layer.num_kv_heads)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(layer.head_dim)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = weights / weights.sum(-1, keepdims=True) @ v
    merged = context.transpose(0, 2, 1, 3).reshape(*context.shape[::2], -1)
    return merged if layer.out_weight is None else project(merged, layer.out_weight, layer.out_bias)


FLOAT_CASES = {
    # H, Hkv, D, Dv, E, kdim, vdim, projected, bias, key_length, mask
    "self-attention": (4, 4, 4, 4, 16, 16, 16, True, True, None, None),
    "one head, bool mask": (1, 1, 8, 8, 16, 16, 16, True, True, None, "bool"),
    "grouped heads, float mask": (4, 2, 4, 4, 16, 16, 16, True, True, None, "float"),
    "value size, no projection, no bias": (2, 2, 4, 6, 16, 16, 16, False, False, None, "bool"),
    "cross-attention, two inputs": (2, 1, 4, 6, 16, 16, 16, True, True, 9, "float"),
    "three inputs": (2, 2, 4, 4, 16, 10, 12, True, True, 9, "bool"),
}


@each_runtime
@pytest.mark.parametrize("case", FLOAT_CASES)
def test_float_graph_computes_attention(rng, case, name):
    *sizes, key_length, kind = FLOAT_CASES[case]
    layer = float_layer(rng, *sizes)
    B, L, S = 2, 7, key_length or 7
    mask = None
    if kind is not None:
        keep = np.tri(L, S, dtype=bool)
        mask = (
            keep
            if kind == "bool"
            else np.where(keep, rng.standard_normal((L, S)), -np.inf).astype(np.float32)
        )
    data = write_tflite(layer, batch=B, sequence_length=L, key_length=key_length, mask=mask)
    session = RUNTIMES[name].session(data)
    inputs = [rng.standard_normal(shape).astype(np.float32) for _, shape, _ in session.inputs]
    assert len(inputs) == {None: 1, 9: 2}[key_length] + (layer.kdim != layer.vdim)
    (output,) = session.run(*inputs)
    expected = float_reference(layer, inputs, mask)
    np.testing.assert_allclose(output, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_float_operators_have_their_first_versions(rng):
    model = model_of(write_tflite(float_layer(rng, 2, 2, 4, 4, 8, 8, 8, True, True), sequence_length=3,
                                  mask=np.ones((3, 3), bool)))
    assert set(operators_of(model)) == {
        ("FULLY_CONNECTED", 5),
        ("RESHAPE", 1),
        ("TRANSPOSE", 1),
        ("BATCH_MATMUL", 1),
        ("SELECT_V2", 1),
        ("SOFTMAX", 1),
    }


def test_mask_argument_equals_a_layer_that_carries_it(rng):
    layer, mask = graphs.random_layer(rng), np.tri(5, dtype=bool)
    assert write_tflite(layer, sequence_length=5, mask=mask) == write_tflite(
        layer.with_mask(mask), sequence_length=5
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sequence_length": 0}, ValueError, "sequence_length must be at least 1"),
        ({"sequence_length": 5, "batch": -1}, ValueError, "batch must be at least 1 and fit int32; got -1"),
        ({"sequence_length": 2**31}, ValueError, "sequence_length must be at least 1 and fit int32"),
        ({"sequence_length": 5.0}, TypeError, "sequence_length must be an integer; got float"),
        (
            {"sequence_length": 5, "key_length": 6},
            ValueError,
            "key_length must be left out or equal sequence_length",
        ),
        (
            {"sequence_length": 6, "mask": np.tri(5, dtype=bool)},
            ValueError,
            (
                r"mask of the layer's SelectMask must broadcast to \(B, H, L, S\) = \(1, 2, 6, 6\); got shape"
                r" \(5, 5\)"
            ),
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(rng, arguments, error, message):
    with pytest.raises(error, match=message):
        write_tflite(graphs.random_layer(rng), **arguments)


def test_a_mask_may_not_enlarge_the_scores(rng):
    layer = graphs.random_layer(rng, score_ops=(SelectMask(np.ones((3, 1, 5, 5), bool)),))
    with pytest.raises(ValueError, match="must broadcast"):
        write_tflite(layer, batch=1, sequence_length=5)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (
            np.ones((4, 4), bool),
            ValueError,
            r"mask must broadcast to \(B, H, L, S\) = \(1, 2, 3, 3\); got shape \(4, 4\)",
        ),
        (np.ones((3, 3)), TypeError, r"mask must be bool \(True = attend\) or float32 .*; got float64"),
        (np.full((3, 3), np.nan, np.float32), ValueError, "mask must hold no NaN"),
    ],
)
def test_masks_that_a_float_graph_cannot_hold_are_refused(rng, mask, error, message):
    layer = float_layer(rng, 2, 2, 4, 4, 8, 8, 8, True, True)
    with pytest.raises(error, match=message):
        write_tflite(layer, sequence_length=3, mask=mask)


def test_only_writing_needs_flatbuffers(rng, monkeypatch):
    layer = graphs.random_layer(rng)
    data = write_tflite(layer, sequence_length=3)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert read_tflite(data).num_heads == 2
    with pytest.raises(ImportError, match=r"flatbuffers: pip install .\.\[quant\]."):
        write_tflite(layer, sequence_length=3)


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="layer must be .*; got int, which has no TFLite form"):
        write_tflite(3, sequence_length=3)


def test_write_atomic_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "layer.tflite"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"half")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["layer.tflite"]


def test_operators_that_errors_name_have_the_schemas_names():
    """Of a model that broadcasts keys `found BROADCAST_TO` is told, not its number."""
    from edgeattn.files.tflite_file import _OPERATOR_NAMES

    assert {130: "BROADCAST_TO", 55: "MAXIMUM"}.items() <= _OPERATOR_NAMES.items()
    assert {code: CODES[code] for code in _OPERATOR_NAMES} == _OPERATOR_NAMES
