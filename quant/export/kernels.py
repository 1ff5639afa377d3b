"""Every kernel of the device package as machine code for targets: the libraries that edgeattn.runtime.prebuilt calls.

``python -m quant.export.kernels FOLDER [TARGET or MACHINE ...]`` compiles them, in processes of their own: what Numba
compiles from then on is for another machine. Without a target, that of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.runtime import prebuilt, sources
from edgeattn.runtime.targets import TARGETS
from quant.export.linker import DEVICE_LIBRARIES, link
from quant.export.targets import host_target

if TYPE_CHECKING:
    from collections.abc import Sequence

# The dtypes of kernels' scratch, by which they are compiled in two processes: those of one have more in common.
DTYPES = "float32", "int32"
_BUILD = ("import sys; from edgeattn.runtime import isa; isa.use(sys.argv[1]); "
          "from quant.export.kernels_build import main; main(*sys.argv[2:])")


def build(targets: Sequence[str], folder: Path, kernels: Sequence[str] = (), jobs: int | None = None) -> None:
    """Write the libraries of targets, and what tells them from others, to a folder.

    Parameters
    ----------
    targets : sequence of str
        Names in TARGETS.
    folder : Path
        Made where it is missing.
    kernels : sequence of str
        Names in edgeattn.kernels.cpu.entries.ENTRIES; all without.
    jobs : int, optional
        How many processes compile at a time; one a core without.

    Raises
    ------
    RuntimeError
        With what was said where one could not be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alike: dict[tuple[str, str], list[str]] = {}  # of one instruction set: compiled up to LLVM's language together
    for name in targets:
        alike.setdefault((TARGETS[name].machine, TARGETS[name].isa), []).append(name)
    # Those for two processors take longest.
    work = sorted(product(alike.items(), DTYPES), key=lambda each: -len(each[0][1]))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = Path(temporary)
        for _ in pool.map(lambda each: _compile(each[0][0][1], each[0][1], each[1], objects, kernels), work):
            pass
        for name in targets:
            machine = TARGETS[name].machine
            for library in DEVICE_LIBRARIES:
                shutil.copy(objects / f"{machine}.{library}.o", objects / f"{library}.o")
            content = link(machine, objects, f"{name}{prebuilt.SUFFIX}", ["edgeattn_*"],
                           [f"{name}.{dtype}.o" for dtype in DTYPES])
            (folder / f"{name}{prebuilt.SUFFIX}").write_bytes(content)
    checksums = {name: prebuilt.checksum((folder / f"{name}{prebuilt.SUFFIX}").read_bytes()) for name in targets}
    about = {"stamp": sources.stamp(), "libraries": checksums}
    (folder / prebuilt.ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def _compile(isa: str, targets: Sequence[str], dtype: str, folder: Path, kernels: Sequence[str]) -> None:
    """Compile the object files of targets with one instruction set, in a process of its own."""
    command = [sys.executable, "-c", _BUILD, isa, dtype, str(folder), ",".join(targets), *kernels]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "EDGEATTN_JIT": "1", "EDGEATTN_ISA": "", "PYTHONHASHSEED": "0"})
    if done.returncode:
        raise RuntimeError(f"the libraries for {', '.join(targets)} could not be compiled:\n{done.stderr.strip()}")


def chosen(names: Sequence[str]) -> list[str]:
    """The targets called so, or of machines called so, in the order of TARGETS.

    Raises
    ------
    ValueError
        For a name that is neither.
    """
    machines = {row.machine for row in TARGETS.values()}
    if unknown := set(names) - set(TARGETS) - machines:
        raise ValueError(f"no target or machine is called {', '.join(sorted(unknown))}; there are "
                         f"{', '.join((*TARGETS, *sorted(machines)))}")
    return [name for name, row in TARGETS.items() if {name, row.machine} & set(names)]


def main() -> None:
    """Compile the libraries of the targets named, or of a machine's; of this machine's without."""
    folder, *names = sys.argv[1:]
    try:
        targets = chosen(names or [host_target()])
    except ValueError as error:
        sys.exit(str(error))
    build(targets, Path(folder))
    print(f"{', '.join(targets)}: compiled to {folder}")


if __name__ == "__main__":
    main()
