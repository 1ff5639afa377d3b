"""Packing and calling of the float32 multi-head layer."""
import numpy as np
from numba.extending import register_jitable

from edgeattn import threads
from edgeattn.jit import entry

from . import fused as f
from .matmul import pack_panels, pad_heads, padded_head, place, round_up
from .simd import LANES, ROWS, WIDTH

GROUP = 1 << 17  # elements of keys and values in scratch at a time, where a head does not need more: 512 KiB
_LOG2_E = 1.4426950408889634
_NO_KEEP = np.zeros(0, np.uint8)
_NO_BIAS = np.zeros(0, np.float32)


def _strides(shape):
    """Element strides of a mask of `shape`, in C order, along the axes of the scores: 0 where it repeats."""
    strides, step = [0, 0, 0, 0], 1
    for axis in range(1, len(shape) + 1):
        if shape[-axis] != 1:
            strides[-axis] = step
        step *= shape[-axis]
    return strides


def place_masks(p, at, keep, bias, band, alibi=None):
    """Write what P_BAND and the ten slots after it say into p[at:], of a band and masks of two shapes, or None.

    Two more slots belong to ALiBi, (B or 1, H, 2): the address, which is each call's own, and the step to a next entry.
    """
    if band is not None:
        p[at:at + 3] = 1, *band
    for slot, shape in ((at + 3, keep), (at + 7, bias)):
        if shape is not None:
            p[slot:slot + 4] = _strides(shape)
    if alibi is not None and alibi[0] > 1:
        p[at + 12] = 2 * alibi[1]


def with_alibi(p, slot, alibi):
    """A copy of p, which other calls share, that says in `slot` where `alibi` lies."""
    p = p.copy()
    p[slot] = alibi.ctypes.data
    return p


def shape_of(mask):
    """The shape of a mask, or None of none."""
    return None if mask is None else mask.shape


@register_jitable
def unit_size(Dp, Dvp):
    """Any multiple of so many heads fills whole panels of features."""
    return max(WIDTH // min(Dp & -Dp, WIDTH), WIDTH // min(Dvp & -Dvp, WIDTH))


@register_jitable
def group_size(S, Hkv, Dp, Dvp):
    """How many key/value heads are projected and attended to at a time: about as many as GROUP elements hold."""
    unit = unit_size(Dp, Dvp)
    most = max(GROUP // max(S * (Dp + Dvp), 1) // unit * unit, unit)
    count = -(-Hkv // most)
    return min(round_up(-(-Hkv // count), unit), Hkv)


@register_jitable
def plan(p, B, L, S, masked):
    """Write a call's shape, and where what it needs lies in its scratch, into p; (shared, private) elements of that."""
    p[f.P_BATCH], p[f.P_L], p[f.P_S] = B, L, S
    H, Hkv, Dp, Dvp = p[f.P_HEADS], p[f.P_KV_HEADS], p[f.P_D_PAD], p[f.P_DV_PAD]
    group, p[f.P_UNIT] = group_size(S, Hkv, Dp, Dvp), unit_size(Dp, Dvp)
    p[f.P_GROUP] = group
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    heads = group * (H // Hkv)
    q_features, k_features, v_features = (round_up(heads * Dp, WIDTH), round_up(group * Dp, WIDTH),
                                          round_up(group * Dvp, WIDTH))
    S_up, tokens = round_up(S, ROWS), min(round_up(L, WIDTH), f.QUERIES)
    shared = round_up((k_features + k_block) * S_up, 16)  # the keys
    shared = place(p, f.P_VALUES, shared, (v_features + v_block) * S_up + ROWS * v_block)
    private = place(p, f.P_AT_LARGEST, f.AT_FREE, k_features + k_block)
    private = place(p, f.P_AT_NATURAL, private, tokens * q_features)
    private = place(p, f.P_AT_Q, private, q_features * WIDTH)
    private = place(p, f.P_AT_CONTEXT, private, tokens * heads * Dvp + ROWS * WIDTH)
    private = place(p, f.P_AT_TAIL, private, ROWS * max(p[f.P_EQ], p[f.P_EK], p[f.P_EV]))
    private = place(p, f.P_AT_MASKS, private, S * WIDTH if masked else 0)
    p[f.P_SHARED], p[f.P_PRIVATE] = shared, private
    return shared, private


def _flat(xq, xk, xv):
    """The inputs in one dimension; mostly they are one array."""
    q = xq.reshape(-1)
    k = q if xk is xq else xk.reshape(-1)
    return q, k, k if xv is xk else xv.reshape(-1)


class FloatLayer:
    """A multi-head attention layer packed for `layer_float32`.

    Parameters
    ----------
    num_heads, num_kv_heads : int
    q_weight, k_weight, v_weight, out_weight : ndarray of float32
        (H*D, Eq), (Hkv*D, Ek), (Hkv*Dv, Ev), (Eo, H*Dv) or None.
    q_bias, k_bias, v_bias, out_bias : ndarray of float32, or None
    scale : float
        Multiplies the scores; folded into the query projection together with log2(e).
    """

    def __init__(self, num_heads, num_kv_heads, q_weight, k_weight, v_weight, out_weight,
                 q_bias, k_bias, v_bias, out_bias, scale):
        H, Hkv = num_heads, num_kv_heads
        D, Dv = q_weight.shape[0] // H, v_weight.shape[0] // Hkv
        Dp, Dvp = padded_head(D), padded_head(Dv)
        fold = np.float64(scale) * _LOG2_E
        parts, at = [], {}

        def put(name, array):
            at[name] = sum(part.size for part in parts)
            padded = np.zeros(round_up(array.size, 16), np.float32)
            padded[:array.size] = array.ravel()
            parts.append(padded)

        for name, weight, bias, heads, size, wide, factor in (
                ("q", q_weight, q_bias, H, D, Dp, fold), ("k", k_weight, k_bias, Hkv, D, Dp, 1.0),
                ("v", v_weight, v_bias, Hkv, Dv, Dvp, 1.0)):
            bias = np.zeros(heads * size, np.float32) if bias is None else bias
            weight, bias = ((a.astype(np.float64) * factor).astype(np.float32) for a in (weight, bias))
            put("w" + name, pack_panels(pad_heads(weight, heads, size, wide)))
            put("b" + name, pad_heads(bias, heads, size, wide))
        if out_weight is not None:
            Eo = out_weight.shape[0]
            spread = np.zeros((round_up(Eo, WIDTH), H, Dvp), np.float32)
            spread[:Eo, :, :Dv] = out_weight.reshape(Eo, H, Dv)
            put("wo", pack_panels(spread.reshape(-1, H * Dvp)))
            padded_bias = np.zeros(round_up(Eo, WIDTH), np.float32)
            if out_bias is not None:
                padded_bias[:Eo] = out_bias
            put("bo", padded_bias)
        else:
            Eo = H * Dv
            at["wo"] = at["bo"] = 0
        self.weights = threads.aligned(sum(part.size for part in parts), np.float32)
        np.concatenate(parts, out=self.weights)
        p = self._parameters = np.zeros(f.P_COUNT, np.int64)
        p[f.P_EQ], p[f.P_EK], p[f.P_EV], p[f.P_EO] = q_weight.shape[1], k_weight.shape[1], v_weight.shape[1], Eo
        p[f.P_HEADS], p[f.P_KV_HEADS], p[f.P_D], p[f.P_DV], p[f.P_D_PAD], p[f.P_DV_PAD] = H, Hkv, D, Dv, Dp, Dvp
        p[f.P_HAS_OUT] = out_weight is not None
        for slot, name in ((f.P_WQ, "wq"), (f.P_BQ, "bq"), (f.P_WK, "wk"), (f.P_BK, "bk"), (f.P_WV, "wv"),
                           (f.P_BV, "bv"), (f.P_WO, "wo"), (f.P_BO, "bo")):
            p[slot] = at[name]
        self.output_dim = Eo
        self._plans = {}
        self._run = None

    def _plan(self, B, L, S, masked):
        """(parameters, shared elements, private elements, work) for one shape."""
        p = self._parameters.copy()
        shared, private = map(int, plan(p, B, L, S, masked))
        H, Hkv, Dp, Dvp, Eq, Ek, Ev, Eo = (int(p[i]) for i in (f.P_HEADS, f.P_KV_HEADS, f.P_D_PAD, f.P_DV_PAD, f.P_EQ,
                                                               f.P_EK, f.P_EV, f.P_EO))
        work = 2 * B * (L * Eq * H * Dp + S * (Ek * Hkv * Dp + Ev * Hkv * Dvp) + L * H * Dvp * Eo
                        + L * S * H * (Dp + Dvp))
        return p, shared, private, work

    def __call__(self, xq, xk, xv, out, keep=None, bias=None, band=None, alibi=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all float32 and C-contiguous.

        keep : uint8 or bool, bias : float32, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules, or None
        band : (low, high) or None: query i sees key j when i + low <= j <= i + high
        alibi : (B or 1, H, 2) float64, C-contiguous, or None: a head's slope, and the position of query 0
        """
        B, L = xq.shape[0], xq.shape[1]
        S = xk.shape[1]
        key = (B, L, S, shape_of(keep), shape_of(bias), band, shape_of(alibi))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 64:
                self._plans.clear()
            masked = keep is not None or bias is not None or alibi is not None
            plan = self._plans[key] = self._plan(B, L, S, masked)
            place_masks(plan[0], f.P_BAND, *key[3:])
        p, shared_size, private_size, work = plan
        if alibi is not None:
            p = with_alibi(p, f.P_ALIBI, alibi)
        keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
        bias = _NO_BIAS if bias is None else bias.reshape(-1)
        arguments = (*_flat(xq, xk, xv), out.reshape(-1), self.weights, p, keep, bias)
        if self._run is None:
            self._run = entry(f.layer_float32, (*arguments, np.zeros(1, np.float32), np.zeros(1, np.int64), 1))
        threads.run(self._run, arguments, np.float32, shared_size, private_size, work, B)
        return out
