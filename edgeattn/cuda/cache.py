"""PTX of kernels, kept beside the machine code of the CPU kernels: compiling one takes seconds."""
import os
import pathlib
import tempfile

from edgeattn import kernel_cache


def ptx(kernel, capability):
    """(PTX, entry name) of a Kernel for a compute capability: from a file where there is one, else compiled."""
    stamp = kernel_cache.source_stamp(__file__)
    paths = []
    if stamp is not None:
        name = f"{kernel.name}.sm_{capability[0]}{capability[1]}.{stamp[:24]}.ptx"
        paths = [pathlib.Path(folder) / name for folder in kernel_cache.folders(ptx)]
    for path in paths:
        try:
            entry, _, text = path.read_text(encoding="ascii").partition("\n")
        except (OSError, UnicodeDecodeError):
            continue
        if text.endswith("\n// complete\n"):
            return text, entry
    from edgeattn.cuda import compile  # needs numba-cuda and libnvvm, which a filled cache does not

    text, entry = compile.to_ptx(kernel, capability)
    text += "\n// complete\n"
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(f"{entry}\n{text}")
            os.replace(part, path)
        except OSError:
            continue
        break
    return text, entry
