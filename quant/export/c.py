"""Static int8 layers as portable C99: one source, one header, on request a self-checking test."""

from __future__ import annotations

import re
import textwrap

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.executors.unfused import attend
from edgeattn.layers import MultiHeadAttention
from edgeattn.layers.attention import forward
from edgeattn.ops import Ops, Sequences
from edgeattn.quantized import INPUTS, QuantizedLinear, StaticMultiHeadAttention
from quant.export.attention_graph import check_lengths
from quant.export.c_mask import ScorePasses, score_passes
from quant.export.c_test import vectors_c
from quant.export.c_text import (
    block_comment_lines,
    check_header_name,
    constant,
    fill_template,
    float_literal,
    numbers,
)

KERNEL_SET = rules.KERNEL_SETS["tflm"]
# The sum of a softmax row is Q12.19 in int32, and each of its terms may be 1.
MAX_KEYS = 2**12 - 1
# 255 * 255 * width, and 128 * 127 * width where the offset lies in the bias, must fit int32.
MAX_HEAD_WIDTH = (2**31 - 1) // 255**2
MAX_WIDTH = (2**31 - 1) // (128 * 127)
MAX_SCRATCH = 2**31 - 1
LARGEST_SHIFT = 30
C_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while".split()
)


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
    values = {**_names(layer, stem, lengths), **_body(layer, passes, lengths.keys),
              **_header(layer, stem, lengths, passes)}
    _check_names(stem, fill_template("layer.c", values | {"stem": ""}))
    result = {f"{stem}.c": fill_template("layer.c", values), f"{stem}.h": fill_template("layer.h", values)}
    if test_vectors is not None:
        result |= vectors_c(layer, stem, input_names(layer), lengths, test_vectors)
    return result


def check_stem(stem: str) -> None:
    """Refuse a stem that cannot be the prefix of C names and the name of a header."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", stem, re.ASCII):
        raise ValueError(f"path must be named like a C identifier, for its functions get that name: letters, digits "
                         f"and underscores after a letter; got {stem!r}")
    if stem in C_KEYWORDS:
        raise ValueError(f"path must not be named by a keyword of C; got {stem!r}")
    check_header_name(stem)


def _check_names(stem: str, text: str) -> None:
    """Refuse a stem whose function has the name of something else in the file."""
    if re.search(rf"\b{stem}_s8\b", text):
        raise ValueError(f"path must not be named {stem!r}: the file has a {stem}_s8 of its own beside the function "
                         "that gets that name")


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
    limits = {"embed_dim": (layer.embed_dim, MAX_WIDTH), "kdim": (layer.kdim, MAX_WIDTH),
              "vdim": (layer.vdim, MAX_WIDTH), "head_dim": (layer.head_dim, MAX_HEAD_WIDTH),
              "value_dim": (layer.value_dim, MAX_HEAD_WIDTH), "output_dim": (layer.output_dim, MAX_WIDTH),
              "the width of all heads": (layer.num_heads * layer.value_dim, MAX_WIDTH)}
    for name, (size, largest) in limits.items():
        if not 1 <= size <= largest:
            raise ValueError(f"layer must have {name} from 1 to {largest} for C; got {size}")
    if lengths.keys > MAX_KEYS:
        raise ValueError(f"there may be at most {MAX_KEYS} keys in C: TFLite Micro sums a softmax row in 12 integer "
                         f"bits; got {lengths.keys}")
    more = max(4 * _sums(layer, lengths), _pairs_bytes(layer, lengths) + _more_rows_bytes(layer))
    sizes = {"scratch memory": _scratch_bytes(layer, lengths) + more,
             "output": lengths.batch * lengths.queries * layer.output_dim,
             "query input": lengths.batch * lengths.queries * layer.embed_dim,
             "key input": lengths.batch * lengths.keys * max(layer.kdim, layer.vdim)}
    for name, size in sizes.items():
        if size > MAX_SCRATCH:
            raise ValueError(f"batch and lengths are too large: {size} bytes of {name}; at most {MAX_SCRATCH} "
                             "fit int32")


def input_names(layer) -> list[str]:
    """The inputs the function takes, as in the .tflite file: ``input``, or ``query_input`` and so on."""
    if max(layer.sources) == 0:
        return ["input"]
    return [f"{INPUTS[source]}_input" for source in sorted(set(layer.sources))]


def _scratch_bytes(layer, lengths) -> int:
    D, Dv, S = layer.head_dim, layer.value_dim, lengths.keys
    context = lengths.queries * layer.num_heads * Dv if "output" in layer.linears else 0
    return S * D + S * Dv + max(D, Dv) + S + context


def _pairs_bytes(layer, lengths) -> int:
    """What four tokens that are projected take where the DSP extension wants them in 16 bits."""
    inputs = max(layer.embed_dim, layer.kdim, layer.vdim, layer.num_heads * layer.value_dim if "output" in layer.linears
                 else 0)
    return max(32 * -(-inputs // 4), 8 * -(-max(layer.head_dim, lengths.keys) // 4))


def _more_rows_bytes(layer) -> int:
    """Rows of a projection beside the first, of the four that the DSP extension takes at a time."""
    return 3 * max(layer.head_dim, layer.value_dim)


def _sums(layer, lengths) -> int:
    """How many int32 sums CMSIS-NN keeps: one per row of the products' right sides."""
    return max(lengths.keys, layer.value_dim)


def _names(layer, stem, lengths) -> dict[str, str]:
    """What every template reads."""
    names = input_names(layer)
    feeds = dict(zip(INPUTS, (names[source] for source in layer.sources), strict=True))
    return {
        "stem": stem, "PREFIX": stem.upper(),
        "title": "self-attention" if layer.num_heads == 1 and len(names) == 1 else
                 "multi-head self-attention" if len(names) == 1 else "multi-head attention",
        "indent": " " * len(f"int {stem}_s8("),
        "parameters": ", ".join(f"const int8_t *{name}" for name in names),
        "B": str(lengths.batch), "H": str(lengths.heads), "L": str(lengths.queries), "S": str(lengths.keys),
        "D": str(layer.head_dim), "DV": str(layer.value_dim), "EQ": str(layer.embed_dim), "EK": str(layer.kdim),
        "EV": str(layer.vdim), "EO": str(layer.output_dim),
        **{f"{role}_input": name for role, name in feeds.items()},
    }


class COps(Ops[str]):
    """`edgeattn.ops.Ops` as C: the constants that each operation reads; what it hands on are names of arrays.

    Their calls stand in layer.c.in, which computes a head at a time.
    """

    def __init__(self, layer: StaticMultiHeadAttention):
        self.layer = layer
        self.linears: list[str] = []
        self.products: list[str] = []

    def linear(self, x: str, linear: QuantizedLinear, name: str) -> str:
        """x weight^T + bias."""
        self.linears.append(_linear(self.layer, linear, name))
        return name

    def attention(self, q: str, k: str, v: str, layer: StaticMultiHeadAttention, sequences: Sequences, name: str
                  ) -> str:
        """The heads side by side."""
        return attend(self, q, k, v, layer, None, name)

    def scores(self, q: str, k: str, layer: StaticMultiHeadAttention, name: str) -> str:
        """q k^T"""
        return self._product(name, "query times keys", q, k)

    def masked(self, scores: str, layer: StaticMultiHeadAttention, mask: None, name: str) -> str:
        """In place, by what `score_passes` writes."""
        return scores

    def softmax(self, scores: str, name: str) -> str:
        """In place."""
        return name

    def context(self, probabilities: str, v: str, name: str) -> str:
        """Probabilities v."""
        return self._product(name, "probabilities times values", probabilities, v)

    def _product(self, name: str, what: str, lhs: str, rhs: str) -> str:
        self.products.append(_product(name, what, *(self.layer.tensors[tensor] for tensor in (lhs, rhs, name))))
        return name


# -- the source ------------------------------------------------------------------------------------------------------


def _largest_sum(layer: StaticMultiHeadAttention, keys: int) -> int:
    """A bound of what a sum of products comes to, bias included."""
    products = 255 * 255 * max(layer.head_dim, keys)
    for linear in layer.linears.values():
        weights = np.abs(linear.weight.astype(np.int64)).sum(1) * 255
        bias = 0 if linear.bias is None else np.abs(linear.bias.astype(np.int64))
        products = max(products, int((weights + bias).max(initial=0)))
    return products


def _body(layer: StaticMultiHeadAttention, passes: ScorePasses, keys: int) -> dict[str, str]:
    """What layer.c.in reads."""
    tensors, ops = layer.tensors, COps(layer)
    result = forward(ops, layer, *INPUTS, Sequences([]))
    constants = [*ops.linears, *ops.products] + [passes.constants] * bool(passes.constants)
    multiplier, shift, lowest = softmax_parameters(passes.scale)
    projected = result == "output"
    all_keys = passes.permitted == "S"
    text = "" if all_keys else f"const int32_t permitted = {passes.permitted};\n"
    seen = "S" if all_keys else "permitted"
    text += f"failed |= batch_matmul_s8(&scores_product, rows + i % TOKENS * D, key, {seen}, D, buffer, scores);\n\n"
    text += passes.code + "/* 4. probabilities, in place */\nsoftmax_s8(scores, S);\n"
    rows = [("tensor", "shape", "scale", "zero point")]
    shapes = {"query": "(B, L, H*D)", "key": "(B, S, H*D)", "value": "(B, S, H*DV)", "scores": "(B, H, L, S)",
              "probabilities": "(B, H, L, S)", "context": "(B, L, H*DV)", "output": "(B, L, EO)"}
    single = max(layer.sources) == 0
    for name, tensor in tensors.items():
        role = name.removesuffix("_input")
        shape = shapes[name] if name in shapes else f"(B, {'L' if role == 'query' else 'S'}, E{role[0].upper()})"
        rows.append(("input" if single and name == "query_input" else name, shape, float_literal(tensor.scale)[:-1],
                     str(tensor.zero_point)))
    return {
        "constants": "\n".join(constants),
        "tensor_table": block_comment_lines(rows),
        "softmax_multiplier": str(multiplier), "softmax_shift": str(shift), "softmax_lowest": str(lowest),
        "small_sums": str(int(_largest_sum(layer, keys) < 2**30)),
        "exp_table": numbers(rules.fixed_table(passes.scale)) + ",",
        "scaling_note": "lies in its scale" if not layer.score_ops or passes.scale == tensors["scores"].scale
                        else "lies in its scale or in pass 3",
        "score_passes": textwrap.indent(text, " " * 16),
        "context_declaration": CONTEXT_IN_SCRATCH if projected else "",
        "context_of_batch": "" if projected else CONTEXT_IN_OUTPUT,
        "output_pass": OUTPUT_PASS if projected else "",
    }


CONTEXT_IN_SCRATCH = "    int8_t *const context = scores + S;                            /* (L, H, DV) */\n"
CONTEXT_IN_OUTPUT = "        int8_t *const context = output + b * L * EO; /* (L, H, DV) */\n"
OUTPUT_PASS = """
        /* 6. the output projection */
        for (int32_t i = 0; i < L; i += TOKENS) {
            failed |= fully_connected_s8(&output_linear, 0, EO, TOKENS > 1 && L - i < TOKENS ? L - i : TOKENS,
                                         context + i * H * DV, buffer, output + (b * L + i) * EO);
        }
"""


def _linear(layer, linear: QuantizedLinear, name: str) -> str:
    """The arrays of a fully connected layer and the struct that points at them."""
    source, output = layer.input_of(name), layer.tensors[name]
    real = rules.fully_connected_multiplier(KERNEL_SET.fully_connected, source.scale, linear.scale, output.scale)
    multiplier, shift = _fixed_point(real, f"the {name} projection")
    sums = linear.weight.astype(np.int64).sum(1)
    bias = rules.wrap_int32((0 if linear.bias is None else linear.bias.astype(np.int64)) - source.zero_point * sums)
    outputs = {"query": "H * D", "key": "H * D", "value": "H * DV", "output": "EO"}[name]
    inputs = {"query": "EQ", "key": "EK", "value": "EV", "output": "H * DV"}[name]
    span = f"{linear.scale.min():.3g} to {linear.scale.max():.3g}"
    return "\n".join((
        constant("int8_t", f"{name}_weight_s8", f"{outputs} * {inputs}", linear.weight,
                 f"The {name} projection. Weight ({outputs.replace(' ', '')}, {inputs.replace(' ', '')}), one row per "
                 f"output; scales {span}."),
        constant("int32_t", f"{name}_bias_s32", outputs, bias,
                 f"Bias ({outputs.replace(' ', '')}), at (scale of the input) * (scale of the row), zero point folded "
                 "in."),
        constant("int32_t", f"{name}_multiplier_s32", outputs, multiplier, "Multiplier, Q0.31."),
        constant("int32_t", f"{name}_shift_s32", outputs, shift, "Its power of two."),
        f"static const linear_s8 {name}_linear = {{{name}_weight_s8, {name}_bias_s32, {name}_multiplier_s32, "
        f"{name}_shift_s32,\n{' ' * (len(name) + 35)}{inputs}, {output.zero_point}}};\n"))


def _product(name: str, what: str, lhs, rhs, output) -> str:
    """The struct of a batch matmul."""
    rule = KERNEL_SET.batch_matmul if rhs.zero_point == 0 else KERNEL_SET.batch_matmul_asymmetric
    real = rules.batch_matmul_multiplier(rule, KERNEL_SET.precision, lhs.scale, rhs.scale, output.scale)
    (multiplier,), (shift,) = _fixed_point(real, f"the {name}")
    return (f"/* {name.capitalize()}: {what}. */\nstatic const product_s8 {name}_product = "
            f"{{{-lhs.zero_point}, {-rhs.zero_point}, {multiplier}, {shift}, {output.zero_point}}};\n")


def _fixed_point(real: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    multiplier, shift = rules.fixed_point(real)
    if shift.max(initial=0) > LARGEST_SHIFT:
        raise ValueError(f"layer has scales too far apart for C: {what} multiplies by {real.max():.3g}; "
                         f"below 2**{LARGEST_SHIFT} is required")
    return multiplier, shift


def softmax_parameters(scale) -> tuple[int, int, int]:
    """What CMSIS-NN's softmax takes for scores of a scale: multiplier, shift, lowest difference whose exp is not 0."""
    bits = rules.FIXED_DIFFERENCE_BITS
    multiplier, shift = rules.quantize_multiplier(min(float(np.float32(scale)) * 2**bits, 2.0**31 - 1))
    return multiplier, shift, -(31 * 2**bits // 2**shift)


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
        "scratch_bytes": str(_scratch_bytes(layer, lengths)),
        "sums_bytes": str(4 * _sums(layer, lengths)),
        "pairs_bytes": str(_pairs_bytes(layer, lengths)),
        "more_rows_bytes": str(_more_rows_bytes(layer)),
        "context_note": ", contexts (L, H, DV)" if projected else "",
        "mask_note": passes.note,
        "output_shape": f"({lengths.batch}, {lengths.queries}, {layer.output_dim})",
    }
