"""Quantized multi-head attention: its parameters, the static and the dynamic layer."""

from edgeattn.quantized.dynamic import DynamicMultiHeadAttention
from edgeattn.quantized.layer import INPUTS, SHORT, QuantizedMultiHeadAttention
from edgeattn.quantized.parameters import (
    LARGEST_SCALE,
    PROBABILITIES,
    SMALLEST_SCALE,
    QuantizedLinear,
    TensorQuantization,
)
from edgeattn.quantized.score_ops import AddMask, MulConstant, ScoreOp, SelectMask, fit_mask, score_map
from edgeattn.quantized.static import SMALLEST_SOFTMAX_SCALE, SOURCES, StaticMultiHeadAttention
from edgeattn.quantized.static_attention import StaticSelfAttention
from edgeattn.quantized.static_feed_forward import StaticFeedForward

__all__ = [
    "INPUTS",
    "LARGEST_SCALE",
    "PROBABILITIES",
    "SHORT",
    "SMALLEST_SCALE",
    "SMALLEST_SOFTMAX_SCALE",
    "SOURCES",
    "AddMask",
    "DynamicMultiHeadAttention",
    "MulConstant",
    "QuantizedLinear",
    "QuantizedMultiHeadAttention",
    "ScoreOp",
    "SelectMask",
    "StaticFeedForward",
    "StaticMultiHeadAttention",
    "StaticSelfAttention",
    "TensorQuantization",
    "fit_mask",
    "score_map",
]
