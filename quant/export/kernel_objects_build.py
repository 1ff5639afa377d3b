"""The process that compiles kernels for a target, each to an object file of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from numba.core.compiler_lock import global_compiler_lock

from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.runtime.prebuilt import symbol_of
from edgeattn.runtime.targets import TARGETS
from quant.export.crosscompile import compile_for, compile_function, emit
from quant.export.kernel_objects import TOGETHER, WORKER_POOL, file_of
from quant.export.kernels_build import I64, SERVICE, exported, service
from quant.export.linker import DEVICE_LIBRARIES


@global_compiler_lock
def main(target: str, folder: str, *names: str) -> None:
    """Write the objects of those names, as quant.export.kernel_objects has them, to a folder."""
    row = TARGETS[target]
    compile_for(row.triple, row.cpu, row.features)
    for name in names:
        if name in DEVICE_LIBRARIES:
            functions = dict.fromkeys(DEVICE_LIBRARIES[name])
        else:
            functions = {symbol: compile_function(*each, I64) for symbol, each in _functions(name).items()}
        Path(folder, file_of(name)).write_bytes(emit(functions))


def _functions(name):
    """The functions of an object that is of kernels."""
    if name == WORKER_POOL:
        return {symbol_of(kernel.py_func): service(kernel, integers) for kernel, integers in SERVICE.items()}
    entries = [ENTRIES[each] for each in ENTRIES if TOGETHER.get(each, each) == name]
    return {symbol_of(entry.kernel.py_func): exported(*entry) for entry in entries}


if __name__ == "__main__":
    main(*sys.argv[1:])
