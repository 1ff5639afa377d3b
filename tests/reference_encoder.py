"""A Transformer encoder written as its formulas say, one token and one pair of tokens at a time, in float64.

Imports nothing of the packages under test.
"""

import math

import numpy as np
import reference


def linear(x, weight, bias=None):
    y = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    return y if bias is None else y + bias


def layer_norm(x, weight, bias=None, eps=1e-5):
    out = np.empty_like(x, np.float64)
    for at in np.ndindex(*x.shape[:-1]):
        row = x[at].astype(np.float64)
        out[at] = (row - row.mean()) / math.sqrt(row.var() + eps) * weight
    return out if bias is None else out + bias


def rms_norm(x, weight, eps=1e-6):
    out = np.empty_like(x, np.float64)
    for at in np.ndindex(*x.shape[:-1]):
        row = x[at].astype(np.float64)
        out[at] = row / math.sqrt((row * row).mean() + eps) * weight
    return out


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def activation(x, kind):
    return np.vectorize(ACTIVATIONS[kind], otypes=[np.float64])(x)


def feed_forward(x, w, kind):
    """w: linear1, linear2 and, for gated networks, gate: (weight, bias)."""
    hidden = linear(x, *w["linear1"])
    hidden = activation(hidden, kind) if "gate" not in w else activation(linear(x, *w["gate"]), kind) * hidden
    return linear(hidden, *w["linear2"])


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def rotary(x, turned, base, interleaved=False, first=0):
    """x (B, H, L, D): pair i of the token at position p is turned by p * base^(-2 i / turned)."""
    out = x.astype(np.float64)
    for p in range(x.shape[2]):
        for i in range(turned // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + turned // 2)
            angle = (p + first) * base ** (-2 * i / turned)
            out[:, :, p, a] = x[:, :, p, a] * math.cos(angle) - x[:, :, p, b] * math.sin(angle)
            out[:, :, p, b] = x[:, :, p, a] * math.sin(angle) + x[:, :, p, b] * math.cos(angle)
    return out


def attention(x, w, num_heads, permitted=None, bias=None, place=lambda q: q, place_keys=None, scale=None):
    """Self-attention; w: q, k, v, out: (weight, bias); `place` turns or norms queries, and keys unless given."""
    q, k, v = (heads(linear(x, *w[name]), num_heads) for name in "qkv")
    context, _ = reference.attention(place(q), (place_keys or place)(k), v, permitted, bias, scale=scale)
    return linear(context.swapaxes(1, 2).reshape(*x.shape[:2], -1), *w["out"])


def encoder_layer(x, w, num_heads, *, kind="gelu", norm_first=False, eps=1e-5, **attending):
    def normed(x, name):
        return layer_norm(x, *w[name], eps=eps)

    if norm_first:
        x = x + attention(normed(x, "norm1"), w, num_heads, **attending)
        return x + feed_forward(normed(x, "norm2"), w, kind)
    x = normed(x + attention(x, w, num_heads, **attending), "norm1")
    return normed(x + feed_forward(x, w, kind), "norm2")


def t5_bucket(distance, buckets, most, bidirectional):
    """The bucket of key minus query; Mesh TensorFlow's _relative_position_bucket."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    far = exact + int(math.log(distance / exact) / math.log(most / exact) * (buckets - exact))
    return bucket + min(far, buckets - 1)


def random_layer(random, E, F, gated=False, bias=True):
    """Weights of a layer by the names above."""
    def pair(outputs, inputs):
        return (random.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32),
                random.normal(0, 0.5, outputs).astype(np.float32) if bias else None)

    norms = {name: (random.normal(1, 0.2, E).astype(np.float32),
                    random.normal(0, 0.2, E).astype(np.float32) if bias else None) for name in ("norm1", "norm2")}
    linears = {"q": (E, E), "k": (E, E), "v": (E, E), "out": (E, E), "linear1": (F, E), "linear2": (E, F)}
    return {**norms, **{name: pair(*shape) for name, shape in (linears | ({"gate": (F, E)} if gated else {})).items()}}


def torch_state_dict(layers, norm=None):
    """Layers by the names of torch.nn.TransformerEncoder."""
    state = {}
    for i, w in enumerate(layers):
        parts = {"self_attn.in_proj_": [np.concatenate([w[name][part] for name in "qkv"])
                                        if w["q"][part] is not None else None for part in (0, 1)],
                 "self_attn.out_proj.": w["out"], **{f"{name}.": w[name] for name in
                                                      ("linear1", "linear2", "norm1", "norm2")}}
        for name, (weight, bias) in parts.items():
            state |= {f"layers.{i}.{name}weight": weight} | ({} if bias is None else {f"layers.{i}.{name}bias": bias})
    if norm is not None:
        state |= {"norm.weight": norm[0], "norm.bias": norm[1]}
    return state
