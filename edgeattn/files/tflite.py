"""Attention read from a .tflite file, ours or another converter's: int8 by `tflite_static`, float by `tflite_float`.

A file is accepted when its operators, all of them, are one attention block that the layer reproduces exactly.
Of a model with several blocks one is read, and what stands around it is not looked at.
"""

from __future__ import annotations

import warnings

from edgeattn.files.tflite_file import parse, read_bytes
from edgeattn.files.tflite_float import float_attention
from edgeattn.files.tflite_static import Matcher
from edgeattn.hints import FRAMES
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import StaticMultiHeadAttention

# Following elements takes four bytes for each: 64 MiB at the largest size, an activation of 4096 rows of 4096, which
# only a file with weights for so many columns may have.
_MOST_ELEMENTS = 2**24
_FEW_ELEMENTS = 2**22


def read_tflite(path_or_bytes, *, arithmetic: str | None = None, block=None
                ) -> StaticMultiHeadAttention | MultiHeadAttention:
    """The attention layer in a .tflite file.

    Read are blocks of int8: FULLY_CONNECTED projections with per-channel weights, apart or packed and cut by SLICE,
    SPLIT, STRIDED_SLICE or GATHER, heads split by RESHAPE and TRANSPOSE, shared by BROADCAST_TO, or one head,
    BATCH_MATMUL, any number of MUL by a constant, ADD of a constant mask, SELECT_V2 by a constant mask and QUANTIZE of
    codes, SOFTMAX, BATCH_MATMUL, and an output projection or none; QUANTIZE and DEQUANTIZE at the edges. Keys and
    values may have a zero point, and the first product may have K transposed already or by adj_y, the second the
    probabilities on either side. Masks that are computed of an input are left out, with a warning. Queries and keys may
    be multiplied by a constant of one number before their product. Of values such a MUL becomes a part of their
    projection, which rounds once where the file rounds twice: a warning says so.

    Attention in float32 is found as `MultiHeadAttention.from_onnx` finds it; int8 weights become float32.

    Parameters
    ----------
    path_or_bytes : str, os.PathLike or bytes
    arithmetic : str, optional
        The kernel set to compute int8 as, see ``edgeattn.arithmetic.KERNEL_SETS``; a file does not name one. Unless
        given "litert".
    block : int or str, optional
        Of a model with more than attention, or with several blocks: the number of one, in the order of the graph, or
        the name of the tensor that its SOFTMAX gives. Unless given the file must be one block and nothing else.

    Returns
    -------
    StaticMultiHeadAttention, or MultiHeadAttention of a file whose attention is float32
        It takes any batch and length unless a mask in the file has its own. A query that the file's mask
        leaves no key gets what the file gives it.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file is damaged, neither int8 nor float32, or anything else than one attention block: the
        message names the file, what was expected and what was found.
    """
    data, name = read_bytes(path_or_bytes)
    most = min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data)))
    matcher = Matcher(parse(data, name), name, most)
    layer = _float_layer(matcher, arithmetic, block) if matcher.is_float() else (
        matcher.layer(arithmetic or "litert", block))
    for told in matcher.told:
        warnings.warn(told, stacklevel=3 + FRAMES)
    return layer


def _float_layer(matcher, arithmetic, block) -> MultiHeadAttention:
    """The layer of a graph whose attention is float32."""
    if arithmetic is not None:
        raise matcher.error(f"arithmetic={arithmetic!r} applies to int8 layers; its attention is float32")
    softmax = matcher.chosen(block)
    heads, kv_heads, arguments, matcher.told = float_attention(matcher, softmax, alone=block is None)
    try:
        return MultiHeadAttention.from_found(heads, kv_heads, arguments)
    except (TypeError, ValueError) as error:
        raise matcher.error(str(error)) from None


def blocks_of(path_or_bytes) -> list[str]:
    """The names of the tensors that the SOFTMAX of each attention block gives."""
    data, name = read_bytes(path_or_bytes)
    matcher = Matcher(parse(data, name), name, min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data))))
    return [matcher.tensor(matcher.graph.operators[number].outputs[0]).name for number in matcher.blocks()
            if matcher.graph.operators[number].outputs]
