"""The command `edgeattn`: what a device has that attention can use."""
import argparse
import importlib.metadata
import os
import platform
import sys
import textwrap

import llvmlite.binding
import numba

from edgeattn import jit
from edgeattn.cpu import fused

_NEEDED = ("numpy", "numba", "llvmlite", "safetensors")
_OPTIONAL = {
    "reading .tflite files": ("flatbuffers",),
    "running .tflite files": ("ai-edge-litert", "tflite-runtime", "tflite-micro"),
    "the workbench (quant)": ("click", "rich"),
}


def main(arguments=None):
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="edgeattn", description="Attention for small computers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, processor, threads, cache and optional packages of this machine",
                               description="Say what this machine has: include it when you report a problem.")
    info.set_defaults(run=_info)
    chosen = parser.parse_args(arguments)
    return chosen.run()


def _info():
    rows = [*_software(), *_processor(), *_cache(), *_extras()]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(textwrap.fill(f"{name:{width}}  {text}", 100, subsequent_indent=" " * (width + 2),
                            break_long_words=False, break_on_hyphens=False))
    return 0


def _software():
    yield "edgeattn", f"{_version('edgeattn') or 'not installed, run from its folder'}"
    yield "python", f"{platform.python_version()} ({sys.executable or 'no executable'})"
    yield "system", platform.platform()
    yield "packages", ", ".join(f"{name} {_version(name) or '(unknown version)'}" for name in _NEEDED)


def _processor():
    features = llvmlite.binding.get_host_cpu_features()
    yield "processor", f"{llvmlite.binding.get_host_cpu_name()} ({platform.machine()}), as LLVM sees it"
    yield "features", " ".join(sorted(name for name, there in features.items() if there)) or "none known to LLVM"
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        yield "compiled for", f"{numba.config.CPU_NAME or 'this processor'} {numba.config.CPU_FEATURES or ''}".rstrip()
    yield "threads", f"{_usable_cores()} of {os.cpu_count()} cores usable"


def _usable_cores():
    # a container or taskset may grant fewer than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cache():
    if numba.config.DISABLE_JIT:
        yield "cache", "none: NUMBA_DISABLE_JIT is set, kernels run as plain Python"
        return
    folders = [(folder, _writable(folder)) for folder in jit._folders(fused.layer_float32.py_func)]
    for folder, writable in folders:
        yield "cache", f"{folder} ({'writable' if writable else 'not writable'})"
    if not any(writable for _, writable in folders):
        yield "", "no folder is writable: every process compiles anew; set NUMBA_CACHE_DIR to one that is"


def _writable(folder):
    while not os.path.isdir(folder):
        if os.path.lexists(folder) or os.path.dirname(folder) == folder:
            return False
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK | os.X_OK)


def _extras():
    for purpose, packages in _OPTIONAL.items():
        yield purpose, ", ".join(f"{name} {_version(name) or '(not installed)'}" for name in packages)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
