"""Data sets of an HDF5 file, bounded by the size of the file; and its attributes, which another process reads.

Reading attributes, the HDF5 library follows a damaged heap for ever: 4 of 2,300 files with a few changed bytes held it
up, all of them there, and none of 10,000 whose attributes were left alone (HDF5 2.0). So attributes are read only when
they are wanted, by a process that is ended when it takes too long.
"""

import io
import json
import os
import subprocess
import sys

from edgeattn.files.stored import StoredTensor, widened

_READER = os.path.join(os.path.dirname(__file__), "hdf5_attributes.py")
_SECONDS = 60  # until the child is given up; its own bound, of processor time, is far below


def data_sets(content, budget, guarded):
    """The data sets of an open HDF5 file by path, as StoredTensors.

    Parameters
    ----------
    content : h5py.File
    budget : Budget
    guarded : callable
        () -> the context in which values are read.

    Raises
    ------
    ValueError
        For data outside of the file, compressed data, and shapes that the file cannot have.
    """
    import h5py

    found = {}

    # visititems follows no link out of the file.
    def visit(path, entry):
        if isinstance(entry, h5py.Dataset):
            found[path] = _stored(path, entry, budget, guarded)

    content.visititems(visit)
    return found


def _stored(path, entry, budget, guarded):
    if entry.external or entry.is_virtual:
        raise ValueError(f"{path} lies in another file")
    properties = entry.id.get_create_plist()
    if properties.get_nfilters():
        raise ValueError(f"{path} is stored compressed; rewrite the file with h5repack -f NONE")
    if entry.shape is None:
        raise ValueError(f"{path} has no shape")
    dtype = entry.dtype
    # Keras stores bfloat16 as bare pairs of bytes, the upper half of a float32
    halves = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None
    shape = tuple(int(axis) for axis in entry.shape)
    nbytes = budget.nbytes(shape, dtype.itemsize, path)
    if entry.chunks is not None:  # a chunk is read whole
        budget.nbytes(tuple(int(axis) for axis in entry.chunks), dtype.itemsize, f"a chunk of {path}")

    def read():
        with guarded():
            if dtype.kind not in "biuf" and not halves:
                raise ValueError(f"{path} holds {dtype}; expected numbers")
            budget.take(nbytes, path)
            array = entry[()]
            return widened(array.view("u2")) if halves else array

    return StoredTensor(shape, "f4" if halves else dtype, read)


def attributes(path_or_bytes):
    """({path of a group ending in /vars: its attribute "name"}, the file's attribute "model_config" or None).

    Raises
    ------
    ValueError
        When they are damaged.
    """
    if not sys.executable:
        raise ValueError("its attributes are read by a process of their own, and this Python knows no executable; pass "
                         "layer= the path of the layer in the file")
    in_memory = isinstance(path_or_bytes, bytes | bytearray | memoryview)
    done = subprocess.run(
        [sys.executable, _READER, "" if in_memory else os.path.abspath(path_or_bytes)],
        input=path_or_bytes if in_memory else b"", capture_output=True, timeout=_SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)})
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"its attributes cannot be read: {last[0] if last else 'the reader was ended'}")
    found = json.loads(done.stdout)
    return found["names"], found["model_config"]


def open_bytes(content):
    """The HDF5 file in bytes."""
    import h5py

    return h5py.File(io.BytesIO(content), "r")
