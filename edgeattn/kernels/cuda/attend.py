"""Attention between arrays on the device: which kernels, grids and numbers. Nothing here waits for the GPU.

Letters as in attention.py. Every `like` is an array whose kind scratch memory is of, and `stream` a handle, an int.
"""
import functools

import numpy as np

from edgeattn.kernels.cuda import attention as fa
from edgeattn.kernels.cuda import attention_parameters as ap
from edgeattn.kernels.cuda import key_mean
from edgeattn.kernels.cuda import merge as fm
from edgeattn.kernels.cuda.arrays import View
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.host import (
    address,
    bits,
    ceil_div,
    check_heads,
    check_reach,
    is_wide,
    part,
    round_up,
    scratch,
    spread,
    store_rows,
)
from edgeattn.kernels.cuda.launch_graph import launch
from edgeattn.kernels.cuda.softmax import LOG2_E
from edgeattn.kernels.cuda.tiles import KEYS


@functools.lru_cache(maxsize=256)
def _attention_plan(precision, q, k, v, out, numbers, processors):
    """(rows, chunk, grid, splits) and what the shapes alone say of P_..., for (shape, strides) pairs."""
    (B, H, L, D), (_, Hkv, S, _), Dv = q[0], k[0], v[0][3]
    rows, longest = 32 if L <= 32 else 64, max(D, Dv)
    # a piece as long as shared memory has room for: pieces of values cost the scores anew
    chunk = 32 if longest <= 32 else 128 if longest > 64 and precision == "float16" else 64
    if precision == "int8":
        rows = chunk = 64
    value_chunks = max(ceil_div(Dv, chunk), 1)
    blocks = ceil_div(L, rows) * B * H * value_chunks
    splits = min(ceil_div(2 * processors, blocks), ceil_div(S, 4 * KEYS))
    splits = splits if blocks < processors and splits > 1 else 1
    p = [0] * ap.P_COUNT
    for slot, value in ((ap.P_H, H), (ap.P_GROUP, H // Hkv), (ap.P_L, L), (ap.P_S, S), (ap.P_D, D), (ap.P_DV, Dv),
                        (ap.P_CHUNKS, max(ceil_div(D, chunk), 1)), (ap.P_VALUE_CHUNKS, value_chunks),
                        (ap.P_SPLITS, splits)):
        p[slot] = value
    for slot, (_, strides) in ((ap.P_Q_B, q), (ap.P_K_B, k), (ap.P_V_B, v), (ap.P_OUT_B, out)):
        p[slot:slot + 3] = strides[:3]
    for slot, value in numbers:
        p[slot] = value
    return rows, chunk, (ceil_div(L, rows), B * H, value_chunks * splits), splits, tuple(p)


def _factor(scale, softcap):
    """Of products before the hyperbolic tangent of a softcap, or else of scores to base 2."""
    return scale / softcap if softcap else scale * LOG2_E


class _Launch:
    """Attention of queries to one set of keys, ready to go: which kernel, grid and numbers; arguments as `attend`'s."""

    def __init__(self, q, k, v, out, scale, softcap=0.0, *, left=-1, right=-1, offset=0, at_end=False, lengths=None,
                 keep=None, bias=None, slopes=None, key_scale=None, value_scale=None, q_scale=None,
                 precision="float32"):
        for name, array in (("query", q), ("key", k), ("value", v), ("out", out), ("attn_mask", keep),
                            ("attn_mask", bias)):
            if array is not None:
                check_reach(name, array)
        B, H, L, _ = out.shape
        check_heads(B, H)
        numbers = [(ap.P_LEFT, left), (ap.P_RIGHT, right), (ap.P_OFFSET, offset), (ap.P_AT_END, int(at_end)),
                   (ap.P_FACTOR, bits(_factor(scale, softcap))),
                   (ap.P_SOFTCAP, bits(softcap * LOG2_E) if softcap else 0),
                   (ap.P_LSE_B, 4 * H * L), (ap.P_LSE_H, 4 * L)]
        if lengths is not None:
            numbers.append((ap.P_LENGTHS_64, int(lengths.dtype.itemsize == 8)))
        for slot, mask in ((ap.P_KEEP_B, keep), (ap.P_BIAS_B, bias)):
            if mask is not None:
                numbers += enumerate(spread(mask), slot)
        if slopes is not None and slopes.ndim == 2:
            numbers.append((ap.P_SLOPES_B, slopes.strides[0]))
        if key_scale is not None:
            numbers += enumerate(key_scale.strides, ap.P_SCALE_B)
        if precision == "int8":
            numbers.append((ap.P_V_S, v.strides[3]))
        rows, chunk, self.grid, self.splits, self.numbers = _attention_plan(
            precision, *((x.shape, x.strides) for x in (q, k, v, out)), tuple(numbers), driver().processors())
        formats, read = (q.dtype.name, k.dtype.name), (q, k, v, out)
        if precision == "int8":
            formats, read = ("codes", "codes"), (out,)
        self.kind = precision, rows, chunk, *formats, is_wide(read)
        self.keys, self.out_format = k.shape[2], out.dtype.name
        self.addresses = [q.pointer, k.pointer, v.pointer, out.pointer, 0, address(keep), address(bias),
                          address(lengths), address(slopes), address(key_scale), address(value_scale),
                          address(q_scale)]

    def alone(self, lse, stream):
        """All of it, the log-sum to `lse` where it is not None."""
        self.addresses[ap.A_LSE] = address(lse)
        launch(fa.attention(*self.kind, self.out_format), self.grid, self.addresses, self.numbers, stream)

    def part(self, at, part, sums, stream):
        """To the places `at` and on of part (parts, B, H, L, Dv) and sums (2, parts, B, H, L)."""
        a, p = list(self.addresses), list(self.numbers)
        a[ap.A_OUT], a[ap.A_LSE] = part.pointer + at * part.strides[0], sums.pointer + at * sums.strides[1]
        p[ap.P_OUT_SPLIT], p[ap.P_OUT_B], p[ap.P_OUT_H], p[ap.P_OUT_L] = part.strides[:4]
        p[ap.P_SUMS], p[ap.P_LSE_SPLIT] = sums.strides[:2]
        launch(fa.attention(*self.kind, "float32"), self.grid, a, p, stream)

    def probabilities(self, weights, sums, stream, none=False):
        """To weights (B, H, L, keys), by the sums (2, parts, B, H, L) of all parts; zeros where `none` is seen."""
        a, p = list(self.addresses), list(self.numbers)
        keys, blocks = weights.shape[3], self.grid[0] * self.grid[1]
        splits = max(min(ceil_div(keys, KEYS), ceil_div(2 * driver().processors(), max(blocks, 1))), 1)
        a[ap.A_OUT], a[ap.A_LSE] = weights.pointer, sums.pointer
        p[ap.P_OUT_B], p[ap.P_OUT_H], p[ap.P_OUT_L] = weights.strides[:3]
        p[ap.P_SUMS], p[ap.P_LSE_SPLIT] = sums.strides[:2]
        p[ap.P_S], p[ap.P_PARTS], p[ap.P_SPLITS], p[ap.P_VALUE_CHUNKS] = keys, sums.shape[1], splits, 1
        if none:
            a[ap.A_KEEP:ap.A_SLOPES + 1] = [0] * 4
            p[ap.P_LEFT], p[ap.P_RIGHT], p[ap.P_OFFSET], p[ap.P_AT_END] = -1, 0, -ap.FAR, 0
        launch(fa.attention(*self.kind, weights.dtype.name, True), (*self.grid[:2], splits), a, p, stream)


def attend(q, k, v, out, scale, softcap=0.0, *, lse=None, weights=None, column=0, added=None, precision="float32",
           stream=0, like=None, **masks):
    """softmax(q k^T scale + masks) v, the two products in `precision`, a key of attention.FORMS, with float32 sums.

    Parameters
    ----------
    q, k, v, out : View
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, L, Dv), neighbours along the last axis. float32 or
        float16, all the same; keys and values may be int8 with `key_scale` and `value_scale` (B, Hkv, S) float32 of
        equal strides. For precision "int8" what `attend_int8` makes of them, with `q_scale` (B, H, L).
    left, right, offset : int
        As edgeattn.masks.Mask, `offset` of all entries; with `at_end` the length minus L instead.
    lengths : View of (B,) int32 or int64, optional
    keep, bias : View (B or 1, H or 1, L or 1, S or 1) of bool, of float32, optional
    slopes : View (H,) or (B, H) of float32, optional
    lse : View (B, H, L) of float32, C-contiguous, optional
    weights : View (B, H, L, columns) of float32 or float16, neighbours along the last axis, optional
        Takes the probabilities: of the keys from `column` on, of added keys at the end, and zeros elsewhere. Not for
        precision "int8".
    added : (View, View), optional
        Keys (B, Hkv, n, D) and values (B, Hkv, n, Dv) that every query sees after the others.
    """
    sets = [_Launch(q, k, v, out, scale, softcap, precision=precision, **masks)]
    if added is not None:
        sets.append(_Launch(q, *added, out, scale, softcap, precision=precision))
    parts = sum(one.splits for one in sets)
    if parts == 1 and weights is None:
        sets[0].alone(lse, stream)
        return
    # each part to a place of its own, in float32, then all together
    B, H, L, Dv = out.shape
    parted = scratch((parts, B, H, L, Dv), np.float32, like)
    sums = scratch((2, parts, B, H, L), np.float32, like)  # largest scores, then sums
    check_reach("scratch", parted)
    at = 0
    for one in sets:
        one.part(at, parted, sums, stream)
        at += one.splits
    m = [B * H * L, Dv, parts, L, H, *out.strides[:3]]
    launch(fm.merge(out.dtype.name), (ceil_div(B * H * L * max(Dv, 1), fm.THREADS), 1, 1),
           [parted.pointer, sums.pointer, sums.pointer + sums.strides[0], out.pointer, address(lse)], m,
           stream)
    if weights is not None:
        check_reach("the probabilities", weights)
        behind, end = column + sets[0].keys, weights.shape[3] - sum(one.keys for one in sets[1:])
        for one, at in zip(sets, (column, end), strict=False):
            one.probabilities(part(weights, 3, at, at + one.keys), sums, stream)
        for begin, stop in ((0, column), (behind, end)):
            if begin < stop:
                sets[0].probabilities(part(weights, 3, begin, stop), sums, stream, none=True)


def _smooth(k, masks, H, L, stream, like):
    """(B, Hkv, D) float32, what `attend_int8` adds to keys (B, Hkv, S, D) float32."""
    B, Hkv, S, D = k.shape
    minus = scratch((B, Hkv, D), np.float32, like)
    keep, bias, lengths = (masks.get(name) for name in ("keep", "bias", "lengths"))
    p = [Hkv, H, L, S, D, masks["left"], masks["right"], masks["offset"], int(masks["at_end"]),
         int(lengths is not None and lengths.dtype.itemsize == 8), *k.strides[:3], *spread(keep), *spread(bias)]
    launch(key_mean.smooth(), (B * Hkv, 1, 1),
           [k.pointer, minus.pointer, address(keep), address(bias), address(lengths)], p, stream)
    return minus


def attend_int8(q, k, v, out, scale, softcap=0.0, stream=0, like=None, **masks):
    """`attend` on float32 arrays with int8 products: every query, key and value by its own range, as on the CPU."""
    (B, H, L, D), (Hkv, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    for name, array in (("key", k), ("attn_mask", masks.get("keep")), ("attn_mask", masks.get("bias"))):
        if array is not None:
            check_reach(name, array)
    check_heads(B, H)
    D_up, Dv_up, S_up = round_up(D, 64), round_up(Dv, 64), round_up(S, 16)
    # the hyperbolic tangent sees what all scores share
    minus = None if softcap else _smooth(k, masks, H, L, stream, like)
    made = []
    for x, heads, n, options in ((q, H, L, dict(factor=_factor(scale, softcap))), (k, Hkv, S, dict(minus=minus))):
        codes, scales = scratch((B, heads, n, D_up), np.int8, like), scratch((B, heads, n), np.float32, like)
        store_rows(x, codes, scales, stream, up=D_up, rule="dynamic", **options)
        made.append((codes, scales))
    (q, q_scale), (k, key_scale) = made
    stored, value_scale = scratch((B, Hkv, Dv_up, S_up), np.int8, like), scratch((B, Hkv, S), np.float32, like)
    b, h, row, one = stored.strides
    turned = View(stored.owner, stored.pointer, v.shape, (b, h, one, row), stored.dtype)
    store_rows(v, turned, value_scale, stream, rule="dynamic")
    attend(q, k, turned, out, scale, softcap, key_scale=key_scale, value_scale=value_scale, q_scale=q_scale,
           precision="int8", stream=stream, like=like, **masks)
