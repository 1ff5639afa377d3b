"""What operators of constants alone give, where all runtimes give the same: masks and shapes that converters leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeattn.tflite_schema import Operator, Tensor


def folded(operator: Operator, inputs: list[Tensor], output: Tensor) -> np.ndarray | None:
    """The array that an operator gives, None where it is not computed here: of ``output``'s shape and dtype.

    inputs : the operator's, all constants but of SHAPE
    """
    kind = operator.name
    computed = _COMPARED if any(each.scale is not None for each in inputs) else _COMPUTED
    made = next((table[kind] for table in (_ROUNDED, _MOVED, _MEASURED, computed) if kind in table), None)
    if made is None or not inputs or operator.options.get("fused_activation_function", 0) or output.dtype is None or (
            kind in _MOVED and not _keeps(kind, inputs, output)) or (
            kind in _COMPUTED and output.scale is not None):
        return None
    try:
        with np.errstate(all="ignore"):
            array = made(operator.options, output, *inputs)
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError, ZeroDivisionError):
        return None  # of damaged operators: these are told where they are looked at
    return array if array is not None and (array.shape, array.dtype) == (output.shape, output.dtype) else None


def _array(tensor: Tensor) -> np.ndarray:
    data = tensor.data
    return data.view(np.uint8) != 0 if data.dtype == np.bool_ else data  # a damaged file's may be neither 0 nor 1


def _whole(tensor: Tensor) -> list[int]:
    if tensor.dtype not in (np.int32, np.int64) or tensor.data.size > 64:
        raise ValueError
    return tensor.data.ravel().tolist()


def _keeps(kind: str, inputs: list[Tensor], output: Tensor) -> bool:
    """Whether codes stand for the same numbers before and behind, in what is moved."""
    moved = inputs[1:] if kind in ("SELECT", "SELECT_V2") else inputs[:1]
    moved = inputs if kind in ("CONCATENATION", "PACK") else moved
    return all(each.dtype == output.dtype and same_codes(each, output) for each in moved)


def same_codes(one: Tensor, other: Tensor) -> bool:
    """Whether codes of two tensors stand for the same numbers."""
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b))
               for a, b in ((one.scale, other.scale), (one.zero_point, other.zero_point)))


# -- what is moved, codes or numbers

def strided(options, begin: list[int], end: list[int], steps: list[int], axes: int) -> list[slice | int]:
    """What a STRIDED_SLICE takes of each axis.

    Raises
    ------
    ValueError
        Where it inserts axes, or runs backwards.
    """
    if options["ellipsis_mask"] or options["new_axis_mask"] or options["offset"] or min(steps) < 1 or not (
            len(begin) == len(end) == len(steps) <= axes):
        raise ValueError("STRIDED_SLICE with an ellipsis, new axes or steps backwards is not followed")
    shrink, from_start, to_end = (options[f"{name}_mask"] for name in ("shrink_axis", "begin", "end"))
    return [begin[i] if shrink >> i & 1 else slice(
        None if from_start >> i & 1 else begin[i], None if to_end >> i & 1 else end[i], steps[i])
        for i in range(len(begin))]


def _slice(_, __, x, begin, size):
    begin, size = _whole(begin), _whole(size)
    if min(begin) < 0 or any(n >= 0 and at + n > most for at, n, most in zip(begin, size, x.data.shape, strict=True)):
        raise ValueError
    return _array(x)[tuple(slice(at, None if n < 0 else at + n) for at, n in zip(begin, size, strict=True))]


def _select(_, output, condition, x, y):
    shapes = [each.data.shape for each in (condition, x, y)]
    if condition.dtype != np.bool_ or np.broadcast_shapes(*shapes) != output.shape:
        raise ValueError
    return np.where(_array(condition), _array(x), _array(y))


def _gather(options, _, x, indices):
    if options["batch_dims"] or indices.dtype not in (np.int32, np.int64) or (indices.data < 0).any():
        raise ValueError
    return np.take(_array(x), indices.data, axis=options["axis"])


def _reshape(_, output, x, *__):
    return _array(x).reshape(output.shape)


def _fill(_, __, shape, x):
    return np.broadcast_to(_array(x).reshape(()), _whole(shape))


def _broadcast_to(_, __, x, shape):
    return np.broadcast_to(_array(x), _whole(shape))


_MOVED: dict[str, Callable[..., Any]] = {
    "RESHAPE": _reshape, "SQUEEZE": _reshape, "EXPAND_DIMS": _reshape,
    "TRANSPOSE": lambda _, __, x, axes: _array(x).transpose(_whole(axes)),
    "BROADCAST_TO": _broadcast_to,
    "SLICE": _slice,
    "STRIDED_SLICE": lambda options, _, x, *numbers: _array(x)[
        tuple(strided(options, *map(_whole, numbers), x.data.ndim))],
    "GATHER": _gather,
    "SELECT": lambda options, output, *inputs: None if len({x.data.shape for x in inputs}) > 1 else _select(
        options, output, *inputs),
    "SELECT_V2": _select,
    "CONCATENATION": lambda options, _, *parts: np.concatenate([_array(each) for each in parts], options["axis"]),
    "PACK": lambda options, _, *parts: np.stack([_array(each) for each in parts], options["axis"]),
}


def laid_out(operator: Operator, elements: np.ndarray, constants: list[Tensor]) -> np.ndarray:
    """The elements of an operator's first input where the operator puts them.

    Raises
    ------
    ValueError
        Where it cannot.
    """
    x = Tensor("", elements.shape, elements.dtype, elements)
    if operator.name == "RESHAPE":
        shape = constants[0].data if constants else operator.options.get("new_shape", ())
        return elements.reshape(np.asarray(shape).ravel().tolist())
    if operator.name == "SQUEEZE":
        axes = np.asarray(operator.options.get("squeeze_dims", ())).tolist()
        return elements.squeeze(tuple(axes) if axes else None)
    if operator.name == "EXPAND_DIMS":
        return np.expand_dims(elements, _whole(constants[0])[0])
    return _MOVED[operator.name](operator.options, None, x, *constants)


# -- numbers: one rounding of float32, whole numbers, or none at all

def _plain(function) -> Callable[..., Any]:
    return lambda _, __, *inputs: np.asarray(function(*map(_array, inputs)))


def _reduced(function) -> Callable[..., Any]:
    return lambda options, output, x, axes: np.asarray(function(
        _array(x), tuple(_whole(axes)), keepdims=bool(options["keep_dims"]))).astype(output.dtype) if (
            x.dtype.kind in "iu") else None


def _range(_, output, start, limit, step):
    start, limit, step = (_array(each) for each in (start, limit, step))
    if math.prod(output.shape) != max(0, math.ceil((limit - start) / step)):
        raise ValueError
    return (start + np.arange(math.prod(output.shape), dtype=output.dtype) * step).astype(output.dtype)


_COMPUTED: dict[str, Callable[..., Any]] = {
    **{name: _plain(getattr(np, function)) for name, function in {
        "ABS": "abs", "ADD": "add", "SUB": "subtract", "MUL": "multiply", "NEG": "negative", "MAXIMUM": "maximum",
        "MINIMUM": "minimum", "LESS": "less", "LESS_EQUAL": "less_equal", "GREATER": "greater",
        "GREATER_EQUAL": "greater_equal", "EQUAL": "equal", "NOT_EQUAL": "not_equal", "LOGICAL_AND": "logical_and",
        "LOGICAL_OR": "logical_or", "LOGICAL_NOT": "logical_not"}.items()},
    "DIV": lambda _, __, x, y: _array(x) / _array(y) if x.dtype == y.dtype == np.float32 else None,
    "CAST": lambda _, output, x: _array(x).astype(output.dtype),
    "SUM": _reduced(np.sum), "REDUCE_PROD": _reduced(np.prod), "REDUCE_MAX": _reduced(np.max),
    "REDUCE_MIN": _reduced(np.min),
    "RANGE": _range,
    "FILL": _fill,
}


_MEASURED: dict[str, Callable[..., Any]] = {"SHAPE": lambda _, output, x: np.array(x.shape, output.dtype)}


# -- between numbers and codes

def _dequantize(_, output, x):
    if x.scale is None or x.scale.size != 1 or x.dtype not in (np.int8, np.int16, np.uint8) or output.scale is not None:
        return None
    return (x.data.astype(np.int32) - np.int32(x.zero_point[0])).astype(np.float32) * np.float32(x.scale[0])


def _quantize(_, output, x):
    """Codes, where the runtimes agree on them: those round halves by rules of their own."""
    if x.dtype != np.float32 or x.scale is not None or output.scale is None or output.scale.size != 1 or not (
            output.scale[0] > 0) or output.dtype != np.int8 or np.isnan(x.data).any():
        return None
    reals = x.data.astype(np.float64) / np.float64(output.scale[0])
    near = np.abs(reals - np.floor(reals) - 0.5) < 1e-5 * np.maximum(np.abs(reals), 1)
    low, high = (limit - int(output.zero_point[0]) for limit in (-128, 127))
    if (near & (reals > low - 1) & (reals < high + 1)).any():
        return None
    return (np.clip(np.rint(reals), low, high) + int(output.zero_point[0])).astype(np.int8)


def _compared(function) -> Callable[..., Any]:
    """A comparison of codes of two scales, which runtimes round to 1/256: where that decides nothing."""
    def made(_, __, x, y):
        if any(each.scale is None or each.scale.size != 1 or not 0 < each.scale[0] < 1 or each.dtype != np.int8
               for each in (x, y)):
            return None
        x, y = ((each.data.astype(np.float64) - each.zero_point[0]) * np.float64(each.scale[0]) for each in (x, y))
        near = np.abs(x - y) < 1 / 64
        return None if (near & ((x != 0) | (y != 0))).any() else np.asarray(function(x, y))
    return made


_COMPARED: dict[str, Callable[..., Any]] = {name: _compared(function) for name, function in {
    "LESS": np.less, "LESS_EQUAL": np.less_equal, "GREATER": np.greater, "GREATER_EQUAL": np.greater_equal,
    "EQUAL": np.equal, "NOT_EQUAL": np.not_equal}.items()}
_ROUNDED: dict[str, Callable[..., Any]] = {"DEQUANTIZE": _dequantize, "QUANTIZE": _quantize}
