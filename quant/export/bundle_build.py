"""The process that compiles a bundle: reads a layer's file, writes object files for the linker."""

from __future__ import annotations

import sys
from pathlib import Path

from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

import edgeattn
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import StaticMultiHeadAttention
from quant.export.bundle_entry import float_entry, static_entry
from quant.export.crosscompile import compile_for, compile_function, emit
from quant.export.linker import DEVICE_LIBRARIES
from quant.export.targets import target_of


def entry_of(layer):
    """(scratch_bytes, run) of a layer."""
    if isinstance(layer, StaticMultiHeadAttention):
        return static_entry(layer.fused_kernel, layer.score_luts, layer.lut_index)
    return float_entry(layer.fused_kernel, not isinstance(layer, MultiHeadAttention))


@global_compiler_lock
def main(folder: str, name: str, prefix: str) -> None:
    """Compile ``layer.safetensors`` of a folder for the target called ``name``."""
    folder = Path(folder)
    target = target_of(name)
    scratch_bytes, run = entry_of(edgeattn.load(folder / "layer.safetensors"))
    compile_for(target.triple, target.cpu, target.features)
    sizes = (types.int64, types.int64, types.int64, types.int32)
    functions = {f"{prefix}_scratch_bytes": compile_function(scratch_bytes, sizes, types.int64),
                 f"{prefix}_run": compile_function(run, (types.int64,), types.int32)}
    (folder / "layer.o").write_bytes(emit(functions))
    for library, names in DEVICE_LIBRARIES.items():
        (folder / f"{library}.o").write_bytes(emit(dict.fromkeys(names)))


if __name__ == "__main__":
    main(*sys.argv[1:])
