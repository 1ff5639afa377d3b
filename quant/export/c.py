"""Static int8 layers as portable C99: one source, one header, on request a self-checking test."""

from __future__ import annotations

import re

import numpy as np

from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import INPUTS, StaticMultiHeadAttention
from quant.export.c_attention import attention_bytes, attention_c, check_attention, widest_input
from quant.export.c_mask import ScorePasses, score_passes
from quant.export.c_names import check_names, check_stem
from quant.export.c_operators import check_bytes, operators, pairs_bytes
from quant.export.c_test import vectors_c
from quant.export.c_text import block_comment_lines, fill_template, float_literal
from quant.export.tflite_ops import check_lengths


def write_c(layer, stem: str, *, batch: int = 1, sequence_length: int, key_length: int | None = None, mask=None,
            test_vectors: int | None = None) -> dict[str, str]:
    """The C source files that compute ``layer`` at fixed lengths.

    Parameters
    ----------
    layer : StaticMultiHeadAttention
        Of the kernel set "tflm".
    stem : str
        Name of the files before their suffix, and prefix of every name they make known to a linker or a preprocessor.
    batch, sequence_length, key_length : int
        B, L, S; S is L by default.
    mask : bool array, broadcastable to (B, H, L, S), optional
        True = attend; as ``layer.with_mask(mask)`` computes it.
    test_vectors : int, optional
        How many to write, with a program that checks them.

    Returns
    -------
    dict of str
        File name -> text: ``stem.c`` and ``stem.h``, with test vectors also ``stem_test.c`` and ``stem_test.h``.

    Raises
    ------
    TypeError, ValueError
        When the layer is of another kind or kernel set, the stem is no C name, or sizes do not fit.
    """
    check_stem(stem)
    check_layer(layer)
    lengths = check_lengths(layer, layer.sources, batch, sequence_length, key_length)
    if mask is not None:
        layer = layer.with_mask(np.asarray(mask))
    passes = score_passes(layer, lengths.scores)
    _check_sizes(layer, lengths)
    values = _names(layer, stem, lengths)
    values |= _body(layer, passes, lengths, values) | _header(layer, stem, lengths, passes)
    check_names(stem, "s8", fill_template("layer.c", values | {"stem": ""}))
    result = {f"{stem}.c": fill_template("layer.c", values), f"{stem}.h": fill_template("layer.h", values)}
    if test_vectors is not None:
        result |= vectors_c(layer, stem, input_names(layer), lengths, test_vectors)
    return result


def check_layer(layer) -> None:
    """Refuse what is not a static layer of TFLite Micro's arithmetic."""
    if isinstance(layer, MultiHeadAttention):
        raise ValueError("layer must be a static int8 layer for C, which computes on integers alone; got a float "
                         f"{type(layer).__name__}: quantize it first, quant.quantize(layer, calibration, "
                         "arithmetic='tflm')")
    if not isinstance(layer, StaticMultiHeadAttention):
        raise TypeError(f"layer must be a static int8 layer for C; quant.quantize makes one; "
                        f"got {type(layer).__name__}")
    if layer.arithmetic != "tflm":
        raise ValueError("layer must have the arithmetic 'tflm' for C, which equals TFLite Micro; got "
                         f"{layer.arithmetic!r}: export layer.with_arithmetic('tflm'), or quantize with "
                         "arithmetic='tflm'")


def _check_sizes(layer, lengths) -> None:
    """Refuse sizes at which TFLite Micro's int32 sums may overflow, and those C has no arrays for."""
    check_attention(layer, lengths.keys)
    more = max(4 * _sums(layer, lengths), _pairs_bytes(layer, lengths) + _more_rows_bytes(layer, lengths))
    check_bytes({"scratch memory": _scratch_bytes(layer, lengths) + more,
                 "output": lengths.batch * lengths.queries * layer.output_dim,
                 "query input": lengths.batch * lengths.queries * layer.embed_dim,
                 "key input": lengths.batch * lengths.keys * max(layer.kdim, layer.vdim)})


def input_names(layer) -> list[str]:
    """The inputs the function takes, as in the .tflite file: ``input``, or ``query_input`` and so on."""
    if max(layer.sources) == 0:
        return ["input"]
    return [f"{INPUTS[source]}_input" for source in sorted(set(layer.sources))]


def _scratch_bytes(layer, lengths, *, dsp: bool = False) -> int:
    context = lengths.queries * layer.num_heads * layer.value_dim if "output" in layer.linears else 0
    return context + attention_bytes(layer, lengths.keys, dsp=dsp)


def _pairs_bytes(layer, lengths) -> int:
    """What the DSP extension wants in 16 bits."""
    return pairs_bytes(widest_input(layer), max(layer.head_dim, lengths.keys))


def _more_rows_bytes(layer, lengths) -> int:
    """Rows of a projection beside the first, of those that the DSP extension takes at a time."""
    return _scratch_bytes(layer, lengths, dsp=True) - _scratch_bytes(layer, lengths)


def _sums(layer, lengths) -> int:
    """How many int32 sums CMSIS-NN keeps: one per row of the products' right sides."""
    return max(lengths.keys, layer.value_dim)


def _names(layer, stem, lengths) -> dict[str, str]:
    """What every template reads."""
    names = input_names(layer)
    return {
        "stem": stem, "PREFIX": stem.upper(),
        "title": "self-attention" if layer.num_heads == 1 and len(names) == 1 else
                 "multi-head self-attention" if len(names) == 1 else "multi-head attention",
        "indent": " " * len(f"int {stem}_s8("),
        "parameters": ", ".join(f"const int8_t *{name}" for name in names),
        "B": str(lengths.batch), "H": str(lengths.heads), "L": str(lengths.queries), "S": str(lengths.keys),
        "D": str(layer.head_dim), "DV": str(layer.value_dim), "EQ": str(layer.embed_dim), "EK": str(layer.kdim),
        "EV": str(layer.vdim), "EO": str(layer.output_dim),
    }


# -- the source ------------------------------------------------------------------------------------------------------


def _body(layer: StaticMultiHeadAttention, passes: ScorePasses, lengths, names: dict[str, str]) -> dict[str, str]:
    """What layer.c.in reads beside the names."""
    prefix, inputs = names["PREFIX"], input_names(layer)
    feeds = dict(zip(INPUTS, (inputs[source] for source in layer.sources), strict=True))
    by_batch = re.search(r"\bb\b", passes.code + passes.permitted) is not None
    attention = attention_c(
        layer, passes, prefix, title="Attention of a batch entry", widths={}, feeds=feeds,
        parameters=", ".join(["int32_t b"] * by_batch + [f"const int8_t *{name}" for name in inputs]),
        sizes="    enum { queries = L, keys = S };\n")
    rows = [("tensor", "shape", "scale", "zero point")]
    shapes = {"query": "(B, L, H*D)", "key": "(B, S, H*D)", "value": "(B, S, H*DV)", "scores": "(B, H, L, S)",
              "probabilities": "(B, H, L, S)", "context": "(B, L, H*DV)", "output": "(B, L, EO)"}
    single = max(layer.sources) == 0
    for name, tensor in layer.tensors.items():
        role = name.removesuffix("_input")
        shape = shapes[name] if name in shapes else f"(B, {'L' if role == 'query' else 'S'}, E{role[0].upper()})"
        rows.append(("input" if single and name == "query_input" else name, shape, float_literal(tensor.scale)[:-1],
                     str(tensor.zero_point)))
    arguments = [f"{name} + b * {'L' if source == 0 else 'S'} * E{INPUTS[source][0].upper()}"
                 for name, source in zip(inputs, sorted(set(layer.sources)), strict=True)]
    return {
        "operators": operators(prefix, layer.linears.values(), max(layer.head_dim, lengths.keys)),
        "constants": attention.constants,
        "attention": attention.function,
        "tensor_table": block_comment_lines(rows),
        "batch_argument": "b, " * by_batch,
        "arguments": ", ".join(arguments),
        "memory": (CONTEXT_IN_SCRATCH if attention.projected else ROWS_IN_SCRATCH).replace("${PREFIX}", prefix),
        "context_of_batch": "" if attention.projected else CONTEXT_IN_OUTPUT,
        "output_pass": OUTPUT_PASS if attention.projected else "",
    }


CONTEXT_IN_SCRATCH = """\
    int8_t *const context = (int8_t *)scratch + ${PREFIX}_BUFFER_BYTES; /* (L, H, DV) */
    int8_t *const rows = context + L * H * DV;                         /* of a head */
"""
ROWS_IN_SCRATCH = "    int8_t *const rows = (int8_t *)scratch + ${PREFIX}_BUFFER_BYTES; /* of a head */\n"
CONTEXT_IN_OUTPUT = "        int8_t *const context = output + b * L * EO; /* (L, H, DV) */\n"
OUTPUT_PASS = """
        /* 6. the output projection */
        for (int32_t i = 0; i < L; i += TOKENS) {
            failed |= fully_connected_s8(&output_linear, 0, EO, TOKENS > 1 && L - i < TOKENS ? L - i : TOKENS,
                                         context + i * H * DV, buffer, output + (b * L + i) * EO);
        }
"""


# -- the header ------------------------------------------------------------------------------------------------------


def _header(layer, stem: str, lengths, passes: ScorePasses) -> dict[str, str]:
    """What layer.h.in reads."""
    projected = "output" in layer.linears
    macros, rows = [], []
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    for name, source in zip(input_names(layer), sorted(set(layer.sources)), strict=True):
        length, axis = (lengths.queries, "L") if source == 0 else (lengths.keys, "S")
        role = INPUTS[source][0].upper()
        rows.append(f" * {name:<13}  (B, {axis}, E{role}) = ({lengths.batch}, {length}, {widths[source]}) codes")
        macros.append((name, lengths.batch * length * widths[source], layer.tensors[f"{INPUTS[source]}_input"]))
    macros.append(("output", lengths.batch * lengths.queries * layer.output_dim,
                   layer.tensors["output" if projected else "context"]))
    return {
        "tensor_macros": "\n".join(f"#define {stem.upper()}_{name.upper()}_{what} {value}"
                                   for name, size, tensor in macros
                                   for what, value in (("SIZE", size), ("SCALE", float_literal(tensor.scale)),
                                                       ("ZERO_POINT", f"({tensor.zero_point})"))),
        "parameter_table": "\n".join(rows),
        "features": fill_template("features.h", {"PREFIX": stem.upper()}),
        "scratch_bytes": str(_scratch_bytes(layer, lengths)),
        "sums_bytes": str(4 * _sums(layer, lengths)),
        "pairs_bytes": str(_pairs_bytes(layer, lengths)),
        "more_rows_bytes": str(_more_rows_bytes(layer, lengths)),
        "context_note": ", contexts (L, H, DV)" if projected else "",
        "mask_note": passes.note,
        "output_shape": f"({lengths.batch}, {lengths.queries}, {layer.output_dim})",
    }
