"""Kernels compiled before they came here: one library a target, in a folder of this package that wheels bring.

A library is used where it was made of these sources, whole, for this machine's processor; which one, or why none, is
decided when this module is imported. Then nothing is compiled, and Numba is not imported. ``EDGEATTN_JIT=1`` has
kernels compiled here all the same; ``EDGEATTN_ISA`` asks for a library of that instruction set.

A bundle brings a library of some kernels (edgeattn/bundle.py). Loaded before any kernel was needed, where the package
has no library, it decides for the process as one of the package would; later it adds the kernels that are missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import platform
import sys
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.runtime import processor, sources
from edgeattn.runtime.addresses import POINTER, address, items_address
from edgeattn.runtime.targets import TARGETS, runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

FOLDER = f"{sources.PACKAGE}/libraries"
ABOUT = "libraries.json"  # in that folder: the stamp of the sources, and each library's checksum
SUFFIX = ".so"


class Library:
    """A target's kernels.

    Parameters
    ----------
    target : str
        A name in TARGETS.
    path : str or path
    opened : str, optional
        What to open instead.
    memory : object
        Kept as long as the library: what knows the file, which may not be written over meanwhile.
    """

    def __init__(self, target: str, path: str | os.PathLike[str], opened: str | None = None, memory: object = None):
        self.target, self.path, self.isa, self.memory = target, path, TARGETS[target].isa, memory
        self._functions = ctypes.CDLL(opened or os.fspath(path))

    def __contains__(self, symbol: str) -> bool:
        return hasattr(self._functions, symbol)

    def close(self) -> None:
        """Take it out of memory; nothing of it may run from then on."""
        import _ctypes

        _ctypes.dlclose(self._functions._handle)

    def function(self, symbol: str) -> Callable[..., int]:
        """The function of a kernel."""
        try:
            found = self._functions[symbol]
        except AttributeError:
            raise RuntimeError(f"{self.path} lacks {symbol}; set EDGEATTN_JIT=1 to have kernels compiled here"
                               ) from None
        found.restype = ctypes.c_int64
        return found


def symbol_of(kernel: Callable[..., Any]) -> str:
    """What a library calls a kernel."""
    return f"edgeattn_{kernel.__module__.rpartition('.')[2]}_{kernel.__qualname__}"


class Kernel:
    """What `jit` gives for a kernel that a library has: called with arrays in C order and integers.

    Parameters
    ----------
    function : callable
        The kernel's source.
    """

    def __init__(self, function: Callable[..., Any]):
        self.py_func, self.__name__, self.__doc__ = function, function.__name__, function.__doc__

    @functools.cached_property
    def function(self) -> Callable[[ctypes.c_int64], int]:
        """The library's: of the address of all arguments as `words`."""
        found: Callable[[ctypes.c_int64], int] = self._found()
        return found

    @functools.cached_property
    def without_result(self) -> Callable[[ctypes.c_int64], object]:
        """The same, of which nothing is returned."""
        found = self._found()
        found.restype = None
        return found  # type: ignore[no-any-return]

    def _found(self) -> Any:
        symbol = symbol_of(self.py_func)
        return _ADDED.get(symbol, LIBRARY).function(symbol)

    def __call__(self, *arguments: Any) -> int:
        """Run it."""
        given = np.array(words(arguments), np.int64)
        return self.function(ctypes.c_int64(address(given)))

    def bind(self, parameters: NDArray[np.int64], addresses: NDArray[np.int64], objects: list[Any]) -> BoundKernel:
        """It and what it is called with first, for one thread at a time.

        addresses : (n + SPARE,) int64 array
            The last ones are the bound kernel's own.
        objects : list
            Of a number of elements that stays; the kernel finds its scratch there, as the last.
        """
        return BoundKernel(self.without_result, parameters, addresses, objects)


SPARE = 9  # parameters, addresses, scratch and task_queue, each with its size, and count


class BoundKernel:
    """A kernel of a library, its parameters and addresses; the scratch is the last of a list.

    ctypes makes an object of each argument, so all lie behind the addresses, in the SPARE elements that these have, and
    where that is, is the only one: `function(argument)` is a call on this thread alone. It gives up the interpreter's
    lock, which nobody may hold for as long as a kernel runs.
    """

    __slots__ = ("_addresses", "_parameters", "argument", "function", "objects")

    def __init__(self, function: Callable[[ctypes.c_int64], object], parameters: NDArray[np.int64],
                 addresses: NDArray[np.int64], objects: list[Any]):
        self.function, self.objects, self._parameters, self._addresses = function, objects, parameters, addresses
        scratch, size = items_address(objects) + 8 * (len(objects) - 1), addresses.size - SPARE
        addresses[size:] = (address(parameters), parameters.size, address(addresses), size, scratch, -POINTER, 0, 0, 1)
        self.argument = ctypes.c_int64(address(addresses) + 8 * size)

    def __call__(self, scratch: NDArray[Any], task_queue: NDArray[np.int64], count: int) -> None:
        """Run it with those who serve a task_queue."""
        self.objects[-1] = scratch
        self.serve(task_queue, count)
        self.function(self.argument)
        self._addresses[-3:] = 0, 0, 1

    def serve(self, task_queue: NDArray[np.int64], count: int) -> None:
        """From now on run it with those who serve a task_queue, which must live as long."""
        self._addresses[-3:] = address(task_queue), task_queue.size, count


def words(arguments: Sequence[Any]) -> list[int]:
    """Arguments as libraries take them: an array as where it is and how many elements it has."""
    found: list[int] = []
    for argument in arguments:
        found += (address(argument), argument.size) if isinstance(argument, np.ndarray) else (int(argument),)
    return found


def jit(function: Callable[..., Any]) -> Kernel:
    """The prebuilt kernel of this source."""
    return Kernel(function)


def compiled_for(kernel: Kernel, _arguments: Sequence[Any]) -> Kernel:
    """The kernel: a library has it for the arguments it takes."""
    return kernel


def compiled() -> int:
    """How many kernels this process has compiled: none."""
    return 0


def find(folder: str | os.PathLike[str], machine: str, flags: set[str], parts: set[str], isa: str | None
         ) -> tuple[Library | None, str]:
    """The library to use, and why that one; or none, and why none.

    Parameters
    ----------
    folder : str or path
        With ABOUT and libraries.
    machine, flags, parts
        As `platform.machine` and edgeattn.runtime.processor have them.
    isa : str, optional
        An instruction set that must be used.
    """
    listed = f"{os.fspath(folder)}/{ABOUT}"
    try:
        with open(listed, "rb") as file:
            about = json.loads(file.read())
        stamp, checksums = about["stamp"], about["libraries"]
        if not isinstance(checksums, dict):
            raise TypeError("libraries is no object")
    except FileNotFoundError:
        return None, f"there are none in {folder}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{listed} cannot be read: {error}"
    possible = [name for name in runnable(machine, flags, parts)
                if name in checksums and isa in (None, TARGETS[name].isa)]
    if not possible:
        wanted = f" with the instruction set {isa}" if isa else ""
        return None, f"there is none for {machine}{wanted} and what its processor can do"
    try:
        here = sources.stamp()
    except OSError as error:
        return None, f"the sources that those in {folder} were made of cannot be read: {error}"
    if stamp != here:
        return None, f"those in {folder} were made of other sources than these"
    name = possible[-1]
    path = f"{os.fspath(folder)}/{name}{SUFFIX}"
    try:
        with open(path, "rb", buffering=0) as file:
            if checksum(file.read()) != checksums[name]:
                return None, f"{path} is damaged"
        return Library(name, path), f"the best of those for {machine} that its processor can run"
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"


def checksum(content: bytes) -> str:
    """What tells that a library is whole."""
    return f"{len(content)} {zlib.crc32(content):08x}"


def require_compiler() -> None:
    """Say what is missing where kernels would have to be compiled, and Numba is not there.

    Raises
    ------
    ImportError
    """
    if importlib.util.find_spec("numba") is None:
        raise ImportError(f"edgeattn has no compiled kernels to use ({REASON}), and cannot compile them without Numba: "
                          "pip install numba, or install a wheel of edgeattn for this machine, which brings them")


def _find_here() -> tuple[Library | None, str]:
    if _jit_is_asked_for():
        return None, "EDGEATTN_JIT is set"
    isa = os.environ.get("EDGEATTN_ISA") or None
    return find(FOLDER, platform.machine(), processor.flags(), processor.parts(), isa)


def _jit_is_asked_for() -> bool:
    return os.environ.get("EDGEATTN_JIT", "0") not in ("", "0")


def _isa_here() -> str | None:
    """The instruction set of this process's kernels; None as long as that is open."""
    if LIBRARY is not None:
        return str(LIBRARY.isa)
    if "edgeattn.runtime.isa" in sys.modules or _jit_is_asked_for() and compiles():
        return importlib.import_module("edgeattn.runtime.isa").ISA.name
    return os.environ.get("EDGEATTN_ISA") or None


def has(symbol: str) -> bool:
    """Whether this process has a compiled kernel that a library calls so."""
    return symbol in _ADDED or LIBRARY is not None and symbol in LIBRARY


def compiles() -> bool:
    """Whether this process can compile what no library has."""
    if LIBRARY is not None:
        return False
    try:
        return "numba" in sys.modules or importlib.util.find_spec("numba") is not None
    except ModuleNotFoundError:
        return False


def add(isa: str, symbols: Sequence[str], load: Callable[[], Library]) -> str | None:
    """Have this process run kernels of a library, made of these sources, that are missing; why not where it cannot.

    Parameters
    ----------
    isa : str
        The instruction set they were written for.
    symbols : sequence of str
        What the library calls them.
    load : callable
        Gives the library; called where it is needed.
    """
    global LIBRARY, REASON
    here = _isa_here()
    if here not in (None, isa):
        return f"its kernels are written for {isa}, those of this process for {here}"
    missing = [symbol for symbol in symbols if not has(symbol)]
    if not missing:
        return None
    library = load()
    if LIBRARY is None and "edgeattn.runtime.isa" not in sys.modules:
        LIBRARY, REASON = library, "it came with a layer, and the package has none"
    else:
        _ADDED.update(dict.fromkeys(missing, library))
    return None


_ADDED: dict[str, Library] = {}  # by the names of the kernels it is asked for
LIBRARY: Any
LIBRARY, REASON = _find_here()
