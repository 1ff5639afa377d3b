"""Files whose content is run, such as machine code: who could have written one, and whether it is whole.

Two dangers, two guards. Somebody else may plant a file: so its owner, and the owners of all folders on the way to it,
must be root, this process's user or the owner of this package's own sources, and nobody else may write there. A disk
may flip a bit: so a checksum over everything stands in front, and is compared before anything is made of the rest. It
is no signature: whoever can write a file can write its checksum.
"""
import errno
import functools
import hashlib
import os
import pathlib
import secrets
import stat

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_MARK = b"edgeattn, sha256\n"
_SIZE = hashlib.sha256().digest_size
_MOST_LINKS = 40  # as in Linux
_CHECKED = os.name == "posix"  # elsewhere owner and mode say nothing


class Untrusted(PermissionError):
    """Somebody else could have written this; the message says who and what."""


def read(path):
    """The content of a file that `write` has written.

    Parameters
    ----------
    path : str or os.PathLike

    Returns
    -------
    bytes

    Raises
    ------
    Untrusted
        Where somebody else could have written the file, or replaced it.
    ValueError
        Where it is damaged, or no such file at all.
    OSError
        Where it is missing or cannot be read.
    """
    check_folder(os.path.dirname(os.path.abspath(path)))
    # What is opened is what is looked at: a name may come to mean another file in between. A pipe would block.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
                     | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a file")
        _check(path, status)
        whole = file.read()
    content = memoryview(whole)[len(_MARK) + _SIZE:]
    if whole[:len(_MARK) + _SIZE] != _MARK + hashlib.sha256(content).digest():
        raise ValueError(f"{path} is damaged")
    return bytes(content)


def write(path, content):
    """Write `content` with its checksum, in one step; folders that are missing are made.

    Raises
    ------
    Untrusted
        Where somebody else could replace the file.
    OSError
        Where it cannot be written.
    """
    path = pathlib.Path(path)
    check_folder(path.parent)
    _make(path.parent)
    check_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # Never writable for others, whatever the umask.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        with os.fdopen(handle, "wb") as file:
            file.write(_MARK + hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make(folder):
    """Make a folder and those above it, none of them writable for others."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


def check_folder(folder):
    """Raise `Untrusted` unless only root, this user and the owner of the sources can put files into `folder`.

    A folder on the way that everybody may write to, but where entries belong to who made them (the sticky bit, as in
    /tmp), is no danger; as the folder itself it is. Whoever can replace this package can do so anyway: nothing is asked
    of the folders that lead to it. What does not exist yet is nobody's.
    """
    if _CHECKED:
        folder = os.path.abspath(folder)
        # What is not there yet may be anybody's later.
        reason = (_reason if os.path.isdir(folder) else _reason.__wrapped__)(folder)
        if reason:
            raise Untrusted(reason)


@functools.lru_cache
def _reason(folder):
    """Why a folder is not trusted, or None. Kept: owners do not change but by root's hand."""
    known = {entry for entry, _ in _way(_PACKAGE)}
    for entry, status in _way(folder):
        if entry in known and entry != folder:
            continue
        try:
            _check(entry, status, on_the_way=entry != folder)
        except Untrusted as error:
            return str(error)
    return None


def _way(path):
    """(entry, status) of every folder and link that is passed on the way to `path`, and of itself, while they exist."""
    here, left, links = "/", path.split("/")[::-1], 0
    yield here, os.stat(here)
    while left:
        part = left.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = os.path.dirname(here)
            continue
        entry = os.path.join(here, part)
        try:
            status = os.lstat(entry)
        except FileNotFoundError:
            return
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), entry)
        yield entry, status
        if stat.S_ISDIR(status.st_mode):
            here = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"{path}: too many links")
        target = os.readlink(entry)
        here = "/" if target.startswith("/") else here
        left.extend(target.split("/")[::-1])


def _check(path, status, on_the_way=False):
    if not _CHECKED:
        return
    # In a container root, and with it "/", may have another number.
    owners = {0, os.geteuid(), os.stat(_PACKAGE).st_uid} | ({os.stat("/").st_uid} if on_the_way else set())
    if status.st_uid not in owners:
        raise Untrusted(f"{path} belongs to {_name(status.st_uid)}")
    if stat.S_ISLNK(status.st_mode) or on_the_way and status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & stat.S_IWOTH:
        raise Untrusted(f"everybody may write to {path}")
    if status.st_mode & stat.S_IWGRP and not _private(status.st_gid, status.st_uid):
        raise Untrusted(f"the members of a group ({status.st_gid}) may write to {path}")


def _name(user):
    import pwd
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


@functools.cache
def _private(group, user):
    """Whether a group is the user's own, named as the user and with no other member, as many systems give one."""
    import grp
    import pwd
    try:
        owner, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    return owner.pw_gid == group and members.gr_name == owner.pw_name and set(members.gr_mem) <= {owner.pw_name}
