"""Operators of .tflite graphs as ONNX nodes that say the same, those that are more than another name."""

from __future__ import annotations

import math

import numpy as np

from edgeattn.files.checkpoints.onnx_values import NotRead

# Operators of the same meaning, whose inputs broadcast alike and whose options say nothing but an activation.
ALIKE = {
    "ABS": "Abs", "ADD": "Add", "COS": "Cos", "EXP": "Exp", "LESS": "Less", "LESS_EQUAL": "LessOrEqual",
    "GREATER": "Greater", "GREATER_EQUAL": "GreaterOrEqual", "EQUAL": "Equal", "LOGICAL_AND": "And",
    "LOGICAL_NOT": "Not", "LOGICAL_OR": "Or", "LOGISTIC": "Sigmoid", "MAXIMUM": "Max", "MINIMUM": "Min", "MUL": "Mul",
    "NEG": "Neg", "POW": "Pow", "RELU": "Relu", "SELECT_V2": "Where", "SIN": "Sin", "SQRT": "Sqrt", "SUB": "Sub",
    "TANH": "Tanh",
}


def _fully_connected(w, operator, to):
    inputs, options = operator.inputs, operator.options
    if len(inputs) not in (2, 3) or options["weights_format"] != 0 or min(inputs[:2]) < 0:
        raise NotRead(f"FULLY_CONNECTED has {len(inputs)} inputs and format {options['weights_format']}")
    weight = w.tensors[inputs[1]]
    w.hybrid |= weight.scale is not None
    if len(weight.shape) != 2:
        raise NotRead(f"FULLY_CONNECTED has weights of shape {weight.shape}; expected 2 axes")
    if weight.scale is not None and weight.zero_point.any():
        raise NotRead(f"FULLY_CONNECTED has weights {weight.name!r} with a zero point; expected none")
    x = w.value(inputs[0])
    if not options["keep_num_dims"] and len(w.tensors[inputs[0]].shape) > 2:
        rows = w.store(f"{to} rows", np.array([-1, weight.shape[1]], np.int64))
        x = w.add("Reshape", [x, rows], f"{to} flat:")
    if w.graph.is_constant(inputs[1]):
        turned = w.store(f"{to} weight", np.ascontiguousarray(w.real(weight).T))
    else:
        turned = w.add("Transpose", [w.value(inputs[1])], f"{to} turned:", perm=[1, 0])
    biased = len(inputs) == 3 and inputs[2] >= 0
    product = w.add("MatMul", [x, turned], f"{to} product:" if biased else to)
    if biased:
        w.add("Add", [product, w.value(inputs[2])], to)


def _batch_matmul(w, operator, to):
    x, y = w.graph.operands(operator, (2,))
    turned = [bool(operator.options[side]) for side in ("adj_x", "adj_y")]
    if w.graph.producer(y, ("SOFTMAX",)) is None:
        sides = [_turned(w, x, turned[0], f"{to} x:"), _turned(w, y, turned[1], f"{to} y:")]
        return w.add("MatMul", sides, to)
    # the reader of ONNX graphs knows probabilities on the left: x y = (y' x')'
    sides = [_turned(w, y, not turned[1], f"{to} y:"), _turned(w, x, not turned[0], f"{to} x:")]
    product = w.add("MatMul", sides, f"{to} turned:")
    return w.add("Transpose", [product], to, perm=_last_two(len(w.tensors[operator.outputs[0]].shape)))


def _turned(w, number, wanted, to):
    """A tensor, with its last two axes exchanged where that is wanted."""
    axes = len(w.tensors[number].shape)
    if axes < 2:
        raise NotRead(f"BATCH_MATMUL takes {w.tensors[number].name!r} of {axes} axes; expected 2 or more")
    return w.add("Transpose", [w.value(number)], to, perm=_last_two(axes)) if wanted else w.value(number)


def _softmax(w, operator, to):
    (scores,) = w.graph.operands(operator, (1,))
    name, beta = w.value(scores), operator.options["beta"]
    if not (math.isfinite(beta) and beta > 0):
        raise NotRead(f"expected SOFTMAX with a positive beta; found {beta}")
    if beta != 1:
        name = w.add("Mul", [name, w.store(f"{to} beta", np.float32(beta).reshape(()))], f"{to} times beta:")
    w.add("Softmax", [name], to, axis=-1)


def _reshape(w, operator, to):
    inputs, output = w.graph.operands(operator, (1, 2)), w.tensors[operator.outputs[0]].shape
    wanted = (w.whole(inputs[1], "the shape of RESHAPE") if len(inputs) == 2
              else np.asarray(operator.options.get("new_shape", ())).tolist())
    if len(wanted) != len(output) or wanted.count(-1) > 1 or any(
            n not in (-1, m) for n, m in zip(wanted, output, strict=True)):
        raise NotRead(f"RESHAPE to {wanted[:8]} gives a tensor of shape {output}; expected them to agree")
    shape = w.store(f"{to} shape", np.array(output, np.int64))
    w.add("Reshape", [w.value(inputs[0]), shape], to)


def _broadcast_to(w, operator, to):
    x, shape = w.graph.operands(operator, (2,))
    shape = np.array(w.whole(shape, "the shape of BROADCAST_TO"), np.int64)
    w.add("Expand", [w.value(x), w.store(f"{to} shape", shape)], to)


def _transpose(w, operator, to):
    x, perm = w.graph.operands(operator, (2,))
    w.add("Transpose", [w.value(x)], to, perm=w.whole(perm, "the permutation of TRANSPOSE"))


def _slice(w, operator, to):
    x, begin, size = w.graph.operands(operator, (3,))
    begin, size = w.whole(begin, "the begin of SLICE"), w.whole(size, "the size of SLICE")
    shape = w.tensors[x].shape
    if not len(begin) == len(size) == len(shape) or any(
            at < 0 or n < -1 or at + max(n, 0) > most for at, n, most in zip(begin, size, shape, strict=True)):
        raise NotRead(f"SLICE begins at {begin[:8]} with {size[:8]} elements; its input has shape {shape}")
    end = [most if n < 0 else at + n for at, n, most in zip(begin, size, shape, strict=True)]
    w.add("Slice", [w.value(x), *(w.store(f"{to} {what}", np.array(numbers, np.int64)) for what, numbers
                                        in (("begin", begin), ("end", end)))], to)


def _split(w, operator, to):
    axis, x = operator.inputs if len(operator.inputs) == 2 else (-1, -1)
    axes, parts = w.whole(axis, "the axis of SPLIT") if axis >= 0 else [], len(operator.outputs)
    shape = w.tensors[x].shape
    if len(axes) != 1 or not -len(shape) <= axes[0] < len(shape) or shape[axes[0]] % parts:
        raise NotRead(f"SPLIT of shape {shape} along {axes[:8]} in {parts} parts; expected equal parts of one axis")
    w.add("Split", [w.value(x)], to, axis=axes[0])
    w.made[-1].output = [w.name(number) for number in operator.outputs]


def _concatenation(w, operator, to):
    w.add("Concat", [w.value(number) for number in operator.inputs], to, axis=operator.options["axis"])


def _mean(w, operator, to):
    x, axes = w.graph.operands(operator, (2,))
    axes = np.array(w.whole(axes, "the axes of MEAN"), np.int64)
    if not axes.size:
        raise NotRead("MEAN has no axes; expected one or more")
    w.add("ReduceMean", [w.value(x), w.store(f"{to} axes", axes)], to,
             keepdims=int(operator.options["keep_dims"]))


def _rsqrt(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    w.add("Reciprocal", [w.add("Sqrt", [w.value(x)], f"{to} root:")], to)


def _square(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    w.add("Mul", [w.value(x)] * 2, to)


def _squared_difference(w, operator, to):
    sides = [w.value(number) for number in w.graph.operands(operator, (2,))]
    w.add("Mul", [w.add("Sub", sides, f"{to} difference:")] * 2, to)


def _gelu(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    w.add("Gelu", [w.value(x)], to, approximate="tanh" if operator.options["approximate"] else "none")


def _dequantize(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    if not w.graph.is_constant(x):
        raise NotRead("expected DEQUANTIZE of weights alone; found it of a computed tensor")
    w.store(to, w.real(w.tensors[x]))


def _last_two(axes: int) -> list[int]:
    return [*range(axes - 2), axes - 1, axes - 2]


# Each takes the `Writer`, the operator, and the name of what is to be given.
WRITERS = {
    "FULLY_CONNECTED": _fully_connected, "BATCH_MATMUL": _batch_matmul, "SOFTMAX": _softmax, "RESHAPE": _reshape,
    "BROADCAST_TO": _broadcast_to, "TRANSPOSE": _transpose, "SLICE": _slice, "SPLIT": _split, "CONCATENATION":
    _concatenation, "MEAN": _mean, "RSQRT": _rsqrt, "SQUARE": _square, "SQUARED_DIFFERENCE": _squared_difference,
    "GELU": _gelu, "DEQUANTIZE": _dequantize,
}
