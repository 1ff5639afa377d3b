"""Tensors in files of others: .safetensors and .npz, whole or an error that names the file."""

import json
import zipfile
import zlib

import numpy as np

from edgeattn.files import as_path

_ENCRYPTED = 1  # in a zip member's flags


def read_tensors(path, prefix=""):
    """The tensors of a .safetensors or .npz file whose names start with `prefix`.

    Returns
    -------
    dict of str to array
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
        _, tensors = read_safetensors(path, prefix, names := [])
        return tensors, names
    raise ValueError(
        f"path must end in .safetensors or .npz, got {str(path)!r}; "
        "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path)"
    )


def read_safetensors(path, prefix="", names=None):
    """(metadata, tensors whose names start with `prefix`); fills `names` with all names."""
    import safetensors  # 0.8 MiB that only files need

    with open(path, "rb"):
        pass  # a missing or forbidden file is the operating system's error, not a damaged file
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            every = list(file.keys())
            tensors = {}
            for name in every:
                if name.startswith(prefix):
                    tensors[name] = _tensor(path, file, name)
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    if names is not None:
        names.extend(every)
    return metadata, tensors


def _tensor(path, file, name):
    if file.get_slice(name).get_dtype() == "BF16":
        return _bfloat16(path, name)
    try:
        return file.get_tensor(name)
    except (KeyError, TypeError, AttributeError) as error:  # what safetensors raises for a dtype NumPy lacks
        dtype = file.get_slice(name).get_dtype()
        raise ValueError(
            f"{path} stores {name} as {dtype}, which NumPy does not have; convert the file to F32 first"
        ) from error


def _bfloat16(path, name):
    """A bfloat16 tensor of a file known to be whole, as float32: each is the upper half of one."""
    with open(path, "rb") as raw:
        header_size = int.from_bytes(raw.read(8), "little")
        entry = json.loads(raw.read(header_size))[name]
        start, end = entry["data_offsets"]
        raw.seek(8 + header_size + start)
        halves = np.frombuffer(raw.read(end - start), "<u2")
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def _read_npz(path, prefix):
    try:
        with open(path, "rb") as raw, np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
            if any(member.flag_bits & _ENCRYPTED for member in file.zip.infolist()):
                raise ValueError("it is encrypted; save it again without a password")
            return {name: file[name] for name in file.files if name.startswith(prefix)}, list(file.files)
    except FileNotFoundError:
        raise
    # zipfile and zlib have an error of their own for each kind of damage
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a whole .npz file of plain arrays: {error}") from error
