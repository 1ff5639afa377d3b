"""Writing layers to files that other runtimes read: one module per format, and one row of the table FORMATS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import edgeattn
from edgeattn.checks import as_array, count, flag, is_one_of, to_float32
from edgeattn.files.paths import as_path, check_folder, write_atomic
from edgeattn.hints import hinted
from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.layers.positions import refuse_positions
from edgeattn.quantized import DynamicMultiHeadAttention, QuantizedMultiHeadAttention, StaticMultiHeadAttention
from edgeattn.runtime.targets import TARGETS
from quant.calibration import of_one_layer
from quant.export.bundle import has_header, write_bundle
from quant.export.c import write_c
from quant.export.c_encoder import write_encoder_c
from quant.export.c_files import check_beside, write_together
from quant.export.onnx import OPSETS, write_onnx
from quant.export.targets import BOARDS, NATIVE, target_named, target_of
from quant.export.tflite import write_tflite
from quant.model_calls import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn import types
    from quant.model_calls import Model
    from quant.types import TargetName


class Request(NamedTuple):
    """The arguments of ``export``, checked, for whoever writes; of several lengths the mask may be "causal"."""

    lengths: dict[str, Any]
    mask: Any
    test_vectors: int | None
    target: str | None
    opset: int | None
    padding: bool = False


class Format(NamedTuple):
    """One row of the table of formats.

    Attributes
    ----------
    write : function of a layer, a Path and a Request
        Writes the file, and what goes beside it, whole or not at all.
    about : str
        What the file is for, as `quant export --help` and docs/formats.md say it.
    any_shape : bool
        Whether a file takes any batch and lengths, and whole models of texts and images; the others are of fixed
        shapes.
    dynamic : bool
        Whether it takes dynamic layers.
    options : tuple of str
        Of "target", which is required then, "test_vectors", "opset", "padding", "several lengths", "any length" and
        "positions", of float attention: those that the format has.
    """

    write: Callable[[Any, Path, Request], None]
    about: str
    any_shape: bool = False
    dynamic: bool = False
    options: tuple[str, ...] = ()


def _tflite(layer: Any, path: Path, request: Request) -> None:
    write_atomic(path, write_tflite(layer, **request.lengths, mask=request.mask, padding=request.padding))


def _onnx(layer: Any, path: Path, request: Request) -> None:
    write_atomic(path, write_onnx(layer, **request.lengths, mask=request.mask, opset=request.opset or OPSETS[0],
                                  padding=request.padding))


def _safetensors(layer: Any, path: Path, request: Request) -> None:
    edgeattn.save(_carrying(layer, path, request.mask), path)


def _c(layer: Any, path: Path, request: Request) -> None:
    write = write_encoder_c if isinstance(layer, TransformerEncoder) else write_c
    texts = write(layer, path.stem, **request.lengths, mask=request.mask, test_vectors=request.test_vectors)
    check_beside(path, texts.keys() - {path.name})
    write_together({path.with_name(name): text.encode("ascii") for name, text in texts.items()})


def _bundle(layer: Any, path: Path, request: Request) -> None:
    layer = _carrying(layer, path, request.mask)
    if has_header(layer):
        check_beside(path, [f"{path.stem}.h"])  # before minutes of compiling
    files = write_bundle(layer, path.name, request.target or "")
    write_together({path.with_name(name): content for name, content in files.items()})


FORMATS = {
    ".tflite": Format(_tflite, "fixed shapes, whole encoders too; runs in LiteRT, tflite-runtime and TFLite Micro",
                      dynamic=True, options=("several lengths", "padding", "positions")),
    ".onnx": Format(_onnx, "fixed shapes or any, whole encoders too; runs in onnxruntime and others",
                    options=("any length", "opset", "padding", "positions")),
    ".safetensors": Format(_safetensors, "any shape; `edgeattn.load` reads it", any_shape=True, dynamic=True),
    ".c": Format(_c, "fixed shapes, whole encoders too; C99 for microcontrollers, with a header beside it",
                 options=("test_vectors",)),
    ".so": Format(_bundle, "any shape, whole models too; its kernels compiled for a target, with a C header for an "
                           "attention layer; `edgeattn.bundle.load` runs it without Numba", any_shape=True,
                  dynamic=True, options=("target",)),
}


@hinted
def export(layer: MultiHeadAttention | QuantizedMultiHeadAttention | Model, path: types.Path, *,
           batch: SupportsIndex | None = None, sequence_length: SupportsIndex | Sequence[SupportsIndex] | None = None,
           key_length: SupportsIndex | None = None, mask: Literal["causal"] | ArrayLike | None = None,
           test_vectors: SupportsIndex | None = None, target: TargetName | None = None,
           opset: SupportsIndex | None = None, padding: types.Flag = False) -> Path:
    """Write ``layer`` to ``path`` in the format its suffix names; nothing half-written is ever left there.

    Parameters
    ----------
    layer : MultiHeadAttention, QuantizedMultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
        The last two, whole, go to a ``.safetensors`` or ``.so``; their ``encoder`` to the others too.
    path : str or path-like
        Ends in one of `FORMATS`, which says what each is for: ``.tflite``, ``.safetensors``, ``.c`` (the name must be a
        C identifier, the layer or encoder a static one with the arithmetic "tflm") or ``.so``. With a target, a folder
        that exists stands for ``attention-TARGET.so`` in it. A file of this name is replaced; what has the name of a
        file that goes beside it, only if it is of an earlier export.
    batch : int
        B of a ``.tflite`` or ``.c``, 1 unless given. A ``.safetensors`` or ``.so`` takes any, and lengths only for a
        mask. An ``.onnx`` takes any where neither ``batch`` nor ``sequence_length`` is given.
    sequence_length : int, or for a ``.tflite`` several
        L of a ``.tflite`` or ``.c``, required there, and of a causal mask. A ``.tflite`` of several has a signature,
        ``length_L``, for each of them, over the same weights. An ``.onnx`` without takes any. An encoder's ``.c`` takes
        sequences of any length up to it.
    key_length : int, optional
        S of a ``.tflite`` or ``.c`` with inputs of their own for key and value; L otherwise.
    mask : "causal" or bool array broadcastable to (B, H, L, S), optional
        Written into the file; True = attend. Of float attention in a ``.tflite`` or ``.onnx`` also numbers that are
        added to the scores, such as ALiBi's. Static attention must have been calibrated with masks, or quantized with
        ``room_for_masks=True``, else its scores' range leaves no room below for masked scores.
    test_vectors : int, optional
        Of a ``.c``: how many test vectors to write beside it, ``NAME_test.h``, with a program that checks them,
        ``NAME_test.c``.
    target : str, optional
        Of a ``.so``, required there: the processor, a name in ``quant.export.targets.TARGETS``, such as "cortex-a72";
        a board in ``BOARDS`` there, such as "pi4"; "native": the best of them that this machine can run.
    opset : int, optional
        Of an ``.onnx``: 17, unless given, to 23, where attention in float32 is one operator.
    padding : bool
        Of an encoder in a ``.tflite`` or ``.onnx``: whether the file has an input more, ``attention_mask`` (B, L), as
        transformers calls it: 1 = token, 0 = padding, which no token attends to. int32 in a ``.tflite``, int64 in an
        ``.onnx``; static attention needs room for it as for ``mask``.

    Returns
    -------
    Path
        The file that was written, of those beside it the one that holds the layer.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, before anything is written.
    RuntimeError
        Where what a ``.so`` needs is missing: a linker for the target, or a Numba that it can be compiled with; or no
        target is for this machine.
    OSError
        When the folder is missing or cannot be written; files of these names stay as they were.
    """
    path = as_path(path)
    if not isinstance(layer, (MODELS, MultiHeadAttention, QuantizedMultiHeadAttention)):
        raise TypeError("layer must be a MultiHeadAttention, an encoder, a model, or what quant.quantize makes of it; "
                        f"got {type(layer).__name__}{of_one_layer(layer)}")
    processor: str | None = target_named(target)
    if processor is not None and path.is_dir():
        target_of(processor)
        path /= f"attention-{processor}.so"
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in one of {', '.join(FORMATS)}; got {str(path)!r}")
    form = FORMATS[path.suffix]
    _check_layer(layer, path, form, mask is not None)
    _check_options(path, form, {"target": processor, "test_vectors": test_vectors, "opset": opset})
    padding = flag("padding", padding)
    if padding and (not isinstance(layer, TransformerEncoder) or "padding" not in form.options):
        takes = "with each call" if form.any_shape else "as constants"
        raise ValueError(f"padding must be left out but for an encoder in a {_with_option('padding')}; got a "
                         f"{type(layer).__name__} for {str(path)!r}, which takes masks {takes}")
    several = _several(sequence_length)
    if several is not None and "several lengths" not in form.options:
        raise ValueError(f"sequence_length must be one number but for a {_with_option('several lengths')}; "
                         f"got {several} for {str(path)!r}")
    vectors = None if test_vectors is None else count("test_vectors", test_vectors)
    version = None if opset is None else count("opset", opset)
    free = "any length" in form.options and sequence_length is None
    if batch is None and not free:
        batch = 1
    given: dict[str, Any] = {"batch": batch, "sequence_length": sequence_length, "key_length": key_length}
    lengths: dict[str, Any] = {
        name: several if name == "sequence_length" and several else None if length is None else count(name, length)
        for name, length in given.items()}
    if form.any_shape:
        needed: dict[str, Any] = {} if mask is not None else {
            "sequence_length": sequence_length, "key_length": key_length}
        for name, value, default in (("batch", batch, 1), *((n, v, None) for n, v in needed.items())):
            if value is not None and value != default:
                raise ValueError(f"{name} must be left out for a {path.suffix}, which takes any; got {value}")
    check_folder(path)
    if mask is not None and not (several and is_one_of(mask, ("causal",)) and key_length is None):
        numbers = "positions" in form.options and not isinstance(layer, StaticMultiHeadAttention)
        mask = _mask(mask, lengths["sequence_length"], lengths["key_length"], numbers)
    if not form.any_shape and sequence_length is None and not free:
        raise ValueError(f"sequence_length is required for a {path.suffix}: its shapes are fixed")
    form.write(layer, path, Request(lengths, mask, vectors, processor, version, padding))
    return path


def _check_layer(layer: Any, path: Path, form: Format, masked: bool) -> None:
    """Raise unless a file of this format holds such a layer, and the mask that it shall carry."""
    whole = isinstance(layer, MODELS)
    of_any_shape = " and ".join(suffix for suffix, other in FORMATS.items() if other.any_shape)
    if whole and not form.any_shape and not isinstance(layer, TransformerEncoder):
        raise TypeError(f"layer must be an encoder or an attention layer for a {path.suffix} file; got a "
                        f"{type(layer).__name__}, which only {of_any_shape} files hold whole; export its encoder, "
                        "model.encoder, whose inputs are what the embedding gives")
    if not form.any_shape and "positions" not in form.options:
        refuse_positions(layer, f"{of_any_shape} files hold it")
    if isinstance(layer, DynamicMultiHeadAttention) and not form.dynamic:
        raise ValueError(f"layer is dynamic, which only {_those('dynamic')} files hold; got {str(path)!r}; "
                         "quantize with scheme='static' for the other formats")
    if form.any_shape and masked and (whole or isinstance(layer, DynamicMultiHeadAttention)):
        raise ValueError(f"mask must be left out for {'a model' if whole else 'a dynamic layer'} in a {path.suffix} "
                         "file, which holds none; pass it to each call")


def _check_options(path: Path, form: Format, options: dict[str, Any]) -> None:
    """Raise unless a target is there where it is required, and no option that the format has not."""
    if options["target"] is None and "target" in form.options:
        raise ValueError(f"target must name the processor of a {path.suffix}, one of {', '.join(TARGETS)}, or the "
                         f"board, one of {', '.join(BOARDS)}, or be {NATIVE!r}; it is missing for {str(path)!r}")
    for name, value in options.items():
        if value is not None and name not in form.options:
            raise ValueError(f"{name} must be left out but for a {_with_option(name)}; got {value!r} for "
                             f"{str(path)!r}")


def _with_option(name: str) -> str:
    """The suffixes of formats that have an option."""
    return " or ".join(suffix for suffix, form in FORMATS.items() if name in form.options)


def _those(what: str) -> str:
    """The suffixes of formats that have it."""
    *others, last = (suffix for suffix, form in FORMATS.items() if getattr(form, what))
    return f"{', '.join(others)} and {last}"


def _several(lengths: object) -> list[int] | None:
    """Several lengths, each once; None where it is one or none."""
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        return None
    found = [count(f"sequence_length[{i}]", length) for i, length in enumerate(lengths)]
    if not found or len(set(found)) != len(found):
        raise ValueError(f"sequence_length must be a number or several, each once; got {found}")
    return found


def _carrying(layer: MultiHeadAttention | QuantizedMultiHeadAttention, path: Path, mask: types.Bools | None
              ) -> MultiHeadAttention | QuantizedMultiHeadAttention:
    """The layer with a mask of its own."""
    if mask is None:
        return layer
    if not isinstance(layer, StaticMultiHeadAttention):
        raise ValueError(f"mask must be left out for a float layer in a {path.suffix} file, which holds none; pass it "
                         "to each call")
    return layer.with_mask(mask)


def _mask(mask: ArrayLike, sequence_length: int | None, key_length: int | None, numbers: bool) -> NDArray[Any]:
    """The mask argument as an array, bool, or where that may be `numbers` float32."""
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be 'causal' or a bool array; got {mask!r}")
        if sequence_length is None or key_length not in (None, sequence_length):
            raise ValueError(f"mask='causal' needs sequence_length, and as many keys as queries; got "
                             f"sequence_length={sequence_length}, key_length={key_length}")
        return np.tri(sequence_length, dtype=np.bool_)
    mask = as_array("mask", mask)
    if mask.ndim <= 4 and numbers and mask.dtype.kind == "f":
        if np.isnan(mask).any():
            raise ValueError("mask must hold no NaN")
        return to_float32(mask)
    if mask.dtype != np.bool_ or mask.ndim > 4:
        raise TypeError(f"mask must be 'causal' or a bool array broadcastable to (B, H, L, S), True = attend; got "
                        f"{mask.dtype} of shape {mask.shape}")
    return mask
