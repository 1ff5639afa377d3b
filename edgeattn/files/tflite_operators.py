"""Operators of .tflite graphs as ONNX nodes that say the same, those that are more than another name."""

from __future__ import annotations

import math

import numpy as np

from edgeattn.files.checkpoints.onnx_values import NotRead
from edgeattn.files.tflite_constants import strided
from edgeattn.files.tflite_graph import LONGEST_CHAIN
from edgeattn.files.tflite_stand_ins import Stored

# Operators of the same meaning, whose inputs broadcast alike and whose options say nothing but an activation.
ALIKE = {
    "ABS": "Abs", "COS": "Cos", "DIV": "Div", "EXP": "Exp", "LESS": "Less", "LESS_EQUAL": "LessOrEqual", "LOG": "Log",
    "GREATER": "Greater", "GREATER_EQUAL": "GreaterOrEqual", "EQUAL": "Equal", "LOGICAL_AND": "And",
    "LOGICAL_NOT": "Not", "LOGICAL_OR": "Or", "LOGISTIC": "Sigmoid", "MAXIMUM": "Max", "MINIMUM": "Min", "MUL": "Mul",
    "NEG": "Neg", "POW": "Pow", "RELU": "Relu", "SELECT_V2": "Where", "SIN": "Sin", "SQRT": "Sqrt", "SUB": "Sub",
    "TANH": "Tanh",
}

_NOTHING = Stored("", None)


def _fully_connected(w, operator, to):
    inputs, options = operator.inputs, operator.options
    if len(inputs) not in (2, 3) or options["weights_format"] != 0 or min(inputs[:2]) < 0:
        raise NotRead(f"FULLY_CONNECTED has {len(inputs)} inputs and format {options['weights_format']}")
    weight = w.tensors[inputs[1]]
    if len(weight.shape) != 2:
        raise NotRead(f"FULLY_CONNECTED has weights of shape {weight.shape}; expected 2 axes")
    if not w.graph.is_constant(inputs[1]) and _is_softmax(w, inputs[1]):
        return _of_probabilities(w, operator, to)
    w.hybrid |= weight.scale is not None
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
    return to


def _of_probabilities(w, operator, to):
    """Values times probabilities as weights: x y' = (y x')', for the reader knows probabilities on the left."""
    x, y, *bias = operator.inputs
    if any(number >= 0 for number in bias) or len(w.tensors[x].shape) != 2:
        raise NotRead("FULLY_CONNECTED has probabilities as weights, and a bias or rows of more than 2 axes")
    product = w.add("MatMul", [w.value(y), _turned(w, x, True, f"{to} x:")], f"{to} turned:")
    return w.add("Transpose", [product], to, perm=[1, 0])


def _conv_2d(w, operator, to):
    """A convolution of one pixel is a linear map."""
    x, weight, *bias = w.graph.operands(operator, (2, 3))
    options, kernel = operator.options, w.tensors[weight]
    array = w.real(kernel) if kernel.data is not None else w.stored.get(w.name(weight), _NOTHING).array
    if array is None or len(kernel.shape) != 4 or kernel.shape[1:3] != (1, 1) or (
            options["stride_w"], options["stride_h"]) != (1, 1):
        raise NotRead(f"CONV_2D has a kernel of shape {kernel.shape}; expected one pixel of constants, and no strides")
    w.hybrid |= kernel.scale is not None
    turned = w.store(f"{to} weight", np.ascontiguousarray(array.reshape(kernel.shape[0], kernel.shape[3]).T))
    biased = bias and bias[0] >= 0
    product = w.add("MatMul", [w.value(x), turned], f"{to} product:" if biased else to)
    return w.add("Add", [product, w.value(bias[0])], to) if biased else to


def _add(w, operator, to):
    x, y = w.graph.operands(operator, (2,))
    for scaled, rest in ((x, y), (y, x)):
        if (found := _centred_behind(w, scaled, rest)) is not None:
            x, mean, factor, offset = found
            shape = w.store(f"{to} shape", np.array(w.tensors[rest].shape, np.int64))
            mean = w.add("Reshape", [w.value(mean), shape], f"{to} mean:")
            product = w.add("Mul", [w.add("Sub", [w.value(x), mean], f"{to} centred:"), w.value(factor)],
                            f"{to} product:")
            return w.add("Add", [product, w.value(offset)], to)
    return w.add("Add", [w.value(x), w.value(y)], to)


def _centred_behind(w, scaled, rest):
    """(x, mean, factor, offset) where ``scaled`` is x times factor, and ``rest`` offset - mean times factor; else None.

    The reader of ONNX graphs finds norms of one value, (x - mean) times factor, where this is a sum of two.
    """
    def inputs(number, kind):
        maker = w.graph.producer(number, (kind,))
        operator = None if maker is None else w.graph.graph.operators[maker]
        plain = operator is not None and not operator.options.get("fused_activation_function", 0)
        return operator.inputs if plain and len(operator.inputs) >= 1 else ()

    def unshaped(number):
        found = inputs(number, "RESHAPE")
        return found[0] if found else number

    difference = inputs(unshaped(rest), "SUB")
    if len(difference) != 2 or not w.graph.is_constant(difference[0]) or (
            unshaped(rest) != rest and w.tensors[difference[0]].data.size != 1):
        return None
    product, sides = inputs(difference[1], "MUL"), inputs(scaled, "MUL")
    for x, factor in (sides, sides[::-1]) if len(sides) == 2 else ():
        for mean, same in (product, product[::-1]) if len(product) == 2 else ():
            if unshaped(factor) == same and w.tensors[factor].shape == w.tensors[rest].shape and (
                    w.tensors[mean].shape == w.tensors[same].shape == w.tensors[difference[1]].shape):
                return x, mean, factor, difference[0]
    return None


def _batch_matmul(w, operator, to):
    x, y = w.graph.operands(operator, (2,))
    turned = [bool(operator.options[side]) for side in ("adj_x", "adj_y")]
    if not _is_softmax(w, y):
        sides = [_turned(w, x, turned[0], f"{to} x:"), _turned(w, y, turned[1], f"{to} y:")]
        return w.add("MatMul", sides, to)
    # the reader of ONNX graphs knows probabilities on the left: x y = (y' x')'
    sides = [_turned(w, y, not turned[1], f"{to} y:"), _turned(w, x, not turned[0], f"{to} x:")]
    product = w.add("MatMul", sides, f"{to} turned:")
    return w.add("Transpose", [product], to, perm=_last_two(len(w.tensors[operator.outputs[0]].shape)))


def _is_softmax(w, number):
    """Whether a tensor is what a SOFTMAX gives, in any layout."""
    for _ in range(LONGEST_CHAIN):
        maker = w.graph.producer(number, ("RESHAPE", "TRANSPOSE"))
        if maker is None:
            break
        number = w.graph.graph.operators[maker].inputs[0]
    return w.graph.producer(number, ("SOFTMAX",)) is not None


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


def _reduced(kind):
    def write(w, operator, to):
        x, axes = w.graph.operands(operator, (2,))
        shape, axes = w.tensors[x].shape, w.whole(axes, f"the axes of {operator.name}")
        if not axes or any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise NotRead(f"{operator.name} has the axes {axes[:8]}; expected one or more of {len(shape)}")
        axes = {axis % len(shape) for axis in axes}
        kept = np.array(sorted(axis for axis in axes if shape[axis] != 1) or sorted(axes), np.int64)
        left = [1 if i in axes else n for i, n in enumerate(shape) if i not in axes or operator.options["keep_dims"]]
        made = w.add(kind, [w.value(x), w.store(f"{to} axes", kept)], f"{to} kept:", keepdims=1)
        return w.add("Reshape", [made, w.store(f"{to} shape", np.array(left, np.int64))], to)
    return write


def _cast(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    return w.add("Cast", [w.value(x)], to, to=w.tensors[operator.outputs[0]].dtype)


def _squeeze(w, operator, to):
    (x,) = w.graph.operands(operator, (1,))
    shape, axes = w.tensors[x].shape, np.asarray(operator.options.get("squeeze_dims", ())).tolist()
    if any(not -len(shape) <= axis < len(shape) or shape[axis] != 1 for axis in axes):
        raise NotRead(f"SQUEEZE of shape {shape} along {axes[:8]}; expected axes of 1")
    axes = [axis % len(shape) for axis in axes] or [i for i, n in enumerate(shape) if n == 1]
    return _shaped(w, x, [n for i, n in enumerate(shape) if i not in axes], to)


def _expand_dims(w, operator, to):
    x, axis = w.graph.operands(operator, (2,))
    shape, axes = list(w.tensors[x].shape), w.whole(axis, "the axis of EXPAND_DIMS")
    if len(axes) != 1 or not -len(shape) <= axes[0] + (axes[0] < 0) <= len(shape):
        raise NotRead(f"EXPAND_DIMS of shape {shape} at {axes[:8]}")
    shape.insert(axes[0] if axes[0] >= 0 else len(shape) + 1 + axes[0], 1)
    return _shaped(w, x, shape, to)


def _shaped(w, number, shape, to):
    return w.add("Reshape", [w.value(number), w.store(f"{to} shape", np.array(shape, np.int64))], to)


def _pack(w, operator, to):
    shape, axis = list(w.tensors[operator.inputs[0]].shape), operator.options["axis"]
    if any(list(w.tensors[number].shape) != shape for number in operator.inputs) or not -len(shape) <= axis + (
            axis < 0) <= len(shape):
        raise NotRead(f"PACK of shape {shape} at {axis}")
    axis += (len(shape) + 1) * (axis < 0)
    parts = [_shaped(w, number, [*shape[:axis], 1, *shape[axis:]], f"{to} part {i}:")
             for i, number in enumerate(operator.inputs)]
    return w.add("Concat", parts, to, axis=axis)


def _unpack(w, operator, to):
    (x,), axis = operator.inputs[:1], operator.options["axis"]
    shape = w.tensors[x].shape
    if not -len(shape) <= axis < len(shape) or shape[axis] != len(operator.outputs):
        raise NotRead(f"UNPACK of shape {shape} along {axis} in {len(operator.outputs)} parts")
    parts = [f"{to} part {i}:" for i in range(len(operator.outputs))]
    w.add("Split", [w.value(x)], parts[0], axis=axis)
    w.made[-1].output = parts
    left = w.store(f"{to} shape", np.array([n for i, n in enumerate(shape) if i != axis % len(shape)], np.int64))
    for number, part in zip(operator.outputs, parts, strict=True):
        w.add("Reshape", [part, left], w.name(number))


def _strided_slice(w, operator, to):
    x, *numbers = w.graph.operands(operator, (4,))
    begin, end, steps = (w.whole(each, "a number of STRIDED_SLICE") for each in numbers)
    shape = w.tensors[x].shape
    cut = strided(operator.options, begin, end, steps, len(shape))
    if any(isinstance(each, int) and not -n <= each < n for each, n in zip(cut, shape, strict=False)):
        raise NotRead(f"STRIDED_SLICE takes {begin[:8]} of shape {shape}")
    bounds = [(each % n, each % n + 1, 1) if isinstance(each, int) else each.indices(n)
              for each, n in zip(cut, shape, strict=False)]
    taken = [len(range(*each)) for each in bounds] + list(shape[len(cut):])
    if 0 in taken:
        raise NotRead(f"STRIDED_SLICE takes nothing of shape {shape}")
    parts = [w.store(f"{to} {what}", np.array(values, np.int64)) for what, values in zip(
        ("begin", "end", "axes", "steps"), (*list(zip(*bounds, strict=True))[:2], range(len(bounds)),
                                            [each[2] for each in bounds]), strict=True)]
    made = w.add("Slice", [w.value(x), *parts], f"{to} slice:")
    left = [n for i, n in enumerate(taken) if i >= len(cut) or not isinstance(cut[i], int)]
    return w.add("Reshape", [made, w.store(f"{to} shape", np.array(left, np.int64))], to)


def _gather(w, operator, to):
    x, indices = w.graph.operands(operator, (2,))
    axes, axis = len(w.tensors[x].shape), operator.options["axis"]
    if operator.options["batch_dims"] or not -axes <= axis < axes:
        raise NotRead(f"GATHER has batch_dims {operator.options['batch_dims']} and axis {axis}; expected 0, and one of "
                      f"{axes}")
    return w.add("Gather", [w.value(x), w.value(indices)], to, axis=axis)


def _embedding_lookup(w, operator, to):
    indices, table = w.graph.operands(operator, (2,))
    return w.add("Gather", [w.value(table), w.value(indices)], to, axis=0)


def _tile(w, operator, to):
    x, times = w.graph.operands(operator, (2,))
    times = np.array(w.whole(times, "the multiples of TILE"), np.int64)
    return w.add("Tile", [w.value(x), w.store(f"{to} multiples", times)], to)


def _select(w, operator, to):
    inputs = w.graph.operands(operator, (3,))
    if len({w.tensors[number].shape for number in inputs}) != 1:
        raise NotRead("SELECT of several shapes; expected one, or SELECT_V2")
    return w.add("Where", [w.value(number) for number in inputs], to)


def _not_equal(w, operator, to):
    sides = [w.value(number) for number in w.graph.operands(operator, (2,))]
    return w.add("Not", [w.add("Equal", sides, f"{to} equal:")], to)


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
    "FULLY_CONNECTED": _fully_connected, "CONV_2D": _conv_2d, "ADD": _add, "BATCH_MATMUL": _batch_matmul, "SOFTMAX":
    _softmax, "RESHAPE": _reshape, "BROADCAST_TO": _broadcast_to, "TRANSPOSE": _transpose, "SLICE": _slice, "SPLIT":
    _split, "CONCATENATION": _concatenation, "CAST": _cast, "SQUEEZE": _squeeze, "EXPAND_DIMS": _expand_dims,
    "PACK": _pack, "UNPACK": _unpack, "STRIDED_SLICE": _strided_slice, "GATHER": _gather, "EMBEDDING_LOOKUP":
    _embedding_lookup, "TILE": _tile, "SELECT": _select, "NOT_EQUAL": _not_equal, "RSQRT": _rsqrt, "SQUARE": _square,
    "SQUARED_DIFFERENCE": _squared_difference, "GELU": _gelu, "DEQUANTIZE": _dequantize, "MEAN":
    _reduced("ReduceMean"), "SUM": _reduced("ReduceSum"), "REDUCE_MAX": _reduced("ReduceMax"), "REDUCE_MIN":
    _reduced("ReduceMin"), "REDUCE_PROD": _reduced("ReduceProd"),
}
