"""Calling kernels, which all take (parameters, addresses, scratch, task_queue, count): those of `entries`.

Parameters and addresses are arrays of int64, records by name inside (see records.py): what follows from shapes, masks
and weights, and where the arrays of one call lie.  The first is made once for many calls; a call writes the second.
"""
import functools
import struct

import numpy as np

from edgeattn import threads
from edgeattn.runtime import prebuilt
from edgeattn.runtime.addresses import address
from edgeattn.runtime.compiler import compiled_for


@functools.cache
def entry(kernel, dtype):
    """The compiled function of a kernel whose scratch is of this dtype."""
    source = getattr(kernel, "py_func", kernel)
    if prebuilt.has(prebuilt.symbol_of(source)):
        return prebuilt.jit(source)
    record = np.zeros(1, np.int64)
    return compiled_for(kernel, (record, record, np.zeros(1, dtype), record, 1))


class PreparedCall:
    """A call of a kernel that lacks nothing but its arrays.

    Parameters
    ----------
    kernel : dispatcher
    parameters : (n,) int64 array
        Not changed by the kernel.
    layout : dtype
        The record of the addresses.
    dtype : type
        Of the scratch.
    shared, private : int
        Elements of scratch for all threads, and for each.
    work, jobs : int
        As for `threads.run`.
    fixed : tuple of int
        The addresses with which the kernel's record ends, those of weights.
    owner : object
        Whose memory is at one of the fixed addresses, if nothing else holds it.
    """

    __slots__ = ("_dtype", "_empty", "_full", "_jobs", "_owner", "_run", "_spare", "_work", "parameters", "private",
                 "shared")

    def __init__(self, kernel, parameters, layout, dtype, shared, private, work, jobs=1, fixed=(), owner=None):
        self._run, self._dtype = entry(kernel, dtype), dtype
        self._empty = np.zeros(len(layout), np.int64)
        self._empty[len(layout) - len(fixed):] = fixed
        self._full, self._spare = len(layout) - len(fixed) - 3, []
        self.parameters, self.shared, self.private, self._work, self._jobs = parameters, shared, private, work, jobs
        self._owner = owner

    def __call__(self, first, second, third, *others, parameters=None):
        """Run it on arrays in the order of the kernel's record, each in C order or as planned, or None or left out.

        The first three are often one array, whose address is asked for once.

        parameters : a copy with what this call alone has, instead of those it was made with
        """
        a = address(first)
        b = a if second is first else address(second)
        c = b if third is second else address(third)
        count = len(others)
        full = count == self._full  # what writes all there is, but for what is fixed, leaves its record for the next
        try:
            record = self._spare.pop() if full else self._empty.copy()
        except IndexError:
            record = self._empty.copy()
        if count:
            _WRITE[3 + count](record, 0, a, b, c, *map(address, others))
        else:
            _WRITE_THREE(record, 0, a, b, c)
        given = self.parameters if parameters is None else parameters
        threads.run(self._run, (given, record), self._dtype, self.shared, self.private, self._work, self._jobs)
        if full:
            self._spare.append(record)


_WRITE = [struct.Struct(f"{count}q").pack_into for count in range(33)]
_WRITE_THREE = _WRITE[3]
