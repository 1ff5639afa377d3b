"""The instruction sets edgeattn knows, and which one this process uses.

One row per instruction set, and a file of its name in edgeattn/kernels/cpu/simd/instruction_sets.  `lanes` is the
number of 32-bit lanes of a vector register; `rows` by `columns` is the register tile (rows of broadcast operands by
column vectors); `offset` is what the packing adds to an int8 operand before it meets an int8 one: 128 where the
instruction multiplies unsigned by signed, 0 where both are signed.  `steps` is how many updates of a float32 tile, and
of a tile of bytes, stand in one turn of the loop: as many as save computations of addresses, and as few as leave the
compiler no room to load ahead until it runs out of registers.
"""
import os
import sys
from typing import NamedTuple

from edgeattn.runtime import prebuilt, processor


class InstructionSet(NamedTuple):
    """One row of the table; the fields are described above."""

    name: str
    lanes: int
    rows: int
    columns: int
    offset: int
    steps: tuple
    x86: bool
    needs: tuple
    amx: bool = False  # products of bytes by the matrix unit


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")

TABLES = (
    InstructionSet("avx512amx", 16, 8, 2, 128, (4, 4), True,
                   (*_AVX512, "avx512vbmi", "amx-tile", "amx-int8"), True),
    InstructionSet("avx512vbmi", 16, 8, 2, 128, (4, 4), True, (*_AVX512, "avx512vbmi")),
    InstructionSet("avx512vnni", 16, 8, 2, 128, (4, 4), True, _AVX512),
    InstructionSet("avx2vnni", 8, 4, 2, 128, (4, 4), True, ("avx2", "fma", "avxvnni")),
    InstructionSet("avx2", 8, 4, 2, 128, (4, 1), True, ("avx2", "fma")),
    InstructionSet("neondot", 4, 8, 2, 0, (4, 4), False, ("neon", "dotprod")),
    InstructionSet("neon", 4, 8, 2, 0, (4, 1), False, ("neon",)),
    InstructionSet("generic", 4, 4, 2, 128, (1, 1), False, ()),
)


def runnable(features):
    """Instruction sets, best first, whose every needed feature is among `features`."""
    features = set(features)
    return [table for table in TABLES if features.issuperset(table.needs)]


def choose(forced, features):
    """The instruction set to use: the best runnable one, or the one named by `forced`.

    Raises
    ------
    ValueError
        If `forced` names no instruction set, or one this CPU cannot execute.
    """
    possible = runnable(features)
    if not forced:
        return possible[0]
    for table in possible:
        if table.name == forced:
            return table
    raise ValueError(
        f"EDGEATTN_ISA must be one of {', '.join(t.name for t in possible)} on this CPU, got {forced!r}; "
        "unset it to use the best one")


_HWCAP_ASIMDDP = 1 << 20  # arm64 Linux: asm/hwcap.h


def arm64_features(hardware, cpu):
    """What LLVM's list of features lacks on ARM64.

    Parameters
    ----------
    hardware : int
        The bits of AT_HWCAP.
    cpu : str
        LLVM's name of the CPU. LLVM uses the dot product where the name implies it, so not for an unknown CPU.
    """
    found = ["neon"]  # part of every ARMv8-A core
    if hardware & _HWCAP_ASIMDDP and cpu != "generic":
        found.append("dotprod")
    return found


def _host_features():
    import platform

    prebuilt.require_compiler()
    from llvmlite import binding
    try:
        found = [name for name, present in binding.get_host_cpu_features().items() if present]
    except RuntimeError:  # LLVM cannot tell on this platform
        found = []
    if not processor.may_use_matrix_unit():
        found = [name for name in found if not name.startswith("amx")]
    if platform.machine().lower() in ("aarch64", "arm64"):
        found += arm64_features(processor.hardware_bits(), binding.get_host_cpu_name())
    return found


def _chosen():
    if prebuilt.LIBRARY is not None:
        return next(table for table in TABLES if table.name == prebuilt.LIBRARY.isa)
    return choose(os.environ.get("EDGEATTN_ISA"), _host_features())


ISA = _chosen()


def use(name):
    """Let kernels be compiled for the instruction set `name`, whether or not this CPU has it.

    For a process that compiles for another machine and runs nothing of it. The kernels read `ISA` when their modules
    are imported, so this comes first.

    Raises
    ------
    RuntimeError
        If kernels have been imported already.
    """
    global ISA
    if "edgeattn.runtime.jit" in sys.modules:
        raise RuntimeError(f"isa.use({name!r}) must come before the first import of a kernel")
    ISA = next(table for table in TABLES if table.name == name)
