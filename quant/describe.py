"""What a file holds, in words and tables: the text of `quant inspect`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import edgeattn
from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.cli_open import hints_of, open_model
from edgeattn.files.tflite import blocks_of
from edgeattn.files.tflite_file import parse, read_bytes
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import (
    INPUTS,
    AddMask,
    DynamicMultiHeadAttention,
    MulConstant,
    Requantize,
    StaticMultiHeadAttention,
)
from edgeattn.summary import summary
from quant.calibration import Calibration, is_calibration
from quant.model_calibration import ModelCalibration, is_model_calibration
from quant.quantize import MASK_MARGIN
from quant.tables import fill, table
from quant.trace import describe_sources


def describe_file(path, *, arithmetic: str | None = None, scheme: str | None = None,
                  part: str | None = None) -> Iterator:
    """Lines and tables about a .tflite file, a saved layer or model, a model's folder or a saved calibration.

    Parameters
    ----------
    path : str or path
    arithmetic : str, optional
        The kernel set to read an int8 layer with, as ``edgeattn.load`` takes it.
    scheme : {"float32", "static"}, optional
        Of an .onnx file, as ``TransformerEncoder.from_onnx`` takes it.
    part : {"text", "vision", "encoder"}, optional
        Of a folder, as ``edgeattn.from_pretrained`` takes it.

    Raises
    ------
    OSError, ValueError
        When the file cannot be read, is damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".onnx", ".so") or scheme or part:
        model = open_model(path, scheme=scheme, arithmetic=arithmetic, part=part)
        yield from _describe_model(model)
        for name, text in hints_of(path, model, scheme):
            yield fill(f"{name}: {text}")
    elif path.suffix == ".tflite":
        yield from _describe_tflite(path, arithmetic)
    elif is_calibration(path):
        if arithmetic is not None:
            raise ValueError(f"arithmetic={arithmetic!r} applies to int8 layers, but {path} holds a calibration")
        yield from _describe_calibration(Calibration.load(path))
    elif is_model_calibration(path):
        yield from _describe_model_calibration(ModelCalibration.load(path))
    else:
        layer = edgeattn.load(path, arithmetic=arithmetic)
        if isinstance(layer, StaticMultiHeadAttention):
            yield from _describe_static(layer, layer.arithmetic)
        elif isinstance(layer, DynamicMultiHeadAttention):
            yield from _describe_dynamic(layer)
        elif isinstance(layer, MultiHeadAttention):
            yield from _describe_float(layer)
        else:
            yield from _describe_model(layer)


def values_of(parts: Iterable) -> dict:
    """What `describe_file` gives, for programs: what stands before ": " of a line, the other lines, and the tables."""
    values: dict = {"about": [], "tables": []}
    for part in parts:
        if not isinstance(part, str):
            columns = [str(column.header) for column in part.columns]
            cells = zip(*(map(_value, column.cells) for column in part.columns), strict=True)
            values["tables"].append([dict(zip(columns, row, strict=True)) for row in cells])
            continue
        name, colon, text = " ".join(part.split()).partition(": ")
        if not colon:
            values["about"].append(name)
        elif name in values:
            values[name] = [*(values[name] if isinstance(values[name], list) else [values[name]]), text]
        else:
            values[name] = text
    return values


def _value(cell: object) -> object:
    """A cell of a table, as a number where it is one."""
    text = str(cell).replace(",", "")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if np.isfinite(number := kind(text)):
                return number
    return str(cell)


def arithmetic_of_tflite(arithmetic: str | None) -> str:
    """Under which kernel set a .tflite was read, and that the file does not say."""
    if arithmetic is None:
        return "not stored in a .tflite; read as litert (--arithmetic chooses)"
    return f"not stored in a .tflite; read as {arithmetic}, as asked"


def _describe_tflite(path: Path, arithmetic: str | None) -> Iterator:
    graph = parse(*read_bytes(path))
    for role, numbers in (("input", graph.inputs), ("output", graph.outputs)):
        for number in numbers:
            tensor = graph.tensors[number]
            yield f"{role} {tensor.name!r}: {tensor.dtype} {tuple(int(size) for size in tensor.shape)}"
    yield fill(f"operators: {', '.join(operator.name for operator in graph.operators)}")
    names = blocks_of(path)
    for number in range(len(names)) if len(names) > 1 else (None,):
        if number is not None:
            yield fill(f"block {number}, {names[number]!r}: edgeattn.load(path, block={number})")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                layer = edgeattn.load(path, arithmetic=arithmetic, block=number)
        except ValueError as error:
            if arithmetic is not None and "applies to int8 layers" in str(error):
                raise ValueError(f"arithmetic={arithmetic!r} applies to int8 layers, but {path} holds a float graph"
                                 ) from None
            yield fill(f"not a layer that edgeattn can load: {error}")
            continue
        for each in told:
            yield fill(str(each.message))
        if isinstance(layer, StaticMultiHeadAttention):
            yield from _describe_static(layer, arithmetic_of_tflite(arithmetic))
        else:
            yield from _describe_float(layer)


def _describe_model(model) -> Iterator:
    for name, text in summary(model):
        yield fill(f"{name}: {text}")


def _describe_model_calibration(calibration: ModelCalibration) -> Iterator:
    yield f"Calibration of a model on {calibration.tokens:,} tokens"
    yield f"encoder checksum: {calibration.encoder}"
    shown = table("linear layer", "inputs", "largest", "median of all inputs")
    for name, largest in calibration.largest.items():
        shown.add_row(name, str(len(largest)), f"{largest.max(initial=0):.4g}",
                      f"{np.median(largest) if len(largest) else 0:.4g}")
    yield shown


def _describe_float(layer: MultiHeadAttention) -> Iterator:
    yield f"{type(layer).__name__}, float32"
    yield from _describe_sizes(layer)
    shown = table("parameter", "shape", "largest")
    _, tensors = layer.to_state()
    for name, array in tensors.items():
        shown.add_row(name, str(array.shape), f"{np.abs(array).max(initial=0):.4g}")
    yield shown
    yield f"{sum(array.size for array in tensors.values()):,} parameters"


def _describe_dynamic(layer: DynamicMultiHeadAttention) -> Iterator:
    yield f"{type(layer).__name__}: float in and out, int8 inside, no calibration"
    yield from _describe_sizes(layer)
    yield _projections((name, layer.weights.get(name), "float32" if name in layer.biases else "none")
                       for name in (*INPUTS, "output"))


def _projections(rows: Iterable):
    """A table of (name, QuantizedLinear or None, kind of its bias)."""
    shown = table("projection", "weight", "bias", "smallest scale", "largest scale")
    for name, linear, bias in rows:
        if linear is not None:
            shown.add_row(name, str(linear.weight.shape), bias, f"{linear.scale.min():.4g}",
                          f"{linear.scale.max():.4g}")
    return shown


def _describe_static(layer: StaticMultiHeadAttention, arithmetic: str) -> Iterator:
    yield f"{type(layer).__name__}, int8, called with {describe_sources(layer.sources)}"
    yield from _describe_sizes(layer)
    yield f"arithmetic: {arithmetic}"
    margin = {None: "not known", 0.0: "0, calibrated without masks: it cannot carry one"}
    yield f"mask margin: {margin.get(layer.mask_margin, layer.mask_margin)}"
    shown = table("tensor", "scale", "zero point", "lowest", "highest")
    for name, t in layer.tensors.items():
        low, high = (f"{float(t.dequantize(code)):.4g}" for code in (CODE_MIN, CODE_MAX))
        shown.add_row(name, f"{t.scale:.8g}", str(t.zero_point), low, high)
    yield shown
    biased = {name for name, linear in layer.linears.items() if linear.bias is not None}
    yield _projections((name, layer.linears.get(name), "int32" if name in biased else "none")
                       for name in (*INPUTS, "output"))
    for name, ops in (("query", layer.query_ops), ("key", layer.key_ops)):
        for op in ops:
            yield f"{name} op: {_describe_op(op)}"
    if not layer.score_ops:
        yield "score ops: none"
    for op in layer.score_ops:
        yield f"score op: {_describe_op(op)}"


def _describe_op(op) -> str:
    if isinstance(op, MulConstant):
        return f"MulConstant by {float(op.constant.dequantize(op.code)):.6g}, output scale {op.output.scale:.8g}"
    if isinstance(op, AddMask):
        return f"AddMask of shape {op.codes.shape}, lowest {float(op.mask.dequantize(op.codes).min()):.6g}"
    if isinstance(op, Requantize):
        return f"Requantize, output scale {op.output.scale:.8g}"
    return f"SelectMask of shape {op.keep.shape}, {op.keep.mean():.1%} permitted, fill {op.fill}"


def _describe_calibration(calibration: Calibration) -> Iterator:
    yield f"Calibration of a layer called with {describe_sources(calibration.sources)}"
    yield f"layer checksum: {calibration.layer}"
    yield f"observer: {calibration.observer}"
    yield fill(f"masks: {describe_masks(calibration)}")
    shown = table("tensor", "values", "minimum", "maximum", "range low", "range high")
    for name, s in calibration.statistics.items():
        low, high = calibration.range(name, symmetric=name in ("key", "value"))
        shown.add_row(name, f"{s.count:,}", *(f"{number:.4g}" for number in (s.minimum, s.maximum, low, high)))
    yield shown


def describe_seen(calibration: Calibration, layer: MultiHeadAttention) -> str:
    """How many tokens ``layer`` was calibrated on; the keys' too where they are an input of their own."""
    tokens = [f"{tokens_seen(calibration, layer):,} tokens"]
    if calibration.sources[1]:
        tokens.append(f"{calibration.statistics['key_input'].count // max(layer.kdim, 1):,} of keys")
    return " and ".join(tokens)


def tokens_seen(calibration: Calibration, layer: MultiHeadAttention) -> int:
    """How many tokens of queries ``layer`` was calibrated on."""
    return calibration.statistics["query_input"].count // max(layer.embed_dim, 1)


def describe_masks(calibration: Calibration) -> str:
    """Whether a calibration saw masks, and what that means for the int8 layer."""
    if calibration.masked:
        return f"seen; an int8 layer can carry one: masked scores lie {MASK_MARGIN:g} below the lowest row or further"
    return "none seen; mask margin 0: an int8 layer takes masks in its calls, but cannot carry one"


def _describe_sizes(layer) -> Iterator[str]:
    yield f"heads: {layer.num_heads} (key and value heads: {layer.num_kv_heads})"
    yield f"widths: query {layer.embed_dim}, key {layer.kdim}, value {layer.vdim}, output {layer.output_dim}"
    yield f"head size: {layer.head_dim}, value size: {layer.value_dim}"
