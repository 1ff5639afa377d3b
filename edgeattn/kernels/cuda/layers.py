"""The linear maps of layers on the device: their parameters, and their launches.

Which follows upon which is not said here: edgeattn/executors/cuda/ops.py. Letters as in attention.py.
"""
import dataclasses

import numpy as np

from edgeattn.kernels.cuda import linear as fl
from edgeattn.kernels.cuda import linear_int8 as li
from edgeattn.kernels.cuda.arrays import View, view
from edgeattn.kernels.cuda.byte_tiles import TILE
from edgeattn.kernels.cuda.driver import driver
from edgeattn.kernels.cuda.host import address, ceil_div, check_reach, is_wide, round_up, scratch, store_rows
from edgeattn.kernels.cuda.launch_graph import launch


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


def token_codes(x, stream, like):
    """x (B, T, E) float32 as int8 codes in rows of whole 16 bytes, and a scale per token."""
    B, T, E = x.shape
    codes = scratch((B, T, round_up(E, 16)), np.int8, like)
    scale = scratch((1, 1, B * T), np.float32, like)
    rows, wide = x.reshape(1, 1, B * T, E), codes.reshape(1, 1, B * T, codes.shape[2])
    store_rows(rows, wide, scale, stream, up=codes.shape[2])
    return codes, scale
