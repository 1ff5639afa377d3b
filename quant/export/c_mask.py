"""What happens to scores between the first product and the softmax, as C: masks, and other converters' operators.

Four forms, from the cheapest: no mask; a number of permitted keys per row, given by a formula or a small table, so that
masked scores are not even computed; one bit per score; and for MUL and ADD a table of codes per class of position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.quantized import AddMask, SelectMask, StaticMultiHeadAttention, score_map
from quant.export.c_text import constant
from quant.export.tflite_ops import mask_to_graph_rank

AXES = ("b", "h", "i", "j")
SIZES = ("B", "H", "L", "S")


@dataclass(frozen=True)
class ScorePasses:
    """The C text of the scores' passes.

    Parameters
    ----------
    constants : str
        Arrays they read, for the file's head.
    permitted : str
        How many keys a row's product covers, as C.
    code : str
        Statements after the product, where the loop variables b, h and i are known.
    note : str
        For the header: ", causal" and the like.
    scale : np.float32
        Of the codes that the softmax reads.
    """

    constants: str
    permitted: str
    code: str
    note: str
    scale: np.float32


def score_passes(layer: StaticMultiHeadAttention, shape: tuple[int, int, int, int], *, name: str = "",
                 any_length: bool = False) -> ScorePasses:
    """The passes that a layer's ``score_ops`` ask for.

    Parameters
    ----------
    layer : StaticMultiHeadAttention
    shape : tuple of int
        (B, H, L, S).
    name : str
        Before the names of arrays.
    any_length : bool
        Whether a call may have fewer queries and keys, the first of these.

    Raises
    ------
    ValueError
        When a mask does not broadcast to ``shape``.
    """
    for op in layer.score_ops:
        if isinstance(op, AddMask | SelectMask):
            mask = op.codes if isinstance(op, AddMask) else op.keep
            mask_to_graph_rank(mask, shape, f"mask of the layer's {type(op).__name__}")
    fills = {op.fill if isinstance(op, SelectMask) else None for op in layer.score_ops}
    if len(fills) > 1 or None in fills:
        return _table_passes(layer, name)
    scale = layer.tensors["scores"].scale
    if not fills:
        return ScorePasses("", "keys", "", "", scale)
    keep = np.ones((1, 1, 1, 1), np.bool_)
    for op in layer.score_ops:
        keep = keep & op.keep
    # The axis of the keys is always written out; of the others only those along which the mask differs.
    keep = np.broadcast_to(keep, (*keep.shape[:3], shape[3]))
    permitted = keep.sum(-1)
    if (keep == (np.arange(shape[3]) < permitted[..., None])).all():
        return _prefix_passes(permitted, fills.pop(), shape, scale, name, any_length)
    return _bit_passes(keep, fills.pop(), scale, name)


def _prefix_passes(permitted: np.ndarray, fill: int, shape, scale, name: str, any_length: bool) -> ScorePasses:
    """A row's first keys are permitted: ``permitted`` (B or 1, H or 1, L or 1) says how many."""
    _, _, L, S = shape
    causal = np.minimum(np.arange(L) + 1, S).reshape(1, 1, L)
    constants = ""
    if (permitted == S).all():
        return ScorePasses("", "keys", "", "", scale)
    if permitted.shape == causal.shape and (permitted == causal).all():
        count, note = "i + 1 < S ? i + 1 : S" if L > S else "i + 1", ", causal: query i sees the keys 0 to i"
    elif permitted.size == 1:
        count, note = str(permitted.item()), f": every query sees the keys 0 to {permitted.item() - 1}"
        if permitted.item() == 0:
            note = ": no query sees any key, so all get the mean of the values"
    else:
        size, index = _broadcast_index(permitted.shape)
        constants = constant("int32_t", f"{name}permitted_keys_s32", _size(size, permitted, name), permitted.ravel(),
                             "How many keys a query sees; those after them are masked.")
        count = f"{name}permitted_keys_s32[{index}]"
        note = f", masked: a query sees its first {name}permitted_keys_s32 keys"
    if any_length and count != "i + 1":
        count = f"{count} < keys ? {count} : keys"
    code = (f"/* 3. masked scores get the code {fill} and keep the weight it stands for, as in the .tflite file */\n"
            f"memset(scores + permitted, {fill}, (size_t)(keys - permitted));\n\n")
    return ScorePasses(constants, count, code, note, scale)


def _bit_passes(keep: np.ndarray, fill: int, scale, name: str) -> ScorePasses:
    """Any mask: a bit per score. ``keep`` is (B or 1, H or 1, L or 1, S)."""
    size, index = _broadcast_index(keep.shape[:3])
    bits = np.packbits(keep, axis=-1, bitorder="little").reshape(-1, (keep.shape[3] + 7) // 8)
    text = constant("uint8_t", f"{name}permitted_u8", _size(f"{size} * ((S + 7) / 8)", bits, name), bits,
                    "A bit per score, 1 = permitted; key j of a row is bit j % 8 of byte j / 8.")
    code = (f"/* 3. masked scores get the code {fill} and keep the weight it stands for, as in the .tflite file */\n"
            f"const uint8_t *const bits = {name}permitted_u8 + ({index}) * ((S + 7) / 8);\n"
            f"for (int32_t j = 0; j < keys; j++) {{\n"
            f"    if ((bits[j / 8] >> (j % 8) & 1) == 0) {{\n"
            f"        scores[j] = {fill};\n"
            f"    }}\n"
            f"}}\n\n")
    return ScorePasses(text, "keys", code, f", masked: {name}permitted_u8 says which keys a query sees", scale)


def _table_passes(layer: StaticMultiHeadAttention, name: str) -> ScorePasses:
    """Any chain of operators: a table of 256 codes per class of position."""
    score_luts, lut_index, quantization = score_map(layer.score_ops, layer.tensors["scores"], KERNEL_SETS["tflm"])
    text = constant("int8_t", f"{name}score_codes_s8", f"{len(score_luts)} * 256", score_luts,
                    "For every class of position, the code the softmax sees for the score's codes -128 to 127:\n"
                    f" * {' then '.join(type(op).__name__ for op in layer.score_ops)}.")
    line = f"scores[j] = {name}score_codes_s8[{{}}scores[j] + 128];"
    if lut_index.size == 1:
        line = line.format("")
    else:
        size, index = _broadcast_index(lut_index.shape)
        text += "\n" + constant("uint8_t", f"{name}score_class_u8", _size(size, lut_index, name),
                                lut_index.reshape(-1, lut_index.shape[3]),
                                "The class of every position.")
        line = line.format(f"{name}score_class_u8[{index}] * 256 + ")
    code = (f"/* 3. constant factors and masks, tabulated */\n"
            f"for (int32_t j = 0; j < keys; j++) {{\n    {line}\n}}\n\n")
    return ScorePasses(text, "keys", code, ", with the constant factors and masks of its graph", quantization.scale)


def _size(text: str, array: np.ndarray, name: str) -> str:
    """The size of an array; those of several layers stand where no axis has a name."""
    return str(array.size) if name else text


def _broadcast_index(shape: tuple[int, ...]) -> tuple[str, str]:
    """C for size and index of an array with the leading axes b, h, i, j; those of size 1 are left out."""
    axes = [(SIZES[n], AXES[n]) for n, length in enumerate(shape) if length > 1]
    if not axes:
        return "1", "0"
    index = axes[0][1]
    for size, axis in axes[1:]:
        index = f"({index}) * {size} + {axis}" if "+" in index else f"{index} * {size} + {axis}"
    return " * ".join(size for size, _ in axes), index
