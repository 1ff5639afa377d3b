"""int8 static attention: the operators a .tflite attention layer consists of, under any rounding and softmax rule.

A rule is an argument: one of the compiled functions in REQUANTIZE, or the (weight, probability) pair in SOFTMAX.
"""

from typing import NamedTuple

import numpy as np

from edgeattn import arithmetic
from edgeattn.jit import jit

REQUANTIZE = {name: jit(rule) for name, rule in arithmetic.REQUANTIZE.items()}
SOFTMAX = {name: (jit(rule.weight), jit(rule.probability)) for name, rule in arithmetic.SOFTMAX.items()}


class Requantization(NamedTuple):
    """From an int32 accumulator to an int8 code: one multiplier per channel, or one for all channels."""

    q31: np.ndarray  # int32 (channels,)
    shift: np.ndarray  # int32 (channels,)
    real: np.ndarray  # float64 (channels,)
    zero_point: int  # of the output


class Softmax(NamedTuple):
    """The data of a softmax rule."""

    table: np.ndarray  # (256,) exponentials of the differences to the row maximum
    zero: np.generic  # an empty sum, in its type


class ScoreMap(NamedTuple):
    """What happens to a score's code before the softmax: ``code -> tables[classes[b, h, i, j], code + 128]``."""

    tables: np.ndarray  # int8 (n, 256)
    classes: np.ndarray  # uint8 (B, H, L, S), strides may be 0


@jit
def code(acc, r, channel, requantize):
    """The int8 code of an accumulator."""
    value = requantize(acc, np.int64(r.q31[channel]), np.int64(r.shift[channel]), r.real[channel]) + r.zero_point
    return np.int8(min(max(value, -128), 127))


@jit
def linear(x, zero_point, weight, bias, r, requantize, out):
    """FULLY_CONNECTED. x (N, I) int8, weight (O, I) int8, bias (O,) int32, out (N, O) int8."""
    for n in range(x.shape[0]):
        for o in range(weight.shape[0]):
            acc = np.int32(bias[o])
            for i in range(x.shape[1]):
                acc += np.int32((np.int32(x[n, i]) - np.int32(zero_point)) * np.int32(weight[o, i]))
            out[n, o] = code(acc, r, o, requantize)


@jit
def attention(q, k, v, zero_points, r_scores, scores_rule, score_map, keep, softmax, weight, probability, r_context,
              context_rule, out):
    """BATCH_MATMUL, score map, SOFTMAX, BATCH_MATMUL for every head.

    q (B, H, L, D), k (B, H, S, D), v (B, H, S, Dv), out (B, H, L, Dv): int8. zero_points: of q, k, v.
    keep (B, H, L, S) uint8: a key with 0 is not there; a row without keys gets the context's zero point.
    """
    zq, zk, zv = np.int32(zero_points[0]), np.int32(zero_points[1]), np.int32(zero_points[2])
    B, H, L, D = q.shape
    S, Dv = v.shape[2], v.shape[3]
    row = np.empty(S, np.int32)
    acc = np.empty(Dv, np.int32)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                # 1. codes of the scores, and their maximum over the keys that are there
                largest = np.int32(-129)
                for j in range(S):
                    if keep[b, h, i, j]:
                        dot = np.int32(0)
                        for d in range(D):
                            dot += np.int32((np.int32(q[b, h, i, d]) - zq) * (np.int32(k[b, h, j, d]) - zk))
                        s = np.int32(code(dot, r_scores, 0, scores_rule))
                        row[j] = score_map.tables[score_map.classes[b, h, i, j], s + 128]
                        largest = max(largest, row[j])
                # 2. sum of the exponentials, in key order
                total = softmax.zero
                for j in range(S):
                    if keep[b, h, i, j]:
                        total += weight(softmax.table[largest - row[j]])
                # 3. probabilities in 1/256 times values
                acc[:] = 0
                if largest >= -128:
                    for j in range(S):
                        if keep[b, h, i, j]:
                            p = np.int32(min(probability(softmax.table[largest - row[j]], total), 255))
                            for d in range(Dv):
                                acc[d] += np.int32(p * (np.int32(v[b, h, j, d]) - zv))
                for d in range(Dv):
                    out[b, h, i, d] = code(acc[d], r_context, 0, context_rule)
