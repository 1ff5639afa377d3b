"""Tensors in files of others: .safetensors and .npz, whole or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeattn.files import npy
from edgeattn.files.paths import as_path, reading
from edgeattn.files.safetensors_file import read_safetensors
from edgeattn.files.stored import Budget, StoredTensor, file_size
from edgeattn.files.zip_members import members, unpack

NPZ = ".npz file of plain arrays"
NPY = ".npy file of plain numbers"


def read_tensors(path, prefix: str = "") -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a .safetensors or .npz file whose names start with `prefix`.

    Returns
    -------
    dict of str to StoredTensor
        Under their full names.
    list of str
        All names in the file.

    Raises
    ------
    ValueError
        Naming the file, for one of another kind, truncated or damaged.
    """
    path = as_path(path)
    if path.suffix == ".npz":
        return _read_npz(path, prefix)
    if path.suffix == ".safetensors":
        _, tensors = read_safetensors(path)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, list(tensors)
    raise ValueError(
        f"path must end in .safetensors or .npz, got {str(path)!r}; "
        "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path)"
    )


def read_npy(path) -> np.ndarray:
    """The array in a .npy file.

    Raises
    ------
    ValueError
        Naming the file, for one that is truncated, damaged, or holds something else than numbers.
    """
    with open(path, "rb") as file, reading(path, NPY):
        budget, size = Budget(file_size(file)), file_size(file)
        at, shape, dtype, fortran_order = npy.parse_header(file.read(npy.LONGEST_HEADER), budget, "it")
        nbytes = budget.nbytes(shape, dtype.itemsize, "it")
        if at + nbytes > size:
            raise ValueError(f"{shape} of {dtype} takes {nbytes} bytes, and {size - at} are there")
        file.seek(at)
        return npy.as_array(file.read(nbytes), 0, shape, dtype, fortran_order)


def _read_npz(path: Path, prefix: str):
    tensors, names = {}, []
    with open(path, "rb") as file, reading(path, NPZ):
        budget = Budget(file_size(file))
        for title, member in members(file).items():
            name = title.removesuffix(".npy")
            if name == title:
                raise ValueError(f"member {title!r} is no .npy array")
            names.append(name)
            if name.startswith(prefix):
                tensors[name] = _in_npz(path, file, member, name, budget)
    return tensors, names


def _in_npz(path: Path, file, member, name: str, budget: Budget) -> StoredTensor:
    """An array of an .npz file, once its header and the size of its member agree."""
    at, shape, dtype, fortran_order = npy.parse_header(unpack(file, member, npy.LONGEST_HEADER), budget, name)
    nbytes = budget.nbytes(shape, dtype.itemsize, name)
    if member.file_size != at + nbytes:
        raise ValueError(f"{name} of shape {shape} and dtype {dtype} takes {at + nbytes} bytes, and its member has "
                         f"{member.file_size}")

    def read():
        with open(path, "rb") as file, reading(path, NPZ):
            budget.take(member.file_size, name)
            return npy.as_array(unpack(file, member), at, shape, dtype, fortran_order)

    return StoredTensor(shape, dtype, read)
