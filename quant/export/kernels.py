"""Every kernel of the device package as machine code for targets: the libraries that edgeattn.runtime.prebuilt calls.

``python -m quant.export.kernels FOLDER [TARGET or MACHINE ...]`` compiles them, in processes of their own: what Numba
compiles from then on is for another machine. Without a target, that of this machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.runtime import prebuilt, sources
from edgeattn.runtime.targets import TARGETS
from quant.export.kernel_objects import file_of, objects
from quant.export.linker import DEVICE_LIBRARIES, link
from quant.export.targets import host_target

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    stamp = sources.stamp()  # before: what is edited meanwhile may be compiled or not
    for target, made in objects(targets, kernels or ENTRIES, jobs).items():
        with tempfile.TemporaryDirectory() as temporary:
            for name, content in made.items():
                Path(temporary, file_of(name)).write_bytes(content)
            linked = link(TARGETS[target].machine, Path(temporary), f"{target}{prebuilt.SUFFIX}", ["edgeattn_*"],
                          [file_of(name) for name in made if name not in DEVICE_LIBRARIES])
        (folder / f"{target}{prebuilt.SUFFIX}").write_bytes(linked)
    checksums = {name: prebuilt.checksum((folder / f"{name}{prebuilt.SUFFIX}").read_bytes()) for name in targets}
    about = {"stamp": stamp, "libraries": checksums}
    (folder / prebuilt.ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


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
