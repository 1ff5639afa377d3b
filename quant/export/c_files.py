"""Several files written all together or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from edgeattn.files import check_folder


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
    mark = secrets.token_hex(6)
    new = {path: path.with_name(f".{path.name}.{mark}.tmp") for path in files}
    old = {path: path.with_name(f".{path.name}.{mark}.old") for path in files}
    replaced: list[Path] = []
    try:
        for path, data in files.items():
            with open(new[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            if path.is_dir():
                raise IsADirectoryError(f"cannot write {path}: it is a folder")
            if path.exists():
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
