"""Running layers compiled ahead of time: needs NumPy and ctypes, neither Numba nor LLVM.

`quant.export(layer, "attention.so", target=...)` compiles a layer's kernels for a processor into a shared library that
holds the weights too. Behind the library, which any C program can call (see the header beside it), follow a description
in JSON and a footer of 24 bytes: MAGIC, the description's length and the CRC-32 of all before the footer, both little
endian. Whoever loads a bundle reads these first: a damaged file, or one for another processor, is never executed.
"""

from __future__ import annotations

import _ctypes
import ctypes
import itertools
import json
import os
import platform
import re
import struct
import weakref
import zlib
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import check_out, float_array, result_dtype, to_float32, write_result
from edgeattn.files.paths import reading, reason
from edgeattn.masks import bool_mask, resolve_mask
from edgeattn.runtime import processor
from edgeattn.shapes import check_input_shapes, strides

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO, Literal

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Bools, CausalAlignment, Codes, Flag, Float32s, Floats, Input, MaskOptions, Path, Window

ABI_VERSION = 1
MAGIC = b"edgeattn bundle\n"
FOOTER = struct.Struct("<16sII")
ALIGNMENT = 64  # bytes, of scratch

# One call: FIELDS numbers of 64 bits, as the struct of the header says.
(ABI, BATCH, QUERIES, KEYS, QUERY, KEY, VALUE, OUTPUT, KEEP, KEEP_STRIDES) = range(10)
(BIAS, BIAS_STRIDES, BANDED, LOW, HIGH, SCRATCH, SCRATCH_BYTES, FIELDS) = 13, 14, 18, 19, 20, 21, 22, 23
# What a call returns; nothing has been written unless it is OK.
OK, BAD_ABI, BAD_SHAPE, BAD_POINTER, BAD_SCRATCH = range(5)
LARGEST = 1 << 24  # B, L and S

INPUTS: tuple[Input, Input, Input] = ("query", "key", "value")
_KEPT = 4  # scratch buffers kept for the next call
# (device, inode) of a file -> its _Library, as long as a bundle runs on it
_LOADED: weakref.WeakValueDictionary[tuple[int, int], _Library] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()  # of what was loaded


def load(path: Path) -> FloatBundle | StaticBundle:
    """Load a bundle that `quant.export` wrote.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    FloatBundle or StaticBundle
        Called like the layer it was made of.

    Raises
    ------
    ValueError
        For a file that is no bundle or is damaged, one of another ABI version, one for a processor that is not this
        one, and one that was written over in place since this process loaded it. Nothing of the file has been run then.
    OSError
        When it cannot be read.
    """
    try:
        path = os.path.abspath(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    with open(path, "rb") as file:
        return _load(path, file)


def _load(path: str, file: BinaryIO) -> FloatBundle | StaticBundle:
    about, checksum = _read(path, file)
    check_description(path, about, os.fstat(file.fileno()).st_size)
    if about["abi"] != ABI_VERSION:
        raise ValueError(f"{path} has ABI version {about['abi']}, and this edgeattn reads {ABI_VERSION}; export it "
                         "again with the edgeattn that runs it")
    machine = platform.machine()
    if about["machine"] != machine:
        raise ValueError(f"{path} is for {about['machine']} ({about['target']}); this machine is {machine}")
    lacking = sorted(set(about["requires"]) - processor.flags())
    if lacking:
        raise ValueError(f"{path} is for {about['target']}; this processor lacks {', '.join(lacking)}: export the "
                         "layer for another target")
    library = _library(path, file, checksum)
    try:
        return (StaticBundle if about["scheme"] == "static" else FloatBundle)(about, library)
    except AttributeError as error:
        raise ValueError(f"{path} has no function of its description: {error}") from error


class _Library(ctypes.CDLL):
    """A loaded library; unloaded when the garbage collector finds that no bundle runs on it any more.

    Parameters
    ----------
    name : str
    checksum : int
        Of the bundle.
    """

    def __init__(self, name: str, checksum: int):
        super().__init__(name)
        self.checksum = checksum
        weakref.finalize(self, _ctypes.dlclose, self._handle).atexit = False  # a thread may still run it


def _library(path: str, file: BinaryIO, checksum: int) -> _Library:
    """The library in an open file whose checksum was read.

    By the file's number, since to a path that it knows, the C library answers with what it loaded from there, whatever
    now lies there. A number is given again after the file is closed, so each time its path is spelled differently; one
    file by two names is still one library, which the C library knows by device and inode.
    """
    status = os.fstat(file.fileno())
    identity = status.st_dev, status.st_ino
    library = _LOADED.get(identity)
    if library is None:
        spelling = f"{next(_NUMBERS):b}".replace("0", "./").replace("1", ".//")
        try:
            library = _Library(f"/proc/self/fd/{spelling}{file.fileno()}", checksum)
        except OSError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        _LOADED[identity] = library
    if library.checksum != checksum:
        raise ValueError(f"{path} was written over in place since this process loaded it; write a new file and rename "
                         "it, as quant.export does")
    return library


def read_description(path: Path) -> dict[str, Any]:
    """The description in a bundle, as a dict; nothing of the file is run."""
    with open(path, "rb") as file:
        return _read(path, file)[0]


def _read(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """(description, checksum) of an open bundle."""
    content = file.read()
    body, footer = content[:-FOOTER.size], content[-FOOTER.size:]
    if len(footer) < FOOTER.size or footer[:len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is no bundle that quant.export wrote, or its end is missing")
    _, size, checksum = FOOTER.unpack(footer)
    if size > len(body) or zlib.crc32(body) != checksum:
        raise ValueError(f"{path} is damaged: its checksum is not the one it was written with")
    with reading(path, "bundle: its description is damaged"):
        return json.loads(body[len(body) - size:]), checksum


def check_description(path: Path, about: Any, size: int) -> None:
    """Raise unless everything in a description is what `quant.export` writes, before anything is made of it.

    Raises
    ------
    ValueError
        Naming the file and the entry.
    """
    rules = dict(_RULES)
    if isinstance(about, dict) and about.get("abi") != ABI_VERSION:
        rules = {"abi": rules["abi"]}  # another version's description is its own affair
    elif isinstance(about, dict) and about.get("scheme") == "static":
        rules |= _STATIC_RULES
    for name, (fits, wanted) in rules.items():
        value = about.get(name) if isinstance(about, dict) else None
        if not fits(value):
            raise ValueError(f"{path} is no bundle that quant.export wrote: {name} in its description must be "
                             f"{wanted}, got {reason(repr(value))}")
    if "sizes" in rules:
        _check_sizes(path, about, size)


def _check_sizes(path: Path, about: dict[str, Any], size: int) -> None:
    """Raise unless the numbers of a layer agree, and its weights fit into the file."""
    sizes = about["sizes"]
    H, Hkv, D, Dv = (sizes[name] for name in ("num_heads", "num_kv_heads", "head_dim", "value_dim"))
    weights = H * D * sizes["embed_dim"] + Hkv * D * sizes["kdim"] + Hkv * Dv * sizes["vdim"]
    if H % Hkv or weights > size:
        raise ValueError(f"{path} is no bundle that quant.export wrote: sizes in its description are those of no layer "
                         f"in a file of this size, got {sizes}")
    if about["scheme"] == "static":
        needed = {INPUTS[source] for source in about["sources"]} | {"output"}
        if set(about["quantization"]) != needed:
            raise ValueError(f"{path} is no bundle that quant.export wrote: quantization in its description must be of "
                             f"{sorted(needed)}, got {reason(sorted(about['quantization']))}")


def _whole(value: object, lowest: int = 1, highest: int = LARGEST) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_quantization(value: object) -> bool:
    return (isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, float)
            and 2.0**-60 <= value[0] <= 2.0**60 and _whole(value[1], -128, 127))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


class Bundle:
    """A layer compiled ahead of time.

    Attributes
    ----------
    scheme : "float32", "dynamic" or "static"
    target : str
        What it was compiled for.
    num_heads, num_kv_heads, embed_dim, kdim, vdim, head_dim, value_dim, output_dim : int
    """

    num_heads: int
    num_kv_heads: int
    embed_dim: int
    kdim: int
    vdim: int
    head_dim: int
    value_dim: int
    output_dim: int

    def __init__(self, about: dict[str, Any], library: _Library):
        self.scheme: Literal["float32", "dynamic", "static"] = about["scheme"]
        self.target: str = about["target"]
        for name in SIZES:
            setattr(self, name, about["sizes"][name])
        self._widths = self.embed_dim, self.kdim, self.vdim
        self._run = library[f"{about['prefix']}_run"]  # not an attribute, which would keep the library
        self._run.argtypes, self._run.restype = [ctypes.c_void_p], ctypes.c_int32
        self._measure = library[f"{about['prefix']}_scratch_bytes"]
        self._measure.argtypes, self._measure.restype = [ctypes.c_int64] * 3 + [ctypes.c_int32], ctypes.c_int64
        self._needs: dict[tuple[int, ...], int] = {}
        self._scratch: list[NDArray[np.uint8]] = []

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in SIZES)
        return f"{type(self).__name__}(scheme={self.scheme!r}, target={self.target!r}, {sizes})"

    def _kernel(self, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], out: NDArray[Any],
                keep: Bools | None, bias: Float32s | None, band: tuple[int, int] | None) -> NDArray[Any]:
        """out (B, L, Eo) from query (B, L, E), key (B, S, kdim), value (B, S, vdim), in C order and not empty."""
        call = np.zeros(FIELDS, np.int64)
        shape = (*query.shape[:2], key.shape[1], keep is not None or bias is not None)
        if max(shape) > LARGEST:
            raise ValueError(f"B, L and S must be at most {LARGEST}, got {shape[:3]}")
        needed = self._needs.get(shape)
        if needed is None:
            if len(self._needs) > 64:
                self._needs.clear()
            needed = self._needs[shape] = self._measure(*shape)
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = np.empty(0, np.uint8)
        if scratch.size < needed + ALIGNMENT:
            scratch = np.zeros(needed + ALIGNMENT, np.uint8)
        call[ABI] = ABI_VERSION
        call[BATCH:QUERY] = shape[:3]
        call[QUERY:KEEP] = [x.ctypes.data for x in (query, key, value, out)]
        for mask, field, at in ((keep, KEEP, KEEP_STRIDES), (bias, BIAS, BIAS_STRIDES)):
            if mask is not None:
                call[field] = mask.ctypes.data
                call[at:at + 4] = strides(mask.shape)
        if band is not None:
            call[BANDED:SCRATCH] = 1, *band
        call[SCRATCH] = scratch.ctypes.data + -scratch.ctypes.data % ALIGNMENT
        call[SCRATCH_BYTES] = needed
        status = self._run(call.ctypes.data)
        if len(self._scratch) < _KEPT:
            self._scratch.append(scratch)
        if status != OK:
            raise RuntimeError(f"the bundle refused a call with status {status}: it is not the library its description "
                               "is about")
        return out


SIZES = ("num_heads", "num_kv_heads", "embed_dim", "kdim", "vdim", "head_dim", "value_dim", "output_dim")
# What each entry of a description must be: (whether a value is that, in words).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "abi": (lambda value: type(value) is int, "an integer"),
    "machine": (_is_text, "a text"), "target": (_is_text, "a text"),
    "requires": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
    "prefix": (lambda value: _is_text(value) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", value) is not None,
               "a name in C"),
    "scheme": (lambda value: isinstance(value, str) and value in ("float32", "dynamic", "static"),
               "float32, dynamic or static"),
    "sizes": (lambda value: isinstance(value, dict) and set(value) == set(SIZES) and all(map(_whole, value.values())),
              f"{', '.join(SIZES)}, each from 1 to {LARGEST}"),
}
_STATIC_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "arithmetic": (_is_text, "a text"),
    "sources": (lambda value: value in ([0, 0, 0], [0, 1, 1], [0, 1, 2]), "one of [0, 0, 0], [0, 1, 1], [0, 1, 2]"),
    "mask_shape": (lambda value: value is None
                   or isinstance(value, list) and len(value) == 4 and all(map(_whole, value)), "null or four axes"),
    "quantization": (lambda value: isinstance(value, dict) and all(map(_is_quantization, value.values())),
                     "a scale within [2**-60, 2**60] and a zero point within [-128, 127] by name"),
}


class FloatBundle(Bundle):
    """A float32 layer, or a dynamic int8 one, compiled ahead of time."""

    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 attn_mask: ArrayLike | None = None, key_padding_mask: ArrayLike | None = None, is_causal: Flag = False,
                 causal_alignment: CausalAlignment | None = None, window_size: Window = (-1, -1),
                 alibi_slopes: ArrayLike | None = None, out: Floats | None = None) -> Floats:
        """Attend from `query` to `key` and `value`; arguments and result as `MultiHeadAttention`'s."""
        if key is None and value is not None:
            raise ValueError("value needs key, got key=None; pass key=query to attend from query to itself")
        query = float_array("query", query)
        key = query if key is None else float_array("key", key)
        value = key if value is None else float_array("value", value)
        check_input_shapes("query", self._widths, query.shape, key.shape, value.shape)
        dtype = result_dtype(query, key, value)
        lead, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
        check_out(out, (*lead, queries, self.output_dim), dtype)
        mask = resolve_mask((*lead, self.num_heads, queries, keys), attn_mask, key_padding_mask, is_causal=is_causal,
                            causal_alignment=causal_alignment, window_size=window_size, alibi_slopes=alibi_slopes)
        batch = mask.shape[0]
        keep, bias, band, _ = mask.without_slopes().for_kernels()
        if keys == 0:  # one key that is not there
            key, value = (np.zeros((*lead, 1, x.shape[-1]), np.float32) for x in (key, value))
            keep, bias, band = np.zeros((1, 1, 1, 1), np.bool_), None, None
        q = to_float32(query).reshape(batch, queries, self.embed_dim)
        k = q if key is query else to_float32(key).reshape(batch, max(keys, 1), self.kdim)
        v = k if value is key else to_float32(value).reshape(batch, max(keys, 1), self.vdim)
        result = np.empty((*lead, queries, self.output_dim), np.float32)
        if result.size:
            self._kernel(q, k, v, result, keep, bias, band)
        return write_result(result, out, dtype)


class StaticBundle(Bundle):
    """A static int8 layer compiled ahead of time: int8 in, int8 out.

    Attributes
    ----------
    arithmetic : str
        The TFLite kernel set it equals.
    sources : tuple of int
        Which input feeds the query, key and value projection.
    quantization : dict
        "query" (and "key", "value" where `sources` has them) and "output" -> (scale, zero_point).
    mask_shape : tuple of int or None
        Of the mask the layer carries, which broadcasts to (B, H, L, S).
    """

    def __init__(self, about: dict[str, Any], library: _Library):
        super().__init__(about, library)
        self.arithmetic: str = about["arithmetic"]
        self.sources = tuple(about["sources"])
        self.mask_shape = None if about["mask_shape"] is None else tuple(about["mask_shape"])
        self.quantization = {name: (np.float32(scale), zero) for name, (scale, zero) in about["quantization"].items()}

    def quantize_input(self, x: ArrayLike, name: Input = "query") -> Codes:
        """int8 codes of a float input; `name` is "query", "key" or "value"."""
        scale, zero = self.quantization[INPUTS[self.sources[INPUTS.index(name)]]]
        with np.errstate(over="ignore"):
            codes = np.rint(np.asarray(float_array(name, x), np.float32) * (np.float32(1) / scale)) + np.float32(zero)
        codes = np.where(np.isnan(codes), np.float32(zero), codes)
        return np.clip(codes, -128, 127).astype(np.int8)

    def dequantize_output(self, codes: ArrayLike) -> Float32s:
        """float32 reals of `run_int8`'s codes."""
        scale, zero = self.quantization["output"]
        return (np.asarray(codes, np.float32) - np.float32(zero)) * scale

    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 attn_mask: ArrayLike | None = None, key_padding_mask: ArrayLike | None = None, is_causal: Flag = False,
                 causal_alignment: CausalAlignment | None = None, window_size: Window = (-1, -1),
                 out: Codes | None = None) -> Codes:
        """Attention on codes; arguments and result as `run_int8` of the layer it was made of."""
        given: list[Any] = [query, key, value]
        for i, name in enumerate(INPUTS):
            if self.sources[i] < i:
                if given[i] is not None and given[i] is not given[self.sources[i]]:
                    raise ValueError(f"{name} must be left out: this layer was quantized with "
                                     f"{INPUTS[self.sources[i]]} as its {name}")
                continue
            given[i] = np.asarray(given[i])
            if given[i].dtype != np.int8:
                raise TypeError(f"{name} must be int8, got {given[i].dtype}; quantize_input makes codes of floats")
            given[i] = np.ascontiguousarray(given[i])
        q, k, v = (given[source] for source in self.sources)
        check_input_shapes("query", self._widths, q.shape, k.shape, v.shape)
        lead, queries, keys = q.shape[:-2], q.shape[-2], k.shape[-2]
        check_out(out, (*lead, queries, self.output_dim), np.dtype(np.int8))
        if attn_mask is not None:
            attn_mask = bool_mask(attn_mask)
        mask = resolve_mask((*lead, self.num_heads, queries, keys), attn_mask, key_padding_mask, is_causal=is_causal,
                            causal_alignment=causal_alignment, window_size=window_size)
        if self.mask_shape is not None and any(
                size not in (1, wanted) for size, wanted in zip(self.mask_shape, mask.shape, strict=True)):
            raise ValueError(f"the mask this layer carries has shape {self.mask_shape}, which does not broadcast to "
                             f"(B, H, L, S) = {mask.shape}; call the layer with the lengths the mask was made for")
        keep, _, band, _ = mask.for_kernels()
        if keys == 0:  # one key that is not there
            k, v = (np.zeros((*lead, 1, x.shape[-1]), np.int8) for x in (k, v))
            keep, band = np.zeros((1, 1, 1, 1), np.bool_), None
        q, k, v = (x.reshape(mask.shape[0], *x.shape[-2:]) for x in (q, k, v))
        result = np.empty((*lead, queries, self.output_dim), np.int8)
        if result.size:
            self._kernel(q, k, v, result, keep, None, band)
        return write_result(result, out, np.dtype(np.int8))

    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 attn_mask: ArrayLike | None = None, key_padding_mask: ArrayLike | None = None, is_causal: Flag = False,
                 causal_alignment: CausalAlignment | None = None, window_size: Window = (-1, -1),
                 out: Floats | None = None) -> Floats:
        """Attention on reals: quantize the inputs, `run_int8`, dequantize; arguments and result as the layer's.

        A row is NaN where its query, or a key or value that the arguments let it see, holds NaN.
        """
        masks: MaskOptions = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal,
                              "causal_alignment": causal_alignment, "window_size": window_size}
        inputs = [None if x is None else np.asarray(x) for x in (query, key, value)]
        codes: list[Any] = [None if x is None else self.quantize_input(x, name)
                            for name, x in zip(INPUTS, inputs, strict=True)]
        if codes[1] is not None and key is query:
            codes[1] = codes[0]
        if codes[2] is not None and (value is key or value is query):
            codes[2] = codes[1] if value is key else codes[0]
        result = self.dequantize_output(self.run_int8(*codes, **masks))
        dtype = result_dtype(*(x for x in inputs if x is not None))
        check_out(out, result.shape, dtype)
        nan = [None if x is None else np.isnan(x).any(-1) for x in inputs]
        if any(x is not None and x.any() for x in nan):
            queries, keys, values = (nan[source] for source in self.sources)
            mask = resolve_mask((*queries.shape[:-1], self.num_heads, queries.shape[-1], keys.shape[-1]), **masks)
            permitted = mask.permitted()
            seen = np.ones(mask.shape, bool) if permitted is None else np.broadcast_to(permitted, mask.shape)
            reached = (seen & (keys | values).reshape(mask.shape[0], 1, 1, -1)).any((1, 3))
            result[queries | reached.reshape(queries.shape)] = np.nan
        return write_result(result, out, dtype)
