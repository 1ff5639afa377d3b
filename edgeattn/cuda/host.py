"""From arrays on the device to launches: which kernel, which grid, which numbers. Nothing here waits for the GPU.

Letters as in attention.py. Every `like` is an array whose kind scratch memory is of, and `stream` a handle, an int.
"""
import dataclasses
import functools

import numpy as np

from edgeattn.cuda import attention as fa
from edgeattn.cuda import elements as el
from edgeattn.cuda import int8 as i8
from edgeattn.cuda import linear as fl
from edgeattn.cuda import masks as mk
from edgeattn.cuda import merge as fm
from edgeattn.cuda import quantize as qz
from edgeattn.cuda import smooth as sm
from edgeattn.cuda.arrays import View, kind, view
from edgeattn.cuda.driver import driver
from edgeattn.cuda.rules import planes

LOG2_E = 1.4426950408889634
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
    return view("scratch", kind(like).empty(tuple(shape), dtype, like))


def _owned(array):
    """A View of our own memory with the elements of a NumPy array."""
    return view("weights", driver().array(array))


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
    return dataclasses.replace(x, pointer=x.pointer + begin * x.strides[axis], shape=shape)


def repeated(x, batch):
    """x (1, ...) as (batch, ...), the same memory again and again."""
    return dataclasses.replace(x, shape=(batch, *x.shape[1:]), strides=(0, *x.strides[1:]))


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
    splits = min(ceil_div(2 * processors, blocks), ceil_div(S, 4 * fa.KEYS))
    splits = splits if blocks < processors and splits > 1 else 1
    p = [0] * fa.P_COUNT
    for slot, value in ((fa.P_H, H), (fa.P_GROUP, H // Hkv), (fa.P_L, L), (fa.P_S, S), (fa.P_D, D), (fa.P_DV, Dv),
                        (fa.P_CHUNKS, max(ceil_div(D, chunk), 1)), (fa.P_VALUE_CHUNKS, value_chunks),
                        (fa.P_SPLITS, splits)):
        p[slot] = value
    for slot, (_, strides) in ((fa.P_Q_B, q), (fa.P_K_B, k), (fa.P_V_B, v), (fa.P_OUT_B, out)):
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
        numbers = [(fa.P_LEFT, left), (fa.P_RIGHT, right), (fa.P_OFFSET, offset), (fa.P_AT_END, int(at_end)),
                   (fa.P_FACTOR, bits(_factor(scale, softcap))),
                   (fa.P_SOFTCAP, bits(softcap * LOG2_E) if softcap else 0),
                   (fa.P_LSE_B, 4 * H * L), (fa.P_LSE_H, 4 * L)]
        if lengths is not None:
            numbers.append((fa.P_LENGTHS_64, int(lengths.dtype.itemsize == 8)))
        for slot, mask in ((fa.P_KEEP_B, keep), (fa.P_BIAS_B, bias)):
            if mask is not None:
                numbers += enumerate(spread(mask), slot)
        if slopes is not None and slopes.ndim == 2:
            numbers.append((fa.P_SLOPES_B, slopes.strides[0]))
        if key_scale is not None:
            numbers += enumerate(key_scale.strides, fa.P_SCALE_B)
        if precision == "int8":
            numbers.append((fa.P_V_S, v.strides[3]))
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
        """All of it, the log-sum to `lse` where it is not None; (kernel, grid, numbers)."""
        self.addresses[fa.A_LSE] = address(lse)
        kernel = fa.attention(*self.kind, self.out_format)
        driver().launch(kernel, self.grid, self.addresses, self.numbers, stream)
        return kernel, self.grid, self.numbers

    def part(self, at, part, sums, stream):
        """To the places `at` and on of part (parts, B, H, L, Dv) and sums (2, parts, B, H, L)."""
        a, p = list(self.addresses), list(self.numbers)
        a[fa.A_OUT], a[fa.A_LSE] = part.pointer + at * part.strides[0], sums.pointer + at * sums.strides[1]
        p[fa.P_OUT_SPLIT], p[fa.P_OUT_B], p[fa.P_OUT_H], p[fa.P_OUT_L] = part.strides[:4]
        p[fa.P_SUMS], p[fa.P_LSE_SPLIT] = sums.strides[:2]
        driver().launch(fa.attention(*self.kind, "float32"), self.grid, a, p, stream)

    def probabilities(self, weights, sums, stream, none=False):
        """To weights (B, H, L, keys), by the sums (2, parts, B, H, L) of all parts; zeros where `none` is seen."""
        a, p = list(self.addresses), list(self.numbers)
        keys, blocks = weights.shape[3], self.grid[0] * self.grid[1]
        splits = max(min(ceil_div(keys, fa.KEYS), ceil_div(2 * driver().processors(), max(blocks, 1))), 1)
        a[fa.A_OUT], a[fa.A_LSE] = weights.pointer, sums.pointer
        p[fa.P_OUT_B], p[fa.P_OUT_H], p[fa.P_OUT_L] = weights.strides[:3]
        p[fa.P_SUMS], p[fa.P_LSE_SPLIT] = sums.strides[:2]
        p[fa.P_S], p[fa.P_PARTS], p[fa.P_SPLITS], p[fa.P_VALUE_CHUNKS] = keys, sums.shape[1], splits, 1
        if none:
            a[fa.A_KEEP:fa.A_SLOPES + 1] = [0] * 4
            p[fa.P_LEFT], p[fa.P_RIGHT], p[fa.P_OFFSET], p[fa.P_AT_END] = -1, 0, -fa.FAR, 0
        driver().launch(fa.attention(*self.kind, weights.dtype.name, True), (*self.grid[:2], splits), a, p, stream)


def attend(q, k, v, out, scale, softcap=0.0, *, lse=None, weights=None, column=0, added=None, precision="float32",
           stream=0, like=None, **masks):
    """softmax(q k^T scale + masks) v, the two products in `precision`, a key of tiles.FORMS, with float32 sums.

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

    Returns
    -------
    (kernel, grid, numbers) or None
        What the one launch was; the same again, with other addresses, is the same for other arrays of these layouts.
    """
    sets = [_Launch(q, k, v, out, scale, softcap, precision=precision, **masks)]
    if added is not None:
        sets.append(_Launch(q, *added, out, scale, softcap, precision=precision))
    parts = sum(one.splits for one in sets)
    if parts == 1 and weights is None:
        return sets[0].alone(lse, stream)
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
    driver().launch(fm.merge(out.dtype.name), (ceil_div(B * H * L * max(Dv, 1), fm.THREADS), 1, 1),
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
    return None


def mean_of_heads(x, out, stream):
    """out (B, L, S) = the mean of x (B, H, L, S) over the heads; float32 in C order."""
    B, H, L, S = x.shape
    check_reach("the probabilities", x)
    driver().launch(el.mean_of_heads(), (ceil_div(B * L * S, el.THREADS), 1, 1), [x.pointer, out.pointer],
                    [B * L * S, H, L * S, bits(H)], stream)


def both(keep, padding, stream, like):
    """`keep` (B or 1, H or 1, L or 1, S or 1) and `padding` (B, S), Views, as one of (B, H or 1, L or 1, S)."""
    shape = (padding.shape[0], *keep.shape[1:3], padding.shape[1])
    out = scratch(shape, np.bool_, like)
    for array in (keep, padding, out):
        check_reach("attn_mask and key_padding_mask together", array)
    if out.size:
        p = [out.size, *shape[1:], *spread(keep), *padding.strides]
        driver().launch(mk.both(), (ceil_div(out.size, mk.THREADS), 1, 1), [keep.pointer, padding.pointer, out.pointer],
                        p, stream)
    return out


def _smooth(k, masks, H, L, stream, like):
    """(B, Hkv, D) float32, what `attend_int8` adds to keys (B, Hkv, S, D) float32."""
    B, Hkv, S, D = k.shape
    minus = scratch((B, Hkv, D), np.float32, like)
    keep, bias, lengths = (masks.get(name) for name in ("keep", "bias", "lengths"))
    p = [Hkv, H, L, S, D, masks["left"], masks["right"], masks["offset"], int(masks["at_end"]),
         int(lengths is not None and lengths.dtype.itemsize == 8), *k.strides[:3], *spread(keep), *spread(bias)]
    driver().launch(sm.smooth(), (B * Hkv, 1, 1),
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


# -- projections -----------------------------------------------------------------------------------------------------


class Projection:
    """Where one projection reads and writes: rows of x (B, T, E) to out (B, heads, T, size)."""

    def __init__(self, x, weight, bias, out, size):
        self.x, self.weight, self.bias, self.out, self.size = x, weight, bias, out, size


def project(projections, stream):
    """Up to three float32 projections in one launch; x (B, T, E) C-contiguous, out (B, heads, T, size)."""
    a, p = [0] * fl.A_COUNT, [0] * fl.P_COUNT
    for z, one in enumerate(projections):
        B, T, E = one.x.shape
        features = one.weight.shape[0]
        check_reach("query" if z == 0 else "key" if z == 1 else "value", one.x)
        check_reach("a projection", one.out)
        a[fl.A_X + z], a[fl.A_W + z], a[fl.A_BIAS + z], a[fl.A_OUT + z] = (
            one.x.pointer, one.weight.pointer, address(one.bias), one.out.pointer)
        for slot, value in zip(range(0, fl.P_COUNT, 3), (B * T, T, 4 * E, E, features, one.size, *one.out.strides[:3]),
                               strict=True):
            p[slot + z] = value
    wide = is_wide([one.x for one in projections] + [one.weight for one in projections])
    grid = (max(ceil_div(one.x.shape[0] * one.x.shape[1], fl.TILE) for one in projections),
            max(ceil_div(one.weight.shape[0], fl.TILE) for one in projections), len(projections))
    driver().launch(fl.linear(wide), grid, a, p, stream)


def as_heads(x, heads):
    """(B, T, heads * size) as (B, heads, T, size), in place."""
    B, T, width = x.shape
    size = width // heads
    b, t, e = x.strides
    return View(x.owner, x.pointer, (B, heads, T, size), (b, size * e, t, e), x.dtype)


class _Layer:
    """What float and dynamic layers share: attention between their projections, to which a subclass has the weights.

    A subclass has `heads`, `kv_heads`, `scale`, `value_size`, `precision`, `gated` and `projects_out`, and the methods
    projected(inputs, stream, like, places=None), gate_of(xq, to, stream, like) and finish(context, out, stream, like).
    """

    added = None

    def add(self, arrays):
        """Keys and values (1, Hkv, n, size) float32 that every query sees, or None."""
        self.added = None if arrays is None else tuple(map(_owned, arrays))

    def _completed(self, attend_to, xq, out, stream, like):
        """What attend_to(context, options) leaves in context (B, H, L, Dv), through gate and output projection."""
        B, L, _ = xq.shape
        width = self.heads * self.value_size
        context = scratch((B, L, width), np.float32, like) if self.projects_out else out
        added = None if self.added is None else tuple(repeated(x, B) for x in self.added)
        attend_to(as_heads(context, self.heads), dict(added=added, stream=stream, like=like))
        if self.gated:
            opened = scratch((B, L, width), np.float32, like)
            self.gate_of(xq, opened, stream, like)
            driver().launch(el.gate(), (ceil_div(opened.size, el.THREADS), 1, 1), [opened.pointer, context.pointer],
                            [opened.size, L, width, *context.strides[:2]], stream)
        if self.projects_out:
            self.finish(context, out, stream, like)

    def through_cache(self, xq, xk, xv, out, cache, pieces, stream, like, weights=None, **masks):
        """As a call, keys and values going into a cache, all of which the queries attend to, in `pieces` of them."""
        tokens = xk.shape[1]
        in_place = cache.dtype == "float32" and len(pieces) == 1
        places = cache.places(tokens, stream, like) if in_place else None
        q, k, v = self.projected((xq, xk, xv), stream, like, places)

        def attend_to(context, options):
            for rows, taken in pieces:
                cache.took(taken[1] - taken[0], None if in_place else [part(x, 2, *taken) for x in (k, v)], stream,
                           like)
                cache.see(part(q, 2, *rows), part(context, 2, *rows), self.scale, rows, precision=self.precision,
                          weights=None if weights is None else part(weights, 2, *rows), **options, **masks)

        self._completed(attend_to, xq, out, stream, like)


class FloatLayer(_Layer):
    """A float32 multi-head layer on the device; weights as edgeattn.layers.MultiHeadAttention holds them.

    `precision` is that of the two products of attention, as `attend` takes it; projections are float32.
    """

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale, precision="float32"):
        self.heads, self.kv_heads, self.scale, self.precision = num_heads, num_kv_heads, scale, precision
        self.weights = {name: _owned(weight) for name, weight in weights.items() if weight is not None}
        self.biases = {name: _owned(bias) for name, bias in biases.items() if bias is not None}
        self.value_size = weights["v"].shape[0] // num_kv_heads
        self.gated, self.projects_out = "gate" in self.weights, "out" in self.weights

    def projected(self, inputs, stream, like, places=None):
        """q (B, H, L, D), k, v (B, Hkv, S, ...) of inputs (B, T, E); k and v at `places` where given."""
        made, projections = [], []
        for name, x, heads in zip(("q", "k", "v"), inputs, (self.heads, self.kv_heads, self.kv_heads), strict=True):
            weight = self.weights[name]
            size = weight.shape[0] // heads
            out = places[len(made) - 1] if places and made else scratch(
                (x.shape[0], heads, x.shape[1], size), np.float32, like)
            made.append(out)
            projections.append(Projection(x, weight, self.biases.get(name), out, size))
        project(projections, stream)
        return made

    def _rows(self, name, x, out, stream):
        weight = self.weights[name]
        project([Projection(x, weight, self.biases.get(name), as_heads(out, 1), weight.shape[0])], stream)

    def gate_of(self, xq, to, stream, like):
        """to (B, L, H Dv) = xq gate_weight^T + gate_bias."""
        self._rows("gate", xq, to, stream)

    def finish(self, context, out, stream, like):
        """out (B, L, Eo) = context (B, L, H Dv) out_weight^T + out_bias."""
        self._rows("out", context, out, stream)

    def __call__(self, xq, xk, xv, out, stream, like, **masks):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), float32 in C order; masks as `attend`."""
        q, k, v = self.projected((xq, xk, xv), stream, like)
        self._completed(lambda context, options: attend(q, k, v, context, self.scale, precision=self.precision,
                                                        **options, **masks), xq, out, stream, like)


# -- int8 ------------------------------------------------------------------------------------------------------------


def padded_weight(weight, heads, tile=i8.TILE):
    """(heads * size, depth) int8 as (heads * size up, depth up), zeros added; sizes up to multiples of 64."""
    features, depth = weight.shape
    size = features // heads
    wide = np.zeros((heads, round_up(size, tile), round_up(depth, tile)), np.int8)
    wide[:, :size, :depth] = weight.reshape(heads, size, depth)
    return wide.reshape(-1, wide.shape[2])


def padded_list(values, heads, tile=i8.TILE):
    """(..., heads * size) as (..., heads * size up), zeros added."""
    values = np.asarray(values)
    size = values.shape[-1] // heads
    wide = np.zeros((*values.shape[:-1], heads, round_up(size, tile)), values.dtype)
    wide[..., :size] = values.reshape(*values.shape[:-1], heads, size)
    return wide.reshape(*values.shape[:-1], -1)


class Int8Linear:
    """One int8 projection's parameters on the device.

    Parameters
    ----------
    weight : int8 (heads * size, depth)
    heads : int
    bias : int32 with the input's zero point in it, or float32
    first, second : (heads * size,) 32-bit values, or None
        What the rule reads; the weights' float32 scales for a dynamic layer.
    zero_point : int
    """

    def __init__(self, weight, heads, bias, first, second=None, zero_point=0):
        self.heads, self.size, self.zero_point = heads, weight.shape[0] // heads, zero_point
        self.weight = _owned(padded_weight(weight, heads))
        self.bias, self.first = _owned(padded_list(bias, heads)), _owned(padded_list(first, heads))
        self.second = None if second is None else _owned(padded_list(second, heads))


def project_int8(rule, items, stream):
    """Up to three int8 projections in one launch.

    Parameters
    ----------
    rule : str or None
        None: dynamic, float32 out.
    items : list of (Int8Linear, x, x_scale, out, strides, stored)
        x View (B, T, depth) int8 of contiguous rows; out View; strides in bytes of out along (B, heads, T, size); how
        many of each head's numbers out has room for.
    """
    a, p = [0] * i8.L_ADDRESSES, [0] * i8.L_NUMBERS
    wide, grid = True, [1, 1, len(items)]
    for z, (linear, x, x_scale, out, strides, stored) in enumerate(items):
        B, T, depth = x.shape
        row = x.strides[1]
        wide = wide and x.pointer % 16 == 0 and row % 16 == 0 and depth % 16 == 0
        check_reach("an input", x)
        check_reach("a projection", out)
        features = linear.weight.shape[0]
        for slot, value in ((i8.L_X, x), (i8.L_W, linear.weight), (i8.L_BIAS, linear.bias), (i8.L_FIRST, linear.first),
                            (i8.L_SECOND, linear.second), (i8.L_OUT, out), (i8.L_X_SCALE, x_scale)):
            a[slot + z] = address(value)
        for slot, value in zip(range(0, i8.L_NUMBERS, 3), (
                B * T, T, row, depth, linear.weight.shape[1], features, linear.size, features // linear.heads,
                stored, linear.zero_point, *strides), strict=True):
            p[slot + z] = value
        grid[0], grid[1] = max(grid[0], ceil_div(B * T, i8.TILE)), max(grid[1], features // i8.TILE)
    driver().launch(i8.linear_int8(rule, wide), tuple(grid), a, p, stream)


class StaticLayer:
    """A static int8 multi-head layer on the device, equal to the CPU's bit for bit.

    Parameters are those of edgeattn.cpu.layer_int8.StaticLayer, and `softmax`, the name of the softmax rule.
    """

    def __init__(self, num_heads, linears, scores, context, zero_points, project_rule, score_rule, context_rule,
                 softmax_table, softmax):
        self.heads, self.zero_points, self.rule = num_heads, zero_points, project_rule
        self.rules = score_rule, context_rule, softmax
        self.linears = {}
        for name, (weight, real, bias) in linears.items():
            source = "context" if name == "output" else name + "_input"
            sums = weight.astype(np.int64).sum(1)
            bias = np.zeros(len(weight), np.int64) if bias is None else bias.astype(np.int64)
            bias = (bias - zero_points[source] * sums + 2**31) % 2**32 - 2**31  # wraps as the accumulator does
            first, second = planes(project_rule, real)
            self.linears[name] = Int8Linear(weight, 1 if name == "output" else num_heads, bias.astype(np.int32), first,
                                            second, zero_points[name])
        self.score = [int(x) for x in planes(score_rule, [scores])[:, 0]]
        self.context = [int(x) for x in planes(context_rule, [context])[:, 0]]
        self.table = _owned(np.ascontiguousarray(softmax_table).view(np.int32))
        self.output_dim = linears.get("output", linears["value"])[0].shape[0]

    def _attend(self, q, k, v, context, stream, *, band=None, keep=None, classes=None, tables=None, weights=None,
                column=0):
        """context (B, L, H Dv) of q (B, H, L, D up), k (B, H, S, D up) and v (B, H, S, Dv), which may lie turned.

        weights : View (B, H, L, columns) int8 in rows of that many bytes, or None; the keys' begin at `column`.
        """
        (B, H, L, D_up), S = q.shape, k.shape[2]
        check_heads(B, H)
        D, Dv = self.linears["query"].size, self.linears["value"].size
        Dv_up = round_up(Dv, i8.TILE)
        low, high = (-fa.FAR, fa.FAR) if band is None else band
        zero = self.zero_points
        for name, array in (("a mask", keep), ("a mask", classes), ("the probabilities", weights), ("a cache", k)):
            if array is not None:
                check_reach(name, array)
        p = [H, L, S, D, Dv, D_up, Dv_up, q.strides[1] // D_up, k.strides[1] // D_up, zero["query"], zero["key"],
             zero["value"], zero["scores"], zero["context"], *self.score, *self.context, low, high,
             *context.strides[:2], *spread(keep), *spread(classes),
             *((0, 0) if weights is None else weights.strides[1:3]), column]
        a = [q.pointer, k.pointer, v.pointer, context.pointer, self.table.pointer, address(keep), address(classes),
             address(tables), address(weights)]
        driver().launch(i8.static_attention(*self.rules, v.strides[2] != 1, weights is not None),
                        (ceil_div(L, i8.TILE), B * H, Dv_up // i8.TILE), a, p, stream)

    def _rows(self, x, up, like):
        """Where a projection of x leaves its codes (B, H, T, up): of memory for whole tiles of tokens."""
        B, T, _ = x.shape
        return part(scratch((B, self.heads, round_up(T, i8.TILE), up), np.int8, like), 2, 0, T)

    def _finished(self, attend_to, B, L, out, stream, like):
        """out (B, L, Eo) of what attend_to(context) leaves in context (B, L, H Dv)."""
        width = self.heads * self.linears["value"].size
        if "output" not in self.linears:
            attend_to(out)
            return
        context = part(scratch((B, L, round_up(width, 16)), np.int8, like), 2, 0, width)
        attend_to(context)
        strides = (out.strides[0], 0, out.strides[1], 1)
        project_int8(self.rule, [(self.linears["output"], context, None, out, strides, self.output_dim)], stream)

    def __call__(self, xq, xk, xv, out, stream, like, **options):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all int8 and C-contiguous.

        band : (low, high) or None; keep : View of bool, classes : View of uint8, (B or 1, H or 1, L or 1, S or 1), or
        None; tables : View (n, 256) of int8, or None; weights : as `_attend`'s.
        """
        (B, L, _), S, H = xq.shape, xk.shape[1], self.heads
        D_up, Dv = round_up(self.linears["query"].size, i8.TILE), self.linears["value"].size
        S_rows = round_up(S, i8.TILE)
        q, k = self._rows(xq, D_up, like), self._rows(xk, D_up, like)
        v = scratch((B, H, round_up(Dv, i8.TILE), S_rows), np.int8, like)
        v = View(v.owner, v.pointer, (B, H, S, Dv), (*v.strides[:2], 1, S_rows), v.dtype)
        project_int8(self.rule, [(self.linears[name], x, None, to, to.strides, to.shape[3]) for name, x, to in (
            ("query", xq, q), ("key", xk, k), ("value", xv, v))], stream)
        self._finished(lambda context: self._attend(q, k, v, context, stream, **options), B, L, out, stream, like)

    def through_cache(self, xq, xk, xv, out, cache, pieces, stream, like, *, offset, left, right, keep=None,
                      tables=None, weights=None):
        """As a call, the codes of keys and values going into a cache, whose keys queries attend to, in `pieces`."""
        D_up, Dv_up = (round_up(self.linears[name].size, i8.TILE) for name in ("query", "value"))
        B, L, _ = xq.shape
        in_place = len(pieces) == 1
        q = self._rows(xq, D_up, like)
        k, v = cache.places(xk.shape[1], stream, like) if in_place else (
            self._rows(xk, up, like) for up in (D_up, Dv_up))
        project_int8(self.rule, [(self.linears[name], x, None, to, to.strides, up) for name, x, to, up in (
            ("query", xq, q, D_up), ("key", xk, k, D_up), ("value", xv, v, Dv_up))], stream)

        def attend_to(context):
            for rows, taken in pieces:
                cache.took(taken[1] - taken[0], None if in_place else [part(x, 2, *taken) for x in (k, v)], stream,
                           like)
                held = cache.start, cache.length
                masks = masks_part(dict(offset=offset, keep=keep), rows, held)
                keys, values = cache.held_slots()[:2]
                self._attend(part(q, 2, *rows), keys, values, part(context, 1, *rows), stream, keep=masks["keep"],
                             band=band_of(left, right, masks["offset"]), tables=tables, column=cache.start,
                             weights=None if weights is None else part(weights, 2, *rows))

        self._finished(attend_to, B, L, out, stream, like)


def band_of(left, right, offset):
    """(low, high): query i sees key j when i + low <= j <= i + high; left and right as edgeattn.masks.Mask."""
    return (offset - left if left >= 0 else -fa.FAR, offset + right if right >= 0 else fa.FAR)


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
    driver().launch(qz.store_rows(rule if out.dtype == np.int8 else None), (ceil_div(B * H * T, qz.ROWS), 1, 1),
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


class DynamicLayer(_Layer):
    """A dynamic int8 multi-head layer on the device: float32 in and out, every product of the tensor cores' int8.

    Every token is quantized by its own range, over a head where it is a query, key or value. Attention itself is
    float32 through a cache, which has the keys and values, with added keys, and where probabilities are wanted.

    Parameters
    ----------
    weights : dict
        "query", "key", "value" and optionally "output" and "gate" -> (int8 codes (out, in), float32 scale (out,)).
    biases : dict
        By the same names float32 (out,), where there is one.
    """

    precision = "float32"

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale):
        self.heads, self.kv_heads, self.scale = num_heads, num_kv_heads, scale
        count = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads, "output": 1, "gate": 1}
        self.linears = {}
        for name, (codes, factors) in weights.items():
            bias = biases.get(name)
            bias = np.zeros(len(codes), np.float32) if bias is None else bias
            self.linears[name] = Int8Linear(codes, count[name], bias, factors)
        self.value_size = self.linears["value"].size
        self.gated, self.projects_out = "gate" in weights, "output" in weights

    def _codes(self, x, stream, like):
        """x (B, T, E) float32 as int8 codes in rows of whole 16 bytes, and a scale per token."""
        B, T, E = x.shape
        codes = scratch((B, T, round_up(E, 16)), np.int8, like)
        scale = scratch((1, 1, B * T), np.float32, like)
        rows, wide = x.reshape(1, 1, B * T, E), codes.reshape(1, 1, B * T, codes.shape[2])
        store_rows(rows, wide, scale, stream, up=codes.shape[2])
        return codes, scale

    def projected(self, inputs, stream, like, places=None):
        """q (B, H, L, D), k, v (B, Hkv, S, ...) float32 of inputs (B, T, E); k and v at `places` where given."""
        quantized, items, made = {}, [], []
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            if (x.pointer, x.shape) not in quantized:
                quantized[x.pointer, x.shape] = self._codes(x, stream, like)
            codes, scale = quantized[x.pointer, x.shape]
            linear = self.linears[name]
            y = places[len(made) - 1] if places and made else scratch(
                (x.shape[0], linear.heads, x.shape[1], linear.size), np.float32, like)
            items.append((linear, codes, scale, y, y.strides, linear.size))
            made.append(y)
        project_int8(None, items, stream)
        return made

    def _rows(self, name, x, out, stream, like):
        codes, scale = self._codes(x, stream, like)
        linear, strides = self.linears[name], (out.strides[0], 0, out.strides[1], 4)
        project_int8(None, [(linear, codes, scale, out, strides, linear.size)], stream)

    def gate_of(self, xq, to, stream, like):
        """to (B, L, H Dv) = xq gate_weight^T + gate_bias."""
        self._rows("gate", xq, to, stream, like)

    def finish(self, context, out, stream, like):
        """out (B, L, Eo) = context (B, L, H Dv) out_weight^T + out_bias."""
        self._rows("output", context, out, stream, like)

    def __call__(self, xq, xk, xv, out, stream, like, weights=None, **masks):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), float32 in C order; masks as `attend`."""
        q, k, v = self.projected((xq, xk, xv), stream, like)

        def attend_to(context, options):
            if weights is None and self.added is None and k.shape[2]:  # no key has no range
                del options["added"]
                attend_int8(q, k, v, context, self.scale, **options, **masks)
            else:
                attend(q, k, v, context, self.scale, weights=weights, **options, **masks)

        self._completed(attend_to, xq, out, stream, like)
