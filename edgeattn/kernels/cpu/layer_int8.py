"""Packing and calling of the static int8 multi-head layer."""
import numpy as np

from edgeattn import threads
from edgeattn.runtime.addresses import address
from edgeattn.runtime.compiler import register_jitable
from edgeattn.runtime.plan_cache import PlanCache

from . import fused_int8 as f
from . import softmax_int8
from .byte_products import DEPTH_STEP, READ_AHEAD, TILES_SCRATCH, pack_byte_panels
from .cached_int8 import cached_int8
from .call import PreparedCall
from .int8_operands import value_terms_size
from .matmul import pad_heads, padded_head, round_up
from .packing import Packer
from .records import BAND, KEEP, NO_MASKS, KernelMask, blank, copy_of, packed, place, set_masks, shape_of, slot
from .requantize import NUMBERS, encode
from .simd import LANES, OFFSET, ROWS, WIDTH, byte_planes
from .softmax_int8 import KEPT_GROUPS
from .static_layout import padded_keys, turned_size, values_size
from .step_int8 import step_sizes
from .token_codes import packed_depth

_OWN = slot(f.LAYER, "keys")  # where begins what each call with a cache has of its own, masks at its end
_MASKS = f"{BAND} {KEEP}".split()
_UNMASKED = (0,) * len(_MASKS)
_MORE_KEYS = 64  # of a cache, that a plan has room for
_CACHED = slot(f.ADDRESSES, "cached_keys")  # and values after them


def place_own(p):
    """Write where things begin in the scratch of each thread into p, but for those behind the codes of scores."""
    H, Dp, Dvp = p.heads, p.padded_head, p.padded_value
    row_major_row = round_up(round_up(H * max(Dp, Dvp), WIDTH) // 4, LANES)
    deepest = packed_depth(max(p.query_width, p.key_width, p.value_width))
    p.at_x, private = place(0, f.TOKENS * deepest + ROWS * WIDTH)
    p.at_row_major, private = place(private, max(WIDTH * row_major_row + LANES, f.TOKENS // 4 * WIDTH, LANES * LANES))
    p.at_q, private = place(private, max(row_major_row, H * round_up(Dp // 4, DEPTH_STEP)) * WIDTH)
    p.at_sums, private = place(private, 3 * WIDTH)
    p.at_terms, private = place(private, value_terms_size(Dvp))
    p.at_context, p.at_codes = place(private, (packed_depth(H * Dvp) + ROWS) * WIDTH)


@register_jitable
def plan(p, B, L, S):
    """Write a call's shape, and where what it needs lies in its scratch, into p, which has the rest.

    Returns (shared, private) elements of scratch.
    """
    p.batch, p.queries, p.keys = B, L, S
    H, Dp, Dvp = p.heads, p.padded_head, p.padded_value
    features, v_features = round_up(H * Dp, WIDTH), round_up(H * Dvp, WIDTH)
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    S_up = padded_keys(S)
    keys = round_up(features, k_block) * S_up + k_block * (READ_AHEAD + LANES)
    shared = round_up(keys // 4 + LANES, 16)
    p.at_values, shared = place(shared, values_size(v_features, v_block, S_up))
    p.at_krow, shared = place(shared, H * S_up)
    _, private = place(p.at_codes, (round_up(S_up // 4, DEPTH_STEP) + 4) * WIDTH)
    p.at_masks, private = place(private, (S_up // 4 + 4) * WIDTH)
    p.at_softmax, private = place(private, min(S_up, 4 * KEPT_GROUPS) * WIDTH)
    p.at_tiles, private = place(private, max(TILES_SCRATCH, 16))
    p.at_transposed, private = place(private, turned_size(packed_depth(H * Dvp)))
    p.shared_size, p.private_size = shared, private
    return shared, private


def corrected_bias(weight, bias, zero_point):
    """The bias (n,) of a weight (n, k), of codes with that zero point, for operands that are codes plus OFFSET."""
    correction = bias.astype(np.int64) - (OFFSET + zero_point) * weight.astype(np.int64).sum(1)
    return ((correction + 2**31) % 2**32 - 2**31).astype(np.int32)  # wraps as the accumulator does


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
        (256,), of the dtype that the rule has; entry d belongs to a code d below the maximum.
    softmax : str
        A name of softmax_int8.RULES.
    tables : dict, optional
        "query" and "key", where the product reads not what the projection gives -> (int8 (256,) of the code c, at
        c + 128, what it reads; the zero point of the codes that the projection gives).
    """

    def __init__(self, num_heads, linears, scores, context, zero_points, project_rule, score_rule, context_rule,
                 softmax_table, softmax, tables=None):
        H, zero_points = num_heads, dict(zero_points)
        D, Dv = linears["query"][0].shape[0] // H, linears["value"][0].shape[0] // H
        Dp, Dvp = padded_head(D), padded_head(Dv)
        weights = Packer(np.int32)

        def put_linear(letter, weight, bias, multipliers, source):
            """Weight (n, k), bias and multipliers are already padded; the source's zero point goes into the bias."""
            weights.put("w" + letter, pack_byte_panels(weight))
            weights.put("b" + letter, corrected_bias(weight, bias, zero_points[source]))
            weights.put("m" + letter, encode(project_rule, multipliers))

        for letter, name, size, wide in (("k", "key", D, Dp), ("v", "value", Dv, Dvp), ("q", "query", D, Dp)):
            weight, real, bias = linears[name]
            depth = weight.shape[1]
            deep = np.zeros((weight.shape[0], 4 * packed_depth(depth)), np.int8)
            deep[:, :depth] = weight
            bias = np.zeros(len(weight), np.int32) if bias is None else bias
            put_linear(letter, pad_heads(deep, H, size, wide), pad_heads(bias, H, size, wide),
                       pad_heads(real, H, size, wide), name + "_input")
        if "output" in linears:
            weight, real, bias = linears["output"]
            Eo = weight.shape[0]
            up = round_up(Eo, WIDTH)
            spread = np.zeros((up, 4 * packed_depth(H * Dvp)), np.int8)
            spread[:Eo, :H * Dvp].reshape(Eo, H, Dvp)[:, :, :Dv] = weight.reshape(Eo, H, Dv)
            wide_bias, wide_real = np.zeros(up, np.int32), np.zeros(up)
            wide_real[:Eo] = real
            if bias is not None:
                wide_bias[:Eo] = bias
            put_linear("o", spread, wide_bias, wide_real, "context")
        else:
            Eo = H * Dv
        for letter, name in (("q", "query"), ("k", "key")):
            zero_points[f"{name}_projection"] = zero_points[name]
            if tables and name in tables:
                table, zero_points[f"{name}_projection"] = tables[name]
                weights.put("t" + letter, np.roll(table, 128).view(np.int32))  # by the bytes that codes are
        weights.put("ms", encode(score_rule, [scores] * LANES))
        weights.put("mc", encode(context_rule, [context] * LANES))
        self.weights = weights.packed()
        self.table = threads.aligned(512, softmax_table.dtype)
        self.table[:] = byte_planes(softmax_table)
        self._fixed = address(self.weights), address(self.table)
        self.parameters = blank(
            f.LAYER, query_width=linears["query"][0].shape[1], key_width=linears["key"][0].shape[1],
            value_width=linears["value"][0].shape[1], out_width=Eo, heads=H, head_size=D, value_size=Dv, padded_head=Dp,
            padded_value=Dvp, has_out="output" in linears, softmax_rule=softmax_int8.NUMBERS[softmax],
            project_rule=NUMBERS[project_rule], score_rule=NUMBERS[score_rule], context_rule=NUMBERS[context_rule],
            yq=zero_points["query_projection"], yk=zero_points["key_projection"],
            zq=zero_points["query"], zk=zero_points["key"], zv=zero_points["value"], zs=zero_points["scores"],
            zc=zero_points["context"], zo=zero_points["output"] if "output" in linears else 0, **weights.at)
        place_own(self.parameters)
        self.output_dim = Eo
        self._plans = PlanCache()

    def prepare(self, xq, xk, xv, masks=NO_MASKS, lut_index=None, score_luts=None):
        """The `PreparedCall` for inputs, some of them perhaps the same array, and masks as `FloatLayer.prepare`'s.

        Its calls bring neither lut_index nor score_luts: they are where these are, and must be kept.
        """
        tokens = xk.shape[1]
        key = (*xq.shape[:2], tokens, tokens, xk is xv, False, masks, shape_of(lut_index),
               (address(lut_index), address(score_luts)))
        return self._plans.get(key) or self._plans.keep(key, self._plan(*key))

    def _plan(self, B, L, S, tokens, same_kv, cached, masks, index, luts):
        """The `PreparedCall` for these shapes, of masks too.

        tokens : keys that are projected; same_kv : whether keys and values have the same input; cached : whether the
        other keys come from a cache; index : the shape of lut_index; luts : addresses of lut_index and score_luts
        """
        p = copy_of(self.parameters)
        set_masks(p, masks, index)
        p.same_kv = same_kv
        shared, private = plan(p, B, L, S)
        if cached:
            p.at_step, private = place(private, sum(step_sizes(p.head_size, p.value_size)))
            p.private_size = private
        H, Dp, Dvp = p.heads, p.padded_head, p.padded_value
        Eq, Ek, Ev, Eo = p.query_width, p.key_width, p.value_width, p.out_width
        work = 2 * (L * Eq * H * Dp + tokens * H * (Ek * Dp + Ev * Dvp) + L * H * Dvp * Eo
                    + L * S * H * (Dp + Dvp + 64)) // 3
        kernel = cached_int8 if cached else f.layer_int8
        return PreparedCall(kernel, packed(p, f.LAYER), f.ADDRESSES, np.int32, shared, private, B * work, B,
                            (*luts, *self._fixed), own=_OWN if cached else None)

    def step(self, plans, x, out, keys, values, slots, score_luts):
        """out (B, 1, Eo) from x (B, 1, E), the one new token of a layer with one input; as `__call__`, without masks.

        plans : PlanCache of this cache alone, whose arrays, the same ones in every call, are keys and values
        slots : (first, last) of those that are attended to; the codes of x go into the last of them
        """
        first, last = slots
        key = self, (last - first + _MORE_KEYS - 1) // _MORE_KEYS
        call = plans.get(key) or plans.keep(key, self._plan(
            keys.shape[0], 1, round_up(last - first, _MORE_KEYS), 1, True, True, NO_MASKS, None,
            (0, address(score_luts))).holding({_CACHED: keys, _CACHED + 1: values}))
        call.run(x, x, x, out, own=(last - first, first, 1, keys.shape[2]))

    def __call__(self, xq, xk, xv, out, keep=None, band=None, lut_index=None, score_luts=None, cached=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all int8 and C-contiguous.

        keep : uint8 or bool, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules; 0 means the key is not there
        band : (low, high): query i sees key j when i + low <= j <= i + high
        score_luts : int8 (n, 256): score code c becomes score_luts[index, c + 128] before the softmax
        lut_index : uint8 broadcast to (B, H, L, S): which of them; the first one everywhere if None
        cached : (keys (B, H, capacity, D), values (B, H, capacity, Dv), first, S), int8 and C-contiguous: attention is
            over the S slots from `first` on, and the codes of xk and xv go into the last of these
        """
        masks = KernelMask(keep, band=band).shapes
        if cached is None:
            self.prepare(xq, xk, xv, masks, lut_index, score_luts)(xq, xk, xv, out, keep)
        else:
            self._call_cached(xq, xk, xv, out, keep, (shape_of(lut_index), (address(lut_index), address(score_luts))),
                              cached, masks)
        return out

    def _call_cached(self, xq, xk, xv, out, keep, luts, cached, masks):
        keys, values, first, S = cached
        key = (*xq.shape[:2], round_up(S, _MORE_KEYS), xk.shape[1], xk is xv, True, NO_MASKS, *luts)
        call = self._plans.get(key) or self._plans.keep(key, self._plan(*key))
        mask_fields = _UNMASKED
        if masks != NO_MASKS:  # a plan serves any masks, and fewer keys too
            p = copy_of(self.parameters)
            set_masks(p, masks)
            mask_fields = [getattr(p, name) for name in _MASKS]
        call.run(xq, xk, xv, out, keep, None, keys, values, own=(S, first, xk.shape[1], keys.shape[2], *mask_fields))
