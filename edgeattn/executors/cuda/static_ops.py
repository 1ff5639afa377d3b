"""The operations of a static int8 layer on a GPU: codes of int8 where others have float32."""

from __future__ import annotations

import numpy as np

from edgeattn.executors.cuda.ops import DeviceOps, Map


class StaticOps(DeviceOps):
    """The operations upon codes, equal to the CPU's bit for bit.

    Parameters
    ----------
    kernels : edgeattn.kernels.cuda.static_layer.StaticLayer
    stream, like
        As for `DeviceOps`.
    score_luts, lut_index : View or None
        As `StaticLayer.attend` takes them.
    """

    dtype = np.int8

    def __init__(self, kernels, stream, like, *, score_luts=None, lut_index=None):
        super().__init__(stream, like)
        self._kernels, self._score_luts, self._lut_index = kernels, score_luts, lut_index

    def _room(self, shape):
        """Of rows that begin at whole 16 bytes, as products read them."""
        from edgeattn.kernels.cuda.host import part, round_up

        wide = super()._room((*shape[:-1], round_up(shape[-1], 16)))
        return part(wide, wide.ndim - 1, 0, shape[-1])

    def linear(self, x, linear, name):
        """The codes of x weight^T + bias; `name` is that of the map in the layer."""
        from edgeattn.kernels.cuda.layers import as_heads, batched

        def write(made, out):
            self._kernels.project([(name, batched(self.rows(x)), as_heads(batched(out), 1))], self.stream)

        return Map(x, name, self._kernels.linears[name].outputs, write)

    def _attend(self, inputs, linears, layer, sequences, group, out):
        kernels, cache, stream, like = self._kernels, sequences.cache, self.stream, self.like
        of_q, of_k, of_v = linears
        xq, xk, xv = inputs
        q = kernels.rows(xq, of_q, like)
        in_place = cache is not None and len(sequences.pieces) == 1
        if in_place:
            k, v = (kernels.whole(x, name) for x, name in zip(cache.places(xk.shape[1], stream, like), (of_k, of_v),
                                                              strict=True))
        else:
            k = kernels.rows(xk, of_k, like)
            v = (kernels.turned_rows if cache is None else kernels.rows)(xv, of_v, like)
        kernels.project([(of_q, xq, q), (of_k, xk, k), (of_v, xv, v)], stream)
        if cache is None:
            kernels.attend(q, k, v, out, stream, lut_index=self._lut_index, weights=sequences.weights,
                           score_luts=self._score_luts, **_read(group.masks))
        else:
            self._attend_cached(sequences, group, q, None if in_place else (k, v), out)

    def _attend_cached(self, sequences, group, q, rows, context):
        """Codes of keys and values into the cache, all of which the queries attend to, piece by piece."""
        from edgeattn.kernels.cuda.host import masks_part, part

        cache, weights = sequences.cache, sequences.weights
        for at, taken in sequences.pieces:
            cache.append_device(taken[1] - taken[0], None if rows is None else [part(x, 2, *taken) for x in rows],
                                self.stream, self.like)
            masks = masks_part(group.masks, at, (cache.start, cache.length))
            keys, values = cache.held_slots()[:2]
            self._kernels.attend(
                part(q, 2, *at), keys, values, part(context, 1, *at), self.stream, column=cache.start,
                score_luts=self._score_luts, weights=None if weights is None else part(weights, 2, *at), **_read(masks))


def _read(masks):
    """What `StaticLayer.attend` takes of masks."""
    from edgeattn.kernels.cuda.static_layer import band_of

    return {"band": band_of(masks["left"], masks["right"], masks["offset"]), "keep": masks.get("keep")}
