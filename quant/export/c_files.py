"""Several files written all together or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeattn.files.paths import beside, check_folder, keep_locked, new_mark, remove_leftovers, write_new


def check_beside(path: Path, names: Iterable[str]) -> None:
    """Refuse to replace what lies beside ``path`` and is not of an earlier export to it.

    Parameters
    ----------
    path : Path
        What the caller named, which may be replaced.
    names : iterable of str
        Of the files that are written beside it; each names ``path`` in its first comment.

    Raises
    ------
    ValueError
        Naming ``path`` and the file.
    """
    for name in names:
        other = path.with_name(name)
        if not other.is_file():
            continue
        with open(other, "rb") as file:
            head = file.read(500)
        if b"quant.export" not in head or path.name.encode(errors="replace") not in head:
            raise ValueError(f"path must have another name than {str(path)!r}: {name} would be replaced, and is of no "
                             f"earlier export to {path.name}")


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write every file, or leave all as they were.

    Each is written under a temporary name in its folder, then all are renamed; what a rename replaces is kept until
    the last has succeeded.

    Parameters
    ----------
    files : mapping of Path to bytes
        Existing files are replaced. Folders must exist.

    Raises
    ------
    OSError
        When a folder is missing or not writable, the disk is full, or a name belongs to a folder.
    """
    for path in files:
        check_folder(path)
        remove_leftovers(path)
    with contextlib.ExitStack() as held:
        _write_together(files, held)


def _write_together(files: Mapping[Path, bytes], held: contextlib.ExitStack) -> None:
    mark = new_mark()
    new, old = ({path: beside(path, mark, kind) for path in files} for kind in ("tmp", "old"))
    replaced: list[Path] = []
    try:
        for path, data in files.items():
            write_new(new[path], data, held)
        for path in files:
            if path.exists():
                keep_locked(path, held)
                os.replace(path, old[path])
            replaced.append(path)
            os.replace(new[path], path)
    except BaseException:
        for path in replaced:
            path.unlink(missing_ok=True)
        for path in files:
            if old[path].exists():
                os.replace(old[path], path)
            new[path].unlink(missing_ok=True)
        raise
    for path in files:
        old[path].unlink(missing_ok=True)
