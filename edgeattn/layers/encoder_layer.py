"""A layer of a Transformer encoder: attention and a feed-forward network, each with a residual and a norm."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from edgeattn.checks import flag
from edgeattn.layers.encoder_call import FURTHEST
from edgeattn.layers.feed_forward import FeedForward
from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.layers.norm import LayerNorm, RMSNorm
from edgeattn.layers.state import Stored
from edgeattn.masks import NO_WINDOW, window_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from edgeattn.executors.stages import Stage
    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.encoder import TransformerEncoder
    from edgeattn.ops import Ops, Sequences, T
    from edgeattn.types import Flag, Floats, Window


class TransformerEncoderLayer(Stored):
    """Self-attention and a feed-forward network, each with a residual and a norm.

    x = norm1(x + attention(x)), then norm2(x + feed_forward(x)); with `norm_first` x + attention(norm1(x)), then
    x + feed_forward(norm2(x)).

    Parameters
    ----------
    attention : MultiHeadAttention, or one in int8
        Of E features in and out.
    feed_forward : FeedForward, or one in static int8
    norm1, norm2 : LayerNorm or RMSNorm, optional
    norm_first : bool
        Whether norms stand before attention and network, not behind the sums.
    window_size : (int, int)
        (left, right): a token sees this many before and after it, whatever the call says; -1 = unbounded.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, attention: MultiHeadAttention, feed_forward: FeedForward,
                 norm1: LayerNorm | RMSNorm | None = None, norm2: LayerNorm | RMSNorm | None = None, *,
                 norm_first: Flag = False, window_size: Window = NO_WINDOW):
        # int8 ones stand above in edgeattn.quantized; a static layer as such takes codes and has no forward of rows
        int8 = getattr(attention, "scheme", None) in ("static", "dynamic") and hasattr(attention, "forward")
        if not isinstance(attention, MultiHeadAttention) and not int8:
            raise TypeError(f"attention must be an edgeattn.MultiHeadAttention, or one in int8 as quant.quantize of an "
                            f"encoder makes it, got {type(attention).__name__}")
        if not isinstance(feed_forward, FeedForward) and getattr(feed_forward, "scheme", None) != "static":
            raise TypeError(f"feed_forward must be an edgeattn.FeedForward, got {type(feed_forward).__name__}")
        self.embed_dim = attention.embed_dim
        for name, norm in (("norm1", norm1), ("norm2", norm2)):
            if norm is not None and not isinstance(norm, (LayerNorm, RMSNorm)):
                raise TypeError(f"{name} must be an edgeattn.LayerNorm, RMSNorm or None, got {type(norm).__name__}")
            if norm is not None and norm.inputs != self.embed_dim:
                raise ValueError(f"{name} must be of E = {self.embed_dim} features, attention's, got {norm}")
        for name, sizes in (("attention", (attention.kdim, attention.vdim, attention.output_dim)),
                            ("feed_forward", (feed_forward.inputs, feed_forward.outputs))):
            if set(sizes) != {self.embed_dim}:
                raise ValueError(f"{name} must have E = {self.embed_dim} features in and out, got {sizes}")
        self.attention, self.feed_forward, self.norm1, self.norm2 = attention, feed_forward, norm1, norm2
        self.norm_first, self.window_size = flag("norm_first", norm_first), window_bounds(window_size, FURTHEST)

    def forward(self, ops: Ops[T], x: T, sequences: Sequences, name: str = "") -> T:
        """Rows of tokens (tokens, E) -> (tokens, E)."""
        return self.feed(ops, self.attend(ops, x, sequences, name), name)

    def attend(self, ops: Ops[T], x: T, sequences: Sequences, name: str = "") -> T:
        """The first half of `forward`: attention with its residual and norm."""
        read = self._norm(ops, x, "norm1", name) if self.norm_first else x
        y = self.attention.forward(ops, read, read, read, sequences, name + "attention.")
        x = ops.add(x, y, name + "sum1")
        return x if self.norm_first else self._norm(ops, x, "norm1", name)

    def feed(self, ops: Ops[T], x: T, name: str = "") -> T:
        """The second half: the feed-forward network with its residual and norm."""
        read = self._norm(ops, x, "norm2", name) if self.norm_first else x
        x = ops.add(x, self.feed_forward.forward(ops, read, name + "feed_forward."), name + "sum2")
        return x if self.norm_first else self._norm(ops, x, "norm2", name)

    def _norm(self, ops: Ops[T], x: T, part: str, name: str) -> T:
        norm: LayerNorm | RMSNorm | None = getattr(self, part)
        return x if norm is None else norm.forward(ops, x, name + part)

    def __call__(self, x: ArrayLike | Sequence[ArrayLike], *, lengths: ArrayLike | None = None,
                 key_padding_mask: ArrayLike | None = None, attn_mask: ArrayLike | None = None, is_causal: Flag = False,
                 window_size: Window = NO_WINDOW, kv_cache: KVCache | None = None, out: Floats | None = None
                 ) -> Floats | list[Floats]:
        """The layer of `x`.

        Parameters
        ----------
        kv_cache : KVCache, optional
            One that `KVCache.for_layer(layer.attention, ...)` makes.
        x : (B, L, E) or (L, E) array, or list of (L_i, E) arrays
        lengths, key_padding_mask, attn_mask : array, optional
        is_causal : bool
        window_size : (int, int)
        out : array of the shape and dtype of `x`, optional
            As for a call of a `TransformerEncoder`, which says what each means: True = attend.

        Returns
        -------
        array of the shape and dtype of `x`, or list of such arrays

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        return self._alone(
            x, lengths=lengths, key_padding_mask=key_padding_mask, attn_mask=attn_mask, is_causal=is_causal,
            window_size=window_size, kv_cache=None if kv_cache is None else [kv_cache], out=out)

    @functools.cached_property
    def _alone(self) -> TransformerEncoder:
        """An encoder of this layer, which keeps what its calls have in common.

        Of another object of the same parts: in a cycle with its encoder a layer would stay in memory for the collector.
        """
        from edgeattn.layers.encoder import TransformerEncoder  # which is made of layers

        same = object.__new__(type(self))
        vars(same).update(vars(self))
        return TransformerEncoder([same])

    @functools.cached_property
    def stages(self) -> list[Stage] | None:
        """The compiled stages that are this layer; None where it must be computed operation by operation."""
        from edgeattn.executors.fused import stages_of

        return stages_of(self)

    def __repr__(self) -> str:
        return (f"TransformerEncoderLayer({self.attention}, {self.feed_forward}, {self.norm1}, {self.norm2}, "
                f"norm_first={self.norm_first}, window_size={self.window_size})")
