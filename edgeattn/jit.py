"""The one decorator every kernel is compiled with.

``numba.njit(cache=True)`` raises at decoration time where no cache directory is writable, never reads a
cache that somebody else prepared in a read-only folder, and compares only the kernel's own file, so an edit
in a helper of another module brings back stale machine code. The cache here is looked for in several folders,
each of which may be missing or read-only, and is valid for one state of all sources of this package.
Nothing is compiled, hashed or written before the first call of a kernel.
"""

import functools
import hashlib
import os
import pathlib
import sys

import numba
from numba import types
from numba.core import caching
from numba.core import codegen as _codegen
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock

from edgeattn.isa import ISA

KERNELS = []  # every dispatcher that `jit` has made
_PACKAGE = pathlib.Path(__file__).resolve().parent


# A forked child would find Numba's lock held for good by a thread that compiles in its parent: a fork waits for that.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release,
                        after_in_child=global_compiler_lock.release)


class _Part(_codegen.JITCodeLibrary):
    """A function that only serves as part of a kernel: linked into it, and optimized and translated there, once."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


class _Kernel(CompilerBase):
    """Numba's pipeline; whatever is compiled on the way to a kernel is a `_Part`."""

    def define_pipelines(self):
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    def compile_extra(self, func):
        codegen = self.state.targetctx.codegen()
        self.state.library = codegen.create_library(func.__qualname__)
        self.state.library.enable_object_caching()
        before = codegen._library_class
        codegen._library_class = _Part

        def set_env(env_name, env):
            if codegen._engine.get_global_value_address(env_name):
                type(codegen).set_env(codegen, env_name, env)
        codegen.set_env = set_env
        try:
            return super().compile_extra(func)
        finally:
            codegen._library_class = before
            del codegen.set_env


def jit(function):
    """Compile a kernel on its first call: releases the GIL, divides as NumPy does, cached on disk.

    Parameters
    ----------
    function : callable
        The kernel, a function at module level.

    Returns
    -------
    callable
        Numba's dispatcher, or `function` itself under ``NUMBA_DISABLE_JIT=1``.
    """
    dispatcher = numba.njit(function, nogil=True, error_model="numpy", boundscheck=False, pipeline_class=_Kernel)
    if dispatcher is not function:
        dispatcher._cache = _Cache(function)
        KERNELS.append(dispatcher)
    return dispatcher


def inlined(function):
    """Compile `function` only as a part of the kernels that call it, so that vectors and tiles stay in registers.

    It can make no array, and counts no references to those it is given, which its caller has.
    """
    return numba.njit(function, error_model="numpy", boundscheck=False, forceinline=True, _nrt=False,
                      no_cpython_wrapper=True, no_cfunc_wrapper=True)


def compiled():
    """How many kernels this process has compiled, rather than read from the cache."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in KERNELS)


_entries = {}  # (dispatcher, types): compiled function


def entry(dispatcher, arguments, strided=0):
    """The compiled function of `dispatcher` for the types of `arguments`, to be called directly.

    Numba's dispatcher finds out the type of every argument on every call, which costs 12 microseconds for a kernel
    that takes functions. A layer knows its types: it asks once. The caller must keep passing arguments of the same
    dtypes, dimensions and contiguity; whether an array is writable does not matter. The first `strided` arguments
    are arrays that may have any strides.
    """
    signature = [numba.typeof(argument) for argument in arguments]
    signature = [t.copy(readonly=False) if isinstance(t, types.Array) else t for t in signature]
    signature[:strided] = [t.copy(layout="A") for t in signature[:strided]]
    key = dispatcher, tuple(signature)
    if key not in _entries:  # Numba knows no kernel again that it read from the cache, where it takes functions
        _entries[key] = dispatcher.compile(key[1])
    return _entries[key]


class _Cache(caching._Cache):
    """Reads from the first folder that has the kernel, writes to the first that can be written."""

    def __init__(self, function):
        self._function = function
        self._enabled = True

    @functools.cached_property
    def _places(self):
        stamp = source_stamp(self._function.__code__.co_filename)
        if stamp is None:
            return []
        return [_FolderCache(self._function, folder, stamp) for folder in folders(self._function)]

    @property
    def cache_path(self):
        return self._places[0].cache_path if self._places else None

    def load_overload(self, sig, target_context):
        for place in self._places if self._enabled else ():
            # Damaged bytes make pickle and LLVM raise nearly anything; a cache that cannot be read is an
            # empty cache, never a reason for a kernel not to run. It is emptied to be filled again.
            try:
                found = place.load_overload(sig, target_context)
            except Exception:  # noqa: BLE001
                _ignoring_read_only(place.flush)
                continue
            if found is not None:
                return found
        return None

    def save_overload(self, sig, data):
        for place in self._places if self._enabled else ():
            try:
                place.save_overload(sig, data)
            except Exception:  # noqa: BLE001 - as above: whatever keeps a kernel out of the cache, it still runs
                continue
            return

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def flush(self):
        for place in self._places:
            _ignoring_read_only(place.flush)


def _ignoring_read_only(action, *arguments):
    """Whether `action` went through; a missing, full or read-only folder is no error."""
    try:
        action(*arguments)
    except OSError:
        return False
    return True


class _FolderCache(caching.FunctionCache):
    """Numba's own file format in one folder."""

    def __init__(self, function, folder, stamp):
        self._impl_class = functools.partial(_FolderImpl, locator=_Locator(function, folder, stamp))
        super().__init__(function)
        self._cache_file = _CacheFile(folder, self._impl.filename_base, stamp)

    def _index_key(self, sig, codegen):
        # Numba knows a function passed as an argument by a number drawn anew in every process. Its name and the
        # checksum of the sources identify it as well, and stay. The instruction set we chose is part of the code.
        named = tuple(
            f"{t.dispatcher.py_func.__module__}.{t.dispatcher.py_func.__qualname__}"
            if isinstance(t, types.Dispatcher) else t for t in sig)
        return named, codegen.magic_tuple(), ISA.name


class _CacheFile(caching.IndexDataCacheFile):
    """Writes into each file whose machine code it holds.

    Files are numbered, and two processes that compile a kernel for different types at the same time may give both
    codes one number: without a look at the name inside, one of them would later be run for the types of the other.
    """

    def save(self, key, data):
        super().save(key, (key, self._source_stamp, data))

    def load(self, key):
        found = super().load(key)
        return found[2] if found is not None and found[:2] == (key, self._source_stamp) else None


class _FolderImpl(caching.CompileResultCacheImpl):
    def __init__(self, function, locator):
        self._lineno = function.__code__.co_firstlineno
        self._locator = locator
        name = f"{pathlib.Path(function.__code__.co_filename).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class _Locator(caching._CacheLocator):
    def __init__(self, function, folder, stamp):
        self._py_file = function.__code__.co_filename
        self._lineno = function.__code__.co_firstlineno
        self._folder = folder
        self._stamp = stamp

    def get_cache_path(self):
        return self._folder

    def get_source_stamp(self):
        return self._stamp

    def get_disambiguator(self):
        return str(self._lineno)


def folders(function):
    """Where this kernel's machine code may be kept, best first.

    Never a folder others can write to, such as the temporary one: what is read back is executed.
    """
    source = os.path.abspath(function.__code__.co_filename)
    own_name = caching._CacheLocator.get_suitable_cache_subpath(source)
    found = [os.path.join(os.path.dirname(source), "__pycache__")]
    if numba.config.CACHE_DIR:
        found.insert(0, os.path.join(numba.config.CACHE_DIR, own_name))
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    if os.path.isabs(user):  # "~" stays where the user has no home
        found.append(os.path.join(user, "edgeattn", own_name))
    return found


def _listing():
    """Name, time and size of every source file of the package: what an edit changes, without reading it."""
    found = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        status = path.stat()
        found.append((path.relative_to(_PACKAGE).as_posix(), status.st_mtime_ns, status.st_size))
    return found


@functools.cache
def source_stamp(filename):
    """Checksum of all sources of this package and of `filename`, which may lie outside it.

    None, meaning "do not cache", where sources are missing, or were edited after this process read them:
    the old code must not be filed under the new text.
    """
    try:
        if not _LOADED or _listing() != _LOADED:
            return None
        checksum = hashlib.sha256()
        for path in [_PACKAGE / name for name, _, _ in _LOADED] + [pathlib.Path(filename)]:
            content = path.read_bytes()
            checksum.update(f"{path.name} {len(content)}\n".encode())
            checksum.update(content)
    except OSError:
        return None
    return checksum.hexdigest()


try:
    _LOADED = _listing()
except OSError:
    _LOADED = []
