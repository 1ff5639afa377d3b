"""Paths, and files that are whole or not there: writing never leaves half a file behind."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``: readers see the old file or the new one, never a part.

    The bytes go to a new file in the same folder, which then takes the name ``path``. A temporary folder
    would not do: a rename is one step only within a file system.

    Parameters
    ----------
    path : str or os.PathLike
        Replaced where it exists. Its folder must exist.
    data : bytes

    Raises
    ------
    OSError
        When the folder is missing or not writable, or the disk is full; the temporary file is removed.
    """
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # "x" with the usual mode: unlike tempfile's 0600, the file gets the permissions the user's umask asks
        # for.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(path: Path) -> None:
    """Refuse a file in a folder that is not there, by the file's name: opening would name the temporary one.

    Raises
    ------
    FileNotFoundError
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def as_path(path: str | os.PathLike) -> Path:
    """`path` as a Path; TypeError where it is neither a string nor a path."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
