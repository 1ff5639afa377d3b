"""From arrays on the device to launches: which kernel, which grid, which numbers. Nothing here waits for the GPU.

Letters as in attention.py. Every `like` is an array whose kind scratch memory is of, and `stream` a handle, an int.
"""
import functools

import numpy as np

from edgeattn.cuda import attention as fa
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


def attend(q, k, v, out, scale, softcap=0.0, *, left=-1, right=-1, offset=0, at_end=False, lengths=None, keep=None,
           bias=None, slopes=None, lse=None, key_scale=None, value_scale=None, q_scale=None, precision="float32",
           stream=0, like=None):
    """softmax(q k^T scale + masks) v, the two products in `precision`, a key of tiles.FORMS, with float32 sums.

    Parameters
    ----------
    q, k, v, out : View
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, L, Dv), neighbours along the last axis. float32 or
        float16, all the same; keys and values may be int8 with `key_scale` and `value_scale` (B, Hkv, S) float32 of
        equal strides. No axis is empty. For precision "int8" what `attend_int8` makes of them, with `q_scale`
        (B, H, L).
    left, right, offset : int
        As edgeattn.masks.Mask, `offset` of all entries; with `at_end` the length minus L instead.
    lengths : View of (B,) int32 or int64, optional
    keep, bias : View (B or 1, H or 1, L or 1, S or 1) of bool, of float32, optional
    slopes : View (H,) or (B, H) of float32, optional
    lse : View (B, H, L) of float32, C-contiguous, optional

    Returns
    -------
    (kernel, grid, numbers) or None
        What the one launch was; the same again, with other addresses, is the same for other arrays of these layouts.
    """
    for name, array in (("query", q), ("key", k), ("value", v), ("out", out), ("attn_mask", keep), ("attn_mask", bias)):
        if array is not None:
            check_reach(name, array)
    B, H, L, Dv = out.shape
    check_heads(B, H)
    numbers = [(fa.P_LEFT, left), (fa.P_RIGHT, right), (fa.P_OFFSET, offset), (fa.P_AT_END, int(at_end)),
               (fa.P_FACTOR, bits(_factor(scale, softcap))),
               (fa.P_SOFTCAP, bits(softcap * LOG2_E) if softcap else 0)]
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
    rows, chunk, grid, splits, p = _attention_plan(
        precision, *((x.shape, x.strides) for x in (q, k, v, out)), tuple(numbers), driver().processors())
    formats, read = (q.dtype.name, k.dtype.name), (q, k, v, out)
    if precision == "int8":
        formats, read = ("codes", "codes"), (out,)
    kernel = fa.attention(precision, rows, chunk, *formats, is_wide(read),
                          "float32" if splits > 1 else out.dtype.name)
    a = [q.pointer, k.pointer, v.pointer, out.pointer, address(lse), address(keep), address(bias), address(lengths),
         address(slopes), address(key_scale), address(value_scale), address(q_scale)]
    p = list(p)
    p[fa.P_LSE_B], p[fa.P_LSE_H] = 4 * H * L, 4 * L
    if splits == 1:
        driver().launch(kernel, grid, a, p, stream)
        return kernel, grid, tuple(p)
    # each split to a place of its own, in float32, then all together
    part = scratch((splits, B, H, L, Dv), np.float32, like)
    sums = scratch((2, splits, B, H, L), np.float32, like)  # largest scores, then sums
    check_reach("scratch", part)
    a[fa.A_OUT], a[fa.A_LSE] = part.pointer, sums.pointer
    p[fa.P_OUT_SPLIT], p[fa.P_OUT_B], p[fa.P_OUT_H], p[fa.P_OUT_L] = part.strides[:4]
    p[fa.P_SUMS], p[fa.P_LSE_SPLIT] = sums.strides[:2]
    driver().launch(kernel, grid, a, p, stream)
    m = [B * H * L, Dv, splits, L, H, *out.strides[:3]]
    driver().launch(fm.merge(out.dtype.name), (ceil_div(B * H * L * Dv, fm.THREADS), 1, 1),
                    [part.pointer, sums.pointer, sums.pointer + sums.strides[0], out.pointer, address(lse)], m, stream)
    return None


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


class FloatLayer:
    """A float32 multi-head layer on the device; weights as edgeattn.layers.MultiHeadAttention holds them.

    `precision` is that of the two products of attention, as `attend` takes it; projections are float32.
    """

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale, precision="float32"):
        self.heads, self.kv_heads, self.scale, self.precision = num_heads, num_kv_heads, scale, precision
        self.weights = {name: _owned(weight) for name, weight in weights.items() if weight is not None}
        self.biases = {name: _owned(bias) for name, bias in biases.items() if bias is not None}

    def projected(self, inputs, stream, like):
        """q (B, H, L, D), k, v (B, Hkv, S, ...) of inputs (B, T, E)."""
        made, projections = [], []
        for name, x, heads in zip(("q", "k", "v"), inputs, (self.heads, self.kv_heads, self.kv_heads), strict=True):
            weight = self.weights[name]
            size = weight.shape[0] // heads
            out = scratch((x.shape[0], heads, x.shape[1], size), np.float32, like)
            made.append(out)
            projections.append(Projection(x, weight, self.biases.get(name), out, size))
        project(projections, stream)
        return made

    def through_cache(self, xq, xk, xv, out, cache, stream, like, **masks):
        """As a call, keys and values going into a cache, all of which the queries attend to."""
        tokens = xk.shape[1]
        size, value_size = cache.head_dim, cache.value_dim
        q = scratch((xq.shape[0], self.heads, xq.shape[1], size), np.float32, like)
        places = cache.places(tokens)
        k, v = places if cache.dtype == "float32" else (
            scratch((xk.shape[0], self.kv_heads, tokens, n), np.float32, like) for n in (size, value_size))
        parts = zip(("q", "k", "v"), (xq, xk, xv), (q, k, v), (size, size, value_size), strict=True)
        project([Projection(x, self.weights[name], self.biases.get(name), to, n) for name, x, to, n in parts], stream)
        cache.took(tokens, None if cache.dtype == "float32" else (k, v), stream)
        last = "out" not in self.weights
        context = out if last else scratch((*xq.shape[:2], self.heads * value_size), np.float32, like)
        cache.see(q, as_heads(context, self.heads), self.scale, precision=self.precision, stream=stream, like=like,
                  **masks)
        if not last:
            self.finish(context, out, stream)

    def finish(self, context, out, stream):
        """out (B, L, Eo) = context (B, L, H Dv) out_weight^T + out_bias."""
        weight = self.weights["out"]
        project([Projection(context, weight, self.biases.get("out"), as_heads(out, 1), weight.shape[0])], stream)

    def __call__(self, xq, xk, xv, out, stream, like, **masks):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), float32 in C order; masks as `attend`."""
        q, k, v = self.projected((xq, xk, xv), stream, like)
        last = "out" not in self.weights
        context = out if last else scratch((*xq.shape[:2], self.heads * v.shape[3]), np.float32, like)
        attend(q, k, v, as_heads(context, self.heads), self.scale, precision=self.precision, stream=stream, like=like,
               **masks)
        if not last:
            self.finish(context, out, stream)


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
        self.kernel = i8.static_attention(score_rule, context_rule, softmax)
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

    def __call__(self, xq, xk, xv, out, stream, like, *, band=None, keep=None, classes=None, tables=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all int8 and C-contiguous.

        band : (low, high) or None; keep : View of bool, classes : View of uint8, (B or 1, H or 1, L or 1, S or 1), or
        None; tables : View (n, 256) of int8, or None.
        """
        (B, L, _), S, H = xq.shape, xk.shape[1], self.heads
        check_heads(B, H)
        D, Dv = self.linears["query"].size, self.linears["value"].size
        D_up, Dv_up = round_up(D, i8.TILE), round_up(Dv, i8.TILE)
        L_rows, S_rows = round_up(L, i8.TILE), round_up(S, i8.TILE)
        q = scratch((B, H, L_rows, D_up), np.int8, like)
        k = scratch((B, H, S_rows, D_up), np.int8, like)
        v = scratch((B, H, Dv_up, S_rows), np.int8, like)
        project_int8(self.rule, [(self.linears["query"], xq, None, q, q.strides, D_up),
                                 (self.linears["key"], xk, None, k, k.strides, D_up),
                                 (self.linears["value"], xv, None, v, (*v.strides[:2], 1, S_rows), Dv)], stream)
        last = "output" not in self.linears
        context = out if last else scratch((B, L, round_up(H * Dv, 16)), np.int8, like)
        low, high = (-fa.FAR, fa.FAR) if band is None else band
        zero = self.zero_points
        for mask in (keep, classes):
            if mask is not None:
                check_reach("a mask", mask)
        p = [H, L, S, D, Dv, D_up, Dv_up, L_rows, S_rows, zero["query"], zero["key"], zero["value"], zero["scores"],
             zero["context"], *self.score, *self.context, low, high, context.strides[1],
             *spread(keep), *spread(classes)]
        a = [q.pointer, k.pointer, v.pointer, context.pointer, self.table.pointer, address(keep), address(classes),
             address(tables)]
        driver().launch(self.kernel, (ceil_div(L, i8.TILE), B * H, Dv_up // i8.TILE), a, p, stream)
        if not last:
            inner = View(context.owner, context.pointer, (B, L, H * Dv), context.strides, context.dtype)
            strides = (out.strides[0], 0, out.strides[1], 1)
            project_int8(self.rule, [(self.linears["output"], inner, None, out, strides, self.output_dim)], stream)


# -- rows -------------------------------------------------------------------------------------------------------------


def store_rows(x, out, scale, stream, up=0, out_strides=None, rule="cache", factor=1.0, minus=None):
    """x (B, H, T, D) float32 to out, as it is or, where there is a `scale` (B, H, T), as int8 codes; rows in one piece.

    up : numbers of a row that are written, zeros behind D; out_strides : bytes along (B, H, T, D), out's unless given;
    rule, factor, minus : as the kernel's.
    """
    B, H, T, D = x.shape
    check_reach("a cache", out)
    p = [B * H * T, H, T, D, max(up, D), bits(factor), *x.strides[:3], *(out_strides or out.strides),
         *((0, 0, 0) if scale is None else scale.strides)]
    driver().launch(qz.store_rows(None if scale is None else rule), (ceil_div(B * H * T, qz.ROWS), 1, 1),
                    [x.pointer, out.pointer, address(scale), address(minus)], p, stream)


class DynamicLayer:
    """A dynamic int8 multi-head layer on the device: float32 in and out, every product of the tensor cores' int8.

    Every token is quantized by its own range, over a head where it is a query, key or value. Through a cache the keys
    and values are what it holds, and queries and probabilities float32.

    Parameters
    ----------
    weights : dict
        "query", "key", "value" and optionally "output" -> (int8 codes (out, in), float32 scale (out,)).
    biases : dict
        By the same names float32 (out,), where there is one.
    """

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale):
        self.heads, self.kv_heads, self.scale = num_heads, num_kv_heads, scale
        count = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads, "output": 1}
        self.linears = {}
        for name, (codes, factors) in weights.items():
            bias = biases.get(name)
            bias = np.zeros(len(codes), np.float32) if bias is None else bias
            self.linears[name] = Int8Linear(codes, count[name], bias, factors)

    def _codes(self, x, stream, like):
        """x (B, T, E) float32 as int8 codes in rows of whole 16 bytes, and a scale per token."""
        B, T, E = x.shape
        codes = scratch((B, T, round_up(E, 16)), np.int8, like)
        scale = scratch((1, 1, B * T), np.float32, like)
        rows, wide = x.reshape(1, 1, B * T, E), codes.reshape(1, 1, B * T, codes.shape[2])
        store_rows(rows, wide, scale, stream, up=codes.shape[2])
        return codes, scale

    def _projected(self, inputs, stream, like):
        """q (B, H, L, D), k, v (B, Hkv, S, ...) float32 of inputs (B, T, E)."""
        quantized, items, made = {}, [], []
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            if (x.pointer, x.shape) not in quantized:
                quantized[x.pointer, x.shape] = self._codes(x, stream, like)
            codes, scale = quantized[x.pointer, x.shape]
            linear = self.linears[name]
            y = scratch((x.shape[0], linear.heads, x.shape[1], linear.size), np.float32, like)
            items.append((linear, codes, scale, y, y.strides, linear.size))
            made.append(y)
        project_int8(None, items, stream)
        return made

    def _context(self, x, out, like):
        """Where attention writes its result for queries of x: `out` itself without an output projection."""
        width = self.heads * self.linears["value"].size
        return scratch((*x.shape[:2], width), np.float32, like) if "output" in self.linears else out

    def _finish(self, context, out, stream, like):
        if "output" not in self.linears:
            return
        codes, scale = self._codes(context, stream, like)
        linear, strides = self.linears["output"], (out.strides[0], 0, out.strides[1], 4)
        project_int8(None, [(linear, codes, scale, out, strides, linear.size)], stream)

    def through_cache(self, xq, xk, xv, out, cache, stream, like, **masks):
        """As a call, keys and values going into a cache, all of which the queries attend to."""
        q, k, v = self._projected((xq, xk, xv), stream, like)
        cache.took(k.shape[2], (k, v), stream)
        context = self._context(xq, out, like)
        cache.see(q, as_heads(context, self.heads), self.scale, stream=stream, like=like, **masks)
        self._finish(context, out, stream, like)

    def __call__(self, xq, xk, xv, out, stream, like, **masks):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), float32 in C order; masks as `attend`."""
        q, k, v = self._projected((xq, xk, xv), stream, like)
        context = self._context(xq, out, like)
        run = attend_int8 if k.shape[2] else attend  # no key has no range
        run(q, k, v, as_heads(context, self.heads), self.scale, stream=stream, like=like, **masks)
        self._finish(context, out, stream, like)
