"""Refuse what no tracked file may hold: paths of one machine, hosts of package registries, unfinished work.

Run as ``python tools/check_tree.py``; files too big to be source are refused too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 512 * 1024

FORBIDDEN = (
    # pip, apt and npm know where their packages come from, and users may have said otherwise.
    ("names a registry's host", re.compile(r"\b(pypi|pythonhosted|npmjs|anaconda|piwheels)\.(org|com|io)\b")),
    ("names a registry's host", re.compile(r"\b(deb|ftp|security|snapshot)\.debian\.org\b")),
    # /home/pi is the home folder on every Raspberry Pi, and stands in the docs.
    ("names a machine's path", re.compile(r"(?<![\w.:/])/(work|root|Users/\w+|home/(?!pi\b)\w+|opt/pypi)\b")),
    ("is unfinished", re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")),
    ("holds a merge conflict", re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)),
)
TEXT = {"", *".c .cfg .h .in .json .md .py .service .sh .toml .txt .yaml .yml".split()}


def tracked_files() -> list[Path]:
    """Return every file that git tracks."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def problems(path: Path) -> list[str]:
    """Return one line per problem of a file: ``file:line: what``."""
    name = path.relative_to(ROOT)
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{name}: is {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} may be committed")
    if path.suffix not in TEXT or path == Path(__file__).resolve():
        return found
    text = path.read_text(encoding="utf-8", errors="replace")
    for what, pattern in FORBIDDEN:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {what}: {match.group().strip()}")
    return found


def main() -> int:
    """Check the whole tree; return 1 when there is a problem."""
    try:
        files = tracked_files()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"check_tree: needs a git checkout, and git: {error}", file=sys.stderr)
        return 1
    found = [line for path in files for line in problems(path)]
    print("\n".join(found) if found else f"check_tree: {len(files)} tracked files, nothing to object to.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
