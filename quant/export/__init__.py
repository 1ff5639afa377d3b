"""Writing layers to files that other runtimes read: one module per format, chosen by the path's suffix."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import edgeattn
from edgeattn.files import write_atomic
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import StaticMultiHeadAttention
from quant.export.tflite import write_tflite

SUFFIXES = (".tflite", ".safetensors")


def export(layer, path, *, batch: int = 1, sequence_length: int | None = None, key_length: int | None = None,
           mask=None) -> None:
    """Write ``layer`` to ``path`` in the format its suffix names; nothing half-written is ever left there.

    Parameters
    ----------
    layer : MultiHeadAttention or StaticMultiHeadAttention
    path : str or path-like
        ``.tflite`` (fixed shapes, runs in LiteRT, tflite-runtime and TFLite Micro) or ``.safetensors``.
    batch : int
        B of a ``.tflite``.
    sequence_length : int
        L of a ``.tflite``; required there.
    key_length : int, optional
        S of a ``.tflite`` with inputs of their own for key and value; L otherwise.
    mask : "causal" or bool array broadcastable to (B, H, L, S), optional
        Written into the graph; True = attend. An int8 layer must have been calibrated with a mask of the kind, else
        its score range leaves no room below for masked scores.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, before anything is written.
    """
    path = Path(os.fspath(path))
    if not isinstance(layer, (MultiHeadAttention, StaticMultiHeadAttention)):
        raise TypeError(f"layer must be a MultiHeadAttention or what quant.quantize returns; got {type(layer).__name__}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}; got {str(path)!r}")
    if path.suffix == ".safetensors":
        edgeattn.save(layer if mask is None else layer.with_mask(_mask(mask, sequence_length, key_length)), path)
        return
    if sequence_length is None:
        raise ValueError("sequence_length is required for a .tflite: its shapes are fixed")
    for name, size in (("batch", batch), ("sequence_length", sequence_length), ("key_length", key_length or 1)):
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size!r}")
    if mask is not None:
        mask = _mask(mask, sequence_length, key_length)
    write_atomic(path, write_tflite(layer, batch=batch, sequence_length=sequence_length, key_length=key_length, mask=mask))


def _mask(mask, sequence_length: int | None, key_length: int | None) -> np.ndarray:
    """The mask argument as a bool array."""
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be 'causal' or a bool array; got {mask!r}")
        if sequence_length is None or key_length not in (None, sequence_length):
            raise ValueError(f"mask='causal' needs sequence_length, and as many keys as queries; got "
                             f"sequence_length={sequence_length}, key_length={key_length}")
        return np.tri(sequence_length, dtype=np.bool_)
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or not 2 <= mask.ndim <= 4:
        raise TypeError(f"mask must be 'causal' or a bool array of 2 to 4 axes (True = attend); got {mask.dtype} of "
                        f"shape {mask.shape}")
    return mask
