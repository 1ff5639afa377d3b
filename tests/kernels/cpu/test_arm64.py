"""On ARM64: which instructions are used on which CPU, seen in the machine code and not only in what was chosen."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from llvmlite import binding
from numba import njit

from edgeattn.kernels.cpu.simd import COLUMNS, LANES, ROWS, WIDTH, outer_product, tile_store, tile_zero
from edgeattn.runtime import isa
from edgeattn.runtime.isa import ISA

# The CPUs of the Raspberry Pis; only the last has the dot product of ARMv8.2.
EXPECTED = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neondot"}

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64"), reason="needs an ARM64 machine; under emulation: make test-arm64")


def test_the_instruction_set_is_the_cpus():
    cpu = binding.get_host_cpu_name()
    if os.environ.get("EDGEATTN_ISA") or cpu not in EXPECTED:
        pytest.skip(f"EDGEATTN_ISA is set, or {cpu} is none of {', '.join(EXPECTED)}")
    assert ISA.name == EXPECTED[cpu]


@njit(error_model="numpy")
def _product_of_bytes(a, b, out, depth, zero):
    tile = tile_zero(ROWS, COLUMNS, zero)
    for k in range(depth):
        tile = outer_product(tile, a, k, depth, b, k * WIDTH)
    tile_store(tile, out, 0, WIDTH, LANES)


def instructions(kernel):
    """The mnemonics in a kernel's machine code."""
    assembly, = kernel.inspect_asm().values()
    return {line.split()[0] for line in assembly.splitlines() if line[:1] == "\t" and line.split()}


def test_int8_tiles_use_the_cpus_instructions():
    rows, columns = np.zeros(ROWS * 5, np.uint32), np.zeros(5 * WIDTH, np.int32)  # four bytes each
    out = np.zeros(ROWS * WIDTH, np.int32)
    _product_of_bytes(rows, columns, out, 5, out)
    used = instructions(_product_of_bytes)
    has_dot_product = "sdot" in used or "udot" in used
    assert has_dot_product == (ISA.name == "neondot")
    if ISA.name == "neon":
        assert {"saddlp", "smull"} <= used
        assert used & {"smull2", "ext"}  # upper halves where they lie, or brought down first: as LLVM likes


def test_an_instruction_set_the_cpu_lacks_is_refused():
    if "dotprod" in isa._host_features():
        pytest.skip("this CPU has every ARM64 instruction set edgeattn knows; needs one without dot product")
    done = subprocess.run([sys.executable, "-c", "import edgeattn.runtime.isa"], capture_output=True, text=True,
                          env={**os.environ, "EDGEATTN_ISA": "neondot"})
    assert done.returncode == 1
    assert "EDGEATTN_ISA must be one of neon, generic on this CPU, got 'neondot'" in done.stderr
