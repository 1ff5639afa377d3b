"""numba.njit for kernels of tests; where TEST_COMPILER names a Python outside of an emulator, that one compiles them.

An emulated processor takes some 20 times as long for that, most of a test's time. tools/arm64/run.py sets
TEST_COMPILER, and TEST_TARGET to the processor to compile for; tests/njit_outside.py runs there.
"""
import atexit
import ctypes
import functools
import inspect
import json
import os
import subprocess

import numpy as np
from places import ROOT, TESTS

from edgeattn.runtime.targets import TARGETS

COMPILER = os.environ.get("TEST_COMPILER")
# The instruction set is chosen before anything is imported that is written for one.
OUTSIDE = ("import sys; from edgeattn.runtime import isa; isa.use(sys.argv[2]); "
           "from njit_outside import main; main(sys.argv[1])")


class Compiled:
    """What a kernel compiled outside is called by: with arrays of one dimension in C order, and integers.

    Parameters
    ----------
    function : callable
        The kernel's source, at the top of a module.
    """

    def __init__(self, function):
        self.py_func, self._functions = function, {}

    def __call__(self, *arguments):
        types = tuple(type_of(argument) for argument in arguments)
        if types not in self._functions:
            self._functions[types] = compile_outside(self.py_func, types)
        function, result = self._functions[types]
        words = []
        for argument in arguments:
            words += (argument.ctypes.data, argument.size) if isinstance(argument, np.ndarray) else (int(argument),)
        returned = np.zeros(1, result) if result else np.zeros(1)
        words = np.array([returned.ctypes.data, *words], np.int64)
        function(ctypes.c_int64(words.ctypes.data))
        return returned[0] if result else None


def type_of(argument):
    """The dtype of an argument, and whether it is an array."""
    if isinstance(argument, np.ndarray):
        assert argument.ndim == 1 and argument.flags.c_contiguous, "takes arrays of one dimension in C order"
        return str(argument.dtype), True
    assert isinstance(argument, (int, np.integer)), f"takes arrays and integers, got {type(argument).__name__}"
    return str(np.asarray(argument).dtype), False


@functools.cache
def outside():
    """The process that compiles, which ends with this one."""
    target = os.environ["TEST_TARGET"]
    started = subprocess.Popen(
        [COMPILER, "-c", OUTSIDE, target, TARGETS[target].isa], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**{name: value for name, value in os.environ.items() if not name.startswith(("EDGEATTN_", "NUMBA_", "TEST_"))},
             "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "EDGEATTN_JIT": "1"})
    atexit.register(started.communicate)
    return started


def compile_outside(function, types):
    """The library's function for a kernel and types of arguments, and the dtype of what it returns, or None."""
    process = outside()
    print(json.dumps([inspect.getsourcefile(function), function.__qualname__, types]), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        outside.cache_clear()  # the next kernel may be better
        raise RuntimeError(f"{COMPILER} could not compile {function.__qualname__} for {types}")
    path, result = json.loads(answer)
    library = ctypes.CDLL(path)
    os.unlink(path)
    return library["kernel"], result


if COMPILER:
    def njit(function=None, **_options):
        """The kernel, which is compiled outside when it is called."""
        return Compiled(function) if function else Compiled
else:
    from numba import njit  # noqa: F401
