"""The sources that kernels are compiled from, and what tells one state of them from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# What a kernel's code may come from, in this package.
SOURCES = "kernels/**/*.py", "runtime/*.py", "arithmetic.py", "checks.py", "messages.py", "shapes.py", "threads.py"


def files() -> list[Path]:
    """Those there are."""
    return sorted(path for pattern in SOURCES for path in PACKAGE.glob(pattern))


def checksum(paths: list[Path]) -> str:
    """Of the names and texts of files."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
