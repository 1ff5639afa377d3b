"""Layers in files.

A layer's file is a .safetensors file: its tensors, and under the metadata key "edgeattn" one JSON object
{"format": 1 or 2, "kind": the name of the layer's class, "config": that class's own settings}.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.files.mapped import let_go, map_file
from edgeattn.files.paths import as_path, reason, suffix_of, write_atomic
from edgeattn.files.safetensors_file import read_safetensors, view_safetensors
from edgeattn.hints import hinted
from edgeattn.kinds import FILES, class_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from edgeattn.files.stored import StoredTensor
    from edgeattn.layers import MultiHeadAttention
    from edgeattn.quantized import DynamicMultiHeadAttention, QuantizedMultiHeadAttention, StaticMultiHeadAttention
    from edgeattn.types import Arithmetic, Path

# Files say 2 where they hold what readers of 1, to whom it is unknown, would leave out.
_FORMATS, _SINCE_2 = (1, 2), ('"query_ops": [', '"key_ops": [')
_METADATA_KEY = "edgeattn"
_AT_ONCE = 1 << 18  # numbers that are looked at before their memory is given back


def save(layer: MultiHeadAttention | QuantizedMultiHeadAttention, path: Path) -> None:
    """Write a layer, an encoder or a model to a .safetensors file, whole or not at all.

    Parameters
    ----------
    layer : layer, encoder or model
        Attention of any kind, Linear, LayerNorm, RMSNorm, FeedForward, TransformerEncoderLayer, TransformerEncoder,
        TextEncoder or ImageEncoder.
    path : str or path
        Ends in ".safetensors". An existing file is replaced.

    Raises
    ------
    TypeError, ValueError
        For another kind of object or another suffix; for weights that hold NaN or infinity, which `load` refuses.
    """
    path = as_path(path)
    kind = kind_of(layer)
    if kind is None or not kind.is_file:
        raise TypeError(f"layer must be one of {', '.join(FILES)}, got {type(layer).__name__}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"path must end in .safetensors, got {str(path)!r}; quant.export writes the other formats"
        )
    write_atomic(path, content_of(layer))


def content_of(layer: Any) -> bytes:
    """What `save` writes of a layer."""
    try:
        import safetensors.numpy  # 0.8 MiB that only files need
    except ModuleNotFoundError as error:
        raise ImportError("writing a .safetensors file needs safetensors: pip install safetensors") from error

    config, tensors = layer.to_state()
    _check_finite(f"a {type(layer).__name__} cannot be saved", tensors, "the training of its model failed")
    text = json.dumps(config, sort_keys=True)
    header = {"format": 2 if any(key in text for key in _SINCE_2) else 1, "kind": type(layer).__name__,
              "config": config}
    return safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in tensors.items()},
        metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)},
    )


@hinted
def load(
    path: Path, *, arithmetic: Arithmetic | None = None, block: str | SupportsIndex | None = None
) -> MultiHeadAttention | StaticMultiHeadAttention | DynamicMultiHeadAttention:
    """Read a layer that `save` wrote, or attention from a .tflite file: static int8, or float32.

    int8 weights of a hybrid .tflite file become the float32 that they stand for, with a warning.

    int8 weights and embeddings of a .safetensors file are not copied: they are the file, mapped into memory, which must
    not be written to while the layer lives. `save` replaces a file, which is no harm.

    Parameters
    ----------
    path : str or path
        Ends in ".safetensors" or ".tflite".
    arithmetic : str, optional
        The kernel set an int8 layer shall follow, a name in `edgeattn.arithmetic.KERNEL_SETS`. Unless given:
        the one a .safetensors file was saved with, "litert" for a .tflite file, which does not say.
    block : int or str, optional
        Which attention block of a .tflite file of a whole model: its number, or the name that `quant inspect` lists.
        Unless given the file must be one block and nothing else.

    Returns
    -------
    layer, encoder or model
        Of the class that was saved.

    Raises
    ------
    ValueError
        Naming the file, for one that is truncated, foreign, or does not hold what it says.
    """
    suffix = suffix_of(path)
    if suffix == ".tflite":
        from edgeattn.files.tflite import read_tflite

        given: dict[str, Any] = {"arithmetic": arithmetic, "block": block}
        return read_tflite(path, **{name: value for name, value in given.items() if value is not None})
    if suffix != ".safetensors":
        folder = os.path.isdir(path) or not suffix
        other = ("; edgeattn.from_pretrained reads a model's folder" if folder else
                 "; edgeattn.bundle.load runs a bundle" if suffix == ".so" else "")
        missing = "" if os.path.exists(path) else ", of which there is none"
        raise ValueError(f"path must end in .safetensors or .tflite, got {str(path)!r}{missing}{other}")
    if block is not None:
        raise ValueError(f"block applies to .tflite files, got {block!r} for {path}")
    metadata, tensors, content = _mapped(path)
    return layer_of(path, metadata, tensors, arithmetic, content)


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor], Any]:
    """(metadata, tensors, content) of a file, mapped where its file system has that: tensors are then the file itself.

    content : what `map_file` gave; None where the file is read.
    """
    try:
        with open(path, "rb") as file:
            content = map_file(file)
    except OSError:
        return (*read_safetensors(path), None)
    return (*view_safetensors(path, memoryview(content).cast("B").toreadonly()), content)


def layer_of(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor],
             arithmetic: Arithmetic | None = None, content: Any = None
             ) -> MultiHeadAttention | StaticMultiHeadAttention | DynamicMultiHeadAttention:
    """The layer of what `read_safetensors` gave of a file; content: where it is mapped."""
    kind, config = _parse_header(path, metadata)
    if arithmetic is not None:
        if "arithmetic" not in config:
            raise ValueError(f"arithmetic={arithmetic!r} applies to int8 layers, but {path} holds a {kind}")
        config["arithmetic"] = arithmetic
    layer_class = class_of(kind)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    _check_finite(path, arrays, "the file is damaged, or was saved of a model whose training failed", content)
    try:
        layer: MultiHeadAttention | StaticMultiHeadAttention | DynamicMultiHeadAttention = (
            layer_class.from_state(config, arrays))
        return layer
    except KeyError as error:
        raise ValueError(f"{path} does not hold a whole {kind}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a valid {kind}: {error}") from error


def _check_finite(place: Path, tensors: Mapping[str, Any], why: str, content: Any = None) -> None:
    """Refuse weights that are no numbers; a position bias may be minus infinity, as a mask is.

    content : the mapped file that they lie in, of which this keeps no more in memory than was there before
    """
    with np.errstate(invalid="ignore", over="ignore"):
        for name, array in tensors.items():
            if array.dtype.kind != "f" or "position_bias" in name:
                continue
            flat = array.reshape(-1)
            for at in range(0, len(flat), _AT_ONCE):
                part = flat[at : at + _AT_ONCE]
                # a sum makes no array of flags; it may leave its own dtype, but not float64, which takes thrice as long
                if not (np.isfinite(np.add.reduce(part)) or np.isfinite(np.add.reduce(part, dtype=np.float64))):
                    raise ValueError(f"{place}: {name} holds NaN or infinity: {why}")
                if content is not None and len(flat) > _AT_ONCE:
                    let_go(content, part)


def _parse_header(path: Path, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(kind, config) from the metadata of a layer's file."""
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors but no edgeattn layer: read checkpoints of other libraries with "
            "MultiHeadAttention.from_torch or from_bert, an encoder with TransformerEncoder.from_torch, a whole model "
            "from its folder with edgeattn.from_pretrained"
        )
    try:
        header = json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has unreadable edgeattn metadata: {type(error).__name__}, {reason(error)}") from error
    if not isinstance(header, dict) or not {"format", "kind", "config"} <= set(header):
        raise ValueError(f"{path} has unreadable edgeattn metadata: it must be an object with 'format', 'kind' and "
                         f"'config', got {str(header)[:100]}")
    version, kind, config = header["format"], header["kind"], header["config"]
    if version not in _FORMATS:
        raise ValueError(
            f"{path} has format {version!r}, this edgeattn reads formats {' and '.join(map(str, _FORMATS))}; update "
            "edgeattn"
        )
    if not isinstance(kind, str) or kind not in FILES or not isinstance(config, dict):
        raise ValueError(f"{path} must hold one of {', '.join(FILES)} with its config, got kind {kind!r}")
    return kind, config
