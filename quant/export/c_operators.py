"""Fully connected layers, products, softmaxes and tables of TFLite Micro's rules as constants of a C file.

What reads them stands in c_templates/operators.c.in: an attention layer's file and an encoder's have it in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn import arithmetic as rules
from quant.export.c_text import constant, fill_template, numbers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgeattn.quantized import QuantizedLinear, TensorQuantization

KERNEL_SET = rules.KERNEL_SETS["tflm"]
# The sum of a softmax row is Q12.19 in int32, and each of its terms may be 1.
MAX_KEYS = 2**12 - 1
# 255 * 255 * width, and 128 * 127 * width where the offset lies in the bias, must fit int32.
MAX_HEAD_WIDTH = (2**31 - 1) // 255**2
MAX_WIDTH = (2**31 - 1) // (128 * 127)
MAX_BYTES = 2**31 - 1
LARGEST_SHIFT = 30
DSP_TOKENS = 4  # that a projection takes at a time with the DSP extension


def operators(prefix: str, linears: Iterable[QuantizedLinear], inner: int, *, gated: bool = False) -> str:
    """The operators that a file needs.

    Parameters
    ----------
    prefix : str
        Of the file's macros.
    linears : iterable of QuantizedLinear
        All that the file has.
    inner : int
        The longest sum of a product, of a head's features or of keys.
    gated : bool
        Whether sums are requantized beside those of the operators.
    """
    largest = 255 * 255 * inner
    for linear in linears:
        weights = np.abs(linear.weight.astype(np.int64)).sum(1) * 255
        bias = 0 if linear.bias is None else np.abs(linear.bias.astype(np.int64))
        largest = max(largest, int((weights + bias).max(initial=0)))
    return fill_template("operators.c", {
        "PREFIX": prefix, "small_sums": str(int(largest < 2**30)),
        "scaling_begin": "" if gated else f"#ifndef {prefix}_USE_CMSIS_NN\n\n",
        "scaling_end": "" if gated else "#endif\n\n"})


def linear_constants(name: str, what: str, linear: QuantizedLinear, source: TensorQuantization,
                     output: TensorQuantization, outputs: str, inputs: str) -> str:
    """The arrays of a fully connected layer and the struct that points at them.

    Parameters
    ----------
    name : str
        Before ``_linear``, of the struct.
    what : str
        For the comment, and for an error.
    linear, source, output
        The layer, and the quantizations of what it reads and gives.
    outputs, inputs : str
        How many, as C.
    """
    real = rules.fully_connected_multiplier(KERNEL_SET.fully_connected, source.scale, linear.scale, output.scale)
    multiplier, shift = fixed_point(real, what)
    sums = linear.weight.astype(np.int64).sum(1)
    bias = rules.wrap_int32((0 if linear.bias is None else linear.bias.astype(np.int64)) - source.zero_point * sums)
    span = f"{linear.scale.min():.3g} to {linear.scale.max():.3g}"
    size = outputs.replace(" ", "")
    return "\n".join((
        constant("int8_t", f"{name}_weight_s8", f"{outputs} * {inputs}", linear.weight,
                 f"{what[0].upper()}{what[1:]}. Weight ({size}, {inputs.replace(' ', '')}), one row per output; scales "
                 f"{span}."),
        constant("int32_t", f"{name}_bias_s32", outputs, bias,
                 f"Bias ({size}), at (scale of the input) * (scale of the row), zero point folded in."),
        constant("int32_t", f"{name}_multiplier_s32", outputs, multiplier, "Multiplier, Q0.31."),
        constant("int32_t", f"{name}_shift_s32", outputs, shift, "Its power of two."),
        f"static const linear_s8 {name}_linear = {{\n    {name}_weight_s8, {name}_bias_s32,\n"
        f"    {name}_multiplier_s32, {name}_shift_s32, {inputs}, {output.zero_point}}};\n"))


def product_constants(name: str, what: str, lhs: TensorQuantization, rhs: TensorQuantization,
                      output: TensorQuantization) -> str:
    """The struct of a batch matmul."""
    rule = KERNEL_SET.batch_matmul if rhs.zero_point == 0 else KERNEL_SET.batch_matmul_asymmetric
    real = rules.batch_matmul_multiplier(rule, KERNEL_SET.precision, lhs.scale, rhs.scale, output.scale)
    (multiplier,), (shift,) = fixed_point(real, what.partition(":")[0])
    return (f"/* {what[0].upper()}{what[1:]}. */\nstatic const product_s8 {name}_product = "
            f"{{{-lhs.zero_point}, {-rhs.zero_point}, {multiplier}, {shift}, {output.zero_point}}};\n")


def softmax_constants(name: str, prefix: str, scale: Any) -> str:
    """What the softmax of scores of a scale reads."""
    return "\n".join((
        f"/* exp(-{float(scale):.9g} * d), the scores' scale times d, for the softmax. */",
        f"static const exponentials_s8 {name} = {{",
        f"#ifdef {prefix}_USE_CMSIS_NN",
        "    " + ", ".join(map(str, softmax_parameters(scale))),
        "#else",
        "    {",
        numbers(rules.fixed_table(scale)),
        "    }",
        "#endif",
        "};\n"))


def fixed_point(real: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Multiplier and power of two of real numbers; an error says of what they are."""
    multiplier, shift = rules.fixed_point(real)
    if shift.max(initial=0) > LARGEST_SHIFT:
        raise ValueError(f"layer has scales too far apart for C: {what} multiplies by {real.max():.3g}; "
                         f"below 2**{LARGEST_SHIFT} is required")
    return multiplier, shift


def softmax_parameters(scale: Any) -> tuple[int, int, int]:
    """What CMSIS-NN's softmax takes for scores of a scale: multiplier, shift, lowest difference whose exp is not 0."""
    bits = rules.FIXED_DIFFERENCE_BITS
    multiplier, shift = rules.quantize_multiplier(min(float(np.float32(scale)) * 2**bits, 2.0**31 - 1))
    return multiplier, shift, -(31 * 2**bits // 2**shift)


def pairs_bytes(inputs: int, inner: int) -> int:
    """What the DSP extension unpacks to 16 bits: four tokens of a projection, or a row of a product."""
    return max(32 * -(-inputs // 4), 8 * -(-inner // 4))


def check_bytes(sizes: dict[str, int]) -> None:
    """Refuse what 32 bits cannot count."""
    for name, size in sizes.items():
        if size > MAX_BYTES:
            raise ValueError(f"batch and lengths are too large: {size} bytes of {name}; at most {MAX_BYTES} fit int32")
