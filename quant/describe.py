"""What a file holds, in words and tables: the text of `quant inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.box
from rich.console import RenderableType
from rich.table import Table

import edgeattn
from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import AddMask, MulConstant, StaticMultiHeadAttention
from edgeattn.tflite_file import parse, read_bytes
from quant.calibrate import Calibration, is_calibration
from quant.trace import describe_sources


def describe_file(path) -> Iterator[RenderableType]:
    """Lines and tables about a .tflite file, a saved layer or a saved calibration.

    Raises
    ------
    OSError, ValueError
        When the file cannot be read, is damaged or of another kind.
    """
    path = Path(path)
    if path.suffix == ".tflite":
        yield from _describe_tflite(path)
    elif is_calibration(path):
        yield from _describe_calibration(Calibration.load(path))
    else:
        layer = edgeattn.load(path)
        yield from (_describe_static if isinstance(layer, StaticMultiHeadAttention) else _describe_float)(layer)


def _describe_tflite(path: Path) -> Iterator[RenderableType]:
    graph = parse(*read_bytes(path))
    for role, numbers in (("input", graph.inputs), ("output", graph.outputs)):
        for number in numbers:
            tensor = graph.tensors[number]
            yield f"{role} {tensor.name!r}: {tensor.dtype} {tuple(int(size) for size in tensor.shape)}"
    yield f"operators: {', '.join(operator.name for operator in graph.operators)}"
    if any(graph.tensors[number].dtype == np.int8 for number in (*graph.inputs, *graph.outputs)):
        try:
            layer = edgeattn.load(path)
        except ValueError as error:
            yield f"not a layer that edgeattn can load: {error}"
        else:
            yield from _describe_static(layer)


def _describe_float(layer: MultiHeadAttention) -> Iterator[RenderableType]:
    yield f"{type(layer).__name__}, float32"
    yield from _describe_sizes(layer)
    table = _table("parameter", "shape", "largest")
    _, tensors = layer._to_state()
    for name, array in tensors.items():
        table.add_row(name, str(array.shape), f"{np.abs(array).max(initial=0):.4g}")
    yield table
    yield f"{sum(array.size for array in tensors.values()):,} parameters"


def _describe_static(layer: StaticMultiHeadAttention) -> Iterator[RenderableType]:
    yield f"{type(layer).__name__}, int8, called with {describe_sources(layer.sources)}"
    yield from _describe_sizes(layer)
    yield f"arithmetic: {layer.arithmetic}"
    margin = {None: "not known", 0.0: "0, calibrated without masks: it cannot carry one"}
    yield f"mask margin: {margin.get(layer.mask_margin, layer.mask_margin)}"
    table = _table("tensor", "scale", "zero point", "lowest", "highest")
    for name, t in layer.tensors.items():
        low, high = (f"{float(t.dequantize(code)):.4g}" for code in (CODE_MIN, CODE_MAX))
        table.add_row(name, f"{t.scale:.8g}", str(t.zero_point), low, high)
    yield table
    table = _table("projection", "weight", "bias", "smallest scale", "largest scale")
    for name, linear in layer.linears.items():
        table.add_row(name, str(linear.weight.shape), "none" if linear.bias is None else "int32",
                      f"{linear.scale.min():.4g}", f"{linear.scale.max():.4g}")
    yield table
    if not layer.score_ops:
        yield "score ops: none"
    for op in layer.score_ops:
        yield f"score op: {_describe_op(op)}"


def _describe_op(op) -> str:
    if isinstance(op, MulConstant):
        return f"MulConstant by {float(op.constant.dequantize(op.code)):.6g}, output scale {op.output.scale:.8g}"
    if isinstance(op, AddMask):
        return f"AddMask of shape {op.codes.shape}, lowest {float(op.mask.dequantize(op.codes).min()):.6g}"
    return f"SelectMask of shape {op.keep.shape}, {op.keep.mean():.1%} permitted, fill {op.fill}"


def _describe_calibration(calibration: Calibration) -> Iterator[RenderableType]:
    yield f"Calibration of a layer called with {describe_sources(calibration.sources)}"
    yield f"layer checksum: {calibration.layer}"
    yield f"observer: {calibration.observer}"
    yield f"masks: {'seen' if calibration.masked else 'none seen'}"
    table = _table("tensor", "values", "minimum", "maximum", "range low", "range high")
    for name, s in calibration.statistics.items():
        low, high = calibration.range(name, symmetric=name in ("key", "value"))
        table.add_row(name, f"{s.count:,}", *(f"{number:.4g}" for number in (s.minimum, s.maximum, low, high)))
    yield table


def _describe_sizes(layer) -> Iterator[str]:
    yield f"heads: {layer.num_heads} (key and value heads: {layer.num_kv_heads})"
    yield f"widths: query {layer.embed_dim}, key {layer.kdim}, value {layer.vdim}, output {layer.output_dim}"
    yield f"head size: {layer.head_dim}, value size: {layer.value_dim}"


def _table(*titles: str) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right")
    return table
