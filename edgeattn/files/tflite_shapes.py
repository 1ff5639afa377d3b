"""The shapes of what operators give where a .tflite file leaves axes open: what the shapes of their inputs make."""

from __future__ import annotations

import math

import numpy as np

from edgeattn.tflite_schema import Operator, Tensor

_BROADCAST = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE", "SELECT_V2",
              "LOGICAL_AND", "LOGICAL_OR", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL", "EQUAL", "NOT_EQUAL")
_SAME = ("SOFTMAX", "QUANTIZE", "DEQUANTIZE", "CAST", "LOGISTIC", "RSQRT", "SQRT", "SQUARE", "GELU", "RELU", "TANH",
         "EXP", "NEG", "ABS", "COS", "SIN", "LOGICAL_NOT")
_REDUCED = ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD")


def shape_of(operator: Operator, inputs: list[Tensor]) -> tuple[int, ...] | None:
    """The shape of an operator's first output; None where it is not found here."""
    try:
        return _shape_of(operator, [each.shape for each in inputs], inputs)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError):
        return None  # of a damaged operator, which is told where it is looked at


def _shape_of(operator, shapes, inputs):
    kind, options, first = operator.name, operator.options, shapes[0]
    if kind in _BROADCAST:
        return np.broadcast_shapes(*shapes)
    if kind in _SAME:
        return first
    if kind == "SHAPE":
        return (len(first),)
    if kind == "RESHAPE":
        wanted = (inputs[1].data.ravel() if len(inputs) > 1 else np.asarray(options["new_shape"])).tolist()
        rest = math.prod(n for n in wanted if n != -1)
        shape = tuple(math.prod(first) // rest if n == -1 else n for n in wanted)
        return shape if math.prod(shape) == math.prod(first) and wanted.count(-1) < 2 else None
    if kind in ("FILL", "BROADCAST_TO"):
        return tuple(inputs[kind == "BROADCAST_TO"].data.ravel().tolist())
    if kind == "TRANSPOSE":
        return tuple(first[axis] for axis in inputs[1].data.ravel().tolist())
    if kind == "FULLY_CONNECTED":
        outputs, width = shapes[1]
        return (*(first[:-1] if options["keep_num_dims"] else (math.prod(first) // width,)), outputs)
    if kind == "BATCH_MATMUL":
        second = shapes[1]
        rows, columns = first[-1 if options["adj_x"] else -2], second[-2 if options["adj_y"] else -1]
        return (*np.broadcast_shapes(first[:-2], second[:-2]), rows, columns)
    if kind in _REDUCED:
        axes = {axis % len(first) for axis in inputs[1].data.ravel().tolist()}
        return tuple(1 if i in axes else n for i, n in enumerate(first) if i not in axes or options["keep_dims"])
    if kind == "PACK":
        axis = options["axis"] % (len(first) + 1)
        return (*first[:axis], len(inputs), *first[axis:])
    if kind == "CONCATENATION":
        axis = options["axis"] % len(first)
        return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1:])
    if kind == "GATHER" and not options["batch_dims"]:
        axis = options["axis"] % len(first)
        return (*first[:axis], *shapes[1], *first[axis + 1:])
    return None
