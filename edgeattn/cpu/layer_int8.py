"""Packing and calling of the static int8 multi-head layer."""
import ctypes
import ctypes.util


import numpy as np

from edgeattn import threads
from . import fused_int8 as f
from edgeattn.jit import entry
from .layer_float32 import _strides
from .matmul import MATRIX, MATRIX_TOKENS, aligned, pack_byte_panels, pad_heads, padded_head, round_up
from .requantize import RULES, encode
from .simd import LANES, OFFSET, ROWS, WIDTH

_EMPTY_U8 = np.zeros(0, np.uint8)
_EMPTY_I8 = np.zeros(0, np.int8)


def fully_connected_multipliers(rule, input_scale, weight_scale, output_scale):
    """Multiplier per output channel in the precision `rule` prescribes."""
    xs, ws, ys = np.float32(input_scale), np.asarray(weight_scale, np.float32), np.float32(output_scale)
    if rule == "float_rne":
        return (xs * ws) / ys
    return np.float64(xs) * ws.astype(np.float64) / np.float64(ys)


def batch_matmul_multiplier(rule, a_scale, b_scale, output_scale):
    """The one multiplier of a batch matmul in the precision `rule` prescribes."""
    product = np.float32(a_scale) * np.float32(b_scale)
    if rule == "float_rne":
        return np.float32(product / np.float32(output_scale))
    return np.float64(product) / np.float64(np.float32(output_scale))


class StaticLayer:
    """A static int8 multi-head layer packed for `layer_int8`.

    Parameters
    ----------
    num_heads : int
    linears : dict
        "query", "key", "value" and optionally "output" -> (weight int8 (out, in), scale float32 (out,),
        bias int32 (out,) or None).
    tensors : dict
        name -> (scale, zero point) for "query_input", "key_input", "value_input", "query", "key", "value", "scores",
        "probabilities", "context" and, with an output projection, "output".
    project_rule, score_rule, context_rule : str
        Names of RULES.
    softmax_table : ndarray
        (256,) float32 for lut_f32, int32 for lut_u16 and fixed; entry d belongs to a code d below the maximum.
    fixed : bool
        Whether an int32 table belongs to the rule "fixed".
    """

    def __init__(self, num_heads, linears, tensors, project_rule, score_rule, context_rule, softmax_table, fixed=False):
        H = num_heads
        D, Dv = linears["query"][0].shape[0] // H, linears["value"][0].shape[0] // H
        Dp, Dvp = padded_head(D), padded_head(Dv)
        parts, at = [], {}

        def put(name, array):
            at[name] = sum(part.size for part in parts)
            padded = np.zeros(round_up(array.size, 16), np.int32)
            padded[:array.size] = array.ravel()
            parts.append(padded)

        def put_linear(letter, weight, bias, scale, source, target):
            """Spread weight (n, k), bias, scale are already padded; the zero point of the source goes into the bias."""
            sums = weight.astype(np.int64).sum(1)
            correction = bias.astype(np.int64) - (OFFSET + int(source[1])) * sums
            correction = (correction + 2**31) % 2**32 - 2**31  # wraps as the accumulator does
            put("w" + letter, pack_byte_panels(weight))
            put("b" + letter, correction.astype(np.int32))
            multipliers = fully_connected_multipliers(project_rule, source[0], scale, target[0])
            put("m" + letter, encode(project_rule, multipliers))

        for letter, name, size, wide in (("q", "query", D, Dp), ("k", "key", D, Dp), ("v", "value", Dv, Dvp)):
            weight, scale, bias = linears[name]
            depth = weight.shape[1]
            deep = np.zeros((weight.shape[0], round_up(depth, 4)), np.int8)
            deep[:, :depth] = weight
            bias = np.zeros(len(weight), np.int32) if bias is None else bias
            put_linear(letter, pad_heads(deep, H, size, wide), pad_heads(bias, H, size, wide),
                       pad_heads(np.asarray(scale, np.float32), H, size, wide), tensors[name + "_input"], tensors[name])
        if "output" in linears:
            weight, scale, bias = linears["output"]
            Eo = weight.shape[0]
            up = round_up(Eo, WIDTH)
            spread = np.zeros((up, H, Dvp), np.int8)
            spread[:Eo, :, :Dv] = weight.reshape(Eo, H, Dv)
            wide_bias, wide_scale = np.zeros(up, np.int32), np.zeros(up, np.float32)
            wide_scale[:Eo] = scale
            if bias is not None:
                wide_bias[:Eo] = bias
            put_linear("o", spread.reshape(up, H * Dvp), wide_bias, wide_scale, tensors["context"], tensors["output"])
        else:
            Eo = H * Dv
            at["wo"] = at["bo"] = at["mo"] = 0
        for name, rule, a, b, c in (("ms", score_rule, "query", "key", "scores"),
                                    ("mc", context_rule, "probabilities", "value", "context")):
            m = batch_matmul_multiplier(rule, tensors[a][0], tensors[b][0], tensors[c][0])
            put(name, encode(rule, [m] * LANES))
        self.weights = aligned(sum(part.size for part in parts), np.int32)
        np.concatenate(parts, out=self.weights)
        table = aligned(256, softmax_table.dtype)
        table[:] = softmax_table
        self._fixed = (*(RULES[name] for name in (project_rule, score_rule, context_rule)), table)
        self._run = None
        p = self._parameters = np.zeros(f.P_COUNT, np.int64)
        for slot, value in (
                (f.P_EQ, linears["query"][0].shape[1]), (f.P_EK, linears["key"][0].shape[1]),
                (f.P_EV, linears["value"][0].shape[1]), (f.P_EO, Eo), (f.P_HEADS, H), (f.P_D, D), (f.P_DV, Dv),
                (f.P_D_PAD, Dp), (f.P_DV_PAD, Dvp), (f.P_HAS_OUT, "output" in linears), (f.P_FIXED, fixed),
                (f.P_WQ, at["wq"]), (f.P_BQ, at["bq"]), (f.P_MQ, at["mq"]), (f.P_WK, at["wk"]), (f.P_BK, at["bk"]),
                (f.P_MK, at["mk"]), (f.P_WV, at["wv"]), (f.P_BV, at["bv"]), (f.P_MV, at["mv"]), (f.P_WO, at["wo"]),
                (f.P_BO, at["bo"]), (f.P_MO, at["mo"]), (f.P_MS, at["ms"]), (f.P_MC, at["mc"]),
                (f.P_ZQ, tensors["query"][1]), (f.P_ZK, tensors["key"][1]), (f.P_ZV, tensors["value"][1]),
                (f.P_ZS, tensors["scores"][1]), (f.P_ZC, tensors["context"][1]),
                (f.P_ZO, tensors["output"][1] if "output" in linears else 0)):
            p[slot] = value
        self.output_dim = Eo
        self._plans = {}

    @classmethod
    def from_reference(cls, P, Q, H):
        """From the dictionaries of a parameter table: P name -> (scale, zero point), Q weights, scales, biases."""
        names = {"query": "q", "key": "k", "value": "v", "output": "o"}
        linears = {n: (Q["w" + c], Q["ws" + c], Q["b" + c]) for n, c in names.items()}
        tensors = {"query_input": P["x"], "key_input": P["x"], "value_input": P["x"], "query": P["q"], "key": P["k"],
                   "value": P["v"], "scores": P["s"], "probabilities": P["p"], "context": P["c"], "output": P["y"]}
        return cls(H, linears, tensors, "float_rne", "float_rne", "float_rne", exponentials_float32(P["s"][0]))

    def _plan(self, L, S):
        p = self._parameters.copy()
        p[f.P_L], p[f.P_S] = L, S
        H, Dp, Dvp = (int(p[i]) for i in (f.P_HEADS, f.P_D_PAD, f.P_DV_PAD))
        Eq, Ek, Ev, Eo = (int(p[i]) for i in (f.P_EQ, f.P_EK, f.P_EV, f.P_EO))
        features, v_features = round_up(H * Dp, WIDTH), round_up(H * Dvp, WIDTH)
        k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
        S_up = round_up(S, ROWS)
        natural_row = round_up(features // 4, LANES)

        def layout(start, sizes):
            for slot, size in sizes:
                if slot is not None:
                    p[slot] = start
                start += round_up(size, 16)
            return start

        shared = layout(0, ((None, (features + k_block) * S_up // 4),
                            (f.P_VALUES, (v_features + v_block) * (S_up // 4) + 2 * WIDTH), (f.P_KROW, H * S_up)))
        private = layout(0, (
            (f.P_AT_X, max(f.TOKENS, WIDTH) * max(round_up(E, 4) // 4 for E in (Eq, Ek, Ev)) + ROWS * WIDTH),
            (f.P_AT_NATURAL, WIDTH * natural_row), (f.P_AT_Q, natural_row * WIDTH),
            (f.P_AT_SUMS, 3 * WIDTH + 16), (f.P_AT_CONTEXT, (H * Dvp // 4 + ROWS) * WIDTH),
            (f.P_AT_CODES, (S_up // 4 + 4) * WIDTH), (f.P_AT_MASKS, (S_up // 4 + 4) * WIDTH),
            (f.P_AT_VALUES, (S_up + 16) * WIDTH), (f.P_AT_TILES, MATRIX_TOKENS * WIDTH),
            (f.P_AT_TURNED, WIDTH * H * Dvp // 4 if MATRIX else 0)))
        work = 2 * (L * Eq * H * Dp + S * H * (Ek * Dp + Ev * Dvp) + L * H * Dvp * Eo + L * S * H * (Dp + Dvp + 64)) // 3
        return p, shared, private, work

    def __call__(self, xq, xk, xv, out, keep=None, band=None, classes=None, tables=None):
        """out (B, L, Eo) from xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), all int8 and C-contiguous.

        keep : uint8 or bool, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules; 0 means the key is not there
        band : (low, high): query i sees key j when i + low <= j <= i + high
        tables : int8 (n, 256): score code c becomes tables[class, c + 128] before the softmax
        classes : uint8 broadcast to (B, H, L, S): which table; class 0 everywhere if None
        """
        B, L, S = xq.shape[0], xq.shape[1], xk.shape[1]
        plan = self._plans.get((L, S))
        if plan is None:
            if len(self._plans) > 64:
                self._plans.clear()
            plan = self._plans[L, S] = self._plan(L, S)
        p, shared_size, private_size, work = plan
        same = xk is xv
        if keep is not None or band is not None or classes is not None or not same:
            p = p.copy()
            if band is not None:
                p[f.P_BAND], p[f.P_LOW], p[f.P_HIGH] = 1, band[0], band[1]
            if keep is not None:
                p[f.P_KEEP_B:f.P_KEEP_S + 1] = _strides(keep, None)
            if classes is not None:
                p[f.P_CLASS_B:f.P_CLASS_S + 1] = _strides(classes, None)
            p[f.P_SAME_KV] = same
        keep = _EMPTY_U8 if keep is None else keep.reshape(-1).view(np.uint8)
        classes = _EMPTY_U8 if classes is None else classes.reshape(-1)
        tables = _EMPTY_I8 if tables is None else tables.reshape(-1)
        arguments = (xq.reshape(-1), xk.reshape(-1), xv.reshape(-1), out.reshape(-1),
                     self.weights, p, keep, classes, tables)
        if self._run is None:
            scratch = np.zeros(1, np.int32)
            self._run = entry(f.layer_int8, (*self._fixed, *arguments, scratch, scratch, 0, 0, 0, 0))
        threads.run_layer(self._run, self._fixed, arguments, np.int32, shared_size, private_size, B, S, MATRIX_TOKENS, -(-L // WIDTH),
                          B * work)
        return out


def exponentials_float32(scale):
    """lut_f32: float32 exp(-scale * d) for d in 0..255, by the C library's expf."""
    expf = ctypes.CDLL(ctypes.util.find_library("m")).expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    step = np.float32(-np.float32(scale))
    return np.array([expf(float(step * np.float32(d))) for d in range(256)], np.float32)
