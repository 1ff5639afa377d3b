"""Every kernel of the device package as machine code for targets: the libraries that edgeattn.runtime.prebuilt calls.

``python -m quant.export.kernels FOLDER [TARGET or MACHINE ...]`` compiles them, each in a process of its own: what
Numba compiles from then on is for another machine. Without a target, that of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.runtime import prebuilt, sources
from edgeattn.runtime.targets import TARGETS
from quant.export.targets import host_target

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        How many are compiled at a time; one a core without.

    Raises
    ------
    RuntimeError
        With what was said where one could not be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        checksums = dict(zip(targets, pool.map(lambda name: _compiled(name, folder, kernels), targets), strict=True))
    about = {"stamp": sources.checksum(sources.files()), "libraries": checksums}
    (folder / prebuilt.ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def _compiled(name: str, folder: Path, kernels: Sequence[str]) -> str:
    """Compile the library of a target in a process of its own; its checksum."""
    command = [sys.executable, "-c", _BUILD, TARGETS[name].isa, name, str(folder), *kernels]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "EDGEATTN_JIT": "1", "EDGEATTN_ISA": "", "PYTHONHASHSEED": "0"})
    if done.returncode:
        raise RuntimeError(f"the library for {name} could not be compiled:\n{done.stderr.strip()}")
    return hashlib.sha256((folder / f"{name}{prebuilt.SUFFIX}").read_bytes()).hexdigest()


def main() -> None:
    """Compile the libraries of the targets named, or of a machine's; of this machine's without."""
    folder, *names = sys.argv[1:]
    wanted = set(names or [host_target()])
    found = [name for name, row in TARGETS.items() if wanted & {name, row.machine}]
    if unknown := wanted - set(TARGETS) - {row.machine for row in TARGETS.values()}:
        sys.exit(f"no target or machine is called {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    build(found, Path(folder))
    print(f"{', '.join(found)}: compiled to {folder}")


if __name__ == "__main__":
    main()
