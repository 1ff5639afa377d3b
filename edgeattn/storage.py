"""Layers and tensors in files.

A layer's file is a .safetensors file: its tensors, and under the metadata key "edgeattn" one JSON object
{"format": 1, "kind": the name of the layer's class, "config": that class's own settings}.
"""

import importlib
import json
import pathlib
import zipfile
import zlib

import numpy as np
import safetensors
import safetensors.numpy

from edgeattn.files import write_atomic

_FORMAT = 1
_METADATA_KEY = "edgeattn"
_ENCRYPTED = 1  # in a zip member's flags
# Where each kind of layer lives; imported only when a file of that kind is opened. Every class has
#     _to_state() -> (config, tensors)    and    _from_state(config, tensors), a class method.
_KINDS = {
    "MultiHeadAttention": "edgeattn.layers.multi_head",
    "SelfAttention": "edgeattn.layers.self_attention",
    "StaticMultiHeadAttention": "edgeattn.quantized.static",
    "DynamicMultiHeadAttention": "edgeattn.quantized.dynamic",
}


def save(layer, path):
    """Write a layer to a .safetensors file, whole or not at all.

    Parameters
    ----------
    layer : MultiHeadAttention, SelfAttention or QuantizedMultiHeadAttention
    path : str or path
        Ends in ".safetensors". An existing file is replaced.

    Raises
    ------
    TypeError, ValueError
        For another kind of object or another suffix.
    """
    path = _path(path)
    kind = type(layer).__name__
    if _KINDS.get(kind) != type(layer).__module__:
        raise TypeError(f"layer must be one of {', '.join(_KINDS)}, got {kind}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"path must end in .safetensors, got {str(path)!r}; quant.export writes the other formats"
        )
    config, tensors = layer._to_state()
    header = {"format": _FORMAT, "kind": kind, "config": config}
    content = safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in tensors.items()},
        metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)},
    )
    write_atomic(path, content)


def load(path, *, arithmetic=None):
    """Read a layer that `save` wrote, or an int8 attention graph from a .tflite file.

    Parameters
    ----------
    path : str or path
        Ends in ".safetensors" or ".tflite".
    arithmetic : str, optional
        The kernel set an int8 layer shall follow, a name in `edgeattn.arithmetic.KERNEL_SETS`. Unless given:
        the one a .safetensors file was saved with, "litert" for a .tflite file, which does not say.

    Returns
    -------
    MultiHeadAttention, SelfAttention or QuantizedMultiHeadAttention

    Raises
    ------
    ValueError
        Naming the file, for one that is truncated, foreign, or does not hold what it says.
    """
    path = _path(path)
    if path.suffix == ".tflite":
        from edgeattn.tflite import read_tflite

        return read_tflite(path) if arithmetic is None else read_tflite(path, arithmetic=arithmetic)
    if path.suffix != ".safetensors":
        bundle = "; edgeattn.bundle.load runs a bundle" if path.suffix == ".so" else ""
        raise ValueError(f"path must end in .safetensors or .tflite, got {str(path)!r}{bundle}")
    metadata, tensors = _read_safetensors(path)
    kind, config = _parse_header(path, metadata)
    if arithmetic is not None:
        if "arithmetic" not in config:
            raise ValueError(f"arithmetic={arithmetic!r} applies to int8 layers, but {path} holds a {kind}")
        config["arithmetic"] = arithmetic
    layer_class = getattr(importlib.import_module(_KINDS[kind]), kind)
    try:
        return layer_class._from_state(config, tensors)
    except KeyError as error:
        raise ValueError(f"{path} does not hold a whole {kind}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a valid {kind}: {error}") from error


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
    path = _path(path)
    if path.suffix == ".npz":
        return _read_npz(path, prefix)
    if path.suffix == ".safetensors":
        _, tensors = _read_safetensors(path, prefix, names := [])
        return tensors, names
    raise ValueError(
        f"path must end in .safetensors or .npz, got {str(path)!r}; "
        "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path)"
    )


def _path(path):
    try:
        return pathlib.Path(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None


def _read_safetensors(path, prefix="", names=None):
    """(metadata, tensors whose names start with `prefix`); fills `names` with all names."""
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


def _parse_header(path, metadata):
    """(kind, config) from the metadata of a layer's file."""
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors but no edgeattn layer: read checkpoints of other libraries with "
            "MultiHeadAttention.from_torch or from_bert"
        )
    try:
        header = json.loads(metadata[_METADATA_KEY])
        version, kind, config = header["format"], header["kind"], header["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has unreadable edgeattn metadata: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, this edgeattn reads format {_FORMAT}; update edgeattn"
        )
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(config, dict):
        raise ValueError(f"{path} must hold one of {', '.join(_KINDS)} with its config, got kind {kind!r}")
    return kind, config
