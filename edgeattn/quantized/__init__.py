"""Quantized multi-head attention: its parameters, the static and the dynamic layer."""

from edgeattn.lazy import dir_of, names_from

# A name's module is imported when the name is asked for: one kind of layer does not bring in all others.
_HOMES = {
    "INPUTS": "layer",
    "LARGEST_SCALE": "parameters",
    "PROBABILITIES": "parameters",
    "SHORT": "layer",
    "SMALLEST_SCALE": "parameters",
    "SMALLEST_SOFTMAX_SCALE": "static_parameters",
    "SOURCES": "static_parameters",
    "AddMask": "score_ops",
    "DynamicMultiHeadAttention": "dynamic",
    "MulConstant": "score_ops",
    "QuantizedLinear": "parameters",
    "QuantizedMultiHeadAttention": "layer",
    "Requantize": "score_ops",
    "ScoreOp": "score_ops",
    "SelectMask": "score_ops",
    "StaticFeedForward": "static_feed_forward",
    "StaticMultiHeadAttention": "static",
    "StaticSelfAttention": "static_attention",
    "TensorQuantization": "parameters",
    "fit_mask": "score_ops",
    "score_map": "score_ops",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.quantized.dynamic import DynamicMultiHeadAttention as DynamicMultiHeadAttention
    from edgeattn.quantized.layer import INPUTS as INPUTS
    from edgeattn.quantized.layer import SHORT as SHORT
    from edgeattn.quantized.layer import QuantizedMultiHeadAttention as QuantizedMultiHeadAttention
    from edgeattn.quantized.parameters import LARGEST_SCALE as LARGEST_SCALE
    from edgeattn.quantized.parameters import PROBABILITIES as PROBABILITIES
    from edgeattn.quantized.parameters import SMALLEST_SCALE as SMALLEST_SCALE
    from edgeattn.quantized.parameters import QuantizedLinear as QuantizedLinear
    from edgeattn.quantized.parameters import TensorQuantization as TensorQuantization
    from edgeattn.quantized.score_ops import AddMask as AddMask
    from edgeattn.quantized.score_ops import MulConstant as MulConstant
    from edgeattn.quantized.score_ops import Requantize as Requantize
    from edgeattn.quantized.score_ops import ScoreOp as ScoreOp
    from edgeattn.quantized.score_ops import SelectMask as SelectMask
    from edgeattn.quantized.score_ops import fit_mask as fit_mask
    from edgeattn.quantized.score_ops import score_map as score_map
    from edgeattn.quantized.static import StaticMultiHeadAttention as StaticMultiHeadAttention
    from edgeattn.quantized.static_attention import StaticSelfAttention as StaticSelfAttention
    from edgeattn.quantized.static_feed_forward import StaticFeedForward as StaticFeedForward
    from edgeattn.quantized.static_parameters import SMALLEST_SOFTMAX_SCALE as SMALLEST_SOFTMAX_SCALE
    from edgeattn.quantized.static_parameters import SOURCES as SOURCES
else:
    __getattr__ = names_from(__name__, _HOMES)
    __dir__ = dir_of(__name__, _HOMES)
