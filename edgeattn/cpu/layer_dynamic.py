"""Packing and calling of the dynamic int8 multi-head layer."""
import numpy as np
from numba.extending import register_jitable

from edgeattn import threads
from edgeattn.jit import entry

from . import fused_dynamic as f
from .layer_float32 import _LOG2_E, _NO_BIAS, _NO_KEEP, _flat, _strides
from .matmul import MATRIX, MATRIX_TOKENS, pack_byte_panels, pad_heads, padded_head, place, round_up
from .simd import LANES, OFFSET, ROWS, WIDTH


def quantize_weight(weight):
    """(int8 codes, float32 scale per row) of a float32 weight (out, in): symmetric, within +-127."""
    largest = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


@register_jitable
def plan(p, B, L, S, masked):
    """Write a call's shape, and where what it needs lies in its scratch, into p; (shared, private) elements of that."""
    p[f.P_BATCH], p[f.P_L], p[f.P_S] = B, L, S
    H, Hkv, Dp, Dvp = p[f.P_HEADS], p[f.P_KV_HEADS], p[f.P_D_PAD], p[f.P_DV_PAD]
    q_features, k_features, v_features = round_up(H * Dp, WIDTH), round_up(Hkv * Dp, WIDTH), round_up(Hkv * Dvp, WIDTH)
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    S_up = round_up(S, ROWS)
    q_row = round_up(round_up(q_features, k_block) // 4, LANES)
    rows = max(f.TOKENS, WIDTH)
    deepest = round_up(max(p[f.P_EQ], p[f.P_EK], p[f.P_EV]), 4) // 4
    shared = round_up((k_features + k_block) * S_up // 4, 16)  # the keys
    shared = place(p, f.P_VALUES, shared, (v_features + v_block) * (S_up // 4) + 2 * WIDTH)
    shared = place(p, f.P_KTERM, shared, Hkv * S_up)
    shared = place(p, f.P_KSCALE, shared, (k_features // k_block + 1) * S_up)
    shared = place(p, f.P_VSCALE, shared, (v_features // v_block + 1) * S_up)
    private = place(p, f.P_AT_X, 0, rows * deepest + WIDTH)
    private = place(p, f.P_AT_XSCALE, private, rows + WIDTH)
    private = place(p, f.P_AT_NATURAL, private,
                    rows * max(q_features, k_features, v_features) + max(k_block, v_block))
    private = place(p, f.P_AT_QBYTES, private, WIDTH * q_row)
    private = place(p, f.P_AT_Q, private, WIDTH * q_row)
    private = place(p, f.P_AT_QSCALE, private, (q_features // k_block + 1) * WIDTH)
    private = place(p, f.P_AT_SCORES, private, (f.KEY_BLOCK + ROWS) * WIDTH)
    private = place(p, f.P_AT_P, private, (f.KEY_BLOCK // 4 + ROWS) * WIDTH)
    private = place(p, f.P_AT_STATS, private, 4 * WIDTH + 16)
    private = place(p, f.P_AT_CONTEXT, private, (H * Dvp + 2 * ROWS) * WIDTH)
    private = place(p, f.P_AT_CBYTES, private, (H * Dvp // 4 + ROWS) * WIDTH)
    private = place(p, f.P_AT_TILE, private, max(ROWS * WIDTH, LANES * LANES))
    private = place(p, f.P_AT_MASKS, private, (S_up + ROWS) * WIDTH if masked else 0)
    private = place(p, f.P_AT_TILES, private, MATRIX_TOKENS * WIDTH)
    private = place(p, f.P_AT_TURNED, private, WIDTH * H * Dvp // 4 if MATRIX else 0)
    p[f.P_SHARED], p[f.P_PRIVATE] = shared, private
    return shared, private


class DynamicLayer:
    """A multi-head layer with int8 weights and activations quantized per token, packed for `layer_dynamic`.

    Parameters
    ----------
    num_heads, num_kv_heads : int
    q_weight, k_weight, v_weight, out_weight : float32 (out, in) weight, or (int8 codes, float32 scale (out,))
        (H*D, Eq), (Hkv*D, Ek), (Hkv*Dv, Ev), (Eo, H*Dv) or None.
    q_bias, k_bias, v_bias, out_bias : ndarray of float32, or None
        k_bias is accepted and has no effect: softmax does not see it.
    scale : float
    """

    def __init__(self, num_heads, num_kv_heads, q_weight, k_weight, v_weight, out_weight,
                 q_bias, k_bias, v_bias, out_bias, scale):
        H, Hkv = num_heads, num_kv_heads
        q, k, v, o = (w if w is None or isinstance(w, tuple) else quantize_weight(w)
                      for w in (q_weight, k_weight, v_weight, out_weight))
        D, Dv = q[0].shape[0] // H, v[0].shape[0] // Hkv
        Dp, Dvp = padded_head(D), padded_head(Dv)
        parts = {np.int32: [], np.float32: []}
        p = self._parameters = np.zeros(f.P_COUNT, np.int64)

        def put(slot, array, dtype):
            p[slot] = sum(part.size for part in parts[dtype])
            padded = np.zeros(round_up(array.size, 16), dtype)
            padded[:array.size] = array.ravel()
            parts[dtype].append(padded)

        def put_linear(slot, codes, scale_slot, factors, bias):
            deep = np.zeros((codes.shape[0], round_up(codes.shape[1], 4)), np.int8)
            deep[:, :codes.shape[1]] = codes
            put(slot, pack_byte_panels(deep), np.int32)
            put(slot + 1, -OFFSET * deep.astype(np.int32).sum(1), np.int32)
            put(scale_slot, factors, np.float32)
            put(scale_slot + 1, bias, np.float32)

        for slot, scale_slot, (codes, factors), bias, heads, size, wide, fold in (
                (f.P_WQ, f.P_SQ, q, q_bias, H, D, Dp, scale * _LOG2_E), (f.P_WK, f.P_SK, k, None, Hkv, D, Dp, 1.0),
                (f.P_WV, f.P_SV, v, v_bias, Hkv, Dv, Dvp, 1.0)):
            bias = np.zeros(heads * size, np.float32) if bias is None else bias
            factors, bias = ((a.astype(np.float64) * fold).astype(np.float32) for a in (factors, bias))
            put_linear(slot, pad_heads(codes, heads, size, wide), scale_slot, pad_heads(factors, heads, size, wide),
                       pad_heads(bias, heads, size, wide))
        Eo = H * Dv
        if o is not None:
            Eo = o[0].shape[0]
            up = round_up(Eo, WIDTH)
            spread = np.zeros((up, H, Dvp), np.int8)
            spread[:Eo, :, :Dv] = o[0].reshape(Eo, H, Dv)
            factors, bias = np.zeros(up, np.float32), np.zeros(up, np.float32)
            factors[:Eo] = o[1]
            if out_bias is not None:
                bias[:Eo] = out_bias
            put_linear(f.P_WO, spread.reshape(up, H * Dvp), f.P_SO, factors, bias)
        self._weights = threads.aligned(sum(part.size for part in parts[np.int32]), np.int32)
        self._factors = threads.aligned(sum(part.size for part in parts[np.float32]), np.float32)
        np.concatenate(parts[np.int32], out=self._weights)
        np.concatenate(parts[np.float32], out=self._factors)
        for slot, value in ((f.P_EQ, q[0].shape[1]), (f.P_EK, k[0].shape[1]), (f.P_EV, v[0].shape[1]), (f.P_EO, Eo),
                            (f.P_HEADS, H), (f.P_KV_HEADS, Hkv), (f.P_D, D), (f.P_DV, Dv), (f.P_D_PAD, Dp),
                            (f.P_DV_PAD, Dvp), (f.P_HAS_OUT, o is not None)):
            p[slot] = value
        self.output_dim = Eo
        self._plans, self._run = {}, None

    def _plan(self, B, L, S, masked, same):
        """(parameters, shared elements, private elements, work) for one shape."""
        p = self._parameters.copy()
        p[f.P_SAME_KV] = same
        shared, private = map(int, plan(p, B, L, S, masked))
        H, Hkv, Dp, Dvp, Eq, Ek, Ev, Eo = (int(p[i]) for i in (f.P_HEADS, f.P_KV_HEADS, f.P_D_PAD, f.P_DV_PAD, f.P_EQ,
                                                               f.P_EK, f.P_EV, f.P_EO))
        work = 2 * (L * Eq * H * Dp + S * Hkv * (Ek * Dp + Ev * Dvp) + L * H * Dvp * Eo
                    + L * S * H * (Dp + Dvp + 64)) // 3
        return p, shared, private, work

    def __call__(self, xq, xk, xv, out, keep=None, bias=None, band=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev): float32, C order; masks as FloatLayer."""
        B, L, S = xq.shape[0], xq.shape[1], xk.shape[1]
        masked = keep is not None or bias is not None
        key = (B, L, S, masked, xk is xv)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 64:
                self._plans.clear()
            plan = self._plans[key] = self._plan(*key)
        p, shared_size, private_size, work = plan
        if masked or band is not None:
            p = p.copy()
        if band is not None:
            p[f.P_BAND], p[f.P_LOW], p[f.P_HIGH] = 1, band[0], band[1]
        if keep is not None:
            p[f.P_KEEP_B:f.P_KEEP_S + 1] = _strides(keep, None)
        if bias is not None:
            p[f.P_BIAS_B:f.P_BIAS_S + 1] = _strides(bias, None)
        keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
        bias = _NO_BIAS if bias is None else bias.reshape(-1)
        arguments = (*_flat(xq, xk, xv), out.reshape(-1), self._weights, self._factors, p,
                     keep, bias)
        if self._run is None:
            self._run = entry(f.layer_dynamic, (*arguments, np.zeros(1, np.int32), np.zeros(1, np.int64), 1))
        threads.run(self._run, arguments, np.int32, shared_size, private_size, B * work)
        return out
