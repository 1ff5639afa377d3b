"""Paths, and files that are whole or not there: reading says what is wrong, writing never leaves half a file behind."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def reading(path, kind: str):
    """Within, whatever goes wrong is a ValueError that names the file and what it was to be.

    For files from strangers: zipfile, zlib, json, protobuf and HDF5 have errors of their own for every kind of damage,
    more than they document. To open the file is not part of it: a missing or forbidden one is an OSError.

    Parameters
    ----------
    path : str or os.PathLike
    kind : str
        What the file is taken for, as in ".npz file of plain arrays".
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not a whole {kind}: {reason(error)}") from error


@contextlib.contextmanager
def named(path):
    """Within, a TypeError or ValueError names the file, also where it is raised by who does not know of a file.

    What is no path, as a mapping of arrays, names nothing.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if not isinstance(path, (str, os.PathLike)) or str(path) in str(error):
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error


def listed(entries) -> str:
    """Names or the like for an error; of many, the first and how many more there are."""
    entries = list(entries)
    return ", ".join(str(entry)[:200] for entry in entries[:20]) + (
        f" and {len(entries) - 20} more" if len(entries) > 20 else "")


def reason(error) -> str:
    """What an error, or any value, says, or its kind where it says nothing; one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
