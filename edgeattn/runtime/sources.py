"""The sources that kernels are compiled from, and what tells one state of them from another."""

from __future__ import annotations

import functools
import os
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# What a kernel's code may come from, in this package: folders with all below them, and files.
CUDA = "kernels/cuda"
FOLDERS = "kernels", "runtime"
FILES = "arithmetic.py", "checks.py", "messages.py", "shapes.py", "threads.py"


def files() -> list[Path]:
    """Those there are."""
    from pathlib import Path

    return [Path(PACKAGE, name) for name in _names()]


def checksum(paths: Iterable[str | Path]) -> str:
    """Of the names and texts of files, by SHA-256."""
    import hashlib

    digest = hashlib.sha256()
    for part in _contents(paths):
        digest.update(part)
    return digest.hexdigest()


def _contents(paths: Iterable[str | Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        yield f"{os.path.basename(path)} {len(content)}\n".encode()
        yield content


@functools.cache
def stamp() -> str:
    """What a library of the CPU's kernels is told by: size and CRC-32 of their sources.

    Every process that looks for a library asks, so it is quick, and does without hashlib, which brings in OpenSSL.
    """
    size = check = 0
    for part in _contents(f"{PACKAGE}/{name}" for name in _names() if not name.startswith(CUDA)):
        size, check = size + len(part), zlib.crc32(part, check)
    return f"{size} {check:08x}"


def _names() -> list[str]:
    """The files there are, as they are called from PACKAGE on."""
    found = [name for name in FILES if os.path.isfile(f"{PACKAGE}/{name}")]
    for top in FOLDERS:
        for folder, below, names in os.walk(f"{PACKAGE}/{top}"):
            below[:] = [name for name in below if name != "__pycache__"]
            inside = folder[len(PACKAGE) + 1:].replace(os.sep, "/")
            found += [f"{inside}/{name}" for name in names if name.endswith(".py")]
    return sorted(found)
