"""Object files of kernels for targets, compiled once: what libraries and bundles are linked from finds them again where
machine code is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import llvmlite
import numba
import numpy as np

from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.runtime import kernel_cache, sources, worker_pool
from edgeattn.runtime.targets import TARGETS
from quant.export.linker import DEVICE_LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WORKER_POOL = "worker pool"  # what a library has beside ENTRIES
# Its kernels, and the integers they take beside a task queue, or beside another array of integers.
SERVICE = {worker_pool.worker_loop: 3, worker_pool.dismiss: 0, worker_pool.run_in_turn: 0}
# Kernels that have most of their code in common, once in the object of the second.
TOGETHER = {"layer int8 with a cache": "layer int8"}
# The instruction set is chosen before anything that reads it is imported.
_CHOOSE = "import sys; from edgeattn.runtime import isa; isa.use(sys.argv[1]); "
_BUILD = "from quant.export.kernel_objects_build import main; main(*sys.argv[2:])"
_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
_HERE = Path(__file__).parent
_WRITTEN_BY = [_HERE / f"{name}.py" for name in ("crosscompile", "linker", "kernel_objects", "kernel_objects_build")]
_compiling = threading.Lock()  # two exports at a time would compile the same kernels


def objects(targets: Iterable[str], kernels: Iterable[str], jobs: int | None = None) -> dict[str, dict[str, bytes]]:
    """What libraries of kernels are linked from.

    Parameters
    ----------
    targets : iterable of str
        Names in TARGETS.
    kernels : iterable of str
        Names in ENTRIES.
    jobs : int, optional
        How many processes compile at a time; one a core without.

    Returns
    -------
    dict of str to dict of str to bytes
        For each target an object file of each kernel that is in no other's, of WORKER_POOL and of each of
        DEVICE_LIBRARIES.

    Raises
    ------
    RuntimeError
        With what was said where one could not be compiled.
    """
    names = list(dict.fromkeys([*DEVICE_LIBRARIES, WORKER_POOL, *(TOGETHER.get(name, name) for name in kernels)]))
    stamp = sources.checksum([*sources.files(), *_WRITTEN_BY])
    made_by = f"{stamp} {numba.__version__} {llvmlite.__version__}\n".encode()
    with _compiling, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        found = {target: {name: content for name in names if (content := _kept(name, target, made_by)) is not None}
                 for target in targets}
        alike: dict[tuple[str, str], list[str]] = {}  # of one instruction set: compiled up to LLVM's language together
        for target in found:
            if len(found[target]) < len(names):
                alike.setdefault((TARGETS[target].machine, TARGETS[target].isa), []).append(target)
        work = [(group, share) for group in alike.values()
                for share in _shares([name for name in names if any(name not in found[target] for target in group)])]
        work.sort(key=lambda each: -len(each[0]))  # those for several processors take longest
        for made in pool.map(lambda each: _compiled(*each), work):
            for (target, name), content in made.items():
                found[target][name] = content
                _keep(name, target, made_by + content)
    return {target: {name: found[target][name] for name in names} for target in found}


def _shares(names: list[str]) -> list[list[str]]:
    """Halves, for two processes: kernels whose scratch is of one dtype have more in common."""
    names = sorted(names, key=lambda name: name in ENTRIES and ENTRIES[name].dtype is np.int32)
    middle = (len(names) + 1) // 2
    return [half for half in (names[:middle], names[middle:]) if half]


def run_build(code: str, targets: Sequence[str], *arguments: object) -> None:
    """Run a process that compiles for other machines, of one instruction set, which it chooses before it runs `code`.

    Raises
    ------
    RuntimeError
        With the last error that it said, Numba's in all their lines.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EDGEATTN_", "NUMBA_"))}
    environment |= {"EDGEATTN_JIT": "1", "PYTHONHASHSEED": "0",
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    command = [sys.executable, "-c", _CHOOSE + code, TARGETS[targets[0]].isa, ",".join(targets), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        error = max((at for at, line in enumerate(lines) if _ERROR.match(line)), default=len(lines) - 1)
        raise RuntimeError(f"compiling for {', '.join(targets)} failed: " + "\n".join(lines[error:]))


def _compiled(targets: list[str], names: list[str]) -> dict[tuple[str, str], bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            Path(folder, target).mkdir()
        run_build(_BUILD, targets, folder, *names)
        return {each: Path(folder, each[0], file_of(each[1])).read_bytes() for each in product(targets, names)}


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
