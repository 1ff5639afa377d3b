"""What a machine has for the CUDA tests: packages, tools, the compiler, the card. Exits with 3 where there is none."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

PACKAGES = """numpy numba llvmlite numba-cuda cuda-bindings cuda-core nvidia-nvvm nvidia-cuda-nvcc
    nvidia-cuda-nvcc-cu12 torch cupy-cuda12x cupy-cuda13x pytest pytest-xdist hypothesis""".split()
TOOLS = ("nvidia-smi", "nvcc", "compute-sanitizer")
NO_CARD = 3


def version(package: str) -> str:
    """Of an installed package; "-" for none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def compiler() -> str:
    """The PTX version that kernels are compiled to here, or why none is."""
    try:
        from edgeattn.kernels.cuda import compile, merge

        return f"PTX {compile.to_ptx(merge.merge('float32'), (9, 0))[0].split('.version ')[1].split()[0]}"
    except Exception as error:  # noqa: BLE001 - whatever is missing is said
        return f"no PTX: {type(error).__name__}: {error}".splitlines()[0]


def main() -> int:
    """Print it; the last line is the summary."""
    print(f"Python {sys.version.split()[0]}, {sys.executable}, {len(os.sched_getaffinity(0))} cores")
    for package in PACKAGES:
        print(f"  {package} {version(package)}")
    for tool in TOOLS:
        print(f"  {tool}: {shutil.which(tool) or '-'}")
    print(f"  CUDA_HOME: {os.environ.get('CUDA_HOME', '-')}", flush=True)
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"])
    print(f"  compiler: {compiler()}", flush=True)
    from edgeattn.kernels.cuda.driver import driver, why_not

    if reason := why_not():
        print(f"no card: {reason}")
        return NO_CARD
    gpu, release = driver(), driver().version()
    print(f"{gpu.name()}, compute capability {'.'.join(map(str, gpu.capability()))}, {gpu.processors()} "
          f"multiprocessors, driver of CUDA {release // 1000}.{release % 1000 // 10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
