"""Compiles kernels of tests for another processor, for a process that is emulated.

tests/njit.py asks, by a line each: the file, the kernel's name, and of each argument the dtype and whether it is an
array. The answer is a line, too: where a library lies with the function `kernel`, which takes the address of a word for
its result and of its arguments as edgeattn.runtime.prebuilt.words has them; and the dtype of the result, or null.
"""
import functools
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.np.numpy_support import from_dtype

from edgeattn.runtime.arrays import array_at
from edgeattn.runtime.compiler import task
from edgeattn.runtime.jit import PartCompiler
from edgeattn.runtime.targets import TARGETS
from quant.export import crosscompile
from quant.export.linker import DEVICE_LIBRARIES, link


@functools.cache
def module(path):
    """What a test's file has."""
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def calling(kernel, arguments, result):
    """The function of words that calls a kernel: how many words there are follows from the arguments."""
    given, at, names = [], 1, {"kernel": kernel, "array_at": array_at, "i64": np.int64}
    for number, (dtype, is_array) in enumerate(arguments):
        names[f"t{number}"] = np.dtype(dtype).type
        given.append(f"array_at(w[{at}], w[{at + 1}], t{number})" if is_array else f"t{number}(w[{at}])")
        at += 1 + is_array
    call = f"kernel({', '.join(given)})"
    if result is not None:
        call, names["r"] = f"array_at(w[0], 1, r)[0] = {call}", np.dtype(result).type
    exec(f"def run(words):\n    w = array_at(words, {at}, i64)\n    {call}\n    return i64(0)", names)
    return names["run"]


def library(machine, path, name, arguments):
    """The bytes of a library with a kernel, and the dtype of what that returns, or None."""
    kernel = task(getattr(module(path), name).py_func)
    dtypes = [from_dtype(np.dtype(dtype)) for dtype, _ in arguments]
    given = tuple(types.Array(dtype, 1, "C") if is_array else dtype
                  for dtype, (_, is_array) in zip(dtypes, arguments, strict=True))
    kernel.compile(given)
    returned = kernel.overloads[given].signature.return_type
    result = None if returned == types.none else str(returned)
    run = crosscompile.compile_function(calling(kernel, arguments, result), (types.int64,), types.int64, PartCompiler)
    with tempfile.TemporaryDirectory() as folder:
        for needed, functions in DEVICE_LIBRARIES.items():
            Path(folder, f"{needed}.o").write_bytes(crosscompile.emit(dict.fromkeys(functions)))
        Path(folder, "kernel.o").write_bytes(crosscompile.emit({"kernel": run}))
        return link(machine, Path(folder), "kernel.so", ["kernel"], ["kernel.o"]), result


@global_compiler_lock
def main(target):
    """Answer as long as anybody asks."""
    row = TARGETS[target]
    crosscompile.compile_for(row.triple, row.cpu, row.features)
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(sys.stdin):
            content, result = library(row.machine, *json.loads(line))
            path = Path(folder, f"{number}.so")
            path.write_bytes(content)
            print(json.dumps([str(path), result]), flush=True)
