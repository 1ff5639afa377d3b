"""Self-attention of an encoder in static int8: rows of float32 around a static layer, which takes codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.kernels.cpu import encoder_int8
from edgeattn.layers import attention as layers_attention
from edgeattn.ops import Sequences
from edgeattn.quantized.static import StaticMultiHeadAttention
from edgeattn.quantized.static_rows import StaticRows, checked_more, codes_of_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

    from typing_extensions import Self

    from edgeattn.executors.stages import Stage
    from edgeattn.kv_cache import KVCache
    from edgeattn.masks import Mask
    from edgeattn.ops import Ops, T
    from edgeattn.types import Bools, Float32s


class StaticSelfAttention(StaticRows):
    """A static layer that attends to its own input, as an encoder's layer has it: float32 rows in and out.

    Parameters
    ----------
    attention : StaticMultiHeadAttention
        Of one input, with E + n features.
    more_inputs : sequence of int
        The n columns of its codes behind E, of features that reach beyond the range of the codes: each holds what the
        range leaves of the column it names.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, attention: StaticMultiHeadAttention, *, more_inputs: Iterable[int] = ()):
        if not isinstance(attention, StaticMultiHeadAttention) or attention.sources != (0, 0, 0):
            raise TypeError(f"attention must be a static layer with one input; got {attention}")
        more_inputs = tuple(more_inputs)
        self.attention, self.arithmetic = attention, attention.arithmetic
        self.embed_dim = self.kdim = self.vdim = attention.embed_dim - len(more_inputs)
        self.more_inputs = checked_more("more_inputs", more_inputs, self.embed_dim)
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim, self.value_dim, self.output_dim = attention.head_dim, attention.value_dim, attention.output_dim

    def __repr__(self) -> str:
        return (f"StaticSelfAttention(num_heads={self.num_heads}, embed_dim={self.embed_dim}, "
                f"arithmetic={self.arithmetic!r}, more_inputs={len(self.more_inputs)})")

    @property
    def cache_scales(self) -> tuple[float, float]:
        """The scales of keys and values, for ``KVCache.for_layer``."""
        return self.attention.cache_scales

    def forward(self, ops: Ops[T], query: T, _key: T, _value: T, sequences: Sequences, name: str = "") -> T:
        """Rows of tokens (tokens, E) -> (tokens, Eo); keys and values are of the same."""
        return ops.static(query, self, sequences, name)

    def rows_of(self, codes_ops: Any, x: Float32s, sequences: Sequences) -> Float32s:
        """float32 (tokens, E) -> (tokens, Eo); codes_ops(layer, part): what computes its codes."""
        of, result = self.attention, np.empty((len(x), self.output_dim), np.float32)
        codes = codes_of_rows(x, of.tensors["query_input"], self.more_inputs)
        for i, (rows, mask) in enumerate(_groups(sequences)):
            ops = codes_ops(of, "" if len(sequences.masks) == 1 else f"{i}.")
            some = codes[rows].reshape(mask.shape[0], mask.shape[2], codes.shape[1])
            made = layers_attention.forward(ops, of, some, some, some, Sequences(
                [mask], cache=sequences.cache, pieces=sequences.pieces))
            result[rows] = of.dequantize_output(made).reshape(-1, self.output_dim)
        result[_reached(np.isnan(x).any(axis=1), sequences)] = np.nan
        return result

    def stage(self, first: Any, last: Any, *, residual: bool = True) -> Stage:
        """(rows, sequences) -> rows: norm(x + attention of x), or with `first` of norm(x); norms as `Ends` has them."""
        of = self.attention
        source, result = of.tensors["query_input"], of.tensors["output" if "output" in of.linears else "context"]
        ends = encoder_int8.Ends(
            self.embed_dim, self.output_dim, (source.scale, source.zero_point), (result.scale, result.zero_point),
            more_inputs=self.more_inputs, norm=first or last, norm_first=first is not None)

        return StaticAttentionStage(self, ends, residual)

    def to_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(config, tensors): all that ``from_state`` needs to build an equal layer."""
        config, tensors = self.attention.to_state()
        return {**config, "more_inputs": list(self.more_inputs)}, tensors

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Self:
        """The layer of which ``to_state`` gave these."""
        return cls(StaticMultiHeadAttention.from_state(config, tensors), more_inputs=config["more_inputs"])


class StaticAttentionStage:
    """Rows to codes, attention upon them, codes to rows: (rows, sequences) -> rows."""

    def __init__(self, layer: StaticSelfAttention, ends: encoder_int8.Ends, residual: bool):
        self.layer, self.ends, self.residual = layer, ends, residual

    def __call__(self, x: Float32s, sequences: Sequences) -> Float32s:  # noqa: D102
        codes, nan = self.ends.to_codes(x)
        out = np.empty((len(x), self.layer.output_dim), np.int8)
        for part, mask in _groups(sequences):
            shape = mask.shape[0], mask.shape[2], -1
            self.layer.attention.attend_codes(codes[part].reshape(shape), mask, out[part].reshape(shape), sequences)
        _spread(nan, sequences)
        rows: Float32s = self.ends.to_rows(out, nan, x if self.residual else None)
        return rows

    can_step = True

    def step(self, x: Float32s, cache: KVCache) -> Float32s:
        """As `AttentionStage.step`."""
        codes, nan = self.ends.to_codes(x)
        _refuse_nan(nan)
        out = self.layer.attention.take_step(codes, cache)
        rows: Float32s = self.ends.to_rows(out.reshape(len(x), -1), nan, x if self.residual else None)
        return rows

    def on(self, x: Float32s, _read: Float32s, _y: Float32s, sequences: Sequences) -> list[Callable[[], object]] | None:
        """As `AttentionStage.on`."""
        (_, mask), *others = _groups(sequences)
        if others or sequences.cache is not None:
            return None
        batch, _, length, _ = mask.shape
        nan = np.empty(batch * length, np.float32)
        codes, out = (np.empty((batch * length, features), np.int8) for features in (
            self.layer.attention.embed_dim, self.layer.output_dim))
        to_codes, _ = self.ends.on(x, codes, nan, None, x)
        _, to_rows = self.ends.on(x, out, nan, x if self.residual else None, x)
        shape = batch, length, -1
        return [to_codes, self.layer.attention.attend_on(codes.reshape(shape), mask, out.reshape(shape)),
                lambda: _spread(nan, sequences), to_rows]


def _groups(sequences: Sequences) -> Iterator[tuple[slice, Mask]]:
    """The rows of each group of equally long sequences, and its mask."""
    row = 0
    for mask in sequences.masks:
        if mask.bias is not None:
            raise ValueError("attn_mask must be bool (True = attend) for static int8, whose scores are codes; a model "
                             "of scheme='dynamic' adds float masks")
        rows = slice(row, row + mask.shape[0] * mask.shape[2])
        row = rows.stop
        yield rows, mask


def _spread(nan: Float32s, sequences: Sequences) -> None:
    """NaN for the rows that see one, in nan, which is 0 for those that hold none."""
    if np.count_nonzero(nan):  # quicker than any()
        nan[_reached(np.isnan(nan), sequences)] = np.nan


def _refuse_nan(nan: Bools | Float32s) -> None:
    if np.count_nonzero(nan):
        raise ValueError("x must hold no NaN with kv_cache: codes cannot keep it")


def _reached(nan: Bools, sequences: Sequences) -> Bools:
    """Which rows see one of those that hold NaN."""
    found = nan.copy()
    for rows, mask in _groups(sequences):
        batch, _, queries, keys = mask.shape
        if sequences.cache is not None:
            _refuse_nan(nan)
            continue
        permitted = mask.permitted()
        seen = np.ones((batch, 1, queries, keys), bool) if permitted is None else permitted
        reached = (seen & nan[rows].reshape(batch, 1, 1, keys)).any(axis=(1, 3))
        found[rows] |= np.broadcast_to(reached, (batch, queries)).reshape(-1)
    return found
