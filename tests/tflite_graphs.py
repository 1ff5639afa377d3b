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
    return _Converter(layer, B, L, S, form or Form(), value_ops).graph


class _Converter:
    def __init__(self, layer, B, L, S, form, value_ops):
        self.layer, self.sizes, self.form, self.graph = layer, (B, L, S), form, Graph()
        self.ops = {"query": layer.query_ops, "key": layer.key_ops, "value": value_ops}
        y = self.attend(*self.inputs())
        if form.float_edges:
            y = self.apply("DEQUANTIZE", [y], self.shape(y), None, version=2, dtype=np.float32)
        self.graph.outputs = [y]

    def shape(self, x):
        return self.graph.tensors[x].shape

    def apply(self, name, operands, shape, quantization, options=None, version=1, dtype=np.int8):
        y = self.graph.activation(f"{name.lower()}_{len(self.graph.tensors)}", shape, dtype, quantization)
        self.graph.operator(name, operands, y, options, version)
        return y

    def apply_to(self, x, name, constant, quantization):
        """MUL or ADD of a tensor and a constant."""
        operands = [x, constant] if self.form.scores_first else [constant, x]
        return self.apply(name, operands, self.shape(x), quantization, version=2)

    def reshape(self, x, shape, quantization):
        target = self.graph.constant(f"shape_{len(self.graph.tensors)}", np.array(shape, np.int32))
        return self.apply("RESHAPE", [x, target], shape, quantization, {"new_shape": shape})

    def transpose(self, x, axes, quantization):
        shape = [self.shape(x)[axis] for axis in axes]
        permutation = self.graph.constant(f"axes_{len(self.graph.tensors)}", np.array(axes, np.int32))
        return self.apply("TRANSPOSE", [x, permutation], shape, quantization, version=2)

    def inputs(self):
        """The int8 tensors of queries, keys and values."""
        (B, L, S), layer, found = self.sizes, self.layer, {}
        for source in sorted(set(layer.sources)):
            name = f"{INPUTS[source]}_input"
            shape = (B, S if source else L, layer.linears[INPUTS[source]].weight.shape[1])
            if self.form.float_edges:
                x = self.graph.activation(name, shape, np.float32)
                found[source] = self.apply("QUANTIZE", [x], shape, layer.tensors[name])
            else:
                x = found[source] = self.graph.activation(name, shape, np.int8, layer.tensors[name])
            self.graph.inputs.append(x)
        return [found[source] for source in layer.sources]

    def project(self, name, x):
        layer, linear = self.layer, self.layer.linears[name]
        rows, source = self.shape(x)[:-1], layer.tensors["context"] if name == "output" else layer.input_of(name)
        if not self.form.keep_num_dims:
            rows = (int(np.prod(rows)),)
            x = self.reshape(x, (*rows, linear.weight.shape[1]), source)
        weight = self.graph.constant(f"{name}_weight", linear.weight, channel_scale=linear.scale)
        bias = -1
        if linear.bias is not None:
            bias = self.graph.constant(f"{name}_bias", linear.bias, channel_scale=source.scale * linear.scale)
        return self.apply("FULLY_CONNECTED", [x, weight, bias], (*rows, linear.weight.shape[0]), layer.tensors[name],
                          {"keep_num_dims": self.form.keep_num_dims}, 5)

    def heads(self, name, x, length, size, transposed):
        """A projection as heads, the last two axes changed where it is transposed."""
        B, quantization = self.sizes[0], self.layer.tensors[name]
        x = self.reshape(self.project(name, x), (B, length, self.layer.num_heads, size), quantization)
        x = self.transpose(x, (0, 2, 3, 1) if transposed else (0, 2, 1, 3), quantization)
        for op in self.ops[name]:
            x = self.apply_to(x, "MUL", self.graph.constant("factor", np.array(op.code, np.int8), op.constant), op.output)
            quantization = op.output
        return self.reshape(x, (B * self.layer.num_heads, *self.shape(x)[2:]), quantization) if self.form.merged_heads else x

    def changed_scores(self, scores):
        """Scores after the layer's own operators on them."""
        current = self.layer.tensors["scores"]
        for op in self.layer.score_ops:
            if isinstance(op, MulConstant):
                constant = self.graph.constant("scale", np.array(op.code, np.int8), op.constant)
                scores, current = self.apply_to(scores, "MUL", constant, op.output), op.output
            elif isinstance(op, AddMask):
                constant = self.graph.constant("mask", op.codes.reshape(op.codes.shape[-2:]), op.mask)
                scores, current = self.apply_to(scores, "ADD", constant, op.output), op.output
            elif isinstance(op, Requantize):
                current = op.output
                scores = self.apply("QUANTIZE", [scores], self.shape(scores), current)
            elif isinstance(op, SelectMask):
                keep = op.keep.reshape(op.keep.shape[-2:])
                fill = self.graph.constant("fill", np.array([op.fill], np.int8), current)
                condition = self.graph.constant("condition", keep if self.form.scores_first else ~keep)
                either = [scores, fill] if self.form.scores_first else [fill, scores]
                scores = self.apply("SELECT_V2", [condition, *either], self.shape(scores), current)
        return scores

    def attend(self, query, key, value):
        (B, L, S), layer, form, t = self.sizes, self.layer, self.form, self.layer.tensors
        leading = (B * layer.num_heads,) if form.merged_heads else (B, layer.num_heads)
        q = self.heads("query", query, L, layer.head_dim, False)
        k = self.heads("key", key, S, layer.head_dim, form.key_transposed)
        scores = self.apply("BATCH_MATMUL", [q, k], (*leading, L, S), t["scores"], {"adj_y": not form.key_transposed}, 2)
        scores = self.changed_scores(scores)
        probabilities = self.apply("SOFTMAX", [scores], self.shape(scores), PROBABILITIES, {"beta": 1.0}, 2)
        v = self.heads("value", value, S, layer.value_dim, form.value_transposed)
        context = self.apply("BATCH_MATMUL", [probabilities, v], (*leading, L, layer.value_dim), t["context"],
                             {"adj_y": form.value_transposed}, 2)
        if form.merged_heads:
            context = self.reshape(context, (B, layer.num_heads, L, layer.value_dim), t["context"])
        context = self.transpose(context, (0, 2, 1, 3), t["context"])
        y = self.reshape(context, (B, L, layer.num_heads * layer.value_dim), t["context"])
        if "output" in layer.linears:
            y = self.reshape(self.project("output", y), (B, L, layer.output_dim), t["output"])
        return y
