"""What a process does that compiles kernels, of wheels and of bundles: from kernels to object files."""

from __future__ import annotations

import gc
import json
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
from quant.export.kernel_objects import WORKER_POOL, file_of
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


def functions_of(title):
    """The functions of an entry, or of the worker pool, by the names C calls them by."""
    if title == WORKER_POOL:
        return {symbol_of(kernel.py_func): service(kernel, integers) for kernel, integers in SERVICE.items()}
    return {symbol_of(ENTRIES[title].kernel.py_func): exported(*ENTRIES[title])}


@global_compiler_lock
def main(names: str, folder: str, contents: str) -> None:
    """Write object files for targets of one instruction set, for each to a folder of its own.

    contents : {name of an object: titles of what it holds} in JSON, as quant.export.kernel_objects has them

    Kernels are written for that instruction set already: Numba does its part once, LLVM for each processor.
    """
    gc.disable()  # nearly all that is made here stays
    targets = {name: TARGETS[name] for name in names.split(",")}
    first = next(iter(targets.values()))
    compile_for(first.triple, first.cpu, first.features)
    compiled = {name: dict.fromkeys(DEVICE_LIBRARIES[name]) if name in DEVICE_LIBRARIES else
                {symbol: compile_function(*each, I64, pipeline=PartCompiler)
                 for title in titles for symbol, each in functions_of(title).items()}
                for name, titles in json.loads(contents).items()}
    for target, row in targets.items():
        translate_for(row.triple, row.cpu, row.features)
        for name, functions in compiled.items():
            Path(folder, target, file_of(name)).write_bytes(emit(functions))


if __name__ == "__main__":
    main(*sys.argv[1:])
