"""How kernels are compiled and where their machine code is kept.

`kernel` marks an entry called from Python: released GIL, cached on disk.  `inlined` marks a helper that is always
folded into the kernel that calls it, so that vectors and tiles stay in registers.

Numba's own cache looks only at the file a function stands in, knows nothing of the instruction set we chose, and
raises where no directory can be written.  The cache used here is keyed by every source file of this package and by
the instruction set, and without a writable directory it is simply off.
"""
import hashlib
import os
import tempfile

from numba import njit, typeof, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator

from .isa import ISA

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def _digest_of_sources():
    digest = hashlib.sha256(ISA.name.encode())
    for name in sorted(os.listdir(_PACKAGE)):
        if name.endswith(".py"):
            with open(os.path.join(_PACKAGE, name), "rb") as file:
                digest.update(name.encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()[:24]


def _candidate_directories():
    """Where compiled kernels may live, best first: the user's choice, beside the source, the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield chosen
    yield os.path.join(_PACKAGE, "__pycache__")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    yield os.path.join(home, "edgeattn")


def _writable_directory():
    for directory in _candidate_directories():
        try:
            os.makedirs(directory, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            continue
        return directory
    return None


DIRECTORY = _writable_directory()
STAMP = _digest_of_sources()


class _Locator(_CacheLocator):
    def __init__(self, py_func):
        # The stamp is part of the path: two versions, or two instruction sets, never overwrite one another.
        self._path = os.path.join(DIRECTORY, f"edgeattn-{ISA.name}-{STAMP}")
        self._line = py_func.__code__.co_firstlineno

    def get_cache_path(self):
        return self._path

    def get_source_stamp(self):
        return STAMP

    def get_disambiguator(self):
        return str(self._line)

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func)


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(FunctionCache):
    _impl_class = _CacheImpl

    def _index_key(self, sig, codegen):
        # Numba identifies a function passed as an argument by a number drawn anew in every process; its name and the
        # stamp of the sources identify it just as well, and stay.
        named = tuple(f"{t.dispatcher.py_func.__module__}.{t.dispatcher.py_func.__qualname__}"
                      if isinstance(t, types.Dispatcher) else t for t in sig)
        return named, codegen.magic_tuple(), STAMP

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError:  # the disk filled up or became read-only: the kernel works, it is just not kept
            pass

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            return None


def kernel(function):
    """Compile `function` on first call with the GIL released, and keep the machine code on disk if possible."""
    dispatcher = njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    dispatcher._cache = _Cache(function) if DIRECTORY else NullCache()
    return dispatcher


def inlined(function):
    """Compile `function` only as a part of the kernels that call it."""
    return njit(error_model="numpy", boundscheck=False, forceinline=True)(function)


def entry(dispatcher, arguments):
    """The compiled function of `dispatcher` for the types of `arguments`, to be called directly.

    Numba's dispatcher finds out the type of every argument on every call, which costs 12 microseconds for a kernel
    that takes functions.  A layer knows its types: it asks once.  The caller must keep passing arguments of the same
    dtypes, dimensions and contiguity; whether an array is writable does not matter.
    """
    signature = tuple(typeof(argument) for argument in arguments)
    signature = tuple(t.copy(readonly=False) if isinstance(t, types.Array) else t for t in signature)
    return dispatcher.compile(signature)
