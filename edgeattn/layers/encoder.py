"""Transformer encoders: layers upon layers, their calls, and what of one call the next ones find again."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np

from edgeattn.checks import FLOAT32, check_out, float_array, result_dtype, to_float32, write_result
from edgeattn.device import Placeable
from edgeattn.files import checkpoints
from edgeattn.files.paths import named
from edgeattn.hints import explained, hinted
from edgeattn.kinds import class_of
from edgeattn.layers.call import resolve_call_mask
from edgeattn.layers.encoder_call import (
    FURTHEST,
    Seen,
    check_caches,
    checked_lengths,
    checked_list,
    narrower,
    said_of,
)
from edgeattn.layers.encoder_layer import TransformerEncoderLayer
from edgeattn.layers.encoder_step import can_step, step, step_signature
from edgeattn.layers.feed_forward import FeedForward
from edgeattn.layers.linear import Linear
from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.layers.norm import LayerNorm, RMSNorm, norm_of
from edgeattn.layers.ragged import gathered, part_of_mask, runs_of, spread
from edgeattn.layers.state import Stored
from edgeattn.masks import NO_WINDOW, resolve_mask, torch_masks, window_bounds
from edgeattn.ops import Sequences
from edgeattn.prepared import is_read_as_it_is
from edgeattn.runtime.plan_cache import PlanCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike
    from typing_extensions import Self

    from edgeattn.kv_cache import KVCache
    from edgeattn.ops import Activation, Ops, T
    from edgeattn.types import (
        Arithmetic,
        CacheDtype,
        Flag,
        Float32s,
        Floats,
        OnnxModel,
        OnnxScheme,
        Path,
        Shape,
        Window,
    )


class TransformerEncoder(Placeable, Stored):
    """A stack of encoder layers.

    Parameters
    ----------
    layers : sequence of TransformerEncoderLayer
        All of the same E. A layer may stand there more than once.
    norm : LayerNorm or RMSNorm, optional
        After the last layer.

    Attributes
    ----------
    layers : tuple of TransformerEncoderLayer
    norm : LayerNorm, RMSNorm or None
    embed_dim : int
        E.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, layers: Iterable[TransformerEncoderLayer], *, norm: LayerNorm | RMSNorm | None = None):
        if not isinstance(layers, Iterable):
            raise TypeError("layers must be a sequence of edgeattn.TransformerEncoderLayer, got "
                            f"{type(layers).__name__}; pass [layer] for one")
        self.layers = tuple(layers)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, TransformerEncoderLayer):
                raise TypeError(f"layers[{i}] must be an edgeattn.TransformerEncoderLayer, got {type(layer).__name__}")
        if len({layer.embed_dim for layer in self.layers}) != 1:
            raise ValueError(f"layers must be at least one, all of the same E, got E of "
                             f"{[layer.embed_dim for layer in self.layers]}")
        self.embed_dim, self.norm = self.layers[0].embed_dim, norm
        if norm is not None and (not isinstance(norm, (LayerNorm, RMSNorm)) or norm.inputs != self.embed_dim):
            raise ValueError(f"norm must be a LayerNorm or RMSNorm of E = {self.embed_dim} features, got {norm}")

    @classmethod
    @explained("a state dict does not say what the layers were made with; torch's own defaults are activation='relu', "
               "norm_first=False")
    def from_torch(cls, state_dict_or_path: Mapping[str, ArrayLike] | Path, num_heads: SupportsIndex, *,
                   activation: Activation, norm_first: Flag, prefix: str = "", layer_norm_eps: float = 1e-5) -> Self:
        """The encoder that torch.nn.TransformerEncoder or torch.nn.TransformerEncoderLayer stored.

        Masks of this encoder mean True = attend, the inverse of torch's: `call_with_torch_masks` takes those. Inputs
        are (B, L, E) whatever batch_first was.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        num_heads : int
        activation : {"relu", "gelu", ...}
        norm_first : bool
            What the layers were made with, which a state dict does not say: torch's own defaults are "relu" and False.
        prefix : str
            What stands before "layers.0.", or before "self_attn." of a single layer.
        layer_norm_eps : float
            Likewise.

        Returns
        -------
        TransformerEncoder
            In float32.

        Raises
        ------
        OSError
            Where the file cannot be read.
        TypeError, ValueError
            Naming the argument, the file or the tensor, what was expected and what came.
        ImportError
            Naming the package that reads such a file, and how to install it.
        """
        with named(state_dict_or_path):
            stems, found = checkpoints.torch_encoder_weights(state_dict_or_path, num_heads, prefix)

            def pair(name: str, joint: str = ".") -> tuple[Any, Any]:
                return found[f"{name}{joint}weight"], found.get(f"{name}{joint}bias")

            def layer(stem: str) -> TransformerEncoderLayer:
                weight, bias = pair(f"{stem}self_attn.in_proj", "_")
                (q, k, v), biases = np.split(weight, 3), [None] * 3 if bias is None else np.split(bias, 3)
                out_weight, out_bias = pair(f"{stem}self_attn.out_proj")
                attention = MultiHeadAttention(num_heads, q, k, v, out_weight, q_bias=biases[0], k_bias=biases[1],
                                               v_bias=biases[2], out_bias=out_bias)
                linear1, linear2 = (Linear(*pair(stem + name)) for name in ("linear1", "linear2"))
                norms = (LayerNorm(*pair(stem + name), layer_norm_eps) for name in ("norm1", "norm2"))
                return TransformerEncoderLayer(
                    attention, FeedForward(linear1, linear2, activation=activation), *norms, norm_first=norm_first)

            norm = LayerNorm(*pair("norm"), layer_norm_eps) if "norm.weight" in found else None
            return cls(map(layer, stems), norm=norm)

    @classmethod
    @hinted
    def from_onnx(cls, path_or_model: Path | OnnxModel, *, scheme: OnnxScheme = "float32",
                  arithmetic: Arithmetic | None = None, nodes: Iterable[SupportsIndex] | None = None) -> Self:
        """The encoder in an ONNX model: from the input of its first layer to the norm behind its last.

        It is found from its attention, see `MultiHeadAttention.from_onnx`, and told by what is computed around that,
        not by how: norms and activations may be one node, taken apart, or fused by onnxruntime. Int8 weights times
        their scales are the float weights. What stands before the encoder (embeddings, convolutions) and behind it
        (pooling, heads) is left out: a warning names the values between which the encoder is. `TextEncoder.from_onnx`
        and `ImageEncoder.from_onnx` take the embeddings along.

        Parameters
        ----------
        path_or_model : path or onnx.ModelProto
            Needs the onnx package. All its attention must be that of one encoder, but where `nodes` says which is.
        scheme : {"float32", "static"}
            What a file with QuantizeLinear and DequantizeLinear (QDQ) becomes: "float32", the float encoder of its
            weights; "static", an int8 encoder by the scales that it has, without data, equal to the one that
            `quant.export` wrote. Norms and residuals are float32 in both.
        arithmetic : str
            Of "static", the kernel set to compute as, a name in `edgeattn.arithmetic.KERNEL_SETS`; "litert" unless
            given, for a file names none.
        nodes : iterable of int, optional
            The attention nodes of the layers, one after the other, by their indices as
            `MultiHeadAttention.from_onnx` lists them: range(6) of a model whose encoder has six layers, and a decoder
            or another stage behind it. All of the model unless given.

        Returns
        -------
        TransformerEncoder
            In float32, or with layers in static int8.

        Raises
        ------
        ImportError
            Where the package onnx is missing.
        OSError
            Where a file is missing or cannot be read.
        ValueError
            Naming the node where something else stands than in an encoder; with "static" the tensor without a scale.
        """
        with named(path_or_model):
            kernel_set = checkpoints.kernel_set_of(scheme, arithmetic)
            return cls.from_found(checkpoints.onnx_encoder(path_or_model, kernel_set, nodes))

    @classmethod
    def from_found(cls, found: Any) -> Self:
        """The encoder of what a reader found: `layers` of weights, and the `norm` behind them."""
        def layer(each: Any) -> TransformerEncoderLayer:
            attention: Any = MultiHeadAttention.from_found(
                each.attention.heads, each.attention.kv_heads, each.attention.arguments)
            gate = None if each.gate is None else Linear(*each.gate)
            feed_forward: Any = FeedForward(Linear(*each.linear1), Linear(*each.linear2), gate=gate,
                                            activation=each.activation)
            if each.static is not None:
                attention, feed_forward = (class_of(name).from_state(*state) for name, state in zip(
                    ("StaticSelfAttention", "StaticFeedForward"), each.static, strict=True))
            return TransformerEncoderLayer(
                attention, feed_forward,
                norm_of(each.norm1), norm_of(each.norm2), norm_first=each.norm_first,
                window_size=each.window_size)

        return cls(map(layer, found.layers), norm=norm_of(found.norm))

    def forward(self, ops: Ops[T], x: T, sequences: Sequence[Sequences], name: str = "") -> T:
        """Rows of tokens (tokens, E) -> (tokens, E); `sequences` of each layer."""
        for i, (layer, seen) in enumerate(zip(self.layers, sequences, strict=True)):
            x = ops.block(layer, x, seen, f"{name}layers.{i}.")
        return x if self.norm is None else self.norm.forward(ops, x, name + "norm")

    def make_caches(self, batch: SupportsIndex, capacity: SupportsIndex, *, dtype: CacheDtype | None = None,
                    window: SupportsIndex | None = None) -> list[KVCache]:
        """One empty cache for each layer, for the `kv_cache` of a call; arguments as `KVCache.for_layer`'s.

        Parameters
        ----------
        batch, capacity : int
            B, and how many tokens each holds at a time.
        dtype : {"float32", "int8"}, optional
        window : int, optional
            Keys that a query sees, itself among them.

        Returns
        -------
        list of KVCache

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        from edgeattn.kv_cache import KVCache

        return [KVCache.for_layer(layer.attention, batch, capacity, dtype=dtype, window=window)
                for layer in self.layers]

    def __call__(
        self,
        x: ArrayLike | Sequence[ArrayLike],
        *,
        lengths: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        attn_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        window_size: Window = NO_WINDOW,
        kv_cache: Sequence[KVCache] | None = None,
        out: Floats | None = None,
    ) -> Floats | list[Floats]:
        """Encode `x`.

        Parameters
        ----------
        x : (B, L, E) or (L, E) float16, float32 or float64 array, or list of (L_i, E) arrays
            All dtypes are computed in float32.
        lengths : (B,) int array, optional
            The number of tokens of each sequence. Rows past it cost nothing and come out as zeros. A sequence gives the
            same bits alone as in any batch.
        key_padding_mask : (B, L) or (L,) bool array, optional
            True = a real token that may be attended to. Where the others are all at the end, `lengths` is cheaper.
        attn_mask : bool or float array, broadcastable to (B, H, L, L), optional
            bool: True = attend. float: added to the scores.
        is_causal : bool
            A token sees none after it.
        window_size : (int, int)
            (left, right): a token at position p sees those from p - left to p + right; -1 = unbounded.
        kv_cache : list of KVCache, optional
            One per layer, see `make_caches`: the tokens of `x` come after those that they hold. With `is_causal` a
            token's result is that in the whole sequence.
        out : array of the shape and dtype of `x`, optional
            Takes the result; it may overlap `x`.

        Returns
        -------
        array of the shape and dtype of `x`, or list of such arrays

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        given: Any = x
        own = _is_own(self)
        if kv_cache is None and not own and is_read_as_it_is(given):
            said = said_of(given.shape[:-1], lengths, window_size, attn_mask=attn_mask,
                           key_padding_mask=key_padding_mask, is_causal=is_causal)
            known = self._seen.get(said)
            if known is not None and given.shape[-1] == self.embed_dim:  # all else was checked
                if out is None and known.run is None and known.chain is not None:
                    return known.chain(given)
                check_out(out, given.shape, FLOAT32)
                if known.run is None:
                    again = self._again(known, given)
                else:
                    whole = given.reshape(-1, *given.shape[-2:])
                    again = spread(self._again(known, gathered(whole, [known.run])), [known.run], whole.shape)
                return write_result(again.reshape(given.shape), out, FLOAT32)
        stepped = None
        if kv_cache is not None and not own:
            stepped = step_signature(given, kv_cache, lengths, window_size, {
                "attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal})
            if stepped in self._steps and (out is None or is_read_as_it_is(out) and out.shape == given.shape):
                token = step(self, given, kv_cache)
                if token is not None:
                    return write_result(token, out, FLOAT32)
        if isinstance(x, (list, tuple)) and any(isinstance(each, np.ndarray) and each.ndim == 2 for each in x):
            return self.encode_list(x, lengths, out, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
                                     is_causal=is_causal, window_size=window_size, kv_cache=kv_cache)
        from edgeattn.executors.compiled import CompiledOps

        x = float_array("x", cast("ArrayLike", x))
        self.check_shape(x)
        dtype = result_dtype(x)
        check_out(out, x.shape, dtype)
        with self.prepared(x.shape[:-1], lengths=lengths, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
                           is_causal=is_causal, window_size=window_size, kv_cache=kv_cache) as sequences:
            if lengths is None:
                rows = to_float32(x).reshape(math.prod(x.shape[:-1]), self.embed_dim)
                result = self.forward(CompiledOps(), rows, sequences).reshape(x.shape) if x.size else rows
            else:
                runs = runs_of(checked_lengths(lengths, x.shape[:-1]))
                whole = to_float32(x).reshape(-1, *x.shape[-2:])
                result = (spread(self.forward(CompiledOps(), gathered(whole, runs), sequences), runs, whole.shape)
                          if runs else np.zeros(x.shape, np.float32))
        if stepped is not None and can_step(self):
            self._steps.keep(stepped, True)
        return write_result(result.reshape(x.shape), out, dtype)

    @functools.cached_property
    def _seen(self) -> PlanCache[Any, Seen]:
        """What `prepared` found of calls before, by `said_of`: masks of sentences, which have many lengths."""
        return PlanCache(64)

    @functools.cached_property
    def _steps(self) -> PlanCache[Any, bool]:
        """The signatures of steps through caches that were checked, see `encoder_step`."""
        return PlanCache(64)

    def _again(self, known: Seen, x: Float32s) -> Float32s:
        """The encoder of tokens x in C order, whose masks were prepared before; what comes thrice becomes a `Chain`."""
        from edgeattn.executors.chain import MOST_LAYERS, chain_of
        from edgeattn.executors.compiled import CompiledOps

        if known.chain is not None:
            return known.chain(x)
        sequences = known.sequences
        result = self.forward(CompiledOps(), x.reshape(-1, self.embed_dim), sequences).reshape(x.shape)
        known.times += 1
        if known.times == 2:  # by now every stage has prepared its call, whoever asked for these before
            chains = sum(each.chain is not None for each in list(self._seen.values()))
            if not chains or (chains + 1) * len(self.layers) <= MOST_LAYERS:
                known.chain = chain_of(self, x, sequences)
        return result

    def encode_rows(self, rows: Float32s, lead: Shape, lengths: list[int], *, window_size: Window = NO_WINDOW,
                    **masks: Any) -> Float32s:
        """Rows (tokens, E), in C order, of the tokens alone of sequences (B, L) of these lengths: what each becomes."""
        from edgeattn.executors.compiled import CompiledOps

        known = self._seen.get(said_of(lead, lengths, window_size, **masks))
        if known is not None and not _is_own(self):
            return self._again(known, rows.reshape(*lead, -1) if known.run is None else rows).reshape(rows.shape)
        with self.prepared(lead, lengths=lengths, window_size=window_size, **masks) as sequences:
            return self.forward(CompiledOps(), rows, sequences) if len(rows) else rows

    @contextlib.contextmanager
    def prepared(self, lead: Shape, *, lengths: ArrayLike | None = None, kv_cache: Sequence[KVCache] | None = None,
                 window_size: Window = NO_WINDOW, **masks: Any) -> Iterator[list[Sequences]]:
        """What the tokens of each layer see, for `forward`; arguments as for a call, of (B, L) or (L,) tokens.

        Within, the caches take tokens in; an exception leaves their lengths as they were.
        """
        said = None if kv_cache is not None else said_of(lead, lengths, window_size, **masks)
        known = self._seen.get(said)  # None of None
        if known is not None:
            yield known.sequences
            return
        if lengths is not None and (kv_cache is not None or masks.get("key_padding_mask") is not None):
            other = "key_padding_mask" if kv_cache is None else "kv_cache"
            raise ValueError(f"lengths must be left out with {other}, got both")
        if said is not None:  # its masks are kept, and must not change with the caller's
            masks = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in masks.items()}
        runs = None if lengths is None else runs_of(checked_lengths(lengths, lead))
        check_caches(self.layers, kv_cache)
        window, scores = window_bounds(window_size, FURTHEST), (lead[-1], lead[-1])

        known_masks: dict[Any, Sequences] = {}

        def without_cache(*key: Any) -> Sequences:
            heads, window = key
            found = known_masks.get(key)
            if found is None:
                mask = resolve_mask((*lead[:-1], heads, *scores), window_size=window, **masks)
                masks_seen = [mask] if runs is None else [part_of_mask(mask, *run) for run in runs]
                found = known_masks[key] = Sequences(masks_seen)
            return found

        def seen(layer: TransformerEncoderLayer, cache: KVCache | None) -> Sequences:
            heads, narrow = layer.attention.num_heads, narrower(window, layer.window_size)
            if cache is None:
                return without_cache(heads, narrow)
            mask, pieces = resolve_call_mask((*lead[:-1], heads, *scores), cache, causal_alignment=None,
                                             window_size=narrow, **masks)
            return Sequences([mask], cache=cache, pieces=pieces)

        caches = [None] * len(self.layers) if kv_cache is None else kv_cache
        sequences = [seen(*pair) for pair in zip(self.layers, caches, strict=True)]
        if said is not None and all(lead) and len(sequences[0].masks) == 1:
            run = None if runs is None or runs == [(0, math.prod(lead[:-1]), lead[-1])] else runs[0]
            self._seen.keep(said, Seen(sequences, run))
        with contextlib.ExitStack() as chunks:
            for cache in kv_cache or ():
                chunks.enter_context(cache.transaction())
            yield sequences

    def call_with_torch_masks(self, x: ArrayLike, *, attn_mask: ArrayLike | None = None,
                              key_padding_mask: ArrayLike | None = None, is_causal: Flag = False,
                              out: Floats | None = None, mask: ArrayLike | None = None,
                              src_key_padding_mask: ArrayLike | None = None) -> Floats:
        """Encode with masks as torch.nn.TransformerEncoder takes them: True = blocked.

        Parameters
        ----------
        x : (B, L, E) or (L, E) array
        attn_mask : (L, L) or (B * H, L, L) bool or float array, optional
            bool: True = do not attend. float: added to the scores.
        key_padding_mask : (B, L) or (L,) bool or float array, optional
            bool: True = padding. float: added to the scores.
        is_causal : bool
            A token sees none after it; unlike torch's this is no hint.
        out : array of the shape and dtype of `x`, optional
            Takes the result.
        mask, src_key_padding_mask : array, optional
            What torch.nn.TransformerEncoder calls `attn_mask` and `key_padding_mask`.

        Returns
        -------
        array of the shape and dtype of `x`
            Rows of padding are those of tokens that see the others.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        x = float_array("x", x)
        self.check_shape(x)
        attn_mask = _either("attn_mask", attn_mask, "mask", mask)
        key_padding_mask = _either("key_padding_mask", key_padding_mask, "src_key_padding_mask", src_key_padding_mask)
        shape = (*x.shape[:-2], self.layers[0].attention.num_heads, *x.shape[-2:-1] * 2)
        attn_mask, key_padding_mask = torch_masks(shape, attn_mask, key_padding_mask)
        result: Any = self(x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal, out=out)
        return cast("Floats", result)

    def check_shape(self, x: Any) -> None:
        """Raise unless x is (B, L, E) or (L, E)."""
        if x.ndim not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (B, L, E) or (L, E) with E = {self.embed_dim}, got shape {x.shape}")

    def encode_list(self, x: Sequence[ArrayLike], lengths: object, out: object, **options: Any) -> list[Floats]:
        """A call for a list of sequences."""
        arrays, counts = checked_list(self.embed_dim, x, lengths, out, options)
        dtype, lead = result_dtype(*arrays), (len(arrays), max(counts))
        del options["key_padding_mask"], options["kv_cache"]
        rows = write_result(self.encode_rows(to_float32(np.concatenate(arrays)), lead, counts, **options), None, dtype)
        ends = list(itertools.accumulate(counts))
        return [rows[end - n : end] for n, end in zip(counts, ends, strict=True)]

    def __repr__(self) -> str:
        # the classes of attention and of products, which tell float from int8
        kinds = ", ".join(sorted({type(part).__name__ for layer in self.layers for part in (
            layer.attention, getattr(layer.feed_forward, "linear1", layer.feed_forward))}))
        return (f"TransformerEncoder({len(self.layers)} layers of {kinds}, "
                f"num_heads={self.layers[0].attention.num_heads}, embed_dim={self.embed_dim}, norm={self.norm})")


def _either(name: str, given: ArrayLike | None, other_name: str, other: ArrayLike | None) -> ArrayLike | None:
    """The one of two names of an argument that was given."""
    if given is not None and other is not None:
        raise ValueError(f"{other_name} must be left out with {name}, which is the same; got both")
    return other if given is None else given


def _is_own(encoder: Any) -> bool:
    """Whether its forward is another one, as on a GPU or where a calibration looks on, and no kernels' chain."""
    return "forward" in vars(encoder) or type(encoder).forward is not TransformerEncoder.forward
