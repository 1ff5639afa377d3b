"""Reading .safetensors files: a length, a header in JSON, and tensors one after the other, each where the header says.

The package `safetensors` writes them, and its README is the description of the format. Here the header is read
once, however many tensors it names, and a tensor's bytes when they are wanted.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.files.paths import reading
from edgeattn.files.stored import Budget, StoredTensor, file_size, widened

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeattn.types import Path

KIND = ".safetensors file"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1", "BF16": "<u2"}
_METADATA = "__metadata__"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """(metadata, tensors by name) of a .safetensors file.

    Raises
    ------
    OSError
        When it cannot be read.
    ValueError
        Naming the file, for one that is truncated or damaged; also when a tensor is read whose dtype NumPy lacks.
    """

    def fetch(start, dtype, count):
        with open(path, "rb") as file:
            file.seek(start)
            return np.fromfile(file, dtype, count)

    with open(path, "rb") as file, reading(path, KIND):
        return _contents(path, file.read, file_size(file), fetch)


def view_safetensors(path: Path, content: memoryview
                     ) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The same of what is in memory already: tensors are views of it; `path` is where it comes from."""
    at = 0

    def read(count):
        nonlocal at
        at += count
        return bytes(content[at - count:at])

    with reading(path, KIND):
        return _contents(path, read, len(content), lambda start, dtype, count: (
            np.frombuffer(content, dtype, count, start) if count else np.zeros(0, dtype)))


def _contents(path: Path, read: Callable[[int], bytes], size: int, fetch: Callable[[int, np.dtype, int], np.ndarray]
              ) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """From what `read` gives of it, byte after byte; `fetch` gives numbers from a place on."""
    if not size:
        raise ValueError("it is empty")
    header_size = int.from_bytes(read(8), "little")
    if size < 8 or header_size > size - 8:
        raise ValueError(f"its header should have {header_size} bytes, and the file has {size}")
    # json has RecursionError for what is nested too deeply, which `reading` makes a ValueError too
    header = json.loads(read(header_size), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header must be an object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata must be texts by name")
    return metadata, _tensors(path, header, 8 + header_size, size, fetch)


def _once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensors(path: Path, header: dict, start: int, size: int, fetch) -> dict[str, StoredTensor]:
    """The tensors of a header, once they are found to fill the file without gap or overlap."""
    budget, places = Budget(size), []
    tensors = {name: _tensor(path, name, entry, start, budget, places, fetch) for name, entry in header.items()}
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            raise ValueError(f"{name} begins at byte {first} of the data, and what is before it ends at {end}")
        end = last
    if start + end != size:
        raise ValueError(f"its tensors take {end} bytes, and {size - start} are there")
    return tensors


def _tensor(path: Path, name: str, entry, start: int, budget: Budget, places: list, fetch) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
            and all(type(offset) is int for offset in offsets) and 0 <= offsets[0] <= offsets[1]):
        raise ValueError(f"{name} must have a dtype, a list as its shape, and two offsets, got {str(entry)[:200]}")
    places.append((*offsets, name))
    known = DTYPES.get(kind)
    dtype = np.dtype("u1" if known is None else known)
    nbytes = budget.nbytes(shape, dtype.itemsize, name)
    if known is not None and nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{name} of shape {shape} and dtype {kind} takes {nbytes} bytes, and has "
                         f"{offsets[1] - offsets[0]}")

    def read():
        if known is None:
            raise ValueError(f"{path} stores {name} as {kind}, which NumPy does not have; convert the file to F32 "
                             "first")
        array = fetch(start + offsets[0], dtype, nbytes // dtype.itemsize)
        with reading(path, KIND):  # a file that was cut off since
            array = array.reshape(shape)
        # the bytes of a damaged file may be neither 0 nor 1
        return widened(array) if kind == "BF16" else array != 0 if kind == "BOOL" else array

    return StoredTensor(shape, {"BF16": "f4", "BOOL": "?"}.get(kind, dtype), read)
