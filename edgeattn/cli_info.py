"""The command `edgeattn info`: what this machine has, and what files hold."""
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import textwrap

import edgeattn
from edgeattn import threads
from edgeattn.cli_open import FORMS, hints_of, open_model
from edgeattn.kernels.cpu import fused
from edgeattn.runtime import prebuilt, processor
from edgeattn.runtime.isa import ISA
from edgeattn.summary import summary

_WIDTH = 80
_NEEDED = ("numpy", "numba", "llvmlite", "safetensors")
# Reading a .tflite and computing what it computes needs none of these.
_OPTIONAL = {
    "other runtimes": ("ai-edge-litert", "tflite-runtime", "tflite-micro"),
    "texts": ("tokenizers",),
    "workbench": ("flatbuffers", "click", "rich"),
}


def add_to(commands):
    """Add the command to those of `edgeattn`."""
    command = commands.add_parser(
        "info", help="Say what this machine has, or what files hold.",
        description="Say what this machine has: include it when you report a problem. With files, what each holds.")
    command.add_argument("files", nargs="*", metavar="FILE", help=f"{FORMS}.")
    command.add_reading_options()
    command.add_argument("--json", action="store_true", help="Print the same as JSON.")
    command.set_defaults(run=_info)


def _info(chosen):
    if not chosen.files:
        rows = [*_software(), *_processor(), *_cache(), *_cuda(), *_extras()]
        if chosen.json:
            print(json.dumps({**dict(rows), "also read": [text for name, text in rows if name == "also read"],
                              "versions": {name: _version(name) for name in (*_NEEDED, *sum(_OPTIONAL.values(), ()))},
                              "instruction set": ISA.name, "number of threads": threads.get_num_threads(),
                              "library": prebuilt.LIBRARY and str(prebuilt.LIBRARY.path)}, indent=1))
        else:
            _print_rows(rows)
        return 0
    options = {"scheme": chosen.scheme, "arithmetic": chosen.arithmetic, "part": chosen.part}
    found = []
    for path in chosen.files:
        model = open_model(path, **options)
        size, rows = _disk_size(path), [*summary(model), *hints_of(path, model, chosen.scheme)]
        found.append({"file": path, "bytes on disk": size, **dict(rows)})
        if not chosen.json:  # at once: a file behind it may be damaged
            print(*[""] * (len(found) > 1), f"{path}: {size:,} bytes on disk", sep="\n")
            _print_rows([(f"  {name}", text) for name, text in rows])
    if chosen.json:
        print(json.dumps(found, indent=1))
    return 0


def _disk_size(path):
    """Bytes of a file, or of all in a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())


def _print_rows(rows):
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(textwrap.fill(f"{name:{width}}  {text}", _WIDTH, subsequent_indent=" " * (width + 2),
                            break_long_words=False, break_on_hyphens=False))


def _software():
    yield "edgeattn", edgeattn.__version__ + ("" if _version("edgeattn") else " (not installed, run from its folder)")
    yield "python", f"{platform.python_version()} ({sys.executable or 'no executable'})"
    yield "system", platform.platform()
    yield "packages", ", ".join(f"{name} {_version(name) or '(not installed)'}" for name in _NEEDED)


def _processor():
    if prebuilt.LIBRARY is None:
        import llvmlite.binding

        features = {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}
        yield "processor", f"{llvmlite.binding.get_host_cpu_name()} ({platform.machine()}), as LLVM sees it"
        yield "kernels", f"compiled here, by Numba: of libraries, {prebuilt.REASON}"
    else:
        features = processor.flags()
        yield "processor", f"{platform.machine()}, as Linux sees it"
        yield "kernels", f"{prebuilt.LIBRARY.path}: {prebuilt.REASON}"
    forced = " (asked for by EDGEATTN_ISA)" if os.environ.get("EDGEATTN_ISA") else ""
    yield "kernels for", f"{ISA.name}{forced}: {ISA.lanes} floats or {4 * ISA.lanes} int8 per instruction"
    yield "features", " ".join(sorted(features)) or "none known"
    if prebuilt.LIBRARY is None:
        import numba

        if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
            yield "compiled for", (f"{numba.config.CPU_NAME or 'this processor'} "
                                   f"{numba.config.CPU_FEATURES or ''}".rstrip())
    yield "threads", (f"{threads.get_num_threads()} unless edgeattn.threads.set_num_threads says otherwise; "
                      f"{_usable_cores()} of {os.cpu_count()} cores usable")


def _cuda():
    if importlib.util.find_spec("numba") is None:
        yield "CUDA", "not used: Numba is not installed, which writes the kernels of a GPU"
        return
    from edgeattn.kernels.cuda.driver import driver, why_not

    reason = why_not()
    if reason is None:
        yield "CUDA", f"{driver().name()}, compute capability {'.'.join(map(str, driver().capability()))}"
    else:
        yield "CUDA", f"not used: {reason}"


def _usable_cores():
    # a container or taskset may grant fewer than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cache():
    if prebuilt.LIBRARY is not None:
        return
    import numba

    from edgeattn.runtime import kernel_cache

    if numba.config.DISABLE_JIT:
        yield "cache", "none: NUMBA_DISABLE_JIT is set, kernels run as plain Python"
        return
    folders = [(folder, kernel_cache.usable(folder)) for folder in kernel_cache.folders(fused.layer_float32.py_func)]
    used = next((folder for folder, writable in folders if writable), None)
    if used is None:
        yield "cache", ("none, every process compiles anew: no folder is writable; set NUMBA_CACHE_DIR to one that is")
    for folder, writable in folders:
        if folder == used:
            yield "cache", f"{folder} ({'used' if os.path.isdir(folder) else 'made when a kernel is compiled'})"
        elif os.path.isdir(folder):
            yield "also read", f"{folder}{'' if writable else ' (not writable)'}"
        elif not writable:
            yield "not used", f"{folder}, which is not there and cannot be made"


def _extras():
    yield ".tflite files", "read and computed with what is here; the packages below are for more"
    for purpose, packages in _OPTIONAL.items():
        yield purpose, ", ".join(f"{name} {_version(name) or '(not installed)'}" for name in packages)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
