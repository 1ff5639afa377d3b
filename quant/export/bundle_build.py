"""The process that compiles what C programs call of a bundle: reads a layer's file, writes an object file."""

from __future__ import annotations

import sys
from pathlib import Path

from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

import edgeattn
from edgeattn.runtime.targets import TARGETS
from quant.export.bundle_entry import entry_of
from quant.export.crosscompile import compile_for, compile_function, emit


@global_compiler_lock
def main(target: str, folder: str, prefix: str) -> None:
    """Compile the functions for ``layer.safetensors`` of a folder."""
    folder = Path(folder)
    row = TARGETS[target]
    scratch_bytes, run = entry_of(edgeattn.load(folder / "layer.safetensors"))
    compile_for(row.triple, row.cpu, row.features)
    sizes = (types.int64, types.int64, types.int64, types.int32)
    functions = {f"{prefix}_scratch_bytes": compile_function(scratch_bytes, sizes, types.int64),
                 f"{prefix}_run": compile_function(run, (types.int64,), types.int32)}
    (folder / "c.o").write_bytes(emit(functions))


if __name__ == "__main__":
    main(*sys.argv[1:])
