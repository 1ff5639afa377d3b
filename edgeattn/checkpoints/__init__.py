"""Attention weights of other libraries, as arguments for `edgeattn.MultiHeadAttention`.

Every reader turns weights into (outputs, inputs) float arrays, and none of them takes a mask along: masks are
arguments of a call. What a library's masks mean, and how that is said to this one, stands with its reader.
"""

from edgeattn.checkpoints.keras_files import keras_weights
from edgeattn.checkpoints.onnx_graphs import onnx_weights
from edgeattn.checkpoints.state_dicts import bert_weights, gpt2_weights, torch_weights

__all__ = ["bert_weights", "gpt2_weights", "keras_weights", "onnx_weights", "torch_weights"]
