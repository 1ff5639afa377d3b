"""Where an array's elements lie in memory, found quickly: what kernels are given instead of arrays."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

POINTER = object.__basicsize__  # in NumPy's C structure of an array: behind the head that every object has
try:
    _memory = (ctypes.c_int64 * 2**50).from_address(0)
except (MemoryError, OverflowError, ValueError):  # addresses of fewer bits
    _memory = None


def address(array: NDArray[Any] | None) -> int:
    """The address of an array's first element, a tenth as costly as `array.ctypes.data`; 0 of None."""
    return 0 if array is None else _memory[id(array) + POINTER >> 3]


_probe = np.zeros(1)
if _memory is None or address(_probe) != _probe.ctypes.data:
    raise ImportError("edgeattn needs CPython on a processor of 64 bits: kernels read an array where id() says it is")
