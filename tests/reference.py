"""Attention written as its formula says, in NumPy: what everything else is compared with.

Imports nothing of the packages under test. In float64 it is the oracle; in float32 it is the plain
implementation whose error is the measure for theirs.
"""

import numpy as np


def visible(
    B,
    H,
    L,
    S,
    *,
    keep=None,
    padding=None,
    causal=False,
    alignment="upper_left",
    window=(-1, -1),
    lengths=None,
):
    """(B, H, L, S) bool: True where query i of batch entry b may see key j, one rule after the other."""
    permitted = np.ones((B, H, L, S), bool)
    for b in range(B):
        length = S if lengths is None else int(lengths[b])
        offset = length - L if alignment == "lower_right" else 0
        for i in range(L):
            for j in range(S):
                p = i + offset
                seen = j < length
                seen &= not (causal and j > p)
                seen &= not (window[0] >= 0 and j < p - window[0])
                seen &= not (window[1] >= 0 and j > p + window[1])
                seen &= padding is None or bool(padding[b, j])
                permitted[b, :, i, j] = seen
    return permitted if keep is None else permitted & keep


def attention(query, key, value, permitted=None, bias=None, *, scale=None, softcap=0.0, dtype=np.float64):
    """(output (B, H, L, Dv), weights (B, H, L, S)), every step in `dtype`."""
    query, key, value = (np.asarray(array).astype(dtype) for array in (query, key, value))
    B, H, L, D = query.shape
    repeats = H // key.shape[1] if key.shape[1] else 1
    key, value = np.repeat(key, repeats, axis=1), np.repeat(value, repeats, axis=1)
    S = key.shape[2]
    if permitted is None:
        permitted = np.ones((B, H, L, S), bool)
    permitted = np.broadcast_to(permitted, (B, H, L, S))
    if scale is None:
        scale = 1 / np.sqrt(D) if D else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        scores = query @ key.swapaxes(-1, -2) * dtype(scale)
        if softcap:
            scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
        if bias is not None:
            bias = np.broadcast_to(np.asarray(bias).astype(dtype), (B, H, L, S))
            permitted = permitted & (bias != -np.inf)
            scores = scores + bias
        weights = np.zeros((B, H, L, S), dtype)
        output = np.zeros((B, H, L, value.shape[3]), dtype)
        for b, h, i in np.ndindex(B, H, L):
            seen = permitted[b, h, i]
            if seen.any():
                row = scores[b, h, i, seen]
                row = np.exp(row - row.max())
                weights[b, h, i, seen] = row / row.sum(dtype=dtype)
                output[b, h, i] = weights[b, h, i, seen] @ value[b, h, seen]
    return output, weights


def multi_head_attention(
    parameters,
    num_heads,
    query,
    key,
    value,
    permitted=None,
    bias=None,
    *,
    num_kv_heads=None,
    dtype=np.float64,
):
    """(output (B, L, Eo), weights (B, H, L, S)) of a layer; `parameters`: q_weight, q_bias, ... to arrays."""
    kv_heads = num_kv_heads or num_heads

    def linear(x, name):
        y = x.astype(dtype) @ parameters[f"{name}_weight"].astype(dtype).T
        bias_vector = parameters.get(f"{name}_bias")
        return y if bias_vector is None else y + bias_vector.astype(dtype)

    def split(x, heads):
        return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)

    context, weights = attention(
        split(linear(query, "q"), num_heads),
        split(linear(key, "k"), kv_heads),
        split(linear(value, "v"), kv_heads),
        permitted,
        bias,
        dtype=dtype,
    )
    B, H, L, Dv = context.shape
    output = context.transpose(0, 2, 1, 3).reshape(B, L, H * Dv)
    return (linear(output, "out") if "out_weight" in parameters else output), weights


def assert_as_accurate(result, oracle, plain):
    """Error against float64 at most twice that of the plain float32 computation.

    In short sums the plain error may be 0 by luck, so two units in the last place of the largest result are
    always allowed: one for the roundings of a probability, one for those of the weighted sum.
    """
    assert result.shape == oracle.shape
    if not result.size:
        return
    ours, theirs = np.abs(result - oracle).max(), np.abs(plain - oracle).max()
    ulps = 2 * float(np.spacing(np.float32(np.abs(oracle).max())))
    assert ours <= 2 * theirs + ulps, f"error {ours:.3g}, plain float32 {theirs:.3g}"
