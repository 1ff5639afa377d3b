"""What a process does that compiles libraries: from kernels to object files."""

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
from edgeattn.runtime.worker_pool import dismiss, worker_loop
from quant.export.crosscompile import compile_for, compile_function, emit, translate_for
from quant.export.kernels import DTYPES
from quant.export.linker import DEVICE_LIBRARIES

I64 = types.int64
SERVICE = {worker_loop: 3, dismiss: 0}  # kernels of the worker pool, and the integers they take beside a task queue


def exported(kernel, dtype):
    """(function, its argument types): what C calls of a kernel, with the address of its `prebuilt.words`."""
    body = task(kernel.py_func)

    def run(words):
        w = array_at(words, 9, np.int64)
        body(array_at(w[0], w[1], np.int64), array_at(w[2], w[3], np.int64), array_at(w[4], w[5], dtype),
             array_at(w[6], w[7], np.int64), w[8])
        return np.int64(0)
    return run, (I64,)


def service(kernel, integers):
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


@global_compiler_lock
def main(dtype: str, folder: str, names: str, *kernels: str) -> None:
    """Write the object files of targets of one instruction set to a folder: of the kernels whose scratch is of a dtype.

    Kernels are written for that instruction set already: Numba does its part once, LLVM for each processor.
    """
    gc.disable()  # nearly all that is made here stays
    targets = {name: TARGETS[name] for name in names.split(",")}
    first = next(iter(targets.values()))
    compile_for(first.triple, first.cpu, first.features)
    functions = {symbol_of(entry.kernel.py_func): exported(*entry) for title, entry in ENTRIES.items()
                 if np.dtype(entry.dtype) == dtype and (not kernels or title in kernels)}
    if dtype == DTYPES[0]:
        functions |= {symbol_of(kernel.py_func): service(kernel, integers) for kernel, integers in SERVICE.items()}
    compiled = {symbol: compile_function(*each, I64, pipeline=PartCompiler) for symbol, each in functions.items()}
    for name, target in targets.items():
        translate_for(target.triple, target.cpu, target.features)
        Path(folder, f"{name}.{dtype}.o").write_bytes(emit(compiled))
        if dtype == DTYPES[0]:
            for library, absent in DEVICE_LIBRARIES.items():
                Path(folder, f"{target.machine}.{library}.o").write_bytes(emit(dict.fromkeys(absent)))


if __name__ == "__main__":
    main(*sys.argv[1:])
