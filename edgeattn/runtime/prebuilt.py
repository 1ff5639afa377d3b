"""Kernels compiled before they came here: one library a target, in a folder of this package that wheels bring.

A library is used where it was made of these sources, whole, for this machine's processor; which one, or why none, is
decided when this module is imported. Then nothing is compiled, and Numba is not imported. ``EDGEATTN_JIT=1`` has
kernels compiled here all the same; ``EDGEATTN_ISA`` asks for a library of that instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.runtime import processor, sources
from edgeattn.runtime.addresses import address
from edgeattn.runtime.targets import TARGETS, runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = sources.PACKAGE / "libraries"
ABOUT = "libraries.json"  # in that folder: the stamp of the sources, and each library's checksum
SUFFIX = ".so"


class Library:
    """A target's kernels.

    Parameters
    ----------
    target : str
        A name in TARGETS.
    path : Path
    """

    def __init__(self, target: str, path: Path):
        self.target, self.path, self.isa = target, path, TARGETS[target].isa
        self._functions = ctypes.CDLL(str(path))

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
        self._function: Callable[..., int] | None = None

    def __call__(self, *arguments: Any) -> int:
        """Run it."""
        if self._function is None:
            self._function = LIBRARY.function(symbol_of(self.py_func))
        given: list[Any] = []
        for argument in arguments:
            if type(argument) is np.ndarray:
                given += (ctypes.c_int64(address(argument)), ctypes.c_int64(argument.size))
            else:
                given.append(ctypes.c_int64(argument))
        return self._function(*given)


def jit(function: Callable[..., Any]) -> Kernel:
    """The prebuilt kernel of this source."""
    return Kernel(function)


def compiled_for(kernel: Kernel, _arguments: Sequence[Any]) -> Kernel:
    """The kernel: a library has it for the arguments it takes."""
    return kernel


def compiled() -> int:
    """How many kernels this process has compiled: none."""
    return 0


def find(folder: Path, machine: str, flags: set[str], parts: set[str], isa: str | None) -> tuple[Library | None, str]:
    """The library to use, and why that one; or none, and why none.

    Parameters
    ----------
    folder : Path
        With ABOUT and libraries.
    machine, flags, parts
        As `platform.machine` and edgeattn.runtime.processor have them.
    isa : str, optional
        An instruction set that must be used.
    """
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        stamp, checksums = about["stamp"], about["libraries"]
        if not isinstance(checksums, dict):
            raise TypeError("libraries is no object")
    except FileNotFoundError:
        return None, f"there are none in {folder}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{folder / ABOUT} cannot be read: {error}"
    possible = [name for name in runnable(machine, flags, parts)
                if name in checksums and isa in (None, TARGETS[name].isa)]
    if not possible:
        wanted = f" with the instruction set {isa}" if isa else ""
        return None, f"there is none for {machine}{wanted} and what its processor can do"
    if stamp != sources.stamp():
        return None, f"those in {folder} were made of other sources than these"
    name = possible[-1]
    path = folder / f"{name}{SUFFIX}"
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksums[name]:
            return None, f"{path} is damaged"
        return Library(name, path), f"the best of those for {machine} that its processor can run"
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"


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
    if os.environ.get("EDGEATTN_JIT", "0") not in ("", "0"):
        return None, "EDGEATTN_JIT is set"
    isa = os.environ.get("EDGEATTN_ISA") or None
    return find(FOLDER, platform.machine(), processor.flags(), processor.parts(), isa)


LIBRARY: Any
LIBRARY, REASON = _find_here()
