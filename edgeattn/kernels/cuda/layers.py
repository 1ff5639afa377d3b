"""Layers on the device: projections around attention, from arrays to launches. Letters as in host.py."""
import dataclasses

import numpy as np

from edgeattn.kernels.cuda import attention as fa
from edgeattn.kernels.cuda import elements as el
from edgeattn.kernels.cuda import int8 as i8
from edgeattn.kernels.cuda import linear as fl
from edgeattn.kernels.cuda.arrays import View, view
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.host import (
    address,
    attend,
    attend_int8,
    ceil_div,
    check_heads,
    check_reach,
    is_wide,
    masks_part,
    part,
    round_up,
    scratch,
    spread,
    store_rows,
)
from edgeattn.kernels.cuda.launch_graph import launch
from edgeattn.kernels.cuda.rules import planes


def _owned(array):
    """A View of our own memory with the elements of a NumPy array."""
    return view("weights", driver().array(array))


def repeated(x, batch):
    """x (1, ...) as (batch, ...), the same memory again and again."""
    return dataclasses.replace(x, shape=(batch, *x.shape[1:]), strides=(0, *x.strides[1:]))


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
    launch(fl.linear(wide), grid, a, p, stream)


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
            launch(el.gate(), (ceil_div(opened.size, el.THREADS), 1, 1), [opened.pointer, context.pointer],
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
                cache.append_device(taken[1] - taken[0], None if in_place else [part(x, 2, *taken) for x in (k, v)],
                                    stream,
                           like)
                cache.attend_device(part(q, 2, *rows), part(context, 2, *rows), self.scale, rows,
                                    precision=self.precision,
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
    launch(i8.linear_int8(rule, wide), tuple(grid), a, p, stream)


class StaticLayer:
    """A static int8 multi-head layer on the device, equal to the CPU's bit for bit.

    Parameters are those of edgeattn.kernels.cpu.layer_int8.StaticLayer, and `softmax`, the name of the softmax rule.
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

    def _attend(self, q, k, v, context, stream, *, band=None, keep=None, lut_index=None, score_luts=None, weights=None,
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
        for name, array in (("a mask", keep), ("a mask", lut_index), ("the probabilities", weights), ("a cache", k)):
            if array is not None:
                check_reach(name, array)
        p = [H, L, S, D, Dv, D_up, Dv_up, q.strides[1] // D_up, k.strides[1] // D_up, zero["query"], zero["key"],
             zero["value"], zero["scores"], zero["context"], *self.score, *self.context, low, high,
             *context.strides[:2], *spread(keep), *spread(lut_index),
             *((0, 0) if weights is None else weights.strides[1:3]), column]
        a = [q.pointer, k.pointer, v.pointer, context.pointer, self.table.pointer, address(keep), address(lut_index),
             address(score_luts), address(weights)]
        launch(i8.static_attention(*self.rules, v.strides[2] != 1, weights is not None),
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

        band : (low, high) or None; keep : View of bool, lut_index : View of uint8, (B or 1, H or 1, L or 1, S or 1), or
        None; score_luts : View (n, 256) of int8, or None; weights : as `_attend`'s.
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
                      score_luts=None, weights=None):
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
                cache.append_device(taken[1] - taken[0], None if in_place else [part(x, 2, *taken) for x in (k, v)],
                                    stream,
                           like)
                held = cache.start, cache.length
                masks = masks_part(dict(offset=offset, keep=keep), rows, held)
                keys, values = cache.held_slots()[:2]
                self._attend(part(q, 2, *rows), keys, values, part(context, 1, *rows), stream, keep=masks["keep"],
                             band=band_of(left, right, masks["offset"]), score_luts=score_luts, column=cache.start,
                             weights=None if weights is None else part(weights, 2, *rows))

        self._finished(attend_to, B, L, out, stream, like)


def band_of(left, right, offset):
    """(low, high): query i sees key j when i + low <= j <= i + high; left and right as edgeattn.masks.Mask."""
    return (offset - left if left >= 0 else -fa.FAR, offset + right if right >= 0 else fa.FAR)


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
            source = getattr(x.pointer, "place", name)  # what is one array in this call may be two in one like it
            if source not in quantized:
                quantized[source] = self._codes(x, stream, like)
            codes, scale = quantized[source]
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
