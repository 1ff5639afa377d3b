"""Calling kernels, which all take (parameters, addresses, scratch, task_queue, count): those of `entries`.

Parameters and addresses are arrays of int64, records by name inside (see records.py): what follows from shapes, masks
and weights, and where the arrays of one call lie.  Both are made once for many calls: the second says where a list
is, in which a call puts its arrays, and the kernel asks these for their addresses, see `records.located`.
"""
import copy
import ctypes
import functools
import struct

import numpy as np

from edgeattn import threads
from edgeattn.runtime import prebuilt
from edgeattn.runtime.addresses import POINTER, address, items_address
from edgeattn.runtime.compiler import compiled_for
from edgeattn.runtime.prebuilt import SPARE, Kernel
from edgeattn.runtime.worker_pool import run_in_turn


@functools.cache
def entry(kernel, dtype):
    """The compiled function of a kernel whose scratch is of this dtype."""
    source = getattr(kernel, "py_func", kernel)
    if prebuilt.has(prebuilt.symbol_of(source)):
        return prebuilt.jit(source)
    record = np.zeros(1, np.int64)
    return compiled_for(kernel, (record, record, np.zeros(1, dtype), record, 1))


def bind(function, parameters, addresses, objects):
    """A compiled function with its first two arguments; `objects`: a list with the arrays of a call, and scratch.

    addresses : has SPARE more elements than the kernel reads.
    """
    if type(function) is Kernel:
        return function.bind(parameters, addresses, objects)
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

    __slots__ = ("_addresses", "_alone", "_bytes", "_dtype", "_fours", "_frames", "_function", "_jobs", "_own",
                 "_owner", "_work", "parameters", "private", "shared")

    def __init__(self, kernel, parameters, layout, dtype, shared, private, work, jobs=1, fixed=(), owner=None,
                 own=None):
        self._function, self._dtype, self._owner = entry(kernel, dtype), dtype, owner
        self._own = None if own is None else 8 * own
        self._addresses = bytes(8 * (len(layout) - len(fixed))) + _WORDS[len(fixed)].pack(*fixed)
        self._frames, self._fours = [], []
        self.parameters, self.shared, self.private, self._work, self._jobs = parameters, shared, private, work, jobs
        self._alone = shared + private
        self._bytes = self._alone * np.dtype(dtype).itemsize

    def holding(self, arrays):
        """The same with arrays in some of its places, which its calls leave out; arrays: {place: array}."""
        words = bytearray(self._addresses)
        for place, array in arrays.items():
            _WORDS[1].pack_into(words, 8 * place, address(array))
        return self._with(bytes(words), (self._owner, arrays))

    def ending(self, fixed, owner=None):
        """The same with other fixed addresses, as many."""
        words = _WORDS[len(fixed)].pack(*fixed)
        return self._with(self._addresses[:-len(words)] + words, owner)

    def _with(self, addresses, owner):
        other = copy.copy(self)
        other._addresses, other._frames, other._fours, other._owner = addresses, [], [], owner
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
        frame.objects[:3] = a, b, c
        frame.objects[3:-1] = others
        if own:
            _WRITE[len(own)](frame.parameters, self._own, *own)
        if frame.argument is None or self._work >= threads.SMALLEST_SHARED_WORK:
            threads.run(frame.run, self._dtype, self.shared, self.private, self._work, self._jobs)
        else:
            try:  # `BoundCall`, written out: a call is a fixed number of calls of Python, see tests/test_prepared.py
                memory = _SCRATCH.pop()
            except IndexError:
                memory = threads.borrow(self._alone, self._dtype)
            if memory.nbytes < self._bytes:
                _SCRATCH.append(memory)
                memory = threads.borrow(self._alone, self._dtype)
            frame.objects[-1] = memory
            frame.function(frame.argument)
            if len(_SCRATCH) < _KEPT:
                _SCRATCH.append(memory)
        frame.objects[:] = frame.nothing
        self._frames.append(frame)

    __call__ = run

    def run_four(self, a, b, c, d):
        """`run` on four arrays, which most calls have, with as few steps as there can be."""
        try:
            frame = self._fours.pop()
        except IndexError:
            frame = _Frame(self, 1)
        objects = frame.objects
        objects[0] = a
        objects[1] = b
        objects[2] = c
        objects[3] = d
        if frame.argument is None or self._work >= threads.SMALLEST_SHARED_WORK:
            threads.run(frame.run, self._dtype, self.shared, self.private, self._work, self._jobs)
        else:
            try:
                memory = _SCRATCH.pop()
            except IndexError:
                memory = threads.borrow(self._alone, self._dtype)
            if memory.nbytes < self._bytes:
                _SCRATCH.append(memory)
                memory = threads.borrow(self._alone, self._dtype)
            objects[4] = memory
            frame.function(frame.argument)
            if len(_SCRATCH) < _KEPT:
                _SCRATCH.append(memory)
        objects[:] = frame.nothing
        self._fours.append(frame)

    def on(self, *arrays):
        """A function that runs it on these arrays, as often as it is called: by one caller at a time."""
        return BoundCall(self, arrays)


class BoundCall:
    """A `PreparedCall` and the arrays that it is run on."""

    __slots__ = "dtype", "frame", "jobs", "private", "shared", "work"

    def __init__(self, call, arrays):
        self.frame = _Frame(call, len(arrays) - 3)
        self.frame.objects[:-1] = arrays
        self.dtype, self.shared, self.private, self.work, self.jobs = (
            call._dtype, call.shared, call.private, call._work, call._jobs)

    def __call__(self):
        """Run it."""
        frame = self.frame
        if frame.argument is None or self.is_shared:
            threads.run(frame.run, self.dtype, self.shared, self.private, self.work, self.jobs)
            return
        memory = frame.objects[-1] = threads.borrow(self.shared + self.private, self.dtype)
        frame.function(frame.argument)
        threads.give_back(memory)

    @property
    def is_shared(self):
        """Whether other threads may take part."""
        return self.work >= threads.SMALLEST_SHARED_WORK

    def scratch_bytes(self, count):
        """The size of the scratch where `count` threads take part in what is shared."""
        return (self.shared + (count if self.is_shared else 1) * self.private) * np.dtype(self.dtype).itemsize


def in_turn(steps):
    """Functions without arguments, to be called one after the other, as fewer that do the same.

    Kernels of a library that follow upon each other become one call, as long as all of them together are not so long
    that signals would have to end it: between two kernels Python takes microseconds, for they leave nothing of it in
    the processor's caches.
    """
    if not prebuilt.has(prebuilt.symbol_of(_RUN_IN_TURN)):
        return list(steps)
    out, some, work = [], [], 0
    for step in steps:
        native = type(step) is BoundCall and step.frame.argument is not None and step.work < threads.LONG_WORK
        if some and (not native or work + step.work >= threads.LONG_WORK):
            out.append(some[0] if len(some) == 1 else CallsInTurn(some))
            some, work = [], 0
        if native:
            some.append(step)
            work += step.work
        else:
            out.append(step)
    if some:
        out.append(some[0] if len(some) == 1 else CallsInTurn(some))
    return out


class CallsInTurn:
    """Bound calls of a library's kernels as one: by one caller at a time."""

    __slots__ = "_argument", "_bytes", "_calls", "_function", "_held", "_memory", "_task_queue"

    def __init__(self, calls):
        self._calls, self._function = calls, prebuilt.jit(_RUN_IN_TURN).without_result
        frames = [each.frame for each in calls]
        pairs = np.array([(ctypes.cast(each.function, ctypes.c_void_p).value, each.argument.value) for each in frames])
        given = np.array(prebuilt.words((pairs,)), np.int64)
        self._argument, self._held = ctypes.c_int64(address(given)), (pairs, given)
        self._task_queue = self._memory = None

    def __call__(self):
        """Run them."""
        task_queue, count = threads.serving()
        if task_queue is not self._task_queue:
            self._task_queue = None  # until all of them know it: a signal's handler may raise between two
            for each in self._calls:
                if each.is_shared:
                    each.frame.run.serve(task_queue, count)
            self._task_queue, self._bytes = task_queue, max(each.scratch_bytes(count) for each in self._calls)
        try:
            memory = _SCRATCH.pop()
        except IndexError:
            memory = threads.borrow(self._bytes, np.uint8)
        if memory.nbytes < self._bytes:
            _SCRATCH.append(memory)
            memory = threads.borrow(self._bytes, np.uint8)
        if memory is not self._memory:
            self._memory = None
            for each in self._calls:
                each.frame.objects[-1] = memory
            self._memory = memory
        self._function(self._argument)
        threads.give_back(memory)


class _Frame:
    """What one call at a time writes: its arrays, for `located`, and, where it has some of its own, its parameters."""

    __slots__ = ("addresses", "argument", "count", "function", "nothing", "objects", "parameters", "run")

    def __init__(self, call, count):
        self.count, self.nothing, parameters = count, _NOTHING[4 + count], call.parameters
        self.objects = list(self.nothing)
        given = _WORDS[4].pack(POINTER, id(None), items_address(self.objects), 3 + count)
        # A copy, which keeps no view of the bytes.
        self.addresses = np.frombuffer(call._addresses + given + _SPARE, np.int64).copy()
        if call._own is not None:
            self.parameters = bytearray(parameters)
            parameters = np.frombuffer(self.parameters, np.int64)
        self.run = bind(call._function, parameters, self.addresses, self.objects)
        self.function, self.argument = getattr(self.run, "function", None), getattr(self.run, "argument", None)


_RUN_IN_TURN = getattr(run_in_turn, "py_func", run_in_turn)
_SPARE = bytes(8 * SPARE)
_WORDS = [struct.Struct(f"{count}q") for count in range(33)]
_WRITE = [words.pack_into for words in _WORDS]
_NOTHING = [(None,) * count for count in range(33)]
_SCRATCH, _KEPT = threads.scratch, threads.KEPT
