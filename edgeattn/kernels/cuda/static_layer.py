"""A static int8 attention layer on the device: its parameters, and its launches. Letters as in attention.py."""
import dataclasses

import numpy as np

from edgeattn.kernels.cuda import static_attention as sa
from edgeattn.kernels.cuda.arrays import View
from edgeattn.kernels.cuda.attention_parameters import FAR
from edgeattn.kernels.cuda.byte_tiles import TILE
from edgeattn.kernels.cuda.host import address, ceil_div, check_heads, check_reach, part, round_up, scratch, spread
from edgeattn.kernels.cuda.launch_graph import launch
from edgeattn.kernels.cuda.layers import Int8Linear, owned, project_int8
from edgeattn.kernels.cuda.rules import planes


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
        low, high = (-FAR, FAR) if band is None else band
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
    return (offset - left if left >= 0 else -FAR, offset + right if right >= 0 else FAR)
