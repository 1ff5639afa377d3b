"""Attention weights of other libraries, as arguments for `edgeattn.MultiHeadAttention`.

Every reader turns weights into (outputs, inputs) float arrays, and none of them takes a mask along: masks are
arguments of a call. What a library's masks mean, and how that is said to this one, stands with its reader.
"""

import importlib

# A reader's module is imported when the reader is asked for: most layers are made without one.
_HOMES = {
    "bert_weights": "state_dicts",
    "gpt2_weights": "state_dicts",
    "keras_weights": "keras_files",
    "onnx_weights": "onnx_graphs",
    "torch_weights": "state_dicts",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
