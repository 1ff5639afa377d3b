"""Attention weights of other libraries, as arguments for `edgeattn.MultiHeadAttention`.

Every reader turns weights into (outputs, inputs) float arrays, and none of them takes a mask along: masks are
arguments of a call. What a library's masks mean, and how that is said to this one, stands with its reader.
"""

from edgeattn.lazy import names_from

# A reader's module is imported when the reader is asked for: most layers are made without one.
_HOMES = {
    "bert_weights": "state_dicts",
    "checkpoint_weights": "attention_names",
    "gpt2_weights": "state_dicts",
    "keras_weights": "keras_files",
    "kernel_set_of": "onnx_graphs",
    "onnx_encoder": "onnx_graphs",
    "onnx_image": "onnx_graphs",
    "onnx_text": "onnx_graphs",
    "onnx_weights": "onnx_graphs",
    "torch_encoder_weights": "state_dicts",
    "torch_weights": "state_dicts",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.files.checkpoints.attention_names import checkpoint_weights as checkpoint_weights
    from edgeattn.files.checkpoints.keras_files import keras_weights as keras_weights
    from edgeattn.files.checkpoints.onnx_graphs import kernel_set_of as kernel_set_of
    from edgeattn.files.checkpoints.onnx_graphs import onnx_encoder as onnx_encoder
    from edgeattn.files.checkpoints.onnx_graphs import onnx_image as onnx_image
    from edgeattn.files.checkpoints.onnx_graphs import onnx_text as onnx_text
    from edgeattn.files.checkpoints.onnx_graphs import onnx_weights as onnx_weights
    from edgeattn.files.checkpoints.state_dicts import bert_weights as bert_weights
    from edgeattn.files.checkpoints.state_dicts import gpt2_weights as gpt2_weights
    from edgeattn.files.checkpoints.state_dicts import torch_encoder_weights as torch_encoder_weights
    from edgeattn.files.checkpoints.state_dicts import torch_weights as torch_weights
else:
    __getattr__ = names_from(__name__, _HOMES)
