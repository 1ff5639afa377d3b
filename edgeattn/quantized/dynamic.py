"""Multi-head attention with int8 weights and activations quantized at run time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeattn.checks import check_out, count, deliver, result_dtype, to_float32
from edgeattn.cpu.layer_dynamic import DynamicLayer
from edgeattn.functional import default_scale
from edgeattn.layers.call import check_inputs
from edgeattn.masks import resolve_mask
from edgeattn.quantized.layer import INPUTS, QuantizedMultiHeadAttention
from edgeattn.quantized.parameters import QuantizedLinear, frozen


class DynamicMultiHeadAttention(QuantizedMultiHeadAttention):
    """Float in, float out, int8 inside: nothing is calibrated, every token is quantized by its own range at run time.

    Weights are int8 per output channel, activations int8 per token, products accumulate in int32, the softmax is
    float32, and probabilities are quantized per row. Biases, masks and the softmax never meet an int8 range, so long
    rows and masks cost nothing.

    Parameters
    ----------
    num_heads : int
        H.
    weights : mapping
        "query" (H*D, Eq), "key" (Hkv*D, Ek), "value" (Hkv*Dv, Ev) and, with an output projection, "output"
        (Eo, H*Dv): QuantizedLinear without a bias.
    biases : mapping
        By the same names float32 (out_features,), where there is one. A key bias has no influence and may be left out.
    num_kv_heads : int, optional
        Hkv, H unless given.
    """

    scheme = "dynamic"
    _query_name = "query"

    def __init__(self, num_heads: int, weights: Mapping[str, QuantizedLinear], biases: Mapping[str, np.ndarray], *,
                 num_kv_heads: int | None = None):
        self.num_heads = count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        self.weights, self.biases = dict(weights), {}
        names = (*INPUTS, "output")
        unknown = sorted(set(self.weights) - set(names)) + sorted(set(biases) - set(self.weights))
        missing = [name for name in INPUTS if name not in self.weights]
        if missing or unknown:
            raise ValueError(f"weights and biases must be of {', '.join(names)}; "
                             f"missing {missing}, unexpected {unknown}")
        for name, bias in biases.items():
            self.biases[name] = frozen(bias, np.float32, f"bias of {name}")
            if self.biases[name].shape != self.weights[name].scale.shape:
                raise ValueError(f"bias of {name} must have shape {self.weights[name].scale.shape}; "
                                 f"got {self.biases[name].shape}")
        shapes = {name: linear.weight.shape for name, linear in self.weights.items()}
        (q, self.embed_dim), (k, self.kdim), (v, self.vdim) = (shapes[name] for name in INPUTS)
        H, Hkv = self.num_heads, self.num_kv_heads
        self.head_dim, self.value_dim = q // H, v // Hkv
        fits = H % Hkv == 0 and (q, k, v) == (H * self.head_dim, Hkv * self.head_dim, Hkv * self.value_dim)
        merged = shapes.get("output", (0, H * self.value_dim))[1]
        if not fits or not (self.head_dim and self.value_dim) or merged != H * self.value_dim:
            raise ValueError(f"weights of shapes {shapes} do not fit num_heads = {H} and num_kv_heads = {Hkv}")
        self.output_dim = shapes.get("output", (H * self.value_dim,))[0]
        self.scale = default_scale(self.head_dim)

        def pair(name):
            return (self.weights[name].weight, self.weights[name].scale) if name in self.weights else None

        self._kernel = DynamicLayer(H, Hkv, *map(pair, names), *(self.biases.get(name) for name in names), self.scale)

    def __repr__(self):
        return (f"{type(self).__name__}(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim}, "
                f"value_dim={self.value_dim}, output_dim={self.output_dim})")

    def __call__(self, query, key=None, value=None, *, attn_mask=None, key_padding_mask=None, is_causal=False,
                 causal_alignment=None, out=None):
        """Attend from ``query`` to ``key`` and ``value``; arguments and result as ``MultiHeadAttention``'s."""
        if key is None and value is None and attn_mask is None and key_padding_mask is None and is_causal is False and (
                out is None and type(query) is np.ndarray and query.dtype == np.float32 and query.ndim == 3
                and query.shape[2] == self.embed_dim == self.kdim == self.vdim and query.flags.carray and query.size
                and self.output_dim):
            # what small layers are called with, again and again: self-attention, nothing masked
            return self._kernel(query, query, query, np.empty((*query.shape[:2], self.output_dim), np.float32))
        query, key, value = check_inputs(self, query, key, value)
        dtype = result_dtype(query, key, value)
        lead, queries = query.shape[:-2], query.shape[-2]
        check_out(out, (*lead, queries, self.output_dim), dtype)
        mask = resolve_mask((*lead, self.num_heads, queries, key.shape[-2]), attn_mask, key_padding_mask,
                            is_causal=is_causal, causal_alignment=causal_alignment)
        batch = mask.shape[0]
        keep, bias, band = mask.for_kernels()
        if key.shape[-2] == 0:  # one key that is not there
            key, value = (np.zeros((*lead, 1, x.shape[-1]), np.float32) for x in (key, value))
            keep, bias, band = np.zeros((1, 1, 1, 1), np.bool_), None, None
        q = to_float32(query).reshape(batch, queries, self.embed_dim)
        k = q if key is query else to_float32(key).reshape(batch, -1, self.kdim)
        v = k if value is key else to_float32(value).reshape(batch, -1, self.vdim)
        result = np.empty((*lead, queries, self.output_dim), np.float32)
        if result.size:
            self._kernel(q, k, v, result.reshape(batch, queries, self.output_dim), keep, bias, band)
        return deliver(result, out, dtype)

    def _to_state(self):
        """(config, tensors): all that ``_from_state`` needs to build an equal layer."""
        tensors = {f"{name}.{part}": getattr(linear, part) for name, linear in self.weights.items()
                   for part in ("weight", "scale")}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}, tensors

    @classmethod
    def _from_state(cls, config, tensors):
        groups = {}
        for name, array in tensors.items():
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        biases = {name: parts.pop("bias") for name, parts in groups.items() if "bias" in parts}
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()}, biases,
                   num_kv_heads=config["num_kv_heads"])
