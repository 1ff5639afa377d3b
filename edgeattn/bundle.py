"""Layers and models with the kernels they call, in one file: needs NumPy and ctypes, neither Numba nor LLVM.

`quant.export(layer, "attention.so", target=...)` writes a shared library of kernels for a processor, which C programs
call by the header beside it. Behind the library follow the layer as `edgeattn.save` writes it, a description in JSON
and a footer of 24 bytes: MAGIC, the description's length and the CRC-32 of all before the footer, both little endian.
Whoever loads a bundle reads these first: nothing is run of a damaged file, or of one for another processor.
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import operator
import os
import platform
import struct
import weakref
import zlib
from typing import TYPE_CHECKING

from edgeattn.files.mapped import map_file
from edgeattn.files.paths import reading, reason
from edgeattn.files.safetensors_file import view_safetensors
from edgeattn.files.storage import layer_of
from edgeattn.runtime import prebuilt, processor, sources
from edgeattn.runtime.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO, TypeAlias

    from edgeattn import types
    from edgeattn.layers import MultiHeadAttention
    from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention

    FloatBundle: TypeAlias = MultiHeadAttention | DynamicMultiHeadAttention
    StaticBundle: TypeAlias = StaticMultiHeadAttention

ABI_VERSION = 2
MAGIC = b"edgeattn bundle\n"
FOOTER = struct.Struct("<16sII")

# (device, inode) of a file -> its memory, as long as an array lies there or a kernel is run
_LOADED: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()  # of what was loaded


def load(path: types.Path) -> FloatBundle | StaticBundle:
    """Load what `quant.export` wrote to a .so.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    MultiHeadAttention, SelfAttention, QuantizedMultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
        As `edgeattn.load` gives it. Its weights lie in the file, mapped into memory; its kernels are those of the file
        where this process has none yet. A warning of the logger ``edgeattn`` says where they cannot be used, being
        made of other sources than this edgeattn's or for another instruction set than this process's, and others run.

    Raises
    ------
    ValueError
        For a file that is no bundle or is damaged, one of another ABI version, one for a processor that is not this
        one, one that was written over in place since this process loaded it, and one whose kernels cannot be used where
        there are no others. Nothing of the file has been run then.
    OSError
        When it cannot be read.
    """
    try:
        path = os.path.abspath(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    with open(path, "rb") as file:
        about, checksum = _read(path, file)
        check_description(path, about)
        machine = platform.machine()
        if about["machine"] != machine:
            raise ValueError(f"{path} is for {about['machine']} ({about['target']}); this machine is {machine}")
        lacking = sorted(set(about["requires"]) - processor.flags())
        if lacking:
            raise ValueError(f"{path} is for {about['target']}; this processor lacks {', '.join(lacking)}: export the "
                             "layer for another target")
        content = _content(path, file, checksum)
        _use_kernels(path, file, about, content)
    start, size = about["layer"]
    return layer_of(path, *view_safetensors(path, memoryview(content).cast("B").toreadonly()[start:start + size]))


def _content(path: str, file: BinaryIO, checksum: int) -> Any:
    """The memory that an open file whose checksum was read is mapped to."""
    status = os.fstat(file.fileno())
    content = _LOADED.get((status.st_dev, status.st_ino))
    if content is None:
        content = _LOADED[status.st_dev, status.st_ino] = map_file(file)
        content.checksum = checksum
    if content.checksum != checksum:
        raise ValueError(f"{path} was written over in place since this process loaded it; write a new file and rename "
                         "it, as quant.export does")
    return content


def _use_kernels(path: str, file: BinaryIO, about: dict[str, Any], content: Any) -> None:
    """Have this process run a bundle's kernels where it has none; refuse what would have none to run."""
    def library() -> prebuilt.Library:
        # By the file's number, since to a path that it knows, the C library answers with what it loaded from there,
        # whatever now lies there. A number is given again, so each time its path is spelled differently.
        spelling = f"{next(_NUMBERS):b}".replace("0", "./").replace("1", ".//")
        try:
            found = prebuilt.Library(about["target"], path, f"/proc/self/fd/{spelling}{file.fileno()}", content)
        except OSError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        if lacking := [symbol for symbol in about["kernels"] if symbol not in found]:
            found.close()
            raise ValueError(f"{path} has no function of its description: {lacking[0]}")
        return found

    why: str | None = f"it was made by edgeattn {about['edgeattn']}, of other sources than these"
    if about["stamp"] == sources.stamp():
        why = prebuilt.add(TARGETS[about["target"]].isa, about["kernels"], library)
    if why is None:
        return
    if not prebuilt.compiles() and not all(map(prebuilt.has, about["kernels"])):
        raise ValueError(f"the kernels of {path} cannot be used here, and there are no others: {why}; export it again "
                         "with the edgeattn and for the target that it is run with, or install numba")
    from edgeattn.messages import LOG

    LOG.warning("the kernels of %s are not used, this process has others: %s. Export it again with the edgeattn and "
                "for the target that it is run with.", path, why)


def read_description(path: types.Path) -> dict[str, Any]:
    """The description in a bundle, as a dict; nothing of the file is run."""
    with open(path, "rb") as file:
        return _read(path, file)[0]


def _read(path: types.Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """(description, checksum) of an open bundle."""
    size = os.fstat(file.fileno()).st_size
    end = size - FOOTER.size
    if end <= 0:
        raise ValueError(f"{path} is no bundle that quant.export wrote, or its end is missing")
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
        magic, length, checksum = FOOTER.unpack(view[end:])
        if magic != MAGIC:
            raise ValueError(f"{path} is no bundle that quant.export wrote, or its end is missing")
        with view[:end] as body:
            if length > end or zlib.crc32(body) != checksum:
                raise ValueError(f"{path} is damaged: its checksum is not the one it was written with")
        text = bytes(view[end - length:end])
    with reading(path, "bundle: its description is damaged"):
        return json.loads(text), checksum


def check_description(path: types.Path, about: Any) -> None:
    """Raise unless everything in a description is what `quant.export` writes, before anything is made of it.

    Raises
    ------
    ValueError
        Naming the file and the entry; for another version, how to get one that can be read.
    """
    for name, (fits, wanted) in _RULES.items():
        value = about.get(name) if isinstance(about, dict) else None
        if not fits(value):
            raise ValueError(f"{path} is no bundle that quant.export wrote: {name} in its description must be "
                             f"{wanted}, got {reason(repr(value))}")
        if name == "abi" and value != ABI_VERSION:  # another version's description is its own affair
            raise ValueError(f"{path} has ABI version {value}, and this edgeattn reads {ABI_VERSION}; export it again "
                             "with the edgeattn that runs it")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# What each entry of a description must be: (whether a value is that, in words).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "abi": (lambda value: type(value) is int, "an integer"),
    "machine": (_is_text, "a text"), "edgeattn": (_is_text, "a text"), "stamp": (_is_text, "a text"),
    "target": (lambda value: isinstance(value, str) and value in TARGETS, f"one of {', '.join(TARGETS)}"),
    "requires": (_are_texts, "a list of texts"), "kernels": (_are_texts, "a list of texts"),
    "layer": (lambda value: isinstance(value, list) and len(value) == 2
              and all(type(each) is int and each >= 0 for each in value), "where the layer begins, and its size"),
}

_KINDS = {"FloatBundle": ("MultiHeadAttention", "DynamicMultiHeadAttention"),
          "StaticBundle": ("StaticMultiHeadAttention",)}


def __getattr__(name: str) -> Any:
    """The kinds of attention layers that `load` gives; imported when asked for, since a bundle decides on kernels."""
    if name not in _KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edgeattn import layers, quantized

    return functools.reduce(operator.or_, (getattr(layers if kind in layers.__all__ else quantized, kind)
                                           for kind in _KINDS[name]))
