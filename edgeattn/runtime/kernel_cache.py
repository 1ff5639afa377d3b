"""Machine code of kernels on disk.

Numba's own cache raises at decoration time where no folder is writable, never reads what somebody else prepared in a
read-only folder, unpickles what anybody has put there, and compares only the kernel's own file, so that an edit in a
helper of another module brings back stale machine code. This one looks into several folders, each of which may be
missing or read-only, takes nothing from one that others may write to, and is valid for one state of all sources that
kernels may import. There is a file for each kernel, types of arguments, processor and Numba: environments side by side
share a folder, whatever their NumPy.
"""
import functools
import hashlib
import os
import pathlib
import pickle
import sys

import llvmlite
import numba
from numba import types
from numba.core import caching, serialize
from numba.core.compiler import CompileResult

from edgeattn.messages import LOG
from edgeattn.runtime import sources, trusted
from edgeattn.runtime.isa import ISA

_SUFFIX = ".kernel"
# What wrote a pickle must read it.
_MADE_BY = (f"python{sys.version_info[0]}.{sys.version_info[1]}{getattr(sys, 'abiflags', '')} numba{numba.__version__} "
            f"llvmlite{llvmlite.__version__}")


class KernelCache(caching._Cache):
    """Of one kernel: reads from the first folder that has the machine code, writes to the first that can be written."""

    def __init__(self, function):
        self._function = function
        self._enabled = True

    @property
    def cache_path(self):
        """The first folder that is looked into; None where nothing can be cached."""
        places = self._places()
        return places[0] if places else None

    def load_overload(self, sig, target_context):
        """The compiled function for the types of `sig`, or None."""
        target_context.refresh()
        name, described = self._described(sig, target_context.codegen())
        for folder in self._places():
            content = read(os.path.join(folder, name))
            if content is None or not content.startswith(described):
                continue
            try:
                return CompileResult._rebuild(target_context, *pickle.loads(content[len(described):]))
            except Exception:  # noqa: BLE001 - of another state of things after all: whatever it was, compile
                continue
        return None

    def save_overload(self, sig, data):
        """Keep a compiled function; where that is impossible, it still runs."""
        if data.lifted or data.library.has_dynamic_globals:  # holds addresses of this process
            return
        name, described = self._described(sig, data.codegen)
        content = described + serialize.dumps(data._reduce())
        for folder in self._places():
            if write(os.path.join(folder, name), content):
                return

    def enable(self):
        """Read and write again."""
        self._enabled = True

    def disable(self):
        """Neither read nor write."""
        self._enabled = False

    def flush(self):
        """Forget everything kept of this kernel."""
        for folder in self._places():
            for path in pathlib.Path(folder).glob(f"{self._stem}.*{_SUFFIX}"):
                try:
                    path.unlink()
                except OSError:
                    continue

    def _places(self):
        known = self._enabled and source_stamp(self._function.__code__.co_filename) is not None
        return folders(self._function) if known else []

    @property
    def _stem(self):
        name = f"{pathlib.Path(self._function.__code__.co_filename).stem}.{self._function.__qualname__}"
        return name.replace("<", "").replace(">", "")  # not in a file's name on Windows

    def _described(self, sig, codegen):
        """(file name, first bytes of its content) for argument types."""
        # Numba knows a function passed as an argument by a number drawn anew in every process. Its name and the
        # checksum of the sources identify it as well, and stay. The instruction set we chose is part of the code.
        named = tuple(f"{t.dispatcher.py_func.__module__}.{t.dispatcher.py_func.__qualname__}"
                      if isinstance(t, types.Dispatcher) else str(t) for t in sig)
        key = f"{_MADE_BY} {codegen.magic_tuple()} {ISA.name} {named}"
        stamp = source_stamp(self._function.__code__.co_filename)
        name = f"{self._stem}.{hashlib.sha256(key.encode()).hexdigest()[:16]}{_SUFFIX}"
        return name, f"{self._stem} {stamp} {key}\n".encode()


def read(path):
    """The content of a kept file; None where there is none to be used."""
    try:
        return trusted.read(path)
    except trusted.Untrusted as error:
        _refuse(str(error))
    except (OSError, ValueError):
        pass
    return None


def write(path, content):
    """Whether a file could be written; a missing, full or read-only folder is no error."""
    try:
        trusted.write(path, content)
    except trusted.Untrusted as error:
        _refuse(str(error))
    except OSError:
        pass
    else:
        return True
    return False


@functools.cache
def _refuse(reason):
    """Say once why machine code is not taken from a place."""
    LOG.warning("compiled kernels are neither read nor kept there: %s. What is read is run, so only you and root may "
                "write: set NUMBA_CACHE_DIR to a folder of your own, or mend owner and mode", reason)


def folders(function):
    """Where this kernel's machine code may be kept, best first."""
    source = os.path.abspath(function.__code__.co_filename)
    own_name = caching._CacheLocator.get_suitable_cache_subpath(source)
    found = [os.path.join(os.path.dirname(source), "__pycache__")]
    if numba.config.CACHE_DIR:
        found.insert(0, os.path.join(os.path.abspath(numba.config.CACHE_DIR), own_name))
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    if os.path.isabs(user):  # "~" stays where the user has no home
        found.append(os.path.join(user, "edgeattn", own_name))
    return found


def usable(folder):
    """Whether this process may keep machine code in a folder, which need not be there yet."""
    try:
        trusted.check_folder(folder)
    except OSError:
        return False
    while not os.path.isdir(folder):
        if os.path.lexists(folder) or os.path.dirname(folder) == folder:
            return False
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK | os.X_OK)


def kept_in(function):
    """The folder that machine code of a function is written to; None where there is none."""
    if source_stamp(function.__code__.co_filename) is None:
        return None
    return next((folder for folder in folders(function) if usable(folder)), None)


def _listing():
    """Name, time and size of every source file: what an edit changes, without reading it."""
    return [(path.relative_to(sources.PACKAGE).as_posix(), (status := path.stat()).st_mtime_ns, status.st_size)
            for path in sources.files()]


@functools.cache
def source_stamp(filename):
    """Checksum of the sources and of `filename`, which may lie outside the package.

    None, meaning "do not cache", where sources are missing, or were edited after this process read them:
    the old code must not be filed under the new text.
    """
    try:
        if not _LOADED or _listing() != _LOADED:
            return None
        return sources.checksum([*(f"{sources.PACKAGE}/{name}" for name, _, _ in _LOADED), pathlib.Path(filename)])
    except OSError:
        return None


try:
    _LOADED = _listing()
except OSError:
    _LOADED = []
