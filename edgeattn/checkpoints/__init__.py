"""Attention weights of other libraries, as arguments for `edgeattn.MultiHeadAttention`.

Every reader turns weights into (outputs, inputs) float arrays, and none of them takes a mask along: masks are
arguments of a call. What a library's masks mean, and how that is said to this one, stands with its reader.
"""

from edgeattn.lazy import names_from

# A reader's module is imported when the reader is asked for: most layers are made without one.
_HOMES = {
    "bert_weights": "state_dicts",
    "gpt2_weights": "state_dicts",
    "keras_weights": "keras_files",
    "onnx_weights": "onnx_graphs",
    "torch_weights": "state_dicts",
}

__all__ = list(_HOMES)
__getattr__ = names_from(__name__, _HOMES)
