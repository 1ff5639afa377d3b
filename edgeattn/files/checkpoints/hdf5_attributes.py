"""The process that reads a file's attributes, for checkpoints/hdf5.py: a path, or "" and the file on standard input.

It gives one JSON object on standard output. It is a script, and imports nothing of edgeattn, to start quickly.
"""

import io
import json
import os
import resource
import signal
import sys

SECONDS = 0.8  # of processor time for 1 MB, and as much again for each 64 MB
HEADROOM = 2**28


def main(path):
    """Print the attributes of the file."""
    # A script's folder comes first on the path, where `tensors` and the like could be taken for packages.
    sys.path.pop(0)
    import h5py

    source = path or io.BytesIO(sys.stdin.buffer.read())
    held = 0 if path else len(source.getbuffer())  # in this process, and once more when h5py reads it
    size = os.path.getsize(path) if path else held
    with open("/proc/self/statm", encoding="ascii") as file:
        used = resource.getpagesize() * int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM + 2 * held,) * 2)
    # The signal's own action ends the process, wherever it is.
    signal.setitimer(signal.ITIMER_PROF, SECONDS * (1 + size / 2**26))
    names = {}
    with h5py.File(source, "r") as content:

        def visit(path, entry):
            if isinstance(entry, h5py.Group) and path.endswith("/vars") and "name" in entry.attrs:
                names[path.removesuffix("/vars")] = str(entry.attrs["name"])

        content.visititems(visit)
        config = content.attrs.get("model_config")
    if isinstance(config, bytes):
        config = config.decode()
    json.dump({"names": names, "model_config": config if isinstance(config, str) else None}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
