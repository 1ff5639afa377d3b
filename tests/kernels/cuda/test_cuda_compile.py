"""Kernels compile to machine code for Jetson Orin (sm_87) and Hopper (sm_90) within the limits of cuda_limits.py.

Needs no GPU, but numba-cuda and ptxas: `make test-cuda-offline` installs both (the extra cuda-offline).
"""
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from cuda_limits import CAPABILITIES, LIMITS

from edgeattn.kernels.cuda.driver import _installed


def ptxas():
    """The assembler: of the nvidia-cuda-nvcc wheel, or of a toolkit on PATH; None without one."""
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/ptxas"))
    return str(wheels[-1]) if wheels else shutil.which("ptxas")


pytestmark = pytest.mark.skipif(
    not (_installed("numba_cuda") and ptxas()),
    reason="numba-cuda and ptxas are not both installed: `make test-cuda-offline` has them")


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: limits[0].name)
def test_kernel_keeps_its_limits(limits, capability, tmp_path):
    from edgeattn.kernels.cuda import compile

    kernel, registers, shared, wide_products = limits
    text, entry = compile.to_ptx(kernel, capability)
    assert f".entry {entry}(" in text
    path = tmp_path / "kernel.ptx"
    path.write_text(text)
    done = subprocess.run([ptxas(), "-v", "-arch", f"sm_{capability[0]}{capability[1]}", "-o", str(tmp_path / "kernel.cubin"),
                           str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert int(re.search(r"Used (\d+) registers", done.stderr).group(1)) <= registers[CAPABILITIES.index(capability)]
    assert kernel.shared == shared
    assert len(re.findall(r"mul\.(?:lo|hi)\.[su]64", text)) <= wide_products
    assert (tmp_path / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"
