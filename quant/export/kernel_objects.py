"""Object files of kernels for a target, compiled once: the next export finds them where machine code is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import llvmlite
import numba

from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.runtime import kernel_cache, sources, worker_pool
from edgeattn.runtime.targets import TARGETS
from quant.export.linker import DEVICE_LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WORKER_POOL = "worker pool"  # what a library has beside ENTRIES
# Kernels that have most of their code in common, once in the object of the second.
TOGETHER = {"layer int8 with a cache": "layer int8"}
# The instruction set is chosen before anything that reads it is imported.
_CHOOSE = "import sys; from edgeattn.runtime import isa; isa.use(sys.argv[1]); "
_BUILD = "from quant.export.kernels_build import main; main(*sys.argv[2:])"
_HERE = Path(__file__).parent
_WRITTEN_BY = [_HERE / name for name in ("crosscompile.py", "kernels_build.py", "linker.py", "kernel_objects.py")]
_compiling = threading.Lock()  # two exports at a time would compile the same kernels


def objects(target: str, kernels: Iterable[str]) -> dict[str, bytes]:
    """What a library of kernels is linked from.

    Parameters
    ----------
    target : str
        A name in TARGETS.
    kernels : iterable of str
        Names in ENTRIES.

    Returns
    -------
    dict of str to bytes
        An object file for each of them that is in no other's, for WORKER_POOL and for each of DEVICE_LIBRARIES.

    Raises
    ------
    RuntimeError
        With what was said where one could not be compiled.
    """
    names = list(dict.fromkeys([*(TOGETHER.get(name, name) for name in kernels), WORKER_POOL, *DEVICE_LIBRARIES]))
    stamp = sources.checksum([*sources.files(), *_WRITTEN_BY])
    made_by = f"{stamp} {numba.__version__} {llvmlite.__version__}\n".encode()
    with _compiling:
        found = {name: content for name in names if (content := _kept(name, target, made_by)) is not None}
        missing = [name for name in names if name not in found]
        processes = min(os.cpu_count() or 1, len(missing))
        with ThreadPoolExecutor(max(processes, 1)) as pool:
            for made in pool.map(lambda i: _compiled(target, missing[i::processes]), range(processes)):
                for name, content in made.items():
                    found[name] = content
                    _keep(name, target, made_by + content)
    return {name: found[name] for name in names}


def compile_objects(targets: Sequence[str], contents: dict[str, Sequence[str]], folder: Path) -> None:
    """Write object files for targets, in a process of its own.

    Parameters
    ----------
    targets : sequence of str
        Names in TARGETS, of one instruction set.
    contents : dict of str to sequence of str
        The names of the objects, and for each what it holds: names in ENTRIES, or WORKER_POOL; of one called as in
        DEVICE_LIBRARIES nothing, for it holds what is called so there.
    folder : Path
        Each target's objects go to a folder in it, of the target's name.

    Raises
    ------
    RuntimeError
        With what was said where one could not be compiled.
    """
    for target in targets:
        (folder / target).mkdir(exist_ok=True)
    run_build(_BUILD, targets, folder, json.dumps(contents))


def run_build(code: str, targets: Sequence[str], *arguments: object) -> None:
    """Run a process that compiles for other machines, of one instruction set.

    Raises
    ------
    RuntimeError
        With the last line it said where it failed.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EDGEATTN_", "NUMBA_"))}
    environment |= {"EDGEATTN_JIT": "1", "PYTHONHASHSEED": "0",
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    command = [sys.executable, "-c", _CHOOSE + code, TARGETS[targets[0]].isa, ",".join(targets), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"compiling for {', '.join(targets)} failed: {last[0]}")


def _compiled(target: str, names: Sequence[str]) -> dict[str, bytes]:
    contents = {name: [title for title in (*ENTRIES, WORKER_POOL) if TOGETHER.get(title, title) == name]
                for name in names}
    with tempfile.TemporaryDirectory() as folder:
        compile_objects([target], contents, Path(folder))
        return {name: Path(folder, target, file_of(name)).read_bytes() for name in names}


def file_of(name: str) -> str:
    """The file of a kernel's object."""
    return f"{name.replace(' ', '-')}.o"


def _places(name: str, target: str) -> list[str]:
    kernel = ENTRIES[name].kernel if name in ENTRIES else worker_pool.worker_loop
    return [os.path.join(folder, f"{target}.{file_of(name)}") for folder in kernel_cache.folders(kernel.py_func)]


def _kept(name: str, target: str, made_by: bytes) -> bytes | None:
    for path in _places(name, target):
        content = kernel_cache.read(path)
        if content is not None and content.startswith(made_by):
            return content[len(made_by):]
    return None


def _keep(name: str, target: str, content: bytes) -> None:
    for path in _places(name, target):
        if kernel_cache.write(path, content):
            return
