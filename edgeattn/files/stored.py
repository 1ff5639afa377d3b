"""Tensors that still lie in their file: shapes are compared first, values are read when they are wanted.

A few bytes of a file can ask for any amount of memory: a compressed member of zeros, a shape that nothing backs. So
what a file may unpack to is bounded by its size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np

# Trained float32 weights compress to about nine tenths. What is smaller than FLOOR may compress as it likes.
EXPANSION = 20
FLOOR = 2**26
_MOST_AXES = 32  # of a NumPy 1 array
_LONGEST_EMPTY = 2**16


class Budget:
    """How many bytes of tensors may come out of a file.

    Parameters
    ----------
    file_size : int
    """

    def __init__(self, file_size: int):
        self.limit = max(FLOOR, EXPANSION * file_size)
        self._left = self.limit

    def nbytes(self, shape, itemsize: int, what: str) -> int:
        """Bytes of a tensor, once its shape is found to be one that a file of this size can have.

        A tensor without elements may have no long axes, along which other arrays would be made.
        """
        if len(shape) > _MOST_AXES or any(type(axis) is not int or axis < 0 for axis in shape):
            raise ValueError(f"{what} must have a shape of at most {_MOST_AXES} axes, none negative, got "
                             f"{str(list(shape[:8]))[:100]}")
        if 0 in shape and math.prod(max(axis, 1) for axis in shape) > _LONGEST_EMPTY:
            raise ValueError(f"{what} must have a shape that fits its data, got {str(list(shape))[:100]}")
        self._refuse_beyond(self.limit, math.prod(shape) * itemsize, what)
        return math.prod(shape) * itemsize

    def take(self, nbytes: int, what: str) -> None:
        """Count bytes that are about to be read."""
        self._refuse_beyond(self._left, nbytes, what)
        self._left -= nbytes

    def _refuse_beyond(self, most: int, nbytes: int, what: str) -> None:
        if nbytes > most:
            takes = f"{nbytes:,}" if nbytes < 2**63 else "2^63 and more"
            raise ValueError(f"{what} takes {takes} bytes, and a file of this size may unpack to {self.limit:,}; "
                             "where that is right, save it without compression")


class StoredTensor:
    """A tensor in a file.

    Parameters
    ----------
    shape : tuple of int
    dtype : np.dtype
        That ``read`` gives.
    read : callable
        () -> array
    """

    def __init__(self, shape: tuple[int, ...], dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("a tensor in a file is always copied, got copy=False")
        return self.read().astype(self.dtype if dtype is None else dtype, copy=False)


def file_size(file) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def widened(halves: np.ndarray) -> np.ndarray:
    """bfloat16, given as uint16, as the float32 whose upper halves they are."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
