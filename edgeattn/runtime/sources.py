"""The sources that kernels are compiled from, and what tells one state of them from another."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = Path(__file__).resolve().parents[1]
# What a kernel's code may come from, in this package: folders with all below them, and files.
CUDA = "kernels/cuda"
FOLDERS = "kernels", "runtime"
FILES = "arithmetic.py", "checks.py", "messages.py", "shapes.py", "threads.py"


def files() -> list[Path]:
    """Those there are."""
    return [PACKAGE / name for name in _names()]


def checksum(paths: Iterable[str | Path]) -> str:
    """Of the names and texts of files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{os.path.basename(path)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def stamp() -> str:
    """What a library of the CPU's kernels is told by; every process that looks for one asks, so it is quick."""
    root = str(PACKAGE)
    return checksum(f"{root}/{name}" for name in _names() if not name.startswith(CUDA))


def _names() -> list[str]:
    """The files there are, as they are called from PACKAGE on."""
    found = [name for name in FILES if os.path.isfile(f"{PACKAGE}/{name}")]
    for top in FOLDERS:
        for folder, below, names in os.walk(f"{PACKAGE}/{top}"):
            below[:] = [name for name in below if name != "__pycache__"]
            inside = Path(folder).relative_to(PACKAGE).as_posix()
            found += [f"{inside}/{name}" for name in names if name.endswith(".py")]
    return sorted(found)
