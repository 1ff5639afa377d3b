"""Packing and calling of the dynamic int8 multi-head layer."""
import numpy as np

from edgeattn import threads
from edgeattn.runtime.addresses import address
from edgeattn.runtime.compiler import register_jitable
from edgeattn.runtime.plan_cache import PlanCache, shared_plans

from . import fused_dynamic as f
from .attend_dynamic import KEY_BLOCK
from .byte_products import DEPTH_STEP, READ_AHEAD, ROW_STEP, pack_byte_panels
from .call import PreparedCall
from .dynamic import COLUMNS_APART, STEP, TOKENS
from .fused import LARGEST_ENTRY, QUERIES
from .layer_float32 import _LOG2_E
from .matmul import pad_heads, round_up
from .packing import Packer
from .positions import norm_fields, rotary_fields, rotary_table
from .projection_dynamic import TILES_SIZE, join_depth
from .records import NO_MASK, NO_MASKS, KernelMask, blank, copy_of, named_fields, packed, place, set_masks
from .simd import LANES, WIDTH
from .word_products import terms_of, words_scratch

SMALLEST_WEIGHT = np.float32(2.0**-100)  # a row of smaller ones is a row of zeros: float32 ends not far below


def quantize_weight(weight):
    """(int8 codes, float32 scale per row) of a float32 weight (out, in): symmetric, within +-127."""
    largest = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
    scale = np.where(largest > SMALLEST_WEIGHT, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


def unit_of(Hkv, Dp, Dvp):
    """Any multiple of so many key heads fills whole panels and vectors: another thread may have the heads beside."""
    if Dp % LANES or Dvp % LANES:
        return Hkv
    groups = max(4 * LANES, WIDTH)
    return max(groups // min(Dp & -Dp, groups), WIDTH // min(Dvp & -Dvp, WIDTH))


def place_own(p):
    """Write where things begin in the scratch of each thread into p; what masks need, of any length, comes last."""
    H, Hkv, Dp, Dvp = p.heads, p.kv_heads, p.padded_head, p.padded_value
    p.unit = unit_of(Hkv, Dp, Dvp)
    D4, K4, C4 = Dp // 4, round_up(Hkv * Dp // 4, LANES), round_up(H * Dvp // 4, LANES)
    deepest = round_up(max(p.query_width, p.key_width, p.value_width), STEP) // 4
    p.at_rest, private = place(0, TOKENS * p.query_width if p.apart else 0)
    p.at_apart, private = place(private, TOKENS * COLUMNS_APART)
    p.at_x, private = place(private, TOKENS * deepest)
    p.at_rows, private = place(private, TOKENS * round_up(max(H * Dp, Hkv * Dvp), WIDTH) + LANES)
    p.at_xscale, private = place(private, TOKENS)
    p.at_inverse, private = place(private, TOKENS)
    p.at_tail, private = place(private, STEP)
    p.at_weights, private = place(private, TOKENS)
    p.at_seen, private = place(private, TOKENS)
    p.at_keys, private = place(private, TOKENS * K4)
    p.at_q, private = place(private, round_up(D4, DEPTH_STEP) * WIDTH)
    rows = round_up(max(Dp, Dvp), LANES)  # of a head, for all tokens
    p.at_scores, private = place(private, max((max(KEY_BLOCK, Dvp) + ROW_STEP) * WIDTH, rows * TOKENS))
    p.at_probabilities, private = place(private, KEY_BLOCK // 4 * WIDTH)
    p.at_stats, private = place(private, 6 * WIDTH)
    p.at_dither, private = place(private, KEY_BLOCK)
    p.at_context, private = place(private, H * Dvp * WIDTH)
    p.at_context_bytes, private = place(private, C4 * WIDTH)
    p.at_transposed, private = place(private, C4 * WIDTH)
    words = words_scratch(TOKENS, max(deepest, C4))
    p.at_tiles, p.at_masks = place(private, max(TILES_SIZE, LANES * LANES) + words)


@register_jitable
def plan(p, B, L, S, masked):
    """Write a call's shape, and where what it needs lies in the scratch of all threads, into p, which has the rest.

    Returns (shared, private) elements of scratch.
    """
    p.batch, p.queries, p.keys = B, L, S
    H, Hkv, Dp, Dvp = p.heads, p.kv_heads, p.padded_head, p.padded_value
    S_up, L_up, K4 = round_up(S, TOKENS), round_up(L, TOKENS), round_up(Hkv * Dp // 4, LANES)
    past = READ_AHEAD  # and of a row past the last number
    shared = round_up((S_up + past) * K4 + past, 16)  # the keys
    p.at_values, shared = place(shared, (Hkv * Dvp + past) * f.values_row(S) + past)
    p.at_kterm, shared = place(shared, Hkv * S_up)
    p.at_kscale, shared = place(shared, Hkv * S_up)
    p.at_vlog, shared = place(shared, Hkv * S_up)
    p.at_vinverse, shared = place(shared, Hkv * S_up)
    p.at_mean, shared = place(shared, round_up(Hkv * Dp, WIDTH) + LANES)
    p.at_key_factors, shared = place(shared, round_up(Hkv * Dp, WIDTH))
    p.at_smooth, shared = place(shared, 1)
    p.at_units, shared = place(shared, Hkv)
    p.kept_size = shared
    p.at_queries, shared = place(shared, L_up * H * (Dp // 4))
    p.at_qscale, shared = place(shared, L_up * H)
    _, private = place(p.at_masks, (S + 4) * WIDTH if masked else 0)
    p.at_entry = 0
    if B > 1 and shared <= LARGEST_ENTRY:
        p.at_entry, private = place(private, shared)
    p.at_contexts, shared = place(shared, round_up(L, WIDTH) * H * Dvp if L <= QUERIES else 0)
    p.shared_size, p.private_size = shared, private
    return shared, private


class DynamicLayer:
    """A multi-head layer with int8 weights and activations quantized per token, packed for `layer_dynamic`.

    Parameters
    ----------
    num_heads, num_kv_heads : int
    weights : float32 (out, in) weights, or pairs (int8 codes, float32 scale (out,))
        Of queries, keys, values and output: (H*D, Eq), (Hkv*D, Ek), (Hkv*Dv, Ev), (Eo, H*Dv) or None.
    biases : ndarrays of float32, each or None
        Likewise. That of keys has no effect where keys are neither normed nor rotated: softmax does not see it.
    scale : float
    rotary, q_norm, k_norm
        As for `FloatLayer`.
    columns : sequence of int
        Inputs of queries, keys and values, all of one width, whose products are float32: their codes are 0.
    apart : None or three float32 arrays
        The weights of `columns`: (H*D, columns), (Hkv*D, columns), (Hkv*Dv, columns).
    """

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale, rotary=None, q_norm=None, k_norm=None,
                 columns=(), apart=None):
        H, Hkv = num_heads, num_kv_heads
        q, k, v, o = (w if w is None or isinstance(w, tuple) else quantize_weight(w) for w in weights)
        q_bias, k_bias, v_bias, out_bias = biases
        D, Dv = q[0].shape[0] // H, v[0].shape[0] // Hkv
        Dp, Dvp = round_up(D, 4), round_up(Dv, 4)
        packer, reals = Packer(np.int32), Packer(np.float32)

        def put_linear(letter, codes, factors, bias):
            packer.put("w" + letter, pack_byte_panels(codes))
            packer.put("c" + letter, terms_of(codes))
            reals.put("s" + letter, factors)
            reals.put("b" + letter, bias)

        fold = scale * _LOG2_E
        if rotary is None and k_norm is None:
            k_bias = None
        packer.put("columns", np.asarray(columns, np.int32))
        for letter, (codes, factors), bias, in_float, heads, size, wide, factor in zip(
                "qkv", (q, k, v), (q_bias, k_bias, v_bias), (None,) * 3 if apart is None else apart, (H, Hkv, Hkv),
                (D, D, Dv), (Dp, Dp, Dvp), (fold if q_norm is None else 1.0, 1.0, 1.0), strict=True):
            if in_float is not None:
                scaled = (in_float.astype(np.float64) * factor).astype(np.float32)
                reals.put("v" + letter, pad_heads(scaled, heads, size, wide).T)
            bias = np.zeros(heads * size, np.float32) if bias is None else bias
            factors, bias = ((a.astype(np.float64) * factor).astype(np.float32) for a in (factors, bias))
            codes, factors, bias = (pad_heads(a, heads, size, wide) for a in (join_depth(codes), factors, bias))
            put_linear(letter, codes, factors, bias)
        Eo = H * Dv
        if o is not None:
            Eo = o[0].shape[0]
            up = round_up(Eo, WIDTH)
            spread = np.zeros((up, round_up(H * Dvp, STEP)), np.int8)
            gaps = ((0, 0), (0, 0), (0, Dvp - Dv))
            spread[:Eo, : H * Dvp] = np.pad(o[0].reshape(Eo, H, Dv), gaps).reshape(Eo, H * Dvp)
            factors, bias = np.zeros(up, np.float32), np.zeros(up, np.float32)
            factors[:Eo] = o[1]
            if out_bias is not None:
                bias[:Eo] = out_bias
            put_linear("o", spread, factors, bias)
        positions = norm_fields(reals, q_norm, k_norm, fold) | rotary_fields(rotary)
        self._rotary = rotary
        self.weights, self.factors = packer.packed(), reals.packed()
        self._fixed = address(self.factors), address(self.weights)
        self.parameters = blank(
            f.LAYER, query_width=q[0].shape[1], key_width=k[0].shape[1], value_width=v[0].shape[1], out_width=Eo,
            heads=H, kv_heads=Hkv, head_size=D, value_size=Dv, padded_head=Dp, padded_value=Dvp,
            has_out=o is not None, apart=len(columns), **packer.at, **reals.at, **positions)
        place_own(self.parameters)
        self.output_dim = Eo
        self._plans = PlanCache()
        self._alike = shared_plans((DynamicLayer, self.weights.size, *vars(self.parameters).values()))

    def prepare(self, xq, xk, xv, masks=NO_MASKS, position=0):
        """The `PreparedCall` for inputs, some of them perhaps the same array; the rest as `FloatLayer.prepare`'s."""
        key = (*xq.shape[:2], xk.shape[1], xq is xk, xk is xv, masks, position)
        return self._plans.get(key) or self._plans.keep(key, self._planned(*key))

    def prepare_kept(self, xq, keys, masks=NO_MASKS, position=0):
        """The `PreparedCall` for queries, and so many keys of what `keep_keys` gave, which it takes last."""
        key = (*xq.shape[:2], keys, False, False, masks, position, True)
        return self._plans.get(key) or self._plans.keep(key, self._plan(*key))

    def keep_keys(self, xk, xv, keep=None):
        """Keys and values of xk (B, S, Ek) and xv (B, S, Ev), as calls read them: an array. keep: as in calls."""
        B, S, _ = xk.shape
        call = self._plan(B, 0, S, False, xk is xv, KernelMask(keep).shapes)
        kept = threads.aligned(B * named_fields(call.parameters, f.LAYER).kept_size, np.int32)
        kept[:] = 0
        call(xk, xk, xv, None, keep, None, None, None, kept)
        return kept

    def _planned(self, *key):
        """As `_plan`, which layers that differ in their weights alone do once."""
        if self._rotary is not None:
            return self._plan(*key)
        alike = self._alike.get(key)
        return self._alike.keep(key, self._plan(*key)) if alike is None else alike.ending((*self._fixed, 0))

    def _plan(self, B, L, S, same_qk, same_kv, masks, position=0, is_kept=False):
        p = copy_of(self.parameters)
        p.same_qk, p.same_kv, p.is_kept = same_qk, same_kv, is_kept
        shared, private = plan(p, B, L, S, set_masks(p, masks))
        table = rotary_table(self._rotary, L, S, position)
        p.query_position, p.table_step = position, 0 if table is None else table.shape[1]
        H, Hkv, Dp, Dvp = p.heads, p.kv_heads, p.padded_head, p.padded_value
        Eq, Ek, Ev, Eo = p.query_width, p.key_width, p.value_width, p.out_width
        work = 2 * (L * Eq * H * Dp + S * Hkv * (Ek * Dp + Ev * Dvp) + L * H * Dvp * Eo
                    + L * S * H * (Dp + Dvp + 64)) // 3
        work = max(B * work, threads.work_of_reading(self.weights))
        return PreparedCall(f.layer_dynamic, packed(p, f.LAYER), f.LAYER_ADDRESSES, np.int32, shared, private,
                            work, B, (*self._fixed, address(table)), owner=table)

    def __call__(self, xq, xk, xv, out, mask=NO_MASK, position=0):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev): float32, C order; masks as FloatLayer."""
        self.prepare(xq, xk, xv, mask.shapes, position)(xq, xk, xv, out, *mask.arrays)
        return out
