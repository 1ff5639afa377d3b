"""What layers have on the device: the parameters of linear maps and of static attention, and their launches.

Which follows upon which is not said here: edgeattn/executors/cuda/ops.py. Letters as in host.py.
"""
import dataclasses

import numpy as np

from edgeattn.kernels.cuda import attention_parameters as ap
from edgeattn.kernels.cuda import linear as fl
from edgeattn.kernels.cuda import linear_int8 as li
from edgeattn.kernels.cuda import static_attention as sa
from edgeattn.kernels.cuda.arrays import View, view
from edgeattn.kernels.cuda.byte_tiles import TILE
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.host import (
    address,
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
from edgeattn.kernels.cuda.rules import planes


def owned(array):
    """A View of our own memory with the elements of a NumPy array."""
    return view("weights", driver().array(array))


def batched(x):
    """Rows (tokens, features) as (1, tokens, features), or those of (B, L, features) as they are."""
    return x if x.ndim == 3 else View(x.owner, x.pointer, (1, *x.shape), (0, *x.strides), x.dtype, x.read_only)


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
    a, p, grid = project_addresses(projections)
    wide = is_wide([one.x for one in projections] + [one.weight for one in projections])
    launch(fl.linear(wide), grid, a, p, stream)


def project_addresses(projections):
    """(addresses, numbers, grid) of what `project` launches."""
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
    grid = (max(ceil_div(one.x.shape[0] * one.x.shape[1], fl.TILE) for one in projections),
            max(ceil_div(one.weight.shape[0], fl.TILE) for one in projections), len(projections))
    return a, p, grid


def as_heads(x, heads):
    """(B, T, heads * size) as (B, heads, T, size), in place."""
    B, T, width = x.shape
    size = width // heads
    b, t, e = x.strides
    return View(x.owner, x.pointer, (B, heads, T, size), (b, size * e, t, e), x.dtype)


class FloatLinear:
    """A float32 linear map's parameters on the device: weight (outputs, inputs) and bias (outputs,) or None."""

    takes_a_residual = True

    def __init__(self, weight, bias):
        self.weight, self.bias = owned(weight), None if bias is None else owned(bias)
        self.outputs = len(weight)

    def into(self, x, out):
        """The Projection of x (B, T, E) to out (B, heads, T, size)."""
        return Projection(x, self.weight, self.bias, out, out.shape[3])


# -- int8 ------------------------------------------------------------------------------------------------------------


def padded_weight(weight, heads, tile=TILE):
    """(heads * size, depth) int8 as (heads * size up, depth up), zeros added; sizes up to multiples of 64."""
    features, depth = weight.shape
    size = features // heads
    wide = np.zeros((heads, round_up(size, tile), round_up(depth, tile)), np.int8)
    wide[:, :size, :depth] = weight.reshape(heads, size, depth)
    return wide.reshape(-1, wide.shape[2])


def padded_list(values, heads, tile=TILE):
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
    table : int8 (256,) or None
        What codes c become, at c + 128.
    """

    takes_a_residual = False

    def __init__(self, weight, heads, bias, first, second=None, zero_point=0, table=None):
        self.outputs, self.heads, self.size, self.zero_point = len(weight), heads, len(weight) // heads, zero_point
        self.weight = owned(padded_weight(weight, heads))
        self.bias, self.first = owned(padded_list(bias, heads)), owned(padded_list(first, heads))
        self.second = None if second is None else owned(padded_list(second, heads))
        self.table = None if table is None else owned(table)


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
    a, p = [0] * li.L_ADDRESSES, [0] * li.L_NUMBERS
    wide, grid = True, [1, 1, len(items)]
    for z, (linear, x, x_scale, out, strides, stored) in enumerate(items):
        B, T, depth = x.shape
        row = x.strides[1]
        wide = wide and x.pointer % 16 == 0 and row % 16 == 0 and depth % 16 == 0
        check_reach("an input", x)
        check_reach("a projection", out)
        features = linear.weight.shape[0]
        for slot, value in ((li.L_X, x), (li.L_W, linear.weight), (li.L_BIAS, linear.bias), (li.L_FIRST, linear.first),
                            (li.L_SECOND, linear.second), (li.L_OUT, out), (li.L_X_SCALE, x_scale),
                            (li.L_TABLE, linear.table)):
            a[slot + z] = address(value)
        for slot, value in zip(range(0, li.L_NUMBERS, 3), (
                B * T, T, row, depth, linear.weight.shape[1], features, linear.size, features // linear.heads,
                stored, linear.zero_point, *strides), strict=True):
            p[slot + z] = value
        grid[0], grid[1] = max(grid[0], ceil_div(B * T, TILE)), max(grid[1], features // TILE)
    looked_up = any(item[0].table is not None for item in items)
    launch(li.linear_int8(rule, wide, looked_up), tuple(grid), a, p, stream)


class StaticLayer:
    """A static int8 multi-head layer on the device, equal to the CPU's bit for bit.

    Parameters are those of edgeattn.kernels.cpu.layer_int8.StaticLayer, and `softmax`, the name of the softmax rule.
    """

    def __init__(self, num_heads, linears, scores, context, zero_points, project_rule, score_rule, context_rule,
                 softmax_table, softmax, tables=None):
        self.heads, self.zero_points, self.rule = num_heads, zero_points, project_rule
        self.rules = score_rule, context_rule, softmax
        self.linears = {}
        for name, (weight, real, bias) in linears.items():
            source = "context" if name == "output" else name + "_input"
            sums = weight.astype(np.int64).sum(1)
            bias = np.zeros(len(weight), np.int64) if bias is None else bias.astype(np.int64)
            bias = (bias - zero_points[source] * sums + 2**31) % 2**32 - 2**31  # wraps as the accumulator does
            first, second = planes(project_rule, real)
            table, zero_point = (tables or {}).get(name, (None, zero_points[name]))
            self.linears[name] = Int8Linear(weight, 1 if name == "output" else num_heads, bias.astype(np.int32), first,
                                            second, zero_point, table)
        self.score = [int(x) for x in planes(score_rule, [scores])[:, 0]]
        self.context = [int(x) for x in planes(context_rule, [context])[:, 0]]
        self.table = owned(np.ascontiguousarray(softmax_table).view(np.int32))

    def attend(self, q, k, v, context, stream, *, band=None, keep=None, lut_index=None, score_luts=None, weights=None,
                column=0):
        """context (B, L, H Dv) of q (B, H, L, D up), k (B, H, S, D up) and v (B, H, S, Dv), which may lie turned.

        weights : View (B, H, L, columns) int8 in rows of that many bytes, or None; the keys' begin at `column`.
        """
        (B, H, L, D_up), S = q.shape, k.shape[2]
        check_heads(B, H)
        D, Dv = self.linears["query"].size, self.linears["value"].size
        Dv_up = round_up(Dv, TILE)
        low, high = (-ap.FAR, ap.FAR) if band is None else band
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
        launch(sa.static_attention(*self.rules, v.strides[2] != 1, weights is not None),
               (ceil_div(L, TILE), B * H, Dv_up // TILE), a, p, stream)

    def rows(self, x, name, like):
        """Where the projection `name` of x (B, T, E) leaves its codes (B, H, T, size up), in memory of whole tiles."""
        B, T, _ = x.shape
        up = round_up(self.linears[name].size, TILE)
        return part(scratch((B, self.heads, round_up(T, TILE), up), np.int8, like), 2, 0, T)

    def whole(self, x, name):
        """Where the codes of the projection `name` go in a cache, with the zeros behind them."""
        return dataclasses.replace(x, shape=(*x.shape[:3], round_up(self.linears[name].size, TILE)))

    def turned_rows(self, x, name, like):
        """The same for values, which `attend` reads turned: (B, H, T, size) whose neighbours are tokens."""
        (B, T, _), size = x.shape, self.linears[name].size
        made = scratch((B, self.heads, round_up(size, TILE), round_up(T, TILE)), np.int8, like)
        return View(made.owner, made.pointer, (B, self.heads, T, size), (*made.strides[:2], 1, made.shape[3]),
                    made.dtype)

    def project(self, items, stream):
        """Up to three projections in one launch: (name, x (B, T, E), out (B, heads, T, size or more)) each."""
        project_int8(self.rule, [(self.linears[name], x, None, out, out.strides, out.shape[3])
                                 for name, x, out in items], stream)


def band_of(left, right, offset):
    """(low, high): query i sees key j when i + low <= j <= i + high; left and right as edgeattn.masks.Mask."""
    return (offset - left if left >= 0 else -ap.FAR, offset + right if right >= 0 else ap.FAR)


def token_codes(x, stream, like):
    """x (B, T, E) float32 as int8 codes in rows of whole 16 bytes, and a scale per token."""
    B, T, E = x.shape
    codes = scratch((B, T, round_up(E, 16)), np.int8, like)
    scale = scratch((1, 1, B * T), np.float32, like)
    rows, wide = x.reshape(1, 1, B * T, E), codes.reshape(1, 1, B * T, codes.shape[2])
    store_rows(rows, wide, scale, stream, up=codes.shape[2])
    return codes, scale
