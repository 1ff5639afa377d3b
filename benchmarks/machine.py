"""What a measurement was made on: it goes into the JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from edgeattn.runtime.isa import ISA

PACKAGES = ("edgeattn", "numpy", "numba", "llvmlite", "ai-edge-litert", "tflite-runtime", "onnxruntime", "torch")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "EDGEATTN_ISA")


def describe() -> dict:
    """Processor, system, instruction set, versions, date, load, and the environment that steers threads."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(), "cores": os.cpu_count(), "affinity": _affinity(), "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "instruction_set": ISA.name, "versions": versions, "load": os.getloadavg(),
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def cache_sizes() -> dict[str, int]:
    """How many bytes to read to find out how fast: half of every cache from the second on, and twice the last.

    Caches as Linux tells them. Without what an eighth of the memory does not hold; that eighth, where nothing is known.
    """
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and int(level) > 1:
            sizes[f"L{level}"] = int(size.rstrip("K")) * 1024
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    found = {name: size // 2 for name, size in sizes.items()} | {"memory": 2 * max(sizes.values(), default=most // 2)}
    return {name: size for name, size in found.items() if size <= most}


def cores() -> int:
    """Cores that this process may use."""
    return len(_affinity() or range(os.cpu_count()))


def _affinity():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = {line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))}
    except OSError:
        names = set()
    return " / ".join(sorted(names)) or platform.processor() or platform.machine()
