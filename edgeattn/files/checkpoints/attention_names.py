"""What state dicts call the projections of attention: one table of families."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.checks import count
from edgeattn.files.checkpoints.tensors import Tensors, check_heads, check_source, other_names, read_named
from edgeattn.files.paths import listed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Path


class Names(NamedTuple):
    """Of queries, keys and values, or of all three one after the other; of the output; and what else there is."""

    family: str
    inputs: tuple[str, ...]
    out: str
    positions: str = ""  # what the family's own code does to queries, keys or scores
    conv1d: bool = False  # weights are (inputs, outputs)
    unscaled: bool = False  # scores are not divided by sqrt(D)


FAMILIES = (
    Names("BERT, MobileBERT", ("self.query", "self.key", "self.value"), "output.dense"),
    Names("ViT", ("attention.query", "attention.key", "attention.value"), "output.dense"),
    Names("DistilBERT", ("q_lin", "k_lin", "v_lin"), "out_lin"),
    Names("ALBERT", ("attention.query", "attention.key", "attention.value"), "attention.dense"),
    Names("MPNet", ("attn.q", "attn.k", "attn.v"), "attn.o", "adds encoder.relative_attention_bias to its scores: "
          "position_bias=RelativePositionBias(table)"),
    Names("CLIP, SigLIP, BART, Wav2Vec2", ("q_proj", "k_proj", "v_proj"), "out_proj"),
    Names("Llama", ("q_proj", "k_proj", "v_proj"), "o_proj", "turns queries and keys: rotary=RotaryEmbedding(D, "
          "base=rope_theta)"),
    Names("Whisper", ("query", "key", "value"), "out"),
    Names("timm", ("qkv",), "proj"),
    Names("T5", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), "SelfAttention.o", "adds the first layer's "
          "relative_attention_bias to its scores: position_bias=RelativePositionBias(table)", unscaled=True),
    Names("T5 cross-attention", ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"), "EncDecAttention.o",
          unscaled=True),
    Names("GPT-2", ("c_attn",), "c_proj", "sees no token after it: is_causal=True in each call", conv1d=True),
)


def checkpoint_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
                       ) -> tuple[int, dict[str, NDArray[Any]]]:
    """(num_kv_heads, weights) of the attention under a prefix, whose names say the family."""
    check_source("state_dict_or_path", state_dict_or_path)
    source, _, names = read_named(state_dict_or_path, "\0")
    known = set(names)
    found = [(stem, row) for row in FAMILIES for name in names if name.endswith(f"{row.inputs[0]}.weight")
             for stem in [name.removesuffix(f"{row.inputs[0]}.weight")] if stem == "" or stem.endswith(".")
             if all(f"{stem}{each}.weight" in known for each in (*row.inputs, row.out))]
    chosen = [each for each in found if each[0] == prefix] or [each for each in found if each[0].startswith(prefix)]
    if not found:
        raise ValueError(f"prefix {prefix!r} fits no attention layer in {source}; {other_names(names)}")
    if len(chosen) != 1:
        raise ValueError(f"prefix {prefix!r} fits {len(chosen)} attention layers in {source}; prefixes that fit one: "
                         f"[{listed(sorted(repr(stem) for stem, _ in chosen or found))}]")
    stem, row = chosen[0]
    _, under, _ = read_named(state_dict_or_path, stem)
    tensors = Tensors(source, stem, {name[len(stem):]: tensor for name, tensor in under.items()
                                     if name[len(stem):].rpartition(".")[0] in (*row.inputs, row.out)})
    for name in (*row.inputs, row.out):
        rows, inputs = tensors.axis(f"{name}.weight", 0), tensors.axis(f"{name}.weight", 1)
        tensors.expect(f"{name}.weight", (rows, inputs))
        if f"{name}.bias" in tensors:
            tensors.expect(f"{name}.bias", (inputs if row.conv1d else rows,))
    arrays = tensors.checked()
    told = row.positions or ("adds a relative position bias to its scores" if any(
        name.startswith(stem) and "relative" in name for name in names) else "")
    if told:
        warnings.warn(f"{stem}: a {row.family} layer {told}; the layer read is without", stacklevel=4)
    weights: dict[str, Any] = {}
    for part, plural in (("weight", True), ("bias", False)):
        inputs_, out = ([arrays.get(f"{name}.{part}") for name in names] for names in (row.inputs, [row.out]))
        if row.conv1d:
            inputs_, out = ([None if array is None else array.T for array in arrays_] for arrays_ in (inputs_, out))
        if len(inputs_) == 1:
            if inputs_[0] is not None and len(inputs_[0]) % 3:
                raise ValueError(f"{source}: {stem}{row.inputs[0]} must have outputs of Q, K and V, got "
                                 f"{len(inputs_[0])}")
            inputs_ = [None] * 3 if inputs_[0] is None else np.split(inputs_[0], 3)
        for short, array in zip(("q", "k", "v", "out"), [*inputs_, *out], strict=True):
            if array is not None or plural:
                weights[f"{short}_{part}"] = array
    heads = count("num_heads", num_heads)
    check_heads(heads, len(weights["q_weight"]))
    size = len(weights["q_weight"]) // heads
    if row.unscaled:
        for name in ("q_weight", "q_bias"):
            if name in weights:
                weights[name] = weights[name] * np.float32(size**0.5)
    if len(weights["k_weight"]) % size or not len(weights["k_weight"]):
        raise ValueError(f"{source}: {stem} must have keys in heads of {size} features, as queries with num_heads="
                         f"{heads}, got {len(weights['k_weight'])}")
    return len(weights["k_weight"]) // size, weights
