"""PTX of kernels, kept beside the machine code of the CPU kernels: compiling one takes seconds."""
import functools
import hashlib
import importlib.metadata
import os
import pathlib

from edgeattn.runtime import kernel_cache

# What decides the PTX of a kernel: Numba's code, LLVM, and NVIDIA's, in the wheels of CUDA 12 and of CUDA 13.
_COMPILER = ("numba-cuda", "numba", "llvmlite", "nvidia-cuda-nvcc-cu12", "nvidia-nvvm")


@functools.cache
def compiler():
    """A few letters that stand for the compiler: the versions of its packages, and a toolkit's place and date."""
    parts = []
    for name in _COMPILER:
        try:
            parts.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            parts.append("")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):  # where numba-cuda looks, wheels aside
        for library in sorted(pathlib.Path(home).glob("nvvm/lib*/libnvvm.so*")) if home else ():
            parts += str(library.resolve()), str(library.stat().st_mtime_ns)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def ptx(kernel, capability):
    """(PTX, entry name) of a Kernel for a compute capability: from a file where there is one, else compiled."""
    stamp = kernel_cache.source_stamp(__file__)
    paths = []
    if stamp is not None:
        name = f"{kernel.name}.sm_{capability[0]}{capability[1]}.{compiler()}.{stamp[:24]}.ptx"
        paths = [pathlib.Path(folder) / name for folder in kernel_cache.folders(ptx)]
    for path in paths:
        content = kernel_cache.read(path)
        if content is not None:
            entry, _, text = content.decode("ascii").partition("\n")
            return text, entry
    from edgeattn.kernels.cuda import compile  # needs numba-cuda and libnvvm, which a filled cache does not

    text, entry = compile.to_ptx(kernel, capability)
    for path in paths:
        if kernel_cache.write(path, f"{entry}\n{text}".encode("ascii")):
            break
    return text, entry
