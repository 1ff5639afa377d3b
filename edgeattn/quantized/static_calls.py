"""How a static layer calls its kernel: with whole sequences, and with what a cache holds."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.kernels.cpu.layer_int8 import StaticLayer
from edgeattn.kernels.cpu.records import KernelMask
from edgeattn.layers.call import check_cache
from edgeattn.masks import check_mask_shapes, resolve_mask
from edgeattn.quantized.score_ops import fit_mask
from edgeattn.quantized.static_parameters import StaticParameters

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Pieces
    from edgeattn.masks import Mask
    from edgeattn.ops import Sequences
    from edgeattn.types import Bools, CausalAlignment, Codes, Flag, MaskShapes, Window


class StaticCalls(StaticParameters):
    """A ``StaticMultiHeadAttention`` behind its checks: codes in, codes out."""

    @property
    def fused_kernel(self) -> StaticLayer:
        """The kernel that is the whole layer: (q, k, v, out, keep, band, lut_index, score_luts, cached)."""
        return self._kernel

    def _kernel_for(self, query: Codes, key: Codes, value: Codes, masks: MaskShapes) -> Any:
        """The kernel for inputs and masks of these shapes."""
        return self._kernel.prepare(query, key, value, masks, self.lut_index, self.score_luts)

    def _run_first(self, signature: tuple[Any, ...], query: Codes, key: Codes, value: Codes, attn_mask: Bools | None,
                   key_padding_mask: Any, is_causal: Flag, causal_alignment: CausalAlignment | None,
                   window_size: Window) -> Codes | None:
        """The result of a call with a signature; the next is prepared. None where masks are not read as they are."""
        *lead, L, _ = query.shape
        scores = *lead, self.num_heads, L, key.shape[-2]
        mask = resolve_mask(scores, is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size)
        check_mask_shapes(scores, attn_mask, key_padding_mask)
        if self.lut_index is not None:
            fit_mask(self.lut_index, mask.shape)
        q, k, v = query, key, value
        if not lead:
            q = query[None]
            k = q if key is query else key[None]
            v = k if value is key else value[None]
        prepared = self.prepared_calls.learn(
            signature, functools.partial(self._kernel_for, q, k, v), scores, (*lead, L, self.output_dim), mask,
            attn_mask, key_padding_mask)
        return None if prepared is None else prepared.run(query, key, value, None, attn_mask, key_padding_mask)

    def _run_fused(self, query: Codes, key: Codes, value: Codes, mask: Mask, result: Codes) -> None:
        given = mask.for_kernels()
        keep, band = given.keep, given.band
        lut_index = self.lut_index
        if lut_index is not None:
            fit_mask(lut_index, mask.shape)
        if mask.shape[3] == 0:  # one key that is not there
            key, value = (np.zeros((len(x), 1, x.shape[-1]), np.int8) for x in (key, value))
            keep, band, lut_index = np.zeros((1, 1, 1, 1), np.bool_), None, None
        self._kernel(query, key, value, result, keep, band, lut_index, self.score_luts)

    def attend_codes(self, x: Codes, mask: Mask, result: Codes, sequences: Sequences) -> None:
        """Attention of x (B, L, E) to itself under `mask`, and to what the cache of `sequences` holds, to `result`."""
        if not result.size:
            return
        if sequences.cache is None:
            self._run_fused(x, x, x, mask, result)
        else:
            self.check_codes_of(sequences.cache)
            self._run_cached(x, x, x, mask, sequences.cache, list(sequences.pieces), result)

    def attend_on(self, x: Codes, mask: Mask, result: Codes) -> Callable[[], object]:
        """A function that does the same without a cache, see `PreparedCall.on`."""
        given = mask.for_kernels()
        if self.lut_index is not None:
            fit_mask(self.lut_index, mask.shape)
        run: Callable[[], object] = self._kernel.prepare(
            x, x, x, KernelMask(given.keep, band=given.band).shapes, self.lut_index, self.score_luts).on(
                x, x, x, result, given.keep)
        return run

    # -- with a cache --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def cache_scales(self) -> tuple[float, float]:
        """The scales of keys and values, for ``KVCache.for_layer``."""
        kept = [self.product_tensors[name] for name in ("key", "value")]
        for name, tensor in zip(("key", "value"), kept, strict=True):
            if tensor.zero_point != 0:
                raise ValueError(f"layer must have keys and values without a zero point for a cache; got "
                                 f"{tensor.zero_point} of its {name}: quantize the float layer with quant.quantize, or "
                                 "give each call the whole sequence")
        return float(kept[0].scale), float(kept[1].scale)

    def _check_cache(self, cache: KVCache, causal_alignment: CausalAlignment | None) -> None:
        check_cache(self, cache, causal_alignment)
        self.check_codes_of(cache)

    def check_codes_of(self, cache: KVCache) -> None:
        """Raise unless `cache`, of this layer's sizes, holds codes of this layer's scales."""
        if cache.scales != self.cache_scales:
            raise ValueError(f"kv_cache must have this layer's scales {self.cache_scales}, got {cache.scales}; make it "
                             "with KVCache.for_layer(layer, ...)")
        if self.lut_index is not None:
            raise ValueError("kv_cache needs a layer without a mask of its own, which is for one length; pass masks to "
                             "each call")

    def take_step(self, x: Codes, cache: KVCache) -> Codes:
        """Attention without masks of one token per batch entry, (B, 1, E) or (1, E), and all before it: (B, 1, Eo)."""
        out, before = np.empty((cache.batch, 1, self.output_dim), np.int8), cache.length
        try:
            cache.take_slots(1)
            self._kernel.step(cache.plans, x, out, cache.key_slots, cache.value_slots, cache.visible_range(),
                              self.score_luts)
        except BaseException:
            cache.restore(before)
            raise
        return out

    def _run_cached(self, query: Codes, key: Codes, value: Codes, mask: Mask, cache: KVCache, pieces: Pieces,
                    result: Codes) -> None:
        for rows, tokens in pieces:
            xk = np.ascontiguousarray(key[:, slice(*tokens)])
            xv = xk if value is key else np.ascontiguousarray(value[:, slice(*tokens)])
            xq = xk if query is key and rows == tokens else np.ascontiguousarray(query[:, slice(*rows)])
            cache.take_slots(tokens[1] - tokens[0])
            given = mask.part(rows, (cache.start, cache.length)).for_kernels()
            keep, band = given.keep, given.band
            held = cache.length - cache.start
            if held == 0:  # one key that is not there
                held, keep, band = 1, np.zeros((1, 1, 1, 1), np.bool_), None
            some = np.empty((*xq.shape[:2], self.output_dim), np.int8)
            self._kernel(xq, xk, xv, some, keep, band, None, self.score_luts,
                         (cache.key_slots, cache.value_slots, cache.first_slot, held))
            result[:, slice(*rows)] = some
