"""Graphs for tests: single operators, and attention in the forms that other converters give it."""

from dataclasses import dataclass

import numpy as np

from edgeattn.quantized import (
    INPUTS,
    AddMask,
    MulConstant,
    QuantizedLinear,
    Requantize,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Graph
from quant.export.tflite import serialize

PROBABILITIES = TensorQuantization(np.float32(1 / 256), -128)


def unary(name, shape, quantization, output, options, version):
    """One operator of one int8 input."""
    graph = Graph()
    graph.inputs = [graph.activation("x", shape, np.int8, quantization)]
    graph.outputs = [graph.activation("y", shape, np.int8, output)]
    graph.operator(name, graph.inputs, graph.outputs[0], options, version)
    return serialize(graph)


def _binary(name, lhs_shape, lhs, rhs_shape, rhs, shape, output, options):
    graph = Graph()
    graph.inputs = [
        graph.activation("lhs", lhs_shape, np.int8, lhs),
        graph.activation("rhs", rhs_shape, np.int8, rhs),
    ]
    graph.outputs = [graph.activation("y", shape, np.int8, output)]
    graph.operator(name, graph.inputs, graph.outputs[0], options, 2)
    return serialize(graph)


def fully_connected(shape, quantization, linear, output) -> bytes:
    """int8 ``shape`` -> (..., out_features), weights per output channel, bias or none."""
    graph = Graph()
    x = graph.activation("x", shape, np.int8, quantization)
    operands = [x, graph.constant("weight", linear.weight, channel_scale=linear.scale)]
    if linear.bias is not None:
        operands.append(graph.constant("bias", linear.bias, channel_scale=quantization.scale * linear.scale))
    y = graph.activation("y", (*shape[:-1], linear.weight.shape[0]), np.int8, output)
    graph.operator("FULLY_CONNECTED", operands, y, {"keep_num_dims": True}, 5)
    graph.inputs, graph.outputs = [x], [y]
    return serialize(graph)


def batch_matmul(lhs_shape, lhs, rhs_shape, rhs, output, *, adj_y) -> bytes:
    """Two int8 inputs; ``rhs_shape`` is (..., columns, inner) with ``adj_y``, else (..., inner, columns)."""
    shape = (*lhs_shape[:-1], rhs_shape[-2 if adj_y else -1])
    return _binary("BATCH_MATMUL", lhs_shape, lhs, rhs_shape, rhs, shape, output, {"adj_y": adj_y})


def mul(lhs_shape, lhs, rhs_shape, rhs, output) -> bytes:
    """Two int8 inputs, broadcast."""
    return _binary(
        "MUL", lhs_shape, lhs, rhs_shape, rhs, np.broadcast_shapes(lhs_shape, rhs_shape), output, None
    )


def add(lhs_shape, lhs, rhs_shape, rhs, output) -> bytes:
    """Two int8 inputs, broadcast."""
    return _binary(
        "ADD", lhs_shape, lhs, rhs_shape, rhs, np.broadcast_shapes(lhs_shape, rhs_shape), output, None
    )


def softmax(shape, quantization) -> bytes:
    """Over the last axis of one int8 input."""
    return unary("SOFTMAX", shape, quantization, PROBABILITIES, {"beta": 1.0}, 2)


def select(keep, shape, quantization, fill, *, scores_second=True) -> bytes:
    """One int8 input where the constant ``keep`` says, the code ``fill`` elsewhere.

    With ``scores_second=False`` the constant is the inverse, and fill and input change places.
    """
    graph = Graph()
    x = graph.activation("x", shape, np.int8, quantization)
    condition = graph.constant("condition", np.asarray(keep) if scores_second else ~np.asarray(keep))
    filling = graph.constant("fill", np.array(fill, np.int8), quantization)
    y = graph.activation("y", shape, np.int8, quantization)
    graph.operator("SELECT_V2", [condition, x, filling] if scores_second else [condition, filling, x], y)
    graph.inputs, graph.outputs = [x], [y]
    return serialize(graph)


def random_layer(rng, H=2, D=4, Dv=4, E=8, sources=(0, 0, 0), projected=True, zero_points=True, bias=True,
                 score_ops=(), Eo=None, query_ops=(), key_ops=()) -> StaticMultiHeadAttention:
    """A static layer of random parameters, keys and values with zero points; nothing in it is calibrated."""
    def tensor(scale):
        return TensorQuantization(
            np.float32(scale * rng.uniform(0.8, 1.25)), int(rng.integers(-9, 10)) if zero_points else 0
        )

    def linear(o, i):
        return QuantizedLinear(
            rng.integers(-127, 128, (o, i)).astype(np.int8),
            rng.uniform(0.002, 0.01, o).astype(np.float32),
            rng.integers(-500, 500, o).astype(np.int32) if bias else None,
        )

    widths = [E + source for source in sources]
    linears = {
        "query": linear(H * D, widths[0]),
        "key": linear(H * D, widths[1]),
        "value": linear(H * Dv, widths[2]),
    }
    tensors = {f"{INPUTS[source]}_input": tensor(0.03) for source in sources}
    tensors |= {"query": tensor(0.02), "key": tensor(0.1), "value": tensor(0.1), "scores": tensor(0.05 * D),
                "context": tensor(0.05)}
    if projected:
        linears["output"], tensors["output"] = linear(Eo or E, H * Dv), tensor(0.1)
    return StaticMultiHeadAttention(H, linears, tensors, sources=sources, score_ops=score_ops, query_ops=query_ops,
                                    key_ops=key_ops)


def random_scaling(rng, before, *, symmetric=False) -> MulConstant:
    """A MUL of what ``before`` quantizes by a constant near 1 or -1; some of its results saturate."""
    factor, zero_point = rng.uniform(0.6, 1.6), int(rng.integers(-128, 128))
    code = int(rng.integers(zero_point + 1, 128) if zero_point < 0 else rng.integers(-128, zero_point))
    constant = TensorQuantization(np.float32(factor / abs(code - zero_point)), zero_point)
    return MulConstant(code, constant, TensorQuantization(before.scale * np.float32(factor * rng.uniform(0.4, 1.5)),
                                                          0 if symmetric else int(rng.integers(-30, 31))))


def converted_score_ops(rng, L, S, D=4):
    """MUL and ADD as TensorFlow writes scale and mask."""
    scaled = TensorQuantization(np.float32(0.05 * D**0.5), 3)
    return (
        MulConstant(127, TensorQuantization(np.float32(1 / 127 / D**0.5), 0), scaled),
        AddMask(
            rng.choice(np.array([-128, 0], np.int8), (1, 1, L, S)),
            TensorQuantization(np.float32(0.05), 0),
            TensorQuantization(np.float32(0.08), -5),
        ),
    )


@dataclass(frozen=True)
class Form:
    """How a converter may write one and the same layer."""

    keep_num_dims: bool = True  # False: reshaped to (B*L, E) before and split straight after
    key_transposed: bool = True  # K as (B, H, D, S), no adj_y
    value_transposed: bool = False  # V as (B, H, Dv, S), adj_y
    merged_heads: bool = False  # products on (B*H, L, D)
    scores_first: bool = (
        True  # the scores' place in MUL and ADD; False also gives SELECT_V2 the inverse condition
    )
    float_edges: bool = False  # QUANTIZE and DEQUANTIZE around it


def converted(layer, B, L, S, form=None, value_ops=()) -> Graph:
    """``layer`` as a graph in ``form``: computes the same bytes as our own, but for MUL of values."""
    form = form or Form()
    graph, t, H = Graph(), layer.tensors, layer.num_heads

    def apply(name, operands, shape, quantization, options=None, version=1, dtype=np.int8):
        y = graph.activation(f"{name.lower()}_{len(graph.tensors)}", shape, dtype, quantization)
        graph.operator(name, operands, y, options, version)
        return y

    def reshape(x, shape, quantization):
        target = graph.constant(f"shape_{len(graph.tensors)}", np.array(shape, np.int32))
        return apply("RESHAPE", [x, target], shape, quantization, {"new_shape": shape})

    def transpose(x, axes, quantization):
        shape = [graph.tensors[x].shape[axis] for axis in axes]
        permutation = graph.constant(f"axes_{len(graph.tensors)}", np.array(axes, np.int32))
        return apply("TRANSPOSE", [x, permutation], shape, quantization, version=2)

    def project(name, x):
        linear, width = layer.linears[name], layer.linears[name].weight.shape[1]
        rows, source = graph.tensors[x].shape[:-1], t["context"] if name == "output" else layer.input_of(name)
        if not form.keep_num_dims:
            rows = (int(np.prod(rows)),)
            x = reshape(x, (*rows, width), source)
        operands = [x, graph.constant(f"{name}_weight", linear.weight, channel_scale=linear.scale)]
        if linear.bias is None:
            operands.append(-1)
        else:
            operands.append(
                graph.constant(f"{name}_bias", linear.bias, channel_scale=source.scale * linear.scale)
            )
        return apply("FULLY_CONNECTED", operands, (*rows, linear.weight.shape[0]), t[name],
                     {"keep_num_dims": form.keep_num_dims}, 5)

    def heads(name, x, length, size, axes):
        x = reshape(project(name, x), (B, length, H, size), t[name])
        x, quantization = transpose(x, axes, t[name]), t[name]
        for op in {"query": layer.query_ops, "key": layer.key_ops, "value": value_ops}[name]:
            operands, quantization = [x, graph.constant("factor", np.array(op.code, np.int8), op.constant)], op.output
            x = apply("MUL", operands if form.scores_first else operands[::-1], graph.tensors[x].shape, quantization,
                      version=2)
        return reshape(x, (B * H, *graph.tensors[x].shape[2:]), quantization) if form.merged_heads else x

    inputs = []
    for source in sorted(set(layer.sources)):
        name = f"{INPUTS[source]}_input"
        shape = (B, S if source else L, layer.linears[INPUTS[source]].weight.shape[1])
        if form.float_edges:
            graph.inputs.append(graph.activation(name, shape, np.float32))
            inputs.append(apply("QUANTIZE", [graph.inputs[-1]], shape, t[name]))
        else:
            graph.inputs.append(graph.activation(name, shape, np.int8, t[name]))
            inputs.append(graph.inputs[-1])
    query, key, value = (inputs[source] for source in layer.sources)

    leading = (B * H,) if form.merged_heads else (B, H)
    q = heads("query", query, L, layer.head_dim, (0, 2, 1, 3))
    k = heads("key", key, S, layer.head_dim, (0, 2, 3, 1) if form.key_transposed else (0, 2, 1, 3))
    scores = apply(
        "BATCH_MATMUL", [q, k], (*leading, L, S), t["scores"], {"adj_y": not form.key_transposed}, 2
    )
    current = t["scores"]
    for op in layer.score_ops:
        if isinstance(op, MulConstant):
            constant, current = graph.constant("scale", np.array(op.code, np.int8), op.constant), op.output
            operands, name = [scores, constant], "MUL"
        elif isinstance(op, AddMask):
            constant, current = (
                graph.constant("mask", op.codes.reshape(op.codes.shape[-2:]), op.mask),
                op.output,
            )
            operands, name = [scores, constant], "ADD"
        elif isinstance(op, Requantize):
            current = op.output
            scores = apply("QUANTIZE", [scores], graph.tensors[scores].shape, current)
            continue
        elif isinstance(op, SelectMask):
            keep = op.keep.reshape(op.keep.shape[-2:])
            fill = graph.constant("fill", np.array([op.fill], np.int8), current)
            condition = graph.constant("condition", keep if form.scores_first else ~keep)
            scores = apply(
                "SELECT_V2",
                [condition, *([scores, fill] if form.scores_first else [fill, scores])],
                graph.tensors[scores].shape,
                current,
            )
            continue
        scores = apply(
            name,
            operands if form.scores_first else operands[::-1],
            graph.tensors[scores].shape,
            current,
            version=2,
        )
    probabilities = apply("SOFTMAX", [scores], graph.tensors[scores].shape, PROBABILITIES, {"beta": 1.0}, 2)
    v = heads("value", value, S, layer.value_dim, (0, 2, 3, 1) if form.value_transposed else (0, 2, 1, 3))
    context = apply("BATCH_MATMUL", [probabilities, v], (*leading, L, layer.value_dim), t["context"],
                    {"adj_y": form.value_transposed}, 2)
    if form.merged_heads:
        context = reshape(context, (B, H, L, layer.value_dim), t["context"])
    y = reshape(transpose(context, (0, 2, 1, 3), t["context"]), (B, L, H * layer.value_dim), t["context"])
    if "output" in layer.linears:
        y = reshape(project("output", y), (B, L, layer.output_dim), t["output"])
    if form.float_edges:
        y = apply("DEQUANTIZE", [y], graph.tensors[y].shape, None, version=2, dtype=np.float32)
    graph.outputs = [y]
    return graph
