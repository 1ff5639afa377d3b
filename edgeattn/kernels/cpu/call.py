"""Calling kernels, which all take (parameters, addresses, scratch, task_queue, count): those of `entries`.

Parameters and addresses are arrays of int64, records by name inside (see records.py): what follows from shapes, masks
and weights, and where the arrays of one call lie.  The first is made once for many calls; of the second a call writes
which arrays it has, and the kernel asks these for their addresses: see `records.located`.
"""
import functools
import struct

import numpy as np

from edgeattn import threads
from edgeattn.runtime import prebuilt
from edgeattn.runtime.addresses import POINTER, address
from edgeattn.runtime.compiler import compiled_for
from edgeattn.runtime.prebuilt import Kernel


@functools.cache
def entry(kernel, dtype):
    """The compiled function of a kernel whose scratch is of this dtype."""
    source = getattr(kernel, "py_func", kernel)
    if prebuilt.has(prebuilt.symbol_of(source)):
        return prebuilt.jit(source)
    record = np.zeros(1, np.int64)
    return compiled_for(kernel, (record, record, np.zeros(1, dtype), record, 1))


def bind(function, parameters, addresses):
    """A compiled function with its first two arguments, of which each call writes the second anew."""
    if type(function) is Kernel:
        return function.bind(parameters, addresses)
    return functools.partial(function, parameters, addresses)


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
    own : int, optional
        The position of the first parameter that each call has of its own.
    """

    __slots__ = ("_addresses", "_dtype", "_frames", "_function", "_jobs", "_own", "_owner", "_work", "parameters",
                 "private", "shared")

    def __init__(self, kernel, parameters, layout, dtype, shared, private, work, jobs=1, fixed=(), owner=None,
                 own=None):
        self._function, self._dtype, self._owner = entry(kernel, dtype), dtype, owner
        self._own = None if own is None else 8 * own
        self._addresses = bytes(8 * (len(layout) - len(fixed))) + _WORDS[len(fixed)].pack(*fixed)
        self._frames = []
        self.parameters, self.shared, self.private, self._work, self._jobs = parameters, shared, private, work, jobs

    def holding(self, arrays):
        """The same with arrays in some of its places, which its calls leave out; arrays: {place: array}."""
        words = bytearray(self._addresses)
        for place, array in arrays.items():
            _WORDS[1].pack_into(words, 8 * place, address(array))
        other = object.__new__(PreparedCall)
        other._addresses, other._frames, other._owner = bytes(words), [], (self._owner, arrays)
        other._function, other._dtype, other._own, other._work, other._jobs = (
            self._function, self._dtype, self._own, self._work, self._jobs)
        other.parameters, other.shared, other.private = self.parameters, self.shared, self.private
        return other

    def run(self, a, b, c, *others, own=()):
        """Run it on arrays in the order of the kernel's record, each in C order or as planned, or None or left out.

        own : parameters that this call alone has, one after another
        """
        count = len(others)
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(self, count)
        if frame.count != count:
            frame = _Frame(self, count)
        if count == 1:  # written out, for what most calls have
            _WRITE_FOUR(frame.addresses, frame.at, id(a), id(b), id(c), id(others[0]))
        elif not count:
            _WRITE_THREE(frame.addresses, frame.at, id(a), id(b), id(c))
        elif count == 2:
            _WRITE_FIVE(frame.addresses, frame.at, id(a), id(b), id(c), id(others[0]), id(others[1]))
        else:
            _WRITE[3 + count](frame.addresses, frame.at, id(a), id(b), id(c), *map(id, others))
        if own:
            _WRITE[len(own)](frame.parameters, self._own, *own)
        threads.run(frame.run, self._dtype, self.shared, self.private, self._work, self._jobs)
        self._frames.append(frame)

    __call__ = run

    def on(self, *arrays):
        """A function that runs it on these arrays, as often as it is called: by one caller at a time."""
        frame = _Frame(self, len(arrays) - 3)
        _WRITE[len(arrays)](frame.addresses, frame.at, *map(id, arrays))
        run = functools.partial(threads.run, frame.run, self._dtype, self.shared, self.private, self._work, self._jobs)
        run.arrays = arrays  # which must live as long
        return run


class _Frame:
    """What one call at a time writes: its arrays, for `located`, and, where it has some of its own, its parameters."""

    __slots__ = ("addresses", "at", "count", "parameters", "run")

    def __init__(self, call, count):
        self.count, self.at, parameters = count, len(call._addresses) + len(_OF_OBJECTS), call.parameters
        self.addresses = bytearray(call._addresses + _OF_OBJECTS + bytes(8 * (3 + count)))
        if call._own is not None:
            self.parameters = bytearray(parameters)
            parameters = np.frombuffer(self.parameters, np.int64)
        self.run = bind(call._function, parameters, np.frombuffer(self.addresses, np.int64))


_WORDS = [struct.Struct(f"{count}q") for count in range(33)]
_WRITE = [words.pack_into for words in _WORDS]
_WRITE_THREE, _WRITE_FOUR, _WRITE_FIVE = _WRITE[3:6]
_OF_OBJECTS = _WORDS[2].pack(POINTER, id(None))
