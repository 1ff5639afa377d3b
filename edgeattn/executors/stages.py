"""The compiled stages of encoder layers, each (rows, sequences) -> rows.

Beside the call a stage may have `step`, of one token of each sequence through a cache, where `can_step` says so;
`onto`, in place of the rows; and `on`, the same bound to arrays, for a `Chain`. Those of static layers stand in
`edgeattn.quantized`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.compiled import CompiledOps

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from edgeattn.kernels.cpu import encoder_float32
    from edgeattn.kv_cache import KVCache
    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s

    Stage: TypeAlias = Callable[[Float32s, Sequences], Float32s]


class AttentionStage:
    """norm(x + attention of x), or x + attention of norm(x), each norm there or not: (rows, sequences) -> rows."""

    def __init__(self, layer: Any, before: encoder_float32.Norm | None, after: encoder_float32.Norm | None):
        self.layer, self.before, self.after = layer, before, after

    def __call__(self, x: Float32s, sequences: Sequences) -> Float32s:  # noqa: D102
        read = x if self.before is None else self.before(x, None, np.empty_like(x))
        known = sequences.calls.get(self)
        if known is None:
            y = self._attend(read, sequences)
        else:
            (call, arrays), y = known, np.empty_like(x)
            call(read, read, read, y, *arrays)
        return np.add(y, x, out=y) if self.after is None else self.after(y, x, y)

    def _attend(self, x: Float32s, sequences: Sequences) -> Float32s:
        layer, kernel = self.layer, self.layer.fused_kernel
        if kernel is None or sequences.cache is not None or sequences.softcap:
            result: Float32s = np.ascontiguousarray(layer.forward(CompiledOps(), x, x, x, sequences))
            return result
        y, row = np.empty_like(x), 0
        for mask, given in zip(sequences.masks, sequences.for_kernels(), strict=True):
            batch, _, length, _ = mask.shape
            rows = slice(row, row + batch * length)
            row = rows.stop
            tokens = x[rows].reshape(batch, length, x.shape[1])
            biased = layer.biased(mask)
            given = given if biased is mask else biased.for_kernels()
            call = kernel.prepare(tokens, tokens, tokens, given.shapes, layer.first_position(mask))
            arrays = given.arrays if any(array is not None for array in given.arrays) else ()
            call(tokens, tokens, tokens, y[rows], *arrays)
            if len(sequences.masks) == 1:
                sequences.calls[self] = call, arrays
        return y

    @functools.cached_property
    def can_step(self) -> bool:
        """Whether there is a `step`."""
        return self.layer.fusible and self.layer.position_bias is None

    def step(self, x: Float32s, cache: KVCache) -> Float32s:
        """A call for one token of each sequence, after those that the cache holds, for which it has room."""
        read = x if self.before is None else self.before(x, None, np.empty_like(x))
        y: Float32s = self.layer.take_step(read, cache)
        return np.add(y, x, out=y) if self.after is None else self.after(y, x, y)

    def on(self, x: Float32s, read: Float32s, y: Float32s, sequences: Sequences) -> list[Callable[[], object]] | None:
        """The steps that make the result of x in x itself, bound to these arrays; None where there are none to bind.

        read, y : of the shape of x, written on the way.  sequences : of a call before, which found their kernel
        """
        known = sequences.calls.get(self)
        if known is None:
            return None
        call, arrays = known
        source = x if self.before is None else read
        return [*([] if self.before is None else [self.before.on(x, None, read)]),
                call.on(source, source, source, y, *arrays),
                functools.partial(np.add, y, x, out=x) if self.after is None else self.after.on(y, x, x)]


class RowStage:
    """What a kernel makes of rows, with x as the residual or without one: (rows, sequences) -> rows."""

    def __init__(self, kernel: encoder_float32.RowKernel, *, residual: bool):
        self.kernel, self.residual = kernel, residual

    def __call__(self, x: Float32s, sequences: Sequences) -> Float32s:  # noqa: D102
        result: Float32s = self.kernel(x, x if self.residual else None, np.empty_like(x))
        return result

    can_step = True

    def step(self, x: Float32s, _cache: KVCache) -> Float32s:
        """As `AttentionStage.step`."""
        result: Float32s = self.kernel(x, x if self.residual else None, np.empty_like(x))
        return result

    def onto(self, x: Float32s) -> Float32s:
        """The same in place of x."""
        result: Float32s = self.kernel(x, x if self.residual else None, x)
        return result

    def on(self, x: Float32s, *_: object) -> list[Callable[[], object]] | None:
        """As `AttentionStage.on`."""
        return [self.kernel.on(x, x if self.residual else None, x)]
