"""Families of models: what their tensors and options are called, one row per architecture of transformers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.files.paths import listed
from edgeattn.layers import (
    Embedding,
    FeedForward,
    Linear,
    MultiHeadAttention,
    PatchEmbedding,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from edgeattn.masks import NO_WINDOW
from edgeattn.position_bias import RelativePositionBias
from edgeattn.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.types import Float32s

    _Place: TypeAlias = tuple[dict[str, Any], tuple[int, int]]  # arguments of a layer's attention, its window_size
    _Biased: TypeAlias = bool | tuple[str, bool]

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu", "swiglu": "silu", "geglu": "gelu",
    "quick_gelu": "silu"}
_STEEP = {"quick_gelu": 1.702}
# The values that an option may have: any other asks for a computation that is not built in.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",),
    "rope_scaling": (), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "prenorm": (False,), "causal": (False,), "use_rms_norm": (False,), "parallel_block": (False,),
    "rotary_emb_interleaved": (False,), "rotary_emb_scale_base": (), "rotary_scaling_factor": (),
    "apply_layernorm": (True, False), "use_task_id": (False,)}
# What belongs to a model's head, or is computed anew: names begin or end so.
_IGNORED = (
    "pooler.", "cls.", "lm_head", "classifier", "qa_outputs.", "predictions.", "discriminator_predictions.",
    "generator_predictions.", "generator_lm_head.", "vocab_", "pre_classifier.", "sop_classifier.", "head.", "decoder.",
    "distillation_classifier.", "cls_classifier.", "score.",
    "position_ids", "token_type_ids", "inv_freq", "mask_token", ".attn.bias", ".attn.masked_bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """Names in the checkpoints of a model_type, those of BERT unless said otherwise; "" for what a family has not."""

    prefix: str = "bert."  # before all names where the model has a head
    layer: str = "encoder.layer.{}."
    shared: bool = False  # layers are members {} of groups {}, which several of them share
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    qkv: str = ""  # in place of the three: their rows one after the other
    out: str = "attention.output.dense"
    norm1: str = "attention.output.LayerNorm"
    linear1: str = "intermediate.dense"
    gate: str = ""  # where it is linear1: gate and linear1 one after the other
    linear2: str = "output.dense"
    norm2: str = "output.LayerNorm"
    scale1: str = ""  # layer scale, which goes into the maps before it
    scale2: str = ""
    norm: str = ""  # after the last layer
    tokens: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    projection: str = ""
    patches: str = ""  # an image encoder's
    patch_bias: bool = True
    first_tokens: tuple[str, ...] = ("embeddings.cls_token",)
    table: bool = False  # whether places are a table (places, features), and a first token (features)
    patch_norm: str = ""  # in front of the layers
    conv1d: bool = False  # weights are (inputs, outputs)
    qkv_bias: _Biased = True  # or an option, and what it is where it is not given
    k_bias: bool = True  # whether keys have one where queries and values do
    out_bias: _Biased = True
    mlp_bias: _Biased = True
    norm_bias: _Biased = True
    norm_first: bool = False
    first_norm: bool = True  # whether the first layer has norm1
    is_causal: bool = False
    numbered_from_padding: bool = False  # positions
    eps: float = 1e-12
    places: Callable[[Checkpoint, Sizes], list[_Place]] | None = None
    pooling: str = ""  # of a text encoder whose folder says none
    other_prefix: str = ""  # in place of `prefix`, in a model without a head
    left_out: tuple[str, ...] = ()  # what else belongs to no encoder
    defaults: tuple[tuple[str, Any], ...] = ()  # options that a config of several models may leave out
    no_front: str = ""  # why the layers alone are read


class Sizes(NamedTuple):
    """Of a model's layers."""

    hidden: int
    heads: int
    head_dim: int
    layers: int


def _mpnet_bias(c: Checkpoint, sizes: Sizes) -> list[_Place]:
    buckets = c.size("relative_attention_num_buckets", default=32)
    bias = RelativePositionBias(c.take("encoder.relative_attention_bias.weight", buckets, sizes.heads))
    return [({"position_bias": bias}, NO_WINDOW)] * sizes.layers


def _nomic_rotary(c: Checkpoint, sizes: Sizes) -> list[_Place]:
    turned = int(sizes.head_dim * c.number("rotary_emb_fraction", default=1.0))
    rotary = RotaryEmbedding(turned, base=_rope_base(c, None, "rotary_emb_base", 1000.0))
    return [({"rotary": rotary}, NO_WINDOW)] * sizes.layers


def _modernbert_rotary(c: Checkpoint, sizes: Sizes) -> list[_Place]:
    every, window = c.size("global_attn_every_n_layers", default=3), c.size("local_attention", default=128) // 2
    bases = {"full_attention": _rope_base(c, "full_attention", "global_rope_theta", 160000.0),
             "sliding_attention": _rope_base(c, "sliding_attention", "local_rope_theta", 10000.0)}
    kinds = c.option("layer_types", default=[
        "sliding_attention" if i % every else "full_attention" for i in range(sizes.layers)])
    if not isinstance(kinds, list) or len(kinds) != sizes.layers or not all(
            isinstance(kind, str) and kind in bases for kind in kinds):
        raise ValueError(f"{c.file}: layer_types must be {' or '.join(bases)} for each of {sizes.layers} layers, got "
                         f"{str(kinds)[:200]}")
    windows = {"full_attention": NO_WINDOW, "sliding_attention": (window, window)}
    rotary = {kind: {"rotary": RotaryEmbedding(sizes.head_dim, base=base)} for kind, base in bases.items()}
    return [(rotary[kind], windows[kind]) for kind in kinds]


def _rope_base(c: Checkpoint, kind: str | None, old: str, default: float) -> float:
    rope = c.config.get("rope_parameters")
    if kind is not None and isinstance(rope, dict):
        rope = rope.get(kind)
    if not isinstance(rope, dict):
        return c.number(old, default=default)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{c.file}: rope_parameters must be of rope_type default and whole, got {str(rope)[:200]}")
    return c.positive("rope_theta", rope.get("rope_theta", default))


_BERT = Family()
_ROBERTA = dataclasses.replace(_BERT, prefix="roberta.", numbered_from_padding=True)
_VIT = Family(
    prefix="vit.", q="attention.attention.query", k="attention.attention.key", v="attention.attention.value",
    norm1="layernorm_before", norm2="layernorm_after", norm="layernorm", norm_first=True,
    patches="embeddings.patch_embeddings.projection", positions="embeddings.position_embeddings",
    qkv_bias=("qkv_bias", True))
_DEIT = dataclasses.replace(
    _VIT, prefix="deit.", first_tokens=("embeddings.cls_token", "embeddings.distillation_token"))
# CLIP and SigLIP: each half of such a model, and the names that both have
_CLIP = Family(
    prefix="text_model.", layer="encoder.layers.{}.", q="self_attn.q_proj", k="self_attn.k_proj",
    v="self_attn.v_proj", out="self_attn.out_proj", norm1="layer_norm1", linear1="mlp.fc1", linear2="mlp.fc2",
    norm2="layer_norm2", norm="final_layer_norm", tokens="embeddings.token_embedding",
    positions="embeddings.position_embedding", types="", embedding_norm="", norm_first=True, is_causal=True, eps=1e-5,
    pooling="last", left_out=("vision_model.", "text_projection", "visual_projection", "logit_scale", "logit_bias"),
    defaults=tuple({"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}.items()))
_CLIP_VISION = dataclasses.replace(
    _CLIP, prefix="vision_model.", patches="embeddings.patch_embedding", patch_bias=False, table=True,
    first_tokens=("embeddings.class_embedding",), positions="embeddings.position_embedding.weight",
    patch_norm="pre_layrnorm", norm="", is_causal=False,
    left_out=("text_model.", "post_layernorm.", *_CLIP.left_out[1:]),
    defaults=tuple({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}.items()))
_SIGLIP = tuple({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "hidden_act": "gelu_pytorch_tanh"}.items())
# Models of texts and of images in one folder: the options of each half, and its family.
HALVES = {kind: {"text": ("text_config", f"{kind}_text_model"), "vision": ("vision_config", f"{kind}_vision_model")}
          for kind in ("clip", "siglip")}
FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": dataclasses.replace(_ROBERTA, prefix="data2vec_text."),
    "ernie": dataclasses.replace(_BERT, prefix="ernie."),
    "electra": dataclasses.replace(_BERT, prefix="electra.", projection="embeddings_project"),
    "distilbert": Family(
        prefix="distilbert.", layer="transformer.layer.{}.", q="attention.q_lin", k="attention.k_lin",
        v="attention.v_lin", out="attention.out_lin", norm1="sa_layer_norm", linear1="ffn.lin1", linear2="ffn.lin2",
        norm2="output_layer_norm", types=""),
    "mpnet": dataclasses.replace(
        _ROBERTA, prefix="mpnet.", q="attention.attn.q", k="attention.attn.k", v="attention.attn.v",
        out="attention.attn.o", norm1="attention.LayerNorm", types="", places=_mpnet_bias),
    "albert": Family(
        prefix="albert.", layer="encoder.albert_layer_groups.{}.albert_layers.{}.", shared=True,
        q="attention.query", k="attention.key", v="attention.value", out="attention.dense",
        norm1="attention.LayerNorm", linear1="ffn", linear2="ffn_output", norm2="full_layer_layer_norm",
        projection="encoder.embedding_hidden_mapping_in"),
    "modernbert": Family(
        prefix="model.", layer="layers.{}.", qkv="attn.Wqkv", out="attn.Wo", norm1="attn_norm", linear1="mlp.Wi",
        gate="mlp.Wi", linear2="mlp.Wo", norm2="mlp_norm", norm="final_norm", tokens="embeddings.tok_embeddings",
        positions="", types="", embedding_norm="embeddings.norm", norm_first=True, first_norm=False, eps=1e-5,
        qkv_bias=("attention_bias", False), out_bias=("attention_bias", False), mlp_bias=("mlp_bias", False),
        norm_bias=("norm_bias", False), places=_modernbert_rotary),
    "nomic_bert": Family(
        layer="encoder.layers.{}.", qkv="attn.Wqkv", out="attn.out_proj", norm1="norm1", linear1="mlp.fc11",
        gate="mlp.fc12", linear2="mlp.fc2", norm2="norm2", positions="", embedding_norm="emb_ln",
        qkv_bias=("qkv_proj_bias", False), out_bias=("qkv_proj_bias", False), mlp_bias=("mlp_fc1_bias", False),
        places=_nomic_rotary),
    "gpt2": Family(
        prefix="transformer.", layer="h.{}.", qkv="attn.c_attn", out="attn.c_proj", norm1="ln_1", linear1="mlp.c_fc",
        linear2="mlp.c_proj", norm2="ln_2", norm="ln_f", tokens="wte", positions="wpe", types="", embedding_norm="",
        conv1d=True, norm_first=True, is_causal=True, eps=1e-5),
    "vit": _VIT,
    "deit": _DEIT,
    "dinov2": dataclasses.replace(
        _VIT, prefix="dinov2.", norm1="norm1", norm2="norm2", linear1="mlp.fc1", linear2="mlp.fc2",
        scale1="layer_scale1.lambda1", scale2="layer_scale2.lambda1", eps=1e-6),
    "audio-spectrogram-transformer": dataclasses.replace(_DEIT, prefix="audio_spectrogram_transformer."),
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP_VISION,
    "siglip_text_model": dataclasses.replace(
        _CLIP, is_causal=False, eps=1e-6,
        defaults=(*_SIGLIP, ("vocab_size", 32000), ("max_position_embeddings", 64))),
    "siglip_vision_model": dataclasses.replace(
        _CLIP_VISION, patch_bias=True, first_tokens=(), patch_norm="", norm="post_layernorm", eps=1e-6,
        left_out=("text_model.", *_CLIP.left_out[1:]), defaults=(*_SIGLIP, ("image_size", 224), ("patch_size", 16))),
    "whisper": Family(
        prefix="model.encoder.", other_prefix="encoder.", layer="layers.{}.", q="self_attn.q_proj",
        k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj", k_bias=False,
        norm1="self_attn_layer_norm", linear1="fc1", linear2="fc2", norm2="final_layer_norm", norm="layer_norm",
        norm_first=True, eps=1e-5,
        left_out=("model.decoder.", "proj_out.", "conv1.", "conv2.", "embed_positions."),
        no_front="it begins with two convolutions over time, of which there is no layer here"),
}
_REFUSED = {"mobilebert": "its layers have bottlenecks, several feed-forward networks and a norm without statistics"}


def family_of(c: Checkpoint, part: str | None = None) -> Family:
    """The family of a checkpoint, whose options must be ones that are built in; `part` as of `from_pretrained`."""
    kind = c.option("model_type")
    if isinstance(kind, str) and kind in HALVES:
        if part not in HALVES[kind]:
            raise ValueError(f"{c.file}: a {kind} model is one of texts and one of images: from_pretrained(folder, "
                             f"part='text') or part='vision' reads one, whose encoder is its layers; got part={part!r}")
        name, kind = HALVES[kind][part]
        options = c.option(name)
        if not isinstance(options, dict):
            raise ValueError(f"{c.file}: {name} must be an object, got {str(options)[:100]}")
        c.config = {**dict(FAMILIES[kind].defaults), **options, "model_type": kind}
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = _REFUSED.get(kind, "it is none of these") if isinstance(kind, str) else "it is no name"
        raise ValueError(f"{c.file}: model_type must be one of {', '.join(FAMILIES)}, got {str(kind)[:100]!r}: {why}")
    for name, values in _SUPPORTED.items():
        given = c.config.get(name)
        if given is not None and given not in values:
            raise ValueError(f"{c.file}: {name} must be {' or '.join(map(str, values)) or 'null'}, got "
                             f"{str(given)[:100]}: a {kind} model computed otherwise is not supported")
    family = FAMILIES[kind]
    if c.flag("use_swiglu_ffn", False):  # DINOv2, giant
        family = dataclasses.replace(family, linear1="mlp.weights_in", gate="mlp.weights_in", linear2="mlp.weights_out")
    if part in ("text", "vision") and (family.no_front or bool(family.patches) != (part == "vision")):
        raise ValueError(f"{c.file}: part must be left out, or 'encoder', for a {kind} model, got {part!r}")
    if family.no_front and part != "encoder":
        raise ValueError(f"{c.file}: a {kind} model is not read whole, for {family.no_front}; "
                         "from_pretrained(folder, part='encoder') reads its layers, which take what transformers' own "
                         "convolutions and positions give")
    c.strip((family.prefix, family.other_prefix), (*_IGNORED, *family.left_out))
    return family


def text_embedding(c: Checkpoint, f: Family) -> Embedding:
    """The embedding of a text encoder."""
    hidden = c.size("hidden_size", "n_embd", "dim")
    width = c.size("embedding_size", default=hidden) if f.projection else hidden
    mapped = bool(f.projection) and (width != hidden or f.projection + ".weight" in c)
    longest = c.size("max_position_embeddings", "n_positions") if f.positions else None

    def table(name: str, rows: int | None) -> Float32s | None:
        return c.take(f"{name}.weight", rows, width) if name else None

    return Embedding(
        c.take(f"{f.tokens}.weight", c.size("vocab_size"), width), table(f.positions, longest),
        table(f.types, c.size("type_vocab_size", default=2)),
        norm=c.norm(f.embedding_norm, width, _eps(c, f), bias=_biased(c, f.norm_bias)) if f.embedding_norm else None,
        projection=c.linear(f.projection, hidden, width) if mapped else None,
        padding_id=_padding_id(c) if f.numbered_from_padding else None)


def patch_embedding(c: Checkpoint, f: Family) -> PatchEmbedding:
    """The embedding of an image encoder, or of one of spectrograms, whose images are (bins, frames)."""
    hidden, patch = c.size("hidden_size"), c.sizes("patch_size")
    if "num_mel_bins" in c.config:
        image = c.size("num_mel_bins"), c.size("max_length")
        stride, channels = (c.size("frequency_stride"), c.size("time_stride")), 1
    else:
        image, stride, channels = c.sizes("image_size"), patch, c.size("num_channels", default=3)
    if any(whole < part for whole, part in zip(image, patch, strict=True)):
        raise ValueError(f"{c.file}: images of {image} must have room for a patch of {patch}")
    patches = [(whole - part) // step + 1 for whole, part, step in zip(image, patch, stride, strict=True)]
    weight = c.take(f"{f.patches}.weight", hidden, channels, *patch).reshape(hidden, -1)
    bias = c.take(f"{f.patches}.bias", hidden) if f.patch_bias else None
    lead = () if f.table else (1,)
    first = [c.take(name, *lead, *lead, hidden).reshape(1, hidden) for name in f.first_tokens]
    count = len(first) + patches[0] * patches[1]
    places = c.take(f.positions, *lead, count, hidden).reshape(count, hidden).astype(np.float32)
    if first:
        places[: len(first)] += np.concatenate(first) - (0 if bias is None else bias)
    norm = c.norm(f.patch_norm, hidden, _eps(c, f)) if f.patch_norm else None
    return PatchEmbedding(Linear(weight, bias), places, patch_size=patch, stride=stride, image_size=image, norm=norm)


def encoder(c: Checkpoint, f: Family, *, alone: bool = False) -> TransformerEncoder:
    """The layers; after this the checkpoint must have no tensor left, but for what stands before layers read alone."""
    hidden = c.size("hidden_size", "n_embd", "dim", "d_model")
    heads = c.size("encoder_attention_heads", "num_attention_heads", "n_head", "n_heads")
    if hidden % heads:
        raise ValueError(f"{c.file}: num_attention_heads must divide hidden_size = {hidden}, got {heads}")
    count = c.size("encoder_layers", "num_hidden_layers", "n_layer", "n_layers")
    sizes = Sizes(hidden, heads, c.size("head_dim", default=hidden // heads), count)
    places = f.places(c, sizes) if f.places else [({}, NO_WINDOW)] * count
    groups, inner = (c.size(name, default=1) if f.shared else 1 for name in ("num_hidden_groups", "inner_group_num"))
    made: dict[str, TransformerEncoderLayer] = {}
    layers = []
    for i, (attention, window) in enumerate(places):
        for j in range(inner):
            stem = f.layer.format(i * groups // count if f.shared else i, j)
            if stem not in made:
                made[stem] = _layer(c, f, stem, sizes, i > 0 or f.first_norm, attention, window)
            layers.append(made[stem])
    norm = c.norm(f.norm, hidden, _eps(c, f), bias=_biased(c, f.norm_bias)) if f.norm else None
    c.finish(whole=not alone)
    return TransformerEncoder(layers, norm=norm)


def _layer(c: Checkpoint, f: Family, stem: str, sizes: Sizes, has_norm1: bool, attention: dict[str, Any],
           window: tuple[int, int]) -> TransformerEncoderLayer:
    hidden, inner = sizes.hidden, sizes.heads * sizes.head_dim

    def linear(name: str, outputs: int, inputs: int, bias: _Biased, scale: str = "") -> Linear:
        made = c.linear(stem + name, outputs, inputs, bias=_biased(c, bias), transposed=f.conv1d)
        if not scale:
            return made
        by = c.take(stem + scale, outputs)
        return Linear(made.weight * by[:, None], None if made.bias is None else made.bias * by)

    if f.qkv:
        q, k, v = _parts(linear(f.qkv, 3 * inner, hidden, f.qkv_bias), 3)
    else:
        q, k, v = (linear(name, inner, hidden, f.qkv_bias if name != f.k or f.k_bias else False)
                   for name in (f.q, f.k, f.v))
    out = linear(f.out, hidden, inner, f.out_bias, f.scale1)
    features, gate = _features(c, hidden), None
    if f.gate == f.linear1:
        gate, linear1 = _parts(linear(f.linear1, 2 * features, hidden, f.mlp_bias), 2)
    else:
        linear1 = linear(f.linear1, features, hidden, f.mlp_bias)
        gate = linear(f.gate, features, hidden, f.mlp_bias) if f.gate else None
    linear2 = linear(f.linear2, hidden, features, f.mlp_bias, f.scale2)
    activation, steep = _activation(c)
    if steep != 1:  # x sigmoid(1.702 x) is a SiLU of 1.702 x, divided by it
        linear1 = Linear(linear1.weight * steep, None if linear1.bias is None else linear1.bias * steep)
        linear2 = Linear(linear2.weight / steep, linear2.bias)
    norms = [c.norm(stem + name, hidden, _eps(c, f), bias=_biased(c, f.norm_bias)) if name else None
             for name in (f.norm1 if has_norm1 else "", f.norm2)]
    return TransformerEncoderLayer(
        MultiHeadAttention(sizes.heads, q.weight, k.weight, v.weight, out.weight, q_bias=q.bias, k_bias=k.bias,
                           v_bias=v.bias, out_bias=out.bias, **attention),
        FeedForward(linear1, linear2, gate=gate, activation=activation),
        *norms, norm_first=f.norm_first, window_size=window)


def _parts(linear: Linear, count: int) -> list[Linear]:
    """A linear map cut into maps of a part of its outputs each."""
    biases = [None] * count if linear.bias is None else np.split(linear.bias, count)
    return [Linear(*pair) for pair in zip(np.split(linear.weight, count), biases, strict=True)]


def _features(c: Checkpoint, hidden: int) -> int:
    """F."""
    if "mlp_ratio" not in c.config:
        return c.size("encoder_ffn_dim", "intermediate_size", "n_inner", "hidden_dim", default=4 * hidden)
    features = int(hidden * c.number("mlp_ratio"))
    return (features * 2 // 3 + 7) // 8 * 8 if c.flag("use_swiglu_ffn", False) else features


def _activation(c: Checkpoint) -> tuple[Any, np.float32]:
    """(the activation, what features are multiplied by before it and divided by behind it)."""
    name = "silu" if c.flag("use_swiglu_ffn", False) else c.option(
        "hidden_act", "activation_function", "hidden_activation", "activation")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{c.file}: the activation must be one of {listed(ACTIVATIONS)}, got {str(name)[:100]!r}")
    return ACTIVATIONS[name], np.float32(_STEEP.get(name, 1))


def _eps(c: Checkpoint, f: Family) -> float:
    eps = c.number("layer_norm_eps", "layer_norm_epsilon", "norm_eps", default=f.eps)
    if eps >= 1:
        raise ValueError(f"{c.file}: layer_norm_eps must be less than 1, got {eps}: norms are of variances near 1")
    return eps


def _biased(c: Checkpoint, bias: _Biased) -> bool:
    return bias if isinstance(bias, bool) else c.flag(*bias)


def _padding_id(c: Checkpoint) -> int:
    number = c.option("pad_token_id", default=1)
    if type(number) is not int or not 0 <= number < c.size("vocab_size"):
        raise ValueError(f"{c.file}: pad_token_id must be one of the tokens, got {str(number)[:100]}")
    return number
