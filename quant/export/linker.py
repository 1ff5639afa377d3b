"""Making a shared library of an object file, for this machine or another, with whatever linker there is."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# What kernels may leave to the device: a few functions of the C library and its mathematics.
DEVICE_LIBRARIES = {"libc.so.6": ("memcpy", "memmove", "memset", "sched_getaffinity", "sched_getcpu",
                                  "sched_setaffinity", "sched_yield", "sem_init", "sem_post", "sem_wait"),
                    "libm.so.6": ("exp", "exp2", "exp2f", "expf", "fma", "fmaf", "fmodf", "ldexp", "ldexpf", "log",
                                  "powf", "tanh", "tanhf")}


def find_linker(machine: str) -> list[str]:
    """The command that links for a machine, without its arguments.

    Raises
    ------
    RuntimeError
        Saying what to install when there is none.
    """
    if found := shutil.which("ld.lld") or shutil.which(f"{machine}-linux-gnu-ld"):
        return [found]
    if machine == platform.machine() and (found := shutil.which("ld")):
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    raise RuntimeError(f"target needs a linker for {machine}, and there is none: apt-get install lld, or pip install "
                       "'edgeattn[bundle]', which brings one for every machine")


def link(machine: str, folder: Path, name: str, exported: list[str], objects: Iterable[str] = ("layer.o",)) -> bytes:
    """The shared library made of object files in ``folder``.

    Parameters
    ----------
    machine : str
    folder : Path
        With the objects, and for every library in DEVICE_LIBRARIES an object file with its functions, none of which
        does anything: the device's libraries are not at hand, and all that is needed are their names.
    name : str
        What the library is called by those that are linked against it.
    exported : list of str
        The names it makes known.
    objects : iterable of str
    """
    linker = find_linker(machine)
    for library in DEVICE_LIBRARIES:
        _run([*linker, "-shared", "-soname", library, "-o", folder / library, folder / f"{library}.o"])
    script = folder / "exported.map"
    script.write_text("{ global: " + " ".join(f"{symbol};" for symbol in exported) + " local: *; };\n")
    # Pages of 64 KiB divide by those of every kernel: a Raspberry Pi 5's are of 16.
    _run([*linker, "-shared", "-soname", name, "--version-script", script, "--strip-all", "--hash-style=gnu",
          "-z", "defs", "-z", "noexecstack", "-z", "relro", "-z", "now", "-z", "max-page-size=65536",
          "-o", folder / "layer.so", *(folder / each for each in objects), "--as-needed",
          *(folder / name for name in DEVICE_LIBRARIES)])
    return (folder / "layer.so").read_bytes()


def _run(command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {done.stderr.strip()}")
