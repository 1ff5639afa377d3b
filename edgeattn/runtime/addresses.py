"""Where an array's elements lie in memory, found quickly: what kernels are given instead of arrays."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

# Behind the head that every object has: in NumPy's C structure of an array, and in Python's of a list, whose elements
# stay where they are as long as their number does.
POINTER, ITEMS = object.__basicsize__, object.__basicsize__ + 8
try:
    _memory = (ctypes.c_int64 * 2**50).from_address(0)
except (MemoryError, OverflowError, ValueError):  # addresses of fewer bits
    _memory = None


def address(array: NDArray[Any] | None) -> int:
    """The address of an array's first element, a tenth as costly as `array.ctypes.data`; 0 of None."""
    return 0 if array is None else _memory[id(array) + POINTER >> 3]


def items_address(objects: list[Any]) -> int:
    """Where a list has its elements, the addresses of objects; until their number changes."""
    return _memory[id(objects) + ITEMS >> 3]


_probe = np.zeros(3)
_listed = [_probe]
if (_memory is None or address(_probe) != _probe.ctypes.data or _memory[items_address(_listed) >> 3] != id(_probe)
        or _memory[_memory[id(_probe) + POINTER + 16 >> 3] >> 3] != _probe.size):
    raise ImportError("edgeattn needs CPython on a processor of 64 bits: kernels read an array where id() says it is")
