"""The decorators every kernel and every part of one is compiled with.

Nothing is compiled, hashed or written before the first call of a kernel. Numba makes machine code of every function it
compiles, together with all that the function calls: a helper's body would be optimized and translated once for each
function on the way up to the kernel. Here a helper is a part: typed and turned into LLVM's language once, and from
there on a piece of the kernels it is linked into.
"""
import contextlib
import ctypes
import os
import threading

import numba
from numba import types
from numba.core import codegen, compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.targetconfig import ConfigStack

from edgeattn.messages import LOG
from edgeattn.runtime.kernel_cache import KernelCache, kept_in

KERNELS = []  # every dispatcher that `jit` has made
PATIENCE = 1.0  # seconds that a kernel may compile in silence
_SAID = set()  # functions that have been said to be compiling: a kernel is compiled for each set of types it meets
# Parts lean on names that Numba keeps to itself: with another version they are compiled as Numba compiles anything.
PARTS_TESTED_WITH = ("0.61", "0.68")
USES_PARTS = ".".join(numba.__version__.split(".")[:2]) in PARTS_TESTED_WITH


# A forked child would find Numba's lock held for good by a thread that compiles in its parent: a fork waits for that.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release,
                        after_in_child=global_compiler_lock.release)


class _WithoutEnvironments:
    """A code generator, but for environments: the Python objects a function refers to when it talks to Python.

    Where a part's is kept has no address, and nothing would look there: it has no wrapper that could talk.
    """

    def __init__(self, generator):
        self._generator = generator

    def __getattr__(self, name):
        return getattr(self._generator, name)

    def set_env(self, env_name, env):
        """Do nothing."""


class _Part(codegen.CPUCodeLibrary):
    """What Numba keeps a compiled function in, left as it is until a kernel is linked from it."""

    @property
    def codegen(self):
        return _WithoutEnvironments(self._codegen)

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, _name):
        """Return what Python calls in a part's stead: a function of its own that raises a TypeError."""
        self._ensure_finalized()
        return ctypes.cast(ctypes.pythonapi.PyErr_BadArgument, ctypes.c_void_p).value


class _InliningCompiler(compiler.Compiler):
    """Numba's pipeline; what a function calls is compiled into it, but for tasks.

    Numba compiles a helper of its own once, as its first caller would have it: without this the code of a kernel would
    depend on which kernels were compiled before.
    """

    def define_pipelines(self):
        """Numba's, and what callees take over from this function."""
        ConfigStack().top().forceinline = True
        return super().define_pipelines()


class PartCompiler(_InliningCompiler):
    """The same, into a `_Part`."""

    def compile_extra(self, func):
        """Compile what will be optimized where it is linked."""
        self.state.library = _Part(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


class _KernelCompiler(_InliningCompiler):
    """The same; what takes long is said."""

    def compile_extra(self, func):
        with _said(func):
            return super().compile_extra(func)


@contextlib.contextmanager
def _said(function):
    """While a kernel compiles for longer than `PATIENCE`, say so once, and whether it will have to again."""
    timer = threading.Timer(PATIENCE, _say, [function])
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # no thread can be started
        _say(function)
    try:
        yield
    finally:
        timer.cancel()


def _say(function):
    folder = kept_in(function)
    again = function in _SAID
    _SAID.add(function)
    LOG.info("compiling %s.%s for this processor%s, %s", function.__module__, function.__qualname__,
             " and other types of arguments" if again else "",
             f"once: it is kept in {folder}" if folder else
             "as every process will: no cache folder can be used (set NUMBA_CACHE_DIR to one of your own)")


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
    dispatcher = numba.njit(function, nogil=True, error_model="numpy", boundscheck=False,
                            pipeline_class=_KernelCompiler)
    if dispatcher is not function:
        dispatcher._cache = KernelCache(function)
        KERNELS.append(dispatcher)
    return dispatcher


def inline(function):
    """Compile `function` only as a part of the kernels that call it, so that vectors and tiles stay in registers.

    It can make no array, and counts no references to those it is given, which its caller has. Python cannot call it.
    """
    return _part(function, forceinline=True)


def task(function):
    """Compile `function` as a part of the kernels that use it, but not into them: a job, called by its address.

    It can make no array, and counts no references to those it is given: the caller of `parallel_for` has them.
    """
    return _part(function, forceinline=False)


def _part(function, **options):
    if USES_PARTS:
        options.update(pipeline_class=PartCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return numba.njit(function, error_model="numpy", boundscheck=False, _nrt=False, **options)


def compiled():
    """How many kernels this process has compiled, rather than read from the cache."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in KERNELS)


_entries = {}  # (dispatcher, types): compiled function


def compiled_for(dispatcher, arguments):
    """The compiled function of `dispatcher` for the types of `arguments`, to be called directly.

    Numba's dispatcher finds out the type of every argument on every call. A layer knows its types: it asks once. The
    caller must keep passing arguments of the same dtypes, dimensions and contiguity; whether an array is writable does
    not matter.
    """
    signature = [numba.typeof(argument) for argument in arguments]
    signature = [t.copy(readonly=False) if isinstance(t, types.Array) else t for t in signature]
    key = dispatcher, tuple(signature)
    if key not in _entries:
        _entries[key] = dispatcher.compile(key[1])
    return _entries[key]
