"""Arguments at the public edge: what is accepted, and how results reach the caller's array."""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from typing import Any, SupportsIndex, TypeGuard

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Float32s, Floats

_LARGEST_COUNT = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_SOFTCAP = 1e-30  # its reciprocal is a float32 too
FLOAT32 = np.dtype(np.float32)


def flag(name: str, value: object) -> bool:
    """`value` as a bool; 0 and 1 and arrays are refused."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def is_one_of(value: object, names: Container[str]) -> TypeGuard[str]:
    """Whether `value` is a string among `names`; False for what cannot be compared with one, such as an array."""
    return isinstance(value, str) and value in names


def number(name: str, value: object) -> float:
    """`value` as a float that float32 can hold."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if abs(value) > _LARGEST:
        raise ValueError(f"{name} must lie within float32, got {value!r}")
    return value


def is_constant(array: NDArray[Any]) -> bool:
    """Whether nobody can write to an array in C order, as to one in the memory of a file: to keep it needs no copy."""
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return isinstance(base, memoryview) and base.readonly and array.flags.c_contiguous and array.flags.aligned


def count(name: str, value: SupportsIndex) -> int:
    """`value` as an int of at least 1 that int32 can hold."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if whole < 1:
        raise ValueError(f"{name} must be at least 1, got {whole}")
    if whole > _LARGEST_COUNT:
        raise ValueError(f"{name} must be at most {_LARGEST_COUNT}, got more")
    return whole


def as_array(name: str, value: ArrayLike) -> NDArray[Any]:
    """`value` as an array, not copied where it is one.

    Raises
    ------
    TypeError, ValueError
        Where NumPy makes no array of it, and for masked arrays: what they hide would be seen.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array, got a numpy.ma.MaskedArray; pass {name}.filled(...), and say in attn_mask "
            "or key_padding_mask what must not be seen")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} must be an array, or rows of equal length: numpy.asarray says {error}") from error


def float_array(name: str, value: ArrayLike) -> Floats:
    """`value` as an array of float16, float32 or float64, not yet converted.

    Raises
    ------
    TypeError
        For every other dtype: an integer array is more often a mistake than a wish.
    """
    if type(value) is np.ndarray and value.dtype is FLOAT32:
        return value
    array = as_array(name, value)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise TypeError(
            f"{name} must be a float16, float32 or float64 array, got dtype {array.dtype}; "
            f"pass numpy.asarray({name}, numpy.float32) if that is meant"
        )
    return array


def to_float32(array: NDArray[Any]) -> Float32s:
    """Float32 values of `array` in C order, read-only so that one compiled kernel serves all callers.

    Copies only what is not float32 in C order already. Values beyond float32 become infinite.
    """
    if array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned:
        converted = array.view()
    else:
        with np.errstate(over="ignore"):
            converted = array.astype(np.float32, order="C")
    converted.flags.writeable = False
    return converted


def result_dtype(*arrays: NDArray[Any]) -> np.dtype[Any]:
    """The dtype of the result: the inputs' own, the widest where they differ, in native byte order."""
    for array in arrays:
        if array.dtype is not FLOAT32:
            return np.dtype(np.result_type(*[array.dtype for array in arrays]).type)
    return FLOAT32


def check_out(out: object, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    """Raise unless `out` is None or an array that can take a result of `shape` and `dtype`."""
    if out is None:
        return
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, the result's, got {out.dtype}")
    if out.shape != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, the result's, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array; pass a copy of it")


def write_result(result: NDArray[Any], out: NDArray[Any] | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The `result` of a kernel as the caller asked for it: in `out`, or as a new array of `dtype`."""
    if result is out or out is None and result.dtype == dtype:
        return result
    if out is not None and out.dtype == result.dtype:
        out[...] = result
        return out
    with np.errstate(over="ignore"):
        if out is None:
            return result.astype(dtype, copy=False)
        out[...] = result
    return out


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim); heads of size 0 have scores of 0 whatever the scale."""
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def checked_softcap(softcap: object) -> float:
    """`softcap` as a float that kernels can divide by, or 0."""
    if type(softcap) is float and not softcap:
        return softcap
    softcap = number("softcap", softcap)
    if softcap != 0 and softcap < _SMALLEST_SOFTCAP:
        raise ValueError(f"softcap must be 0 (off), or positive and at least {_SMALLEST_SOFTCAP}, got {softcap}")
    return softcap
