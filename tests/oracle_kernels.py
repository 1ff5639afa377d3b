"""Slow and obvious attention in float64 and in exact integers, for the kernel tests; imports nothing of edgeattn."""
import numpy as np


def visible(shape, keep=None, band=None, lengths=None):
    """Boolean (B, H, L, S): which key each query may see."""
    seen = np.ones(shape, bool)
    if keep is not None:
        seen &= np.broadcast_to(keep, shape).astype(bool)
    i, j = np.arange(shape[2])[:, None], np.arange(shape[3])[None, :]
    if band is not None:
        seen &= (i + band[0] <= j) & (j <= i + band[1])
    if lengths is not None:
        seen &= np.arange(shape[3]) < np.asarray(lengths)[:, None, None, None]
    return seen


def attention(q, k, v, scale, softcap=0.0, keep=None, bias=None, band=None, lengths=None):
    """softmax(q k^T scale) v in float64; a query that sees no key gets zeros; unseen keys are not touched."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.astype(np.float64), k.astype(np.float64).repeat(group, 1), v.astype(np.float64).repeat(group, 1)
    scores = np.einsum("bhld,bhsd->bhls", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    seen = visible(scores.shape, keep, band, lengths)
    out = np.zeros(q.shape[:3] + v.shape[3:])
    for at in np.ndindex(scores.shape[:3]):
        row = seen[at]
        if row.any():
            e = np.exp(scores[at][row] - scores[at][row].max())
            out[at] = e @ v[at[0], at[1]][row] / e.sum()
    return out


def heads(x, weight, bias, count):
    y = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    return y.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def layer(xq, xk, xv, weights, num_heads, num_kv_heads, **masks):
    """A whole multi-head layer in float64; weights = (wq, wk, wv, wo, bq, bk, bv, bo)."""
    wq, wk, wv, wo, bq, bk, bv, bo = weights
    q, k, v = heads(xq, wq, bq, num_heads), heads(xk, wk, bk, num_kv_heads), heads(xv, wv, bv, num_kv_heads)
    context = attention(q, k, v, q.shape[-1] ** -0.5, **masks)
    merged = context.transpose(0, 2, 1, 3).reshape(xq.shape[0], xq.shape[1], -1)
    return merged @ wo.astype(np.float64).T + bo


# --- int8: rules on Python integers ------------------------------------------------------------------------------

def doubling_high(a, q):
    product = a * q
    nudge = 1 << 30 if product >= 0 else 1 - (1 << 30)
    total = product + nudge
    return total // 2**31 if total >= 0 else -(-total // 2**31)


def divide_by_power(v, exponent):
    mask = (1 << exponent) - 1
    return (v >> exponent) + ((v & mask) > (mask >> 1) + (v < 0))


def wrap32(v):
    return (v + 2**31) % 2**32 - 2**31


def rule_double(acc, q, shift):
    return divide_by_power(doubling_high(wrap32(acc << max(shift, 0)), q), max(-shift, 0))


def rule_ruy(acc, q, shift):
    v = doubling_high(wrap32(acc << max(shift, 0)), q)
    right = max(-shift, 0)
    return (v + ((1 << right) >> 1)) >> right


def rule_float_rne(acc, m):
    return int(np.rint(np.float32(np.int32(acc)) * np.float32(m)))


def rule_float64(acc, m):
    x = float(acc) * float(m)
    whole = int(x)
    rest = x - whole
    return whole + (rest >= 0.5) - (rest <= -0.5)


def quantize_multiplier(m):
    fraction, shift = np.frexp(np.float64(m))
    q = int(np.floor(fraction * 2.0**31 + 0.5))
    if q == 2**31:
        q, shift = q // 2, shift + 1
    return (0, 0) if shift < -31 else (q, int(shift))


def scaled(rule, acc, m):
    """Accumulators (n,) by the rule's name, before a zero point is added."""
    if rule == "float_rne":
        return [rule_float_rne(int(a), np.float32(m)) for a in acc]
    if rule == "float64":
        return [rule_float64(int(a), m) for a in acc]
    return [{"double": rule_double, "ruy": rule_ruy}[rule](int(a), *quantize_multiplier(m)) for a in acc]


def requantize(rule, acc, m, zero_point):
    """Codes of an integer array by the rule's name; m broadcasts against acc."""
    acc, m = np.broadcast_arrays(acc, m)
    out = np.empty(acc.shape, np.int8)
    for at in np.ndindex(acc.shape):
        a, scale = int(acc[at]), m[at]
        if rule == "float_rne":
            v = rule_float_rne(a, scale)
        elif rule == "float64":
            v = rule_float64(a, scale)
        else:
            v = {"double": rule_double, "ruy": rule_ruy}[rule](a, *quantize_multiplier(scale))
        out[at] = min(max(v + zero_point, -128), 127)
    return out


def softmax_lut_f32(codes, table):
    """One row of int8 codes to probabilities 0..255; float32 sum in key order."""
    e = table[int(codes.max()) - codes.astype(np.int64)]
    total = np.float32(0)
    for value in e:
        total = np.float32(total + value)
    inverse = np.float32(np.float32(1) / np.float32(total * np.float32(1 / 256)))
    p = (e * inverse).astype(np.float32).astype(np.float64)
    return np.minimum(np.floor(p + 0.5), 255).astype(np.int64)


def softmax_lut_u16(codes, table):
    e = table[int(codes.max()) - codes.astype(np.int64)].astype(np.int64)
    inverse = np.float32(1) / np.float32(np.float32(int(e.sum())) * np.float32(1 / 256))
    q, shift = quantize_multiplier(float(inverse))
    return np.array([min(rule_double(int(v), q, shift), 255) for v in e])


def reciprocal(total):
    """gemmlowp GetReciprocal of a Q12.19 sum, in exact integers: (scale, right shift)."""
    zeros = 32 - total.bit_length()
    x = (total << zeros) - (1 << 31)
    half = (x + 2**31 - 1 + 1) >> 1
    r = 1515870810 + doubling_high(half, -1010580540)
    for _ in range(3):
        r = r + (doubling_high(r, (1 << 29) - doubling_high(half, r)) << 2)
    return min(r << 1, 2**31 - 1), 12 - zeros + 31 - 8


def softmax_fixed(codes, table):
    e = [int(v) for v in table[int(codes.max()) - codes.astype(np.int64)]]
    scale, right = reciprocal(sum(divide_by_power(v, 12) for v in e))
    return np.array([min(divide_by_power(doubling_high(scale, v), right), 255) for v in e])


SOFTMAX = {"lut_f32": softmax_lut_f32, "lut_u16": softmax_lut_u16, "fixed": softmax_fixed}


def multipliers_fc(rule, xs, ws, ys):
    if rule == "float_rne":
        return np.float32(xs) * ws.astype(np.float32) / np.float32(ys)
    return np.float64(np.float32(xs)) * ws.astype(np.float32).astype(np.float64) / np.float64(np.float32(ys))


def multiplier_bmm(rule, a, b, c):
    product = np.float32(a) * np.float32(b)
    return np.float32(product / np.float32(c)) if rule == "float_rne" else np.float64(product) / np.float64(np.float32(c))


def static_layer(xq, xk, xv, num_heads, linears, tensors, rules, softmax, table, keep=None, band=None,
                 lut_index=None, score_luts=None, tables=None):
    """The static int8 layer, operator by operator, in exact integers; tables: as those of StaticLayer."""
    fc_rule, score_rule, context_rule = rules

    def linear(x, name, source, target):
        weight, ws, bias = linears[name]
        (xs, xz), (ys, yz) = tensors[source], tensors[target]
        table, yz = (tables or {}).get(name, (None, yz))
        acc = (x.astype(np.int64) - xz) @ weight.astype(np.int64).T + (0 if bias is None else bias)
        codes = requantize(fc_rule, acc, multipliers_fc(fc_rule, xs, ws, ys), yz)
        return codes if table is None else table[codes.astype(np.int64) + 128]

    def split(y):
        return y.reshape(*y.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)

    def t(name):
        return tensors[name]

    q = split(linear(xq, "query", "query_input", "query"))
    k = split(linear(xk, "key", "key_input", "key"))
    v = split(linear(xv, "value", "value_input", "value"))
    acc = np.einsum("bhld,bhsd->bhls", q.astype(np.int64) - t("query")[1], k.astype(np.int64) - t("key")[1])
    m = multiplier_bmm(score_rule, t("query")[0], t("key")[0], t("scores")[0])
    codes = requantize(score_rule, acc, m, t("scores")[1])
    if score_luts is not None:
        row = np.zeros(codes.shape, np.int64) if lut_index is None else np.broadcast_to(lut_index, codes.shape)
        codes = score_luts[row, codes.astype(np.int64) + 128]
    seen = visible(codes.shape, keep, band)
    p = np.zeros(codes.shape, np.int64)
    for at in np.ndindex(codes.shape[:3]):
        if seen[at].any():
            p[at][seen[at]] = SOFTMAX[softmax](codes[at][seen[at]], table)
    acc = np.einsum("bhls,bhsd->bhld", p, v.astype(np.int64) - t("value")[1])
    m = multiplier_bmm(context_rule, t("probabilities")[0], t("value")[0], t("context")[0])
    context = requantize(context_rule, acc, m, t("context")[1])
    merged = context.transpose(0, 2, 1, 3).reshape(xq.shape[0], xq.shape[1], -1)
    return linear(merged, "output", "context", "output") if "output" in linears else merged
