"""Paths, and files that are whole or not there: reading says what is wrong, writing never leaves half a file behind.

A writer that is killed leaves `.NAME.<12 hex digits>.tmp`, or `.old` with what NAME was. Writers lock such files as
long as they live, and the next writer of NAME removes those that nobody has locked. Unlike a process number in the
name, a lock tells the living from the dead across containers that share a folder, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing removed
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
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
    path = as_path(path)
    check_folder(path)
    remove_leftovers(path)
    temporary = beside(path, new_mark(), "tmp")
    with contextlib.ExitStack() as held:
        try:
            write_new(temporary, data, held)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def new_mark() -> str:
    """What the names of one writer's temporary files have in common, and no other's have."""
    return os.urandom(6).hex()


def beside(path: Path, mark: str, kind: str) -> Path:
    """The temporary file for ``path`` of a writer: "tmp", what ``path`` will be, or "old", what it was."""
    return path.with_name(f".{path.name}.{mark}.{kind}")


def write_new(temporary: Path, data: bytes, held: contextlib.ExitStack) -> None:
    """Write a file that is not there, on the disk when this returns, and keep it locked until ``held`` is closed."""
    for _ in range(3):
        # "x" with the usual mode: unlike tempfile's 0600, the file gets the permissions the user's umask asks for
        file = open(temporary, "xb")  # noqa: SIM115 (held closes it)
        held.callback(file.close)
        if _lock(file, wait=True) and os.fstat(file.fileno()).st_nlink == 0:
            file.close()  # another writer of the same name took it for a dead one's, before it was locked
            continue
        break
    else:
        raise OSError(errno.EAGAIN, "other writers of the same name remove it each time", str(temporary))
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
    if fcntl is None:  # an open file has no other name there
        file.close()


def keep_locked(path: Path, held: contextlib.ExitStack) -> None:
    """Lock a file that is there until ``held`` is closed, where that is possible."""
    with contextlib.suppress(OSError):
        file = open(path, "rb")  # noqa: SIM115 (held closes it)
        held.callback(file.close)
        _lock(file)


def remove_leftovers(path: Path) -> None:
    """Remove what dead writers of ``path`` left; what they had moved away takes its place again if nothing has it.

    Where nothing can be locked nothing is removed.
    """
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if found := pattern.fullmatch(name):
                _remove_leftover(path.with_name(name), path if found[1] == "old" else None)


def _remove_leftover(left: Path, place: Path | None) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(left.lstat().st_mode):
            return
        with open(left, "rb") as file:
            if not _lock(file):
                return
            if place is not None and not os.path.lexists(place):
                os.replace(left, place)
            else:
                left.unlink()


def _lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Take the lock of an open file, which closing it gives back; False where another has it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_folder(path: Path) -> None:
    """Refuse a file in a folder that is not there, by the file's name: opening would name the temporary one.

    Raises
    ------
    FileNotFoundError
    IsADirectoryError
        When the file is a folder itself.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")


def check_output(path: Path, *inputs: Path | None) -> None:
    """`check_folder`, and refuse to replace what is read, under whatever name: links and relative paths too.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
    ValueError
        Naming the file and the input that it is.
    """
    check_folder(path)
    for other in inputs:
        with contextlib.suppress(FileNotFoundError):
            if other is not None and os.path.samefile(path, other):
                same = "" if str(path) == str(other) else f", the same file as {other}"
                raise ValueError(f"cannot write {path}: it is an input of this command{same}; choose another name")


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; TypeError where it is neither a string nor a path."""
    from pathlib import Path

    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None


def suffix_of(path: str | os.PathLike[str]) -> str:
    """`path.suffix` without pathlib, which takes milliseconds to import; TypeError as `as_path`."""
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}")
    return os.path.splitext(name)[1]


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
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
def named(path: object) -> Iterator[None]:
    """Within, a TypeError or ValueError names the file, also where it is raised by who does not know of a file.

    What is no path, as a mapping of arrays, names nothing.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if not isinstance(path, (str, os.PathLike)) or str(path) in str(error):
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error


def listed(entries: Iterable[object]) -> str:
    """Names or the like for an error; of many, the first and how many more there are."""
    entries = list(entries)
    return ", ".join(str(entry)[:200] for entry in entries[:20]) + (
        f" and {len(entries) - 20} more" if len(entries) > 20 else "")


def reason(error: object) -> str:
    """What an error, or any value, says, or its kind where it says nothing; one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
