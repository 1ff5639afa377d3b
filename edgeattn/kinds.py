"""Every class that a file may hold: where it lives, how it is written, and which compiled kernels it calls."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any


class Kind(NamedTuple):
    """What is to be known of a class before it is imported."""

    home: str  # its module in edgeattn, imported only when a file holds one
    kernels: tuple[str, ...] = ()  # names in kernels.cpu.entries.ENTRIES, beside those of what it is made of
    is_file: bool = True  # whether a file may hold one alone, by to_state() and from_state()
    own_state: bool = False  # whether it is written so inside another, too, and not as the arguments of its constructor


CACHES = ("decode float32", "decode int8", "store rows")
_ATTENTION = ("attention float32", "attention by rows", *CACHES)
_FLOAT = ("layer float32", *_ATTENTION, "linear float32")
_STATIC = ("layer int8", "layer int8 with a cache")

KINDS = {
    "MultiHeadAttention": Kind("layers.multi_head", _FLOAT),
    "SelfAttention": Kind("layers.self_attention", _FLOAT),
    "DynamicMultiHeadAttention": Kind("quantized.dynamic", ("layer dynamic", *_ATTENTION, "projection dynamic"),
                                      own_state=True),
    "StaticMultiHeadAttention": Kind("quantized.static", (*_STATIC, "quantize", "dequantize"), own_state=True),
    "StaticSelfAttention": Kind("quantized.static_attention", ("rows to codes", *_STATIC, "codes to rows"),
                                own_state=True),
    "StaticFeedForward": Kind("quantized.static_feed_forward", ("feed-forward int8",), own_state=True),
    "FeedForward": Kind("layers.feed_forward"),
    "Linear": Kind("layers.linear", ("feed-forward float32", "linear float32")),
    "DynamicLinear": Kind("layers.dynamic_linear", ("feed-forward dynamic", "linear dynamic")),
    "LayerNorm": Kind("layers.norm", ("norm",)),
    "RMSNorm": Kind("layers.norm", ("norm",)),
    "Embedding": Kind("layers.embedding", is_file=False),
    "PatchEmbedding": Kind("layers.embedding", is_file=False),
    "RotaryEmbedding": Kind("rotary", is_file=False),
    "ConstantPositionBias": Kind("position_bias", is_file=False),
    "RelativePositionBias": Kind("position_bias", is_file=False),
    "TransformerEncoderLayer": Kind("layers.encoder_layer"),
    "TransformerEncoder": Kind("layers.encoder"),
    "TextEncoder": Kind("models.text_encoder"),
    "ImageEncoder": Kind("models.image_encoder"),
}
FILES = [name for name, kind in KINDS.items() if kind.is_file]


def kind_of(thing: Any) -> Kind | None:
    """The row of an object's class; None where there is none, as of a class of that name elsewhere."""
    kind = KINDS.get(type(thing).__name__)
    return kind if kind is not None and type(thing).__module__ == f"edgeattn.{kind.home}" else None


def class_of(name: str) -> Any:
    """The class of a row."""
    return getattr(importlib.import_module(f"edgeattn.{KINDS[name].home}"), name)
