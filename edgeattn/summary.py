"""What a layer, an encoder or a model is, in a few lines: for `edgeattn info FILE` and `quant inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.layers import FeedForward, MultiHeadAttention, TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.layers.module import TokenWise
from edgeattn.models import ImageEncoder, TextEncoder
from edgeattn.quantized import StaticFeedForward, StaticMultiHeadAttention, StaticSelfAttention

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

_ENCODERS = (TransformerEncoderLayer, TransformerEncoder, TextEncoder, ImageEncoder)
_STATIC = (StaticMultiHeadAttention, StaticSelfAttention, StaticFeedForward)
_PARTS = ("weights", "embedding", "attention", "feed-forward", "norms", "tokenizer")


def summary(of: Any) -> list[tuple[str, str]]:
    """(what, text) rows: its class and precision, its sizes, and the bytes of its weights in memory.

    Parameters
    ----------
    of : what `edgeattn.load` or `edgeattn.from_pretrained` gave
    """
    rows = [("class", f"{type(of).__name__}, {precision(of)}")]
    if isinstance(of, _ENCODERS):
        if isinstance(of, TextEncoder):
            rows.append(("texts", ", ".join(_texts(of))))
        elif isinstance(of, ImageEncoder):
            rows.append(("pixels", _pixels(of)))
        rows.append(("layers", _describe_layers(_layers_of(of))))
    elif isinstance(of, TokenWise):
        rows.append(("features", f"{of.inputs} to {of.outputs}"))
    else:
        rows.append(("heads", f"{of.num_heads} of {of.head_dim}, {of.num_kv_heads} of keys and values"))
        rows.append(("width", f"query {of.embed_dim}, key {of.kdim}, value {of.vdim}, output {of.output_dim}"))
    return [*rows, *_weights(of)]


def precision(of: Any) -> str:
    """What its products are computed in."""
    if isinstance(of, _STATIC):
        return f"static int8, as {of.arithmetic} computes"
    if isinstance(of, _ENCODERS):
        layers = _layers_of(of)
        attention = {precision(layer.attention) for layer in layers}
        feed_forward = {precision(layer.feed_forward) for layer in layers}
        if attention == feed_forward:
            return " and ".join(sorted(attention))
        return f"feed-forward {' and '.join(sorted(feed_forward))}, attention {' and '.join(sorted(attention))}"
    if isinstance(of, FeedForward):
        return precision(of.linear2)
    whole = isinstance(of, (MultiHeadAttention, TokenWise)) and not isinstance(of, DynamicLinear)
    return "float32" if whole else "dynamic int8"


def _layers_of(of: Any) -> Sequence[TransformerEncoderLayer]:
    if isinstance(of, TransformerEncoderLayer):
        return [of]
    layers: Sequence[TransformerEncoderLayer] = (of if isinstance(of, TransformerEncoder) else of.encoder).layers
    return layers


def _texts(model: TextEncoder) -> Iterator[str]:
    yield f"{len(model.embedding.token_weight):,} tokens"
    longest = model.embedding.longest
    yield "positions without end" if longest is None else f"{longest:,} positions"
    if model.max_length is not None:
        yield f"cut after {model.max_length:,}"
    if model.is_causal:
        yield "causal"
    yield f"pooling {model.pooling}{', length 1' if model.normalize else ''}"
    yield "with a tokenizer" if model.tokenizer is not None else "without a tokenizer"


def _pixels(model: ImageEncoder) -> str:
    embedding = model.embedding
    height, width = embedding.image_size
    size = f"(B, {width}, {height}), a spectrogram" if model.spectrogram else (
        f"(B, {embedding.channels}, {height}, {width})")
    return f"{size}, patches of {embedding.patch_size[0]} x {embedding.patch_size[1]}"


def _describe_layers(layers: Sequence[TransformerEncoderLayer]) -> str:
    parts = [layer.feed_forward for layer in layers]
    heads = _any(layer.attention.num_heads for layer in layers)
    activations = _any(("gated " if _is_gated(part) else "") + part.activation for part in parts)
    return (f"{len(parts)}, width {layers[0].embed_dim}, {heads} heads, hidden "
            f"{_any(map(_hidden, parts))}, {activations}, "
            f"{'pre' if layers[0].norm_first else 'post'}-norm")


def _is_gated(part: Any) -> bool:
    gated: bool = part.gated if isinstance(part, StaticFeedForward) else part.gate is not None
    return gated


def _hidden(part: Any) -> int:
    """The hidden features of a feed-forward."""
    if isinstance(part, StaticFeedForward):
        return part.hidden + (0 if part.large is None else part.large.hidden)
    hidden: int = part.linear1.outputs
    return hidden


def _any(values: Iterable[Any]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def _weights(of: Any) -> Iterator[tuple[str, str]]:
    """The bytes of each part by dtype, and of all."""
    _, tensors = of.to_state()
    bytes_of: dict[str, dict[str, int]] = {}
    for name, array in tensors.items():
        kinds = bytes_of.setdefault(_part(of, name), {})
        kinds[str(array.dtype)] = kinds.get(str(array.dtype), 0) + array.nbytes
    for part in _PARTS:
        if part in bytes_of:
            yield part, ", ".join(f"{kind} {size:,} bytes" for kind, size in sorted(bytes_of[part].items()))
    yield "in all", f"{sum(array.nbytes for array in tensors.values()):,} bytes in {len(tensors)} tensors"


def _part(of: Any, name: str) -> str:
    if not isinstance(of, _ENCODERS):
        return "weights" if isinstance(of, TokenWise) else "attention"
    if name == "tokenizer" or name.startswith("embedding."):
        return name.partition(".")[0]
    name = f".{name}"
    return "attention" if ".attention." in name else "feed-forward" if ".feed_forward." in name else "norms"
