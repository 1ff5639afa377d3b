"""Packing and calling of the static int8 multi-head layer."""
import numpy as np
from numba.extending import register_jitable

from edgeattn import threads
from edgeattn.jit import entry

from . import fused_int8 as f
from .cached_int8 import cached_int8
from .layer_float32 import _flat, place_masks, shape_of
from .matmul import (
    MATRIX,
    MATRIX_DEPTH,
    MATRIX_SCRATCH,
    MATRIX_TOKENS,
    pack_byte_panels,
    pad_heads,
    padded_head,
    place,
    round_up,
)
from .requantize import RULES, encode
from .simd import LANES, OFFSET, ROWS, WIDTH, byte_planes
from .softmax_int8 import KEPT_GROUPS
from .step_int8 import step_sizes

_EMPTY_U8 = np.zeros(0, np.uint8)
_EMPTY_I8 = np.zeros(0, np.int8)
_MORE_KEYS = 64  # of a cache, that a plan has room for


@register_jitable
def plan(p, B, L, S):
    """Write a call's shape, and where what it needs lies in its scratch, into p; (shared, private) elements of that."""
    p[f.P_BATCH], p[f.P_L], p[f.P_S] = B, L, S
    H, Dp, Dvp = p[f.P_HEADS], p[f.P_D_PAD], p[f.P_DV_PAD]
    features, v_features = round_up(H * Dp, WIDTH), round_up(H * Dvp, WIDTH)
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    S_up = f.padded_keys(S)
    natural_row = round_up(max(features, v_features) // 4, LANES)
    q_groups = round_up(Dp // 4, MATRIX_DEPTH)
    context4 = f.packed_depth(H * Dvp)
    deepest = f.packed_depth(max(p[f.P_EQ], p[f.P_EK], p[f.P_EV]))
    # The matrix unit reads MATRIX_TOKENS rows of MATRIX_DEPTH groups, whatever is there.
    if MATRIX:
        values = (v_features + MATRIX_TOKENS) * round_up(S_up // 4, MATRIX_DEPTH) + MATRIX_DEPTH
    else:
        values = (v_features + v_block) * (S_up // 4) + 2 * WIDTH
    keys = round_up(features, k_block) * S_up + k_block * (MATRIX_TOKENS + LANES)
    shared = round_up(keys // 4 + LANES, 16)
    shared = place(p, f.P_VALUES, shared, values)
    shared = place(p, f.P_KROW, shared, H * S_up)
    private = place(p, f.P_AT_X, 0, f.TOKENS * deepest + ROWS * WIDTH)
    private = place(p, f.P_AT_NATURAL, private, max(WIDTH * natural_row + LANES, f.TOKENS // 4 * WIDTH, LANES * LANES))
    private = place(p, f.P_AT_Q, private, max(natural_row, H * q_groups) * WIDTH)
    private = place(p, f.P_AT_SUMS, private, 3 * WIDTH)
    private = place(p, f.P_AT_TERMS, private, Dvp + LANES + ROWS if OFFSET == 0 else 0)
    private = place(p, f.P_AT_CONTEXT, private, (context4 + ROWS) * WIDTH)
    private = place(p, f.P_AT_CODES, private, (round_up(S_up // 4, MATRIX_DEPTH) + 4) * WIDTH)
    private = place(p, f.P_AT_MASKS, private, (S_up // 4 + 4) * WIDTH)
    private = place(p, f.P_AT_VALUES, private, min(S_up, 4 * KEPT_GROUPS) * WIDTH)
    private = place(p, f.P_AT_TILES, private, max(MATRIX_SCRATCH, 16))
    private = place(p, f.P_AT_TURNED, private, WIDTH * context4 if MATRIX else 0)
    p[f.P_SHARED], p[f.P_PRIVATE] = shared, private
    return shared, private


class StaticLayer:
    """A static int8 multi-head layer packed for `layer_int8`.

    Parameters
    ----------
    num_heads : int
    linears : dict
        "query", "key", "value" and optionally "output" -> (weight int8 (out, in), real multiplier float64 (out,),
        bias int32 (out,) or None).
    scores, context : float
        Real multipliers of the two batch matmuls. All real multipliers in the precision their rule prescribes.
    zero_points : dict
        Of "query_input", "key_input", "value_input", "query", "key", "value", "scores", "context" and, with an output
        projection, "output".
    project_rule, score_rule, context_rule : str
        Names of RULES.
    softmax_table : ndarray
        (256,) float32 for lut_f32, int32 for lut_u16 and fixed; entry d belongs to a code d below the maximum.
    fixed : bool
        Whether an int32 table belongs to the rule "fixed".
    """

    def __init__(self, num_heads, linears, scores, context, zero_points, project_rule, score_rule, context_rule,
                 softmax_table, fixed=False):
        H = num_heads
        D, Dv = linears["query"][0].shape[0] // H, linears["value"][0].shape[0] // H
        Dp, Dvp = padded_head(D), padded_head(Dv)
        parts, at = [], {}

        def put(name, array):
            at[name] = sum(part.size for part in parts)
            padded = np.zeros(round_up(array.size, 16), np.int32)
            padded[:array.size] = array.ravel()
            parts.append(padded)

        def put_linear(letter, weight, bias, multipliers, source):
            """Weight (n, k), bias and multipliers are already padded; the source's zero point goes into the bias."""
            sums = weight.astype(np.int64).sum(1)
            correction = bias.astype(np.int64) - (OFFSET + zero_points[source]) * sums
            correction = (correction + 2**31) % 2**32 - 2**31  # wraps as the accumulator does
            put("w" + letter, pack_byte_panels(weight))
            put("b" + letter, correction.astype(np.int32))
            put("m" + letter, encode(project_rule, multipliers))

        for letter, name, size, wide in (("q", "query", D, Dp), ("k", "key", D, Dp), ("v", "value", Dv, Dvp)):
            weight, real, bias = linears[name]
            depth = weight.shape[1]
            deep = np.zeros((weight.shape[0], 4 * f.packed_depth(depth)), np.int8)
            deep[:, :depth] = weight
            bias = np.zeros(len(weight), np.int32) if bias is None else bias
            put_linear(letter, pad_heads(deep, H, size, wide), pad_heads(bias, H, size, wide),
                       pad_heads(real, H, size, wide), name + "_input")
        if "output" in linears:
            weight, real, bias = linears["output"]
            Eo = weight.shape[0]
            up = round_up(Eo, WIDTH)
            spread = np.zeros((up, 4 * f.packed_depth(H * Dvp)), np.int8)
            spread[:Eo, :H * Dvp].reshape(Eo, H, Dvp)[:, :, :Dv] = weight.reshape(Eo, H, Dv)
            wide_bias, wide_real = np.zeros(up, np.int32), np.zeros(up)
            wide_real[:Eo] = real
            if bias is not None:
                wide_bias[:Eo] = bias
            put_linear("o", spread, wide_bias, wide_real, "context")
        else:
            Eo = H * Dv
            at["wo"] = at["bo"] = at["mo"] = 0
        put("ms", encode(score_rule, [scores] * LANES))
        put("mc", encode(context_rule, [context] * LANES))
        self.weights = threads.aligned(sum(part.size for part in parts), np.int32)
        np.concatenate(parts, out=self.weights)
        table = threads.aligned(512, softmax_table.dtype)
        table[:] = byte_planes(softmax_table)
        self._fixed = (*(RULES[name] for name in (project_rule, score_rule, context_rule)), table)
        self._runs = {}
        p = self._parameters = np.zeros(f.P_COUNT, np.int64)
        for slot, value in (
                (f.P_EQ, linears["query"][0].shape[1]), (f.P_EK, linears["key"][0].shape[1]),
                (f.P_EV, linears["value"][0].shape[1]), (f.P_EO, Eo), (f.P_HEADS, H), (f.P_D, D), (f.P_DV, Dv),
                (f.P_D_PAD, Dp), (f.P_DV_PAD, Dvp), (f.P_HAS_OUT, "output" in linears), (f.P_FIXED, fixed),
                (f.P_WQ, at["wq"]), (f.P_BQ, at["bq"]), (f.P_MQ, at["mq"]), (f.P_WK, at["wk"]), (f.P_BK, at["bk"]),
                (f.P_MK, at["mk"]), (f.P_WV, at["wv"]), (f.P_BV, at["bv"]), (f.P_MV, at["mv"]), (f.P_WO, at["wo"]),
                (f.P_BO, at["bo"]), (f.P_MO, at["mo"]), (f.P_MS, at["ms"]), (f.P_MC, at["mc"]),
                (f.P_ZQ, zero_points["query"]), (f.P_ZK, zero_points["key"]), (f.P_ZV, zero_points["value"]),
                (f.P_ZS, zero_points["scores"]), (f.P_ZC, zero_points["context"]),
                (f.P_ZO, zero_points["output"] if "output" in linears else 0)):
            p[slot] = value
        self.output_dim = Eo
        self._plans = {}

    def _plan(self, B, L, S, tokens, same, cached):
        """(parameters, shared elements, private elements, work) for one shape, of which `tokens` keys are projected."""
        p = self._parameters.copy()
        p[f.P_SAME_KV] = same
        shared, private = map(int, plan(p, B, L, S))
        if cached:
            private = p[f.P_PRIVATE] = place(p, f.P_AT_STEP, private, sum(step_sizes(p[f.P_D], p[f.P_DV])))
        H, Dp, Dvp, Eq, Ek, Ev, Eo = (int(p[i]) for i in (f.P_HEADS, f.P_D_PAD, f.P_DV_PAD, f.P_EQ, f.P_EK, f.P_EV,
                                                          f.P_EO))
        work = 2 * (L * Eq * H * Dp + tokens * H * (Ek * Dp + Ev * Dvp) + L * H * Dvp * Eo
                    + L * S * H * (Dp + Dvp + 64)) // 3
        return p, shared, int(private), work

    def __call__(self, xq, xk, xv, out, keep=None, band=None, classes=None, tables=None, cached=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all int8 and C-contiguous.

        keep : uint8 or bool, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules; 0 means the key is not there
        band : (low, high): query i sees key j when i + low <= j <= i + high
        tables : int8 (n, 256): score code c becomes tables[class, c + 128] before the softmax
        classes : uint8 broadcast to (B, H, L, S): which table; class 0 everywhere if None
        cached : (keys (B, H, capacity, D), values (B, H, capacity, Dv), first, S), int8 and C-contiguous: attention is
            over the S slots from `first` on, and the codes of xk and xv go into the last of these
        """
        B, L, tokens = xq.shape[0], xq.shape[1], xk.shape[1]
        S = room = tokens
        masks = in_plan = (shape_of(keep), shape_of(classes), band)
        if cached is not None:
            keys, values, first, S = cached
            room, in_plan = round_up(S, _MORE_KEYS), (None, None, None)  # a plan serves fewer keys too
        key = (B, L, room, tokens, xk is xv, cached is not None, *in_plan)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 64:
                self._plans.clear()
            plan = self._plans[key] = self._plan(*key[:6])
            place_masks(plan[0], f.P_BAND, *in_plan)
        p, shared_size, private_size, work = plan
        if cached is not None:
            p = p.copy()
            place_masks(p, f.P_BAND, *masks)
        keep = _EMPTY_U8 if keep is None else keep.reshape(-1).view(np.uint8)
        classes = _EMPTY_U8 if classes is None else classes.reshape(-1)
        tables = _EMPTY_I8 if tables is None else tables.reshape(-1)
        arguments = (*self._fixed, *_flat(xq, xk, xv), out.reshape(-1), self.weights, p, keep, classes, tables)
        kernel = f.layer_int8
        if cached is not None:
            p[f.P_S], p[f.P_NEW], p[f.P_FIRST], p[f.P_CAPACITY] = S, tokens, first, keys.shape[2]
            arguments, kernel = (*arguments, keys.reshape(-1), values.reshape(-1)), cached_int8
        run = self._runs.get(kernel)
        if run is None:
            run = self._runs[kernel] = entry(kernel, (*arguments, np.zeros(1, np.int32), np.zeros(1, np.int64), 1))
        threads.run(run, arguments, np.int32, shared_size, private_size, B * work, B)
        return out
