"""What state dicts call the projections of attention: one table of families."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.checks import count
from edgeattn.files.checkpoints.tensors import Tensors, check_heads, check_source, read_named, times
from edgeattn.files.paths import listed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Path


class Names(NamedTuple):
    """Of queries, keys and values, or of all three one after the other; of the output; and what else there is.

    A point stands between these and weight or bias, where they do not end in an underscore.
    """

    family: str
    inputs: tuple[str, ...]
    out: str
    positions: str = ""  # what the family's own code does to queries, keys or scores
    conv1d: bool = False  # weights are (inputs, outputs), where the packed ones are not three times as high as wide
    unscaled: bool = False  # scores are not divided by sqrt(D)
    by_head: bool = False  # of all three: those of one head one after the other, then of the next


_TURNS = "turns queries and keys: rotary=RotaryEmbedding(D, base=rope_theta)"
_RELATIVE = "adds relative positions to its scores, where the model has them"
# The last word of a tensor beside the projections that changes what attention computes.
_ELSE = ("q_norm", "k_norm", "q_ln", "k_ln", "norm_q", "norm_k", "q_bias", "k_bias", "v_bias", "bias_k", "bias_v",
         "logit_scale", "sinks", "pos_proj", "pos_q_proj")

FAMILIES = (
    Names("torch.nn.MultiheadAttention", ("in_proj_",), "out_proj"),
    Names("BERT, MobileBERT", ("self.query", "self.key", "self.value"), "output.dense"),
    Names("ViT", ("attention.query", "attention.key", "attention.value"), "output.dense"),
    Names("DistilBERT", ("q_lin", "k_lin", "v_lin"), "out_lin"),
    Names("ALBERT", ("attention.query", "attention.key", "attention.value"), "attention.dense"),
    Names("MPNet", ("attn.q", "attn.k", "attn.v"), "attn.o", "adds encoder.relative_attention_bias to its scores: "
          "position_bias=RelativePositionBias(table)"),
    Names("CLIP, SigLIP, BART, Wav2Vec2", ("q_proj", "k_proj", "v_proj"), "out_proj"),
    Names("Llama", ("q_proj", "k_proj", "v_proj"), "o_proj", _TURNS),
    Names("Llama, by Meta", ("wq", "wk", "wv"), "wo", f"{_TURNS[:-1]}, interleaved=True)"),
    Names("Phi", ("q_proj", "k_proj", "v_proj"), "dense", _TURNS),
    Names("Phi-3", ("qkv_proj",), "o_proj", _TURNS),
    Names("ModernBERT", ("Wqkv",), "Wo", _TURNS),
    Names("nomic-bert, FlashAttention", ("Wqkv",), "out_proj", f"{_TURNS}, where the model has them"),
    Names("GPT-NeoX, BLOOM", ("query_key_value",), "dense", "turns queries and keys (GPT-NeoX), or adds ALiBi to its "
          "scores (BLOOM)", by_head=True),
    Names("DeBERTa-v2", ("self.query_proj", "self.key_proj", "self.value_proj"), "output.dense", "adds products with "
          "relative positions to its scores, for which there is no argument"),
    Names("Whisper", ("query", "key", "value"), "out"),
    Names("timm", ("qkv",), "proj"),
    Names("BLIP", ("qkv",), "projection"),
    Names("InternViT", ("q_proj", "k_proj", "v_proj"), "projection_layer"),
    Names("Conformer, Wav2Vec2-BERT", ("linear_q", "linear_k", "linear_v"), "linear_out", _RELATIVE),
    Names("Informer", ("query_projection", "key_projection", "value_projection"), "out_projection"),
    Names("PatchTST", ("W_Q", "W_K", "W_V"), "to_out.0"),
    Names("diffusers", ("to_q", "to_k", "to_v"), "to_out.0"),
    Names("vit-pytorch", ("to_qkv",), "to_out.0"),
    Names("The Annotated Transformer", ("linears.0", "linears.1", "linears.2"), "linears.3"),
    Names("pytorch-seq2seq", ("fc_q", "fc_k", "fc_v"), "fc_o"),
    Names("Dive into Deep Learning", ("W_q", "W_k", "W_v"), "W_o"),
    Names("T5", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), "SelfAttention.o", "adds the first layer's "
          "relative_attention_bias to its scores: position_bias=RelativePositionBias(table)", unscaled=True),
    Names("T5 cross-attention", ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"), "EncDecAttention.o",
          unscaled=True),
    Names("GPT-2, nanoGPT", ("c_attn",), "c_proj", "sees no token after it: is_causal=True in each call", conv1d=True),
)


def checkpoint_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
                       ) -> tuple[int, dict[str, NDArray[Any]]]:
    """(num_kv_heads, weights) of the attention under a prefix, whose names say the family."""
    check_source("state_dict_or_path", state_dict_or_path)
    source, _, names = read_named(state_dict_or_path, "\0")
    known = set(names)
    found = [(stem, row) for row in FAMILIES for name in names if name.endswith(_of(row.inputs[0], "weight"))
             for stem in [name.removesuffix(_of(row.inputs[0], "weight"))] if stem == "" or stem.endswith(".")
             if all(f"{stem}{_of(each, 'weight')}" in known for each in (*row.inputs, row.out))]
    if not found:
        raise ValueError(f"{source} must hold attention under names of a known family, got {listed(names)}; known are "
                         f"{', '.join(row.family for row in FAMILIES)}; MultiHeadAttention(q_weight, k_weight, v_weight"
                         ", out_weight, ...) takes weights by hand")
    chosen = [each for each in found if each[0] == prefix] or [each for each in found if each[0].startswith(prefix)]
    if len(chosen) != 1:
        raise ValueError(f"prefix {prefix!r} fits {len(chosen)} attention layers in {source}; prefixes that fit one: "
                         f"[{listed(sorted(repr(stem) for stem, _ in chosen or found))}]")
    stem, row = chosen[0]
    _, under, _ = read_named(state_dict_or_path, stem)
    wanted = {_of(name, part) for name in (*row.inputs, row.out) for part in ("weight", "bias")}
    tensors = Tensors(source, stem, {name[len(stem):]: tensor for name, tensor in under.items()
                                     if name[len(stem):] in wanted})
    high, wide = (tensors.axis(_of(row.inputs[0], "weight"), axis) for axis in (0, 1))
    if row.conv1d and high == times(3, wide):
        row = row._replace(conv1d=False)
    for name in (*row.inputs, row.out):
        rows, inputs = (tensors.axis(_of(name, "weight"), axis) for axis in (0, 1))
        tensors.expect(_of(name, "weight"), (rows, inputs))
        if _of(name, "bias") in tensors:
            tensors.expect(_of(name, "bias"), (inputs if row.conv1d else rows,))
    arrays = tensors.checked()
    heads = count("num_heads", num_heads)
    beside = [name for name in under if any(f".{each}" in f".{name[len(stem):]}" for each in _ELSE)]
    told = [row.positions] if row.positions else []
    if any("relative" in name for name in under) and not told:
        told.append("adds a relative position bias to its scores")
    if beside:
        told.append(f"has {listed(beside)}")
    if told:
        warnings.warn(f"{stem}: a {row.family} layer {' and '.join(told)}; the layer read is without", stacklevel=4)
    weights: dict[str, Any] = {}
    for part, plural in (("weight", True), ("bias", False)):
        inputs_, out = ([arrays.get(_of(name, part)) for name in names] for names in (row.inputs, [row.out]))
        if row.conv1d:
            inputs_, out = ([None if array is None else array.T for array in arrays_] for arrays_ in (inputs_, out))
        if len(inputs_) == 1:
            width = arrays[_of(row.out, "weight")].shape[0 if row.conv1d else 1]  # of the queries
            inputs_ = [None] * 3 if inputs_[0] is None else _parts(
                inputs_[0], width, heads if row.by_head else 0, f"{source}: {stem}{row.inputs[0]}")
        for short, array in zip(("q", "k", "v", "out"), [*inputs_, *out], strict=True):
            if array is not None or plural:
                weights[f"{short}_{part}"] = array
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


def _of(name: str, part: str) -> str:
    """The name of a weight or bias."""
    return f"{name}{part}" if name.endswith("_") else f"{name}.{part}"


def _parts(packed: NDArray[Any], width: int, heads: int, name: str) -> list[NDArray[Any]]:
    """Those of queries, as wide as the output's inputs, keys and values; `heads` where each head has its three."""
    rest = len(packed) - width
    if rest <= 0 or rest % 2 or (heads and (rest != 2 * width or width % heads)):
        raise ValueError(f"{name} must have outputs of Q, {width}, K and V{', head by head' if heads else ''}, got "
                         f"{len(packed)}")
    if heads:
        return [part.reshape(width, *packed.shape[1:])
                for part in packed.reshape(heads, 3, width // heads, *packed.shape[1:]).swapaxes(0, 1)]
    return np.split(packed, [width, width + rest // 2])
