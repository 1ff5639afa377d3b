"""Packing and calling of the float32 multi-head layer."""
import numpy as np

from edgeattn import threads
from edgeattn.runtime.addresses import address
from edgeattn.runtime.compiler import register_jitable
from edgeattn.runtime.plan_cache import PlanCache, shared_plans

from . import fused as f
from .attend_lanes import AT_FREE
from .attend_rows import FEW_QUERIES, MORE_MASK, scratch_of_rows
from .call import PreparedCall
from .matmul import pack_panels, pad_heads, padded_head, round_up
from .packing import Packer
from .positions import norm_fields, rotary_fields, rotary_table
from .records import NO_MASK, NO_MASKS, KernelMask, blank, copy_of, named_fields, packed, place, set_masks
from .row_products import CHAIN
from .simd import LANES, ROWS, WIDTH

GROUP = 1 << 17  # elements of keys and values in scratch at a time, where a head does not need more: 512 KiB
_LOG2_E = 1.4426950408889634


@register_jitable
def unit_size(Dp, Dvp):
    """Any multiple of so many heads fills whole panels of features."""
    return max(WIDTH // min(Dp & -Dp, WIDTH), WIDTH // min(Dvp & -Dvp, WIDTH))


@register_jitable
def heads_of_chain(features):
    """So many key/value heads, of whose context the output has these features each, are whole chains of its sums."""
    heads = 1
    while 2 * heads * features <= CHAIN:
        heads *= 2
    return heads


def chain_of_heads(features):
    """How many products of whole heads a chain of the output's sums has, CHAIN at most: a group begins with a chain."""
    parts = -(-features // CHAIN)
    while features % parts:
        parts += 1
    return heads_of_chain(features) * (features // parts)


@register_jitable
def group_size(S, repeats, Hkv, Dp, Dvp):
    """How many key/value heads are projected and attended to at a time: about as many as GROUP elements hold.

    repeats: heads of queries that each has.  Whole chains of the output's sums, which are the same whatever S is.
    """
    unit = max(unit_size(Dp, Dvp), heads_of_chain(repeats * Dvp))
    most = max(GROUP // max(S * (Dp + Dvp), 1) // unit * unit, unit)
    count = -(-Hkv // most)
    return min(round_up(-(-Hkv // count), unit), Hkv)


@register_jitable
def plan(p, B, L, S, masked):
    """Write a call's shape, and where what it needs lies in its scratch, into p; (shared, private) elements of that."""
    p.batch, p.queries, p.keys = B, L, S
    H, Hkv, Dp, Dvp = p.heads, p.kv_heads, p.padded_head, p.padded_value
    group, p.unit = group_size(S, H // Hkv, Hkv, Dp, Dvp), unit_size(Dp, Dvp)
    p.group = group
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    heads = group * (H // Hkv)
    q_features, k_features, v_features = (round_up(heads * Dp, WIDTH), round_up(group * Dp, WIDTH),
                                          round_up(group * Dvp, WIDTH))
    S_up, tokens = round_up(S, ROWS), min(round_up(L, WIDTH), f.QUERIES)
    shared = round_up((k_features + k_block) * S_up, 16)  # the keys
    p.at_values, shared = place(shared, (v_features + v_block) * S_up + ROWS * v_block)
    p.at_largest, private = place(AT_FREE, k_features + k_block)
    p.at_rows, private = place(private, tokens * (q_features + WIDTH))
    p.at_q, private = place(private, k_block * WIDTH)
    p.at_head, private = place(private, (v_block + ROWS) * WIDTH)
    p.at_context, private = place(private, tokens * (heads * Dvp + WIDTH))
    p.at_edge, private = place(private, tokens * WIDTH)
    p.at_masks, private = place(private, S * WIDTH if masked else 0)
    if L <= FEW_QUERIES:
        p.at_few, private = place(private + MORE_MASK, scratch_of_rows(p.head_size, Dvp))
    p.at_entry = 0
    if B > 1 and shared <= f.LARGEST_ENTRY:
        p.at_entry, private = place(private, shared)
    p.shared_size, p.private_size = shared, private
    return shared, private


class FloatLayer:
    """A multi-head attention layer packed for `layer_float32`.

    Parameters
    ----------
    num_heads, num_kv_heads : int
    weights : ndarrays of float32
        Of queries, keys, values and output: (H*D, Eq), (Hkv*D, Ek), (Hkv*Dv, Ev), (Eo, H*Dv) or None.
    biases : ndarrays of float32, each or None
        In the same order.
    scale : float
        Multiplies the scores; folded into the query projection, or its norm, together with log2(e).
    rotary : RotaryEmbedding, optional
    q_norm, k_norm : (kind, weight, bias or None, eps), optional
        "layer" or "rms", of D features.
    """

    def __init__(self, num_heads, num_kv_heads, weights, biases, scale, rotary=None, q_norm=None, k_norm=None):
        H, Hkv = num_heads, num_kv_heads
        (q_weight, k_weight, v_weight, out_weight), (q_bias, k_bias, v_bias, out_bias) = weights, biases
        D, Dv = q_weight.shape[0] // H, v_weight.shape[0] // Hkv
        Dp, Dvp = padded_head(D), padded_head(Dv)
        fold = np.float64(scale) * _LOG2_E
        packer = Packer(np.float32)
        for name, weight, bias, heads, size, wide, factor in (
                ("k", k_weight, k_bias, Hkv, D, Dp, 1.0),  # in the order in which they are read
                ("v", v_weight, v_bias, Hkv, Dv, Dvp, 1.0),
                ("q", q_weight, q_bias, H, D, Dp, fold if q_norm is None else 1.0)):
            bias = np.zeros(heads * size, np.float32) if bias is None else bias
            if factor != 1.0:
                weight, bias = ((a.astype(np.float64) * factor).astype(np.float32) for a in (weight, bias))
            packer.put("w" + name, pack_panels(pad_heads(weight, heads, size, wide)))
            packer.put("b" + name, pad_heads(bias, heads, size, wide))
        if out_weight is not None:
            Eo = out_weight.shape[0]
            spread = np.zeros((round_up(Eo, WIDTH), H, Dvp), np.float32)
            spread[:Eo, :, :Dv] = out_weight.reshape(Eo, H, Dv)
            packer.put("wo", pack_panels(spread.reshape(-1, H * Dvp)))
            padded_bias = np.zeros(round_up(Eo, WIDTH), np.float32)
            if out_bias is not None:
                padded_bias[:Eo] = out_bias
            packer.put("bo", padded_bias)
        else:
            Eo = H * Dv
        positions = norm_fields(packer, q_norm, k_norm, fold) | rotary_fields(rotary)
        self._rotary = rotary
        self.weights = packer.packed()
        self._address = address(self.weights)
        self.parameters = blank(
            f.LAYER, query_width=q_weight.shape[1], key_width=k_weight.shape[1], value_width=v_weight.shape[1],
            out_width=Eo, heads=H, kv_heads=Hkv, head_size=D, value_size=Dv, padded_head=Dp, padded_value=Dvp,
            has_out=out_weight is not None, out_chain=chain_of_heads(H // Hkv * Dvp), **packer.at, **positions)
        self.output_dim = Eo
        self._plans = PlanCache()
        self._alike = shared_plans((FloatLayer, self.weights.size, *vars(self.parameters).values()))

    def prepare(self, xq, xk, xv, masks=NO_MASKS, position=0):
        """The `PreparedCall` for inputs and masks of such shapes; masks: `KernelMask.shapes`; position: a call's."""
        key = (*xq.shape[:2], xk.shape[1], masks, position)
        return self._plans.get(key) or self._plans.keep(key, self._planned(*key))

    def prepare_kept(self, xq, keys, masks=NO_MASKS, position=0):
        """The `PreparedCall` for queries, and so many keys of what `keep_keys` gave, which it takes last."""
        key = (*xq.shape[:2], keys, masks, position, True)
        return self._plans.get(key) or self._plans.keep(key, self._plan(*key))

    def keep_keys(self, xk, xv, keep=None):
        """Keys and values of xk (B, S, Ek) and xv (B, S, Ev), as calls read them: an array. keep: as in calls."""
        B, S, _ = xk.shape
        call = self._plan(B, 0, S, KernelMask(keep).shapes)
        p = named_fields(call.parameters, f.LAYER)
        kept = threads.aligned(B * -(-p.kv_heads // p.group) * p.kept_size, np.float32)
        call(xk, xk, xv, None, keep, None, None, None, kept)
        return kept

    def _planned(self, *key):
        """As `_plan`, which layers that differ in their weights alone do once."""
        if self._rotary is not None:
            return self._plan(*key)
        alike = self._alike.get(key)
        return self._alike.keep(key, self._plan(*key)) if alike is None else alike.ending((self._address, 0))

    def _plan(self, B, L, S, masks, position=0, is_kept=False):
        p = copy_of(self.parameters)
        shared, private = plan(p, B, L, S, set_masks(p, masks))
        table = rotary_table(self._rotary, L, S, position)
        p.query_position, p.table_step = position, 0 if table is None else table.shape[1]
        p.kept_size, p.is_kept = shared, is_kept
        H, Hkv, Dp, Dvp = p.heads, p.kv_heads, p.padded_head, p.padded_value
        Eq, Ek, Ev, Eo = p.query_width, p.key_width, p.value_width, p.out_width
        work = 2 * B * (L * Eq * H * Dp + S * (Ek * Hkv * Dp + Ev * Hkv * Dvp) + L * H * Dvp * Eo
                        + L * S * H * (Dp + Dvp))
        work = max(work, threads.work_of_reading(self.weights))
        return PreparedCall(f.layer_float32, packed(p, f.LAYER), f.LAYER_ADDRESSES, np.float32, shared, private, work,
                            B, (self._address, address(table)), owner=table)

    def __call__(self, xq, xk, xv, out, mask=NO_MASK, position=0):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all float32 and C-contiguous.

        mask : KernelMask
        position : that of query 0 among the keys, for the rotation
        """
        self.prepare(xq, xk, xv, mask.shapes, position)(xq, xk, xv, out, *mask.arrays)
        return out
