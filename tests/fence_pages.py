"""Arrays between pages that may not be touched, and everything that kernels read and write from there: see fence.py."""
import contextlib
import ctypes
import mmap

import numpy as np

from edgeattn import threads

PAGE = mmap.PAGESIZE
NAN, BYTES = np.array([np.nan], "<f4").tobytes(), b"\xa5"
_READ, _NOTHING = mmap.PROT_READ, 0
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_empty = np.empty


def permit(address, size, what):
    """Let so many bytes, whole pages, be read, be read and written, or not be touched."""
    if _mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), what):
        raise OSError(ctypes.get_errno(), "mprotect")


class Plain:
    """Arrays as NumPy makes them, and cleared scratch."""

    def input(self, array):
        return array

    def storage(self, array):
        return array

    def make(self, shape, dtype):
        return np.zeros(shape, dtype)


class Fenced:
    """Arrays between two pages that may not be touched, at the end or at the start of what lies between."""

    def __init__(self, at_end, filling):
        self._at_end, self._filling = at_end, filling

    def _between(self, nbytes):
        """(bytes, address of the pages they lie in, size of these)."""
        size = -(-max(nbytes, 1) // PAGE) * PAGE
        memory = mmap.mmap(-1, size + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + PAGE
        permit(start - PAGE, PAGE, _NOTHING)
        permit(start + size, PAGE, _NOTHING)
        first = PAGE + (size - nbytes if self._at_end else 0)
        return np.frombuffer(memory, np.uint8)[first:first + nbytes], start, size

    def _copy(self, array):
        """(a copy in the same order of axes, and where its pages are)."""
        order = np.argsort([-step for step in array.strides], kind="stable")
        raw, *pages = self._between(array.nbytes)
        copy = raw.view(array.dtype).reshape([array.shape[axis] for axis in order]).transpose(np.argsort(order))
        copy[...] = array
        return copy, pages

    def input(self, array):
        """A copy that may only be read; None of None."""
        if array is None:
            return None
        copy, pages = self._copy(array)
        permit(*pages, _READ)
        return copy

    def storage(self, array):
        """Poison of the shape and kind of `array`."""
        return self.make(array.shape, array.dtype)

    def make(self, shape, dtype):
        """Poison."""
        dtype = np.dtype(dtype)
        raw, *_ = self._between(int(np.prod(shape)) * dtype.itemsize)
        filling = np.frombuffer(self._filling, np.uint8)
        raw[:] = np.resize(filling[:1] if dtype.kind == "b" else filling, raw.size)
        return raw.view(dtype).reshape(shape)


@contextlib.contextmanager
def everything_from(place):
    """Packed weights, scratch, and what `np.empty` makes come from `place`."""
    def empty(shape, dtype=float, order="C", **others):
        if np.dtype(dtype).hasobject or order != "C" or others:
            return _empty(shape, dtype, order, **others)
        return place.make(shape, dtype)

    kept = threads.aligned, threads.borrow, threads.give_back
    threads.aligned, threads.borrow = place.make, place.make
    threads.give_back = lambda array: None
    if isinstance(place, Fenced):  # not where kernels are compiled: Numba knows the function by its identity
        np.empty = empty
    try:
        yield
    finally:
        threads.aligned, threads.borrow, threads.give_back = kept
        np.empty = _empty
