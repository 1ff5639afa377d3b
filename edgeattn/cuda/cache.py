"""PTX of kernels, kept beside the machine code of the CPU kernels: compiling one takes seconds."""
import pathlib

from edgeattn import kernel_cache


def ptx(kernel, capability):
    """(PTX, entry name) of a Kernel for a compute capability: from a file where there is one, else compiled."""
    stamp = kernel_cache.source_stamp(__file__)
    paths = []
    if stamp is not None:
        name = f"{kernel.name}.sm_{capability[0]}{capability[1]}.{stamp[:24]}.ptx"
        paths = [pathlib.Path(folder) / name for folder in kernel_cache.folders(ptx)]
    for path in paths:
        content = kernel_cache.read(path)
        if content is not None:
            entry, _, text = content.decode("ascii").partition("\n")
            return text, entry
    from edgeattn.cuda import compile  # needs numba-cuda and libnvvm, which a filled cache does not

    text, entry = compile.to_ptx(kernel, capability)
    for path in paths:
        if kernel_cache.write(path, f"{entry}\n{text}".encode("ascii")):
            break
    return text, entry
