"""Weights from state dicts: torch.nn.MultiheadAttention, torch.nn.TransformerEncoder, BERT, GPT-2."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import to_float32
from edgeattn.files.checkpoints.tensors import (
    Tensors,
    check_heads,
    check_source,
    open_state_dict,
    other_names,
    prefixes_of,
    read_named,
    times,
)
from edgeattn.files.paths import listed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Path

# Part of what BERT calls attention, but after it.
_BERT_NORM = (
    "output.LayerNorm.weight",
    "output.LayerNorm.bias",
    "output.LayerNorm.gamma",
    "output.LayerNorm.beta",
)
# A tensor that an encoder has, and one of its layers alone.
_ENCODERS = ("layers.0.self_attn.in_proj_weight", "self_attn.in_proj_weight")
# Causal masks that older releases of transformers stored as if they were weights.
_GPT2_MASKS = ("bias", "masked_bias")


def torch_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, num_heads: SupportsIndex, prefix: str = ""
                  ) -> dict[str, NDArray[Any]]:
    """Weights of a torch.nn.MultiheadAttention.

    in_proj_weight holds the rows of Q, K and V one after the other; where kdim or vdim differ from E there
    are q_proj_weight, k_proj_weight and v_proj_weight instead, still with one in_proj_bias. Layers made with
    add_bias_kv=True have bias_k and bias_v besides.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
    num_heads : int
    prefix : str
        What stands before these names.

    Returns
    -------
    dict of str to array
        q_weight, k_weight, v_weight, out_weight, and the biases, bias_k and bias_v where there are any.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    tensors = open_state_dict(state_dict_or_path, prefix, "in_proj_weight", "q_proj_weight")
    packed = "in_proj_weight" in tensors or "q_proj_weight" not in tensors
    embed = tensors.axis("in_proj_weight" if packed else "q_proj_weight", 1)
    if packed:
        tensors.expect("in_proj_weight", (times(3, embed), embed))
    else:
        tensors.expect("q_proj_weight", (embed, embed))
        tensors.expect("k_proj_weight", (embed, tensors.axis("k_proj_weight", 1)))
        tensors.expect("v_proj_weight", (embed, tensors.axis("v_proj_weight", 1)))
    tensors.expect("out_proj.weight", (embed, embed))
    biased = "in_proj_bias" in tensors or "out_proj.bias" in tensors
    if biased:
        tensors.expect("in_proj_bias", (times(3, embed),))
        tensors.expect("out_proj.bias", (embed,))
    added = [name for name in ("bias_k", "bias_v") if "bias_k" in tensors or "bias_v" in tensors]
    for name in added:
        tensors.expect(name, (1, 1, embed))
    found = tensors.checked()
    check_heads(num_heads, embed)

    if packed:
        q_weight, k_weight, v_weight = np.split(found["in_proj_weight"], 3)
    else:
        q_weight, k_weight, v_weight = (found[f"{letter}_proj_weight"] for letter in "qkv")
    weights = {
        "q_weight": q_weight,
        "k_weight": k_weight,
        "v_weight": v_weight,
        "out_weight": found["out_proj.weight"],
    }
    if biased:
        weights["q_bias"], weights["k_bias"], weights["v_bias"] = np.split(found["in_proj_bias"], 3)
        weights["out_bias"] = found["out_proj.bias"]
    return weights | {name: found[name] for name in added}


def torch_encoder_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, num_heads: SupportsIndex, prefix: str = ""
                          ) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Weights of a torch.nn.TransformerEncoder or torch.nn.TransformerEncoderLayer.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
    num_heads : int
    prefix : str
        What stands before "layers.0.", or before "self_attn." of a single layer.

    Returns
    -------
    list of str
        What stands before the names of each layer.
    dict of str to array
        All tensors, without the prefix.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    check_source("state_dict_or_path", state_dict_or_path)
    source, found, names = read_named(state_dict_or_path, prefix)
    if not any(f"{prefix}{each}" in found for each in _ENCODERS):
        fitting = [prefixes_of(names, each) for each in _ENCODERS]
        way_out = (f"prefixes that fit one: [{listed(map(repr, fitting[0] or fitting[1]))}]" if fitting[1] else
                   other_names(names))
        raise ValueError(f"prefix {prefix!r} fits no torch.nn.TransformerEncoder in {source}; {way_out}")
    tensors = Tensors(source, prefix, {name[len(prefix) :]: tensor for name, tensor in found.items()})
    count = next(i for i in itertools.count() if f"layers.{i}.self_attn.in_proj_weight" not in tensors)
    stems = [f"layers.{i}." for i in range(count)] or [""]
    embed = tensors.axis(f"{stems[0]}linear1.weight", 1)
    for stem in stems:
        hidden = tensors.axis(f"{stem}linear1.weight", 0)
        shapes = {"self_attn.in_proj_": (times(3, embed), embed), "self_attn.out_proj.": (embed, embed),
                  "linear1.": (hidden, embed), "linear2.": (embed, hidden), "norm1.": (embed,), "norm2.": (embed,)}
        for name, shape in shapes.items():
            tensors.expect(f"{stem}{name}weight", shape)
            if f"{stems[0]}norm1.bias" in tensors:
                tensors.expect(f"{stem}{name}bias", shape[:1])
    if count and "norm.weight" in tensors:
        for part in ("weight", "bias") if "norm.bias" in tensors else ("weight",):
            tensors.expect(f"norm.{part}", (embed,))
    found = tensors.checked(what="torch.nn.TransformerEncoder")
    for name, array in found.items():
        if not np.isfinite(to_float32(array)).all():
            raise ValueError(f"{source}: {prefix}{name} holds NaN or infinity as float32: the weights are damaged, or "
                             "their training failed")
    check_heads(num_heads, embed)
    return stems, found


def bert_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
                 ) -> dict[str, NDArray[Any]]:
    """Weights of the attention in one layer of a BERT model as the transformers library names them.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
    prefix : str
        What stands before "self.query.weight".
    num_heads : int

    Returns
    -------
    dict of str to array
        q_weight, k_weight, v_weight, out_weight and the biases. output.LayerNorm is left where it is.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    tensors = open_state_dict(state_dict_or_path, prefix, "self.query.weight")
    inner, embed = tensors.axis("self.query.weight", 0), tensors.axis("self.query.weight", 1)
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "out": "output.dense"}
    for name in names.values():
        shape = (embed, inner) if name == "output.dense" else (inner, embed)
        tensors.expect(f"{name}.weight", shape)
        tensors.expect(f"{name}.bias", shape[:1])
    found = tensors.checked(ignored=_BERT_NORM)
    check_heads(num_heads, inner)
    return {
        f"{ours}_{part}": found[f"{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }


def gpt2_weights(state_dict_or_path: Mapping[str, ArrayLike] | Path, prefix: str, num_heads: SupportsIndex
                 ) -> dict[str, NDArray[Any]]:
    """Weights of the attention in one layer of a GPT-2 model as the transformers library names them.

    Its linear maps are Conv1D: (inputs, outputs), the transpose of ours. c_attn holds the columns of Q, K and V
    one after the other; in cross-attention there is q_attn too, and c_attn holds K and V.

    Parameters
    ----------
    state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
    prefix : str
        What stands before "c_attn.weight".
    num_heads : int

    Returns
    -------
    dict of str to array
        q_weight, k_weight, v_weight, out_weight and the biases. Stored causal masks are left where they are.

    Raises
    ------
    ValueError
        Listing all missing, unexpected and mis-shaped tensors.
    """
    tensors = open_state_dict(state_dict_or_path, prefix, "c_attn.weight")
    crossed = "q_attn.weight" in tensors or "q_attn.bias" in tensors
    packed = 2 if crossed else 3
    embed, columns = tensors.axis("c_attn.weight", 0), tensors.axis("c_attn.weight", 1)
    inner = None if columns is None else columns // packed
    shapes = {"c_attn": (embed, times(packed, inner)), "c_proj": (inner, embed)}
    if crossed:
        shapes["q_attn"] = (embed, inner)
    for name, shape in shapes.items():
        tensors.expect(f"{name}.weight", shape)
        tensors.expect(f"{name}.bias", shape[1:])
    found = tensors.checked(ignored=_GPT2_MASKS)
    check_heads(num_heads, inner)
    weights = {}
    for part in ("weight", "bias"):
        columns = np.split(found[f"c_attn.{part}"], packed, axis=-1)
        columns = [found[f"q_attn.{part}"], *columns] if crossed else columns
        columns.append(found[f"c_proj.{part}"])
        for name, array in zip("q k v out".split(), columns, strict=True):
            weights[f"{name}_{part}"] = array.T
    return weights
