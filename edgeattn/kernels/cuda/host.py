"""Attention between arrays on the device: which kernels, grids and numbers. Nothing here waits for the GPU.

Letters as in attention.py. Every `like` is an array whose kind scratch memory is of, and `stream` a handle, an int.
"""
import functools

import numpy as np

from edgeattn.kernels.cuda import attention as fa
from edgeattn.kernels.cuda import attention_parameters as ap
from edgeattn.kernels.cuda import elements as el
from edgeattn.kernels.cuda import key_mean
from edgeattn.kernels.cuda import masks as mk
from edgeattn.kernels.cuda import merge as fm
from edgeattn.kernels.cuda import quantize as qz
from edgeattn.kernels.cuda.array_provider import kind
from edgeattn.kernels.cuda.arrays import View, view
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.launch_graph import capturing, launch
from edgeattn.kernels.cuda.softmax import LOG2_E
from edgeattn.kernels.cuda.tiles import KEYS

SMALL = 2**31
MOST_HEADS = 65535  # the second axis of a grid


def bits(x):
    """The bits of a float32 as an int."""
    return int(np.float32(x).view(np.int32))


def ceil_div(n, by):
    """n / by, rounded up."""
    return -(-n // by)


def round_up(n, to):
    """n, rounded up to a multiple of `to`."""
    return -(-n // to) * to


def scratch(shape, dtype, like):
    """A View of new memory of the kind of `like`, not filled."""
    made = view("scratch", kind(like).empty(tuple(shape), dtype, like))
    record = capturing()
    return made if record is None else record.place(made)


def spread(mask):
    """Strides in bytes of a (B or 1, H or 1, L or 1, S) mask along (B, H, L, S); zeros where None."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True))


def check_reach(name, array):
    """Raise unless offsets within an array are int32, as kernels count them."""
    low, high = array.span()
    if array.size and high - low >= SMALL:
        raise ValueError(f"{name} must reach over less than 2 GiB on CUDA, where offsets are int32, got shape "
                         f"{array.shape} and strides {array.strides} bytes; call with parts of the batch")


def check_heads(batch, heads):
    """Raise unless there is a block row for every head of every batch entry."""
    if batch * heads > MOST_HEADS:
        raise ValueError(f"query must have at most {MOST_HEADS} batch entries times heads on CUDA, got {batch} times "
                         f"{heads}; call with parts of the batch")


def address(array):
    """The address of a View, 0 for None."""
    return 0 if array is None else array.pointer


def part(x, axis, begin, end):
    """x[begin:end] along an axis of a View."""
    shape = (*x.shape[:axis], end - begin, *x.shape[axis + 1:])
    return View(x.owner, x.pointer + begin * x.strides[axis], shape, x.strides, x.dtype, x.read_only)


def masks_part(masks, rows, keys):
    """The masks of queries rows[0] to rows[1] - 1 and keys keys[0] to keys[1] - 1."""
    found = masks | {"offset": masks["offset"] + rows[0] - keys[0]}
    for name in ("keep", "bias"):
        for axis, (begin, end) in ((2, rows), (3, keys)):
            if found.get(name) is not None and found[name].shape[axis] > 1:
                found[name] = part(found[name], axis, begin, end)
    return found


# -- float32 attention -----------------------------------------------------------------------------------------------


def is_wide(arrays):
    """Whether four numbers at a time can be read and written in all arrays: sizes, addresses and strides allow it."""
    return all(a.shape[-1] % 4 == 0 and a.pointer % (4 * a.dtype.itemsize) == 0
               and all(s % (4 * a.dtype.itemsize) == 0 for s in a.strides[:-1]) for a in arrays)


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


def mean_of_heads(x, out, stream):
    """out (B, L, S) = the mean of x (B, H, L, S) over the heads; float32 in C order."""
    B, H, L, S = x.shape
    check_reach("the probabilities", x)
    launch(el.mean_of_heads(), (ceil_div(B * L * S, el.THREADS), 1, 1), [x.pointer, out.pointer],
                    [B * L * S, H, L * S, bits(H)], stream)


def open_gate(gate, x, stream):
    """x (B, T, width) *= sigmoid(gate), gate as many numbers in C order; float32."""
    size, (_, T, width) = gate.size, x.shape
    launch(el.gate(), (ceil_div(size, el.THREADS), 1, 1), [gate.pointer, x.pointer], [size, T, width, *x.strides[:2]],
           stream)


def both(keep, padding, stream, like):
    """`keep` (B or 1, H or 1, L or 1, S or 1) and `padding` (B, S), Views, as one of (B, H or 1, L or 1, S)."""
    shape = (padding.shape[0], *keep.shape[1:3], padding.shape[1])
    out = scratch(shape, np.bool_, like)
    for array in (keep, padding, out):
        check_reach("attn_mask and key_padding_mask together", array)
    if out.size:
        p = [out.size, *shape[1:], *spread(keep), *padding.strides]
        launch(mk.both(), (ceil_div(out.size, mk.THREADS), 1, 1), [keep.pointer, padding.pointer, out.pointer],
                        p, stream)
    return out


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


# -- rows -------------------------------------------------------------------------------------------------------------


def store_rows(x, out, scale, stream, up=0, out_strides=None, rule="cache", factor=1.0, minus=None):
    """x (B, H, T, D) float32 to out, as it is or, where out is int8, as codes; rows in one piece.

    scale : View (B, H, T) that takes theirs, None for the rule "fixed"; up : numbers of a row that are written, zeros
    behind D; out_strides : bytes along (B, H, T, D), out's unless given; rule, factor, minus : as the kernel's.
    """
    B, H, T, D = x.shape
    check_reach("a cache", out)
    p = [B * H * T, H, T, D, max(up, D), bits(factor), *x.strides[:3], *(out_strides or out.strides),
         *((0, 0, 0) if scale is None else scale.strides)]
    launch(qz.store_rows(rule if out.dtype == np.int8 else None), (ceil_div(B * H * T, qz.ROWS), 1, 1),
                    [x.pointer, out.pointer, address(scale), address(minus)], p, stream)


def words(rows):
    """(B, H, T) or (B, H, T, ...), rows of whole words that fill their stride, as (B, H, T, words) float32."""
    return View(rows.owner, rows.pointer, (*rows.shape[:3], rows.strides[2] // 4), (*rows.strides[:3], 4),
                np.dtype(np.float32))


def to_front(rows, begin, count, stream, like):
    """Move `count` rows of (B, H, capacity, ...) from `begin` on to the front."""
    rows = words(rows)
    check_reach("a cache", rows)
    kept = part(rows, 2, begin, begin + count)
    if begin < count:  # not onto what is still to be read
        aside = scratch(kept.shape, np.float32, like)
        store_rows(kept, aside, None, stream)
        kept = aside
    store_rows(kept, part(rows, 2, 0, count), None, stream)
