"""The process that compiles kernels for targets of one instruction set, each to an object file of its own."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.runtime.arrays import array_at
from edgeattn.runtime.compiler import task
from edgeattn.runtime.jit import PartCompiler
from edgeattn.runtime.prebuilt import symbol_of
from edgeattn.runtime.targets import TARGETS
from quant.export.crosscompile import compile_for, compile_function, emit, translate_for
from quant.export.kernel_objects import SERVICE, TOGETHER, WORKER_POOL, file_of
from quant.export.linker import DEVICE_LIBRARIES

I64 = types.int64


@global_compiler_lock
def main(targets: str, folder: str, *names: str) -> None:
    """Write the objects of those names, as quant.export.kernel_objects has them, to a folder for each target there.

    Kernels are written for that instruction set already: Numba does its part once, LLVM for each processor.
    """
    gc.disable()  # nearly all that is made here stays
    rows = {name: TARGETS[name] for name in targets.split(",")}
    first = next(iter(rows.values()))
    compile_for(first.triple, first.cpu, first.features)
    objects = {name: _functions(name) for name in names}
    for target, row in rows.items():
        translate_for(row.triple, row.cpu, row.features)
        for name, functions in objects.items():
            Path(folder, target, file_of(name)).write_bytes(emit(functions))


def _functions(name):
    """What an object has: symbol -> compile result, or None."""
    if name in DEVICE_LIBRARIES:
        return dict.fromkeys(DEVICE_LIBRARIES[name])
    if name == WORKER_POOL:
        functions = {symbol_of(kernel.py_func): _service(kernel, integers) for kernel, integers in SERVICE.items()}
    else:
        entries = [ENTRIES[each] for each in ENTRIES if TOGETHER.get(each, each) == name]
        functions = {symbol_of(entry.kernel.py_func): _exported(*entry) for entry in entries}
    return {symbol: compile_function(*each, I64, pipeline=PartCompiler) for symbol, each in functions.items()}


def _exported(kernel, dtype):
    """(function, its argument types): what C calls of a kernel, with the address of its `prebuilt.words`."""
    body = task(kernel.py_func)

    def run(words):
        w = array_at(words, 9, np.int64)
        scratch, size = w[4], w[5]
        if size < 0:  # where a list has the array, and as a negative number where arrays have their address and shape
            array = array_at(array_at(scratch, 1, np.int64)[0] - size, 3, np.int64)
            scratch, size = array[0], array_at(array[2], 1, np.int64)[0]
        body(array_at(w[0], w[1], np.int64), array_at(w[2], w[3], np.int64), array_at(scratch, size, dtype),
             array_at(w[6], w[7], np.int64), w[8])
        return np.int64(0)
    return run, (I64,)


def _service(kernel, integers):
    """The same of a kernel of the worker pool."""
    body = task(kernel.py_func)
    if integers == 0:
        def run(words):
            w = array_at(words, 2, np.int64)
            body(array_at(w[0], w[1], np.int64))
            return np.int64(0)
    else:
        def run(words):
            w = array_at(words, 5, np.int64)
            return np.int64(body(array_at(w[0], w[1], np.int64), w[2], w[3], w[4]))
    return run, (I64,)


if __name__ == "__main__":
    main(*sys.argv[1:])
