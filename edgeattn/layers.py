"""Attention layers in float32: projections, attention, output projection."""

import functools

import numpy as np

from edgeattn import checkpoints
from edgeattn.checks import check_out, count, deliver, flag, float_array, result_dtype, to_float32
from edgeattn.cpu import plain
from edgeattn.cpu.layer_float32 import FloatLayer
from edgeattn.functional import default_scale
from edgeattn.masks import resolve_mask

_TENSORS = ("q_weight", "k_weight", "v_weight", "out_weight", "q_bias", "k_bias", "v_bias", "out_bias")


class MultiHeadAttention:
    """concat(head_1, ..., head_H) out_weight^T + out_bias, with head_h = attention(Q_h, K_h, V_h).

    Q = query q_weight^T + q_bias, split into H heads of size D; K and V likewise, into Hkv heads. The scores
    are scaled by 1 / sqrt(D). Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.

    Parameters
    ----------
    num_heads : int
        H.
    q_weight : (H * D, E) float array
        All weights are (outputs, inputs), as in torch.nn.Linear; they are copied to float32.
    k_weight : (Hkv * D, kdim) float array
    v_weight : (Hkv * Dv, vdim) float array
    out_weight : (Eo, H * Dv) float array, optional
        Without it the heads side by side are the output.
    q_bias, k_bias, v_bias : (H * D,), (Hkv * D,), (Hkv * Dv,) float arrays, optional
    out_bias : (Eo,) float array, optional
    num_kv_heads : int, optional
        Hkv, H unless given. Query head h reads key/value head h // (H / Hkv).

    Attributes
    ----------
    q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias : float32 array or None
        Read-only, in C order.
    num_heads, num_kv_heads, embed_dim, kdim, vdim, head_dim, value_dim, output_dim : int
        H, Hkv, E, width of key, width of value, D, Dv, Eo.
    scale : float
        1 / sqrt(D).
    """

    _query_name = "query"  # what the caller calls it

    def __init__(
        self,
        num_heads,
        q_weight,
        k_weight,
        v_weight,
        out_weight=None,
        *,
        q_bias=None,
        k_bias=None,
        v_bias=None,
        out_bias=None,
        num_kv_heads=None,
    ):
        self.num_heads = count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        self.q_weight = _parameter("q_weight", q_weight, 2)
        self.k_weight = _parameter("k_weight", k_weight, 2)
        self.v_weight = _parameter("v_weight", v_weight, 2)
        self.out_weight = _parameter("out_weight", out_weight, 2, optional=True)
        self.q_bias = _parameter("q_bias", q_bias, 1, optional=True)
        self.k_bias = _parameter("k_bias", k_bias, 1, optional=True)
        self.v_bias = _parameter("v_bias", v_bias, 1, optional=True)
        self.out_bias = _parameter("out_bias", out_bias, 1, optional=True)

        self.head_dim = _split("q_weight", self.q_weight, "num_heads", self.num_heads)
        self.value_dim = _split("v_weight", self.v_weight, "num_kv_heads", self.num_kv_heads)
        self.embed_dim, self.kdim, self.vdim = (
            weight.shape[1] for weight in (self.q_weight, self.k_weight, self.v_weight)
        )
        self.scale = default_scale(self.head_dim)
        if self.k_weight.shape[0] != self.num_kv_heads * self.head_dim:
            raise ValueError(
                f"k_weight must have Hkv * D = {self.num_kv_heads} * {self.head_dim} rows, D from q_weight "
                f"{self.q_weight.shape}, got {self.k_weight.shape}; pass num_kv_heads if heads share keys"
            )
        context_dim = self.num_heads * self.value_dim
        if self.out_weight is not None and self.out_weight.shape[1] != context_dim:
            raise ValueError(
                f"out_weight must have H * Dv = {context_dim} columns, got shape {self.out_weight.shape}"
            )
        if self.out_weight is None and self.out_bias is not None:
            raise ValueError(
                "out_bias needs out_weight, got out_weight=None; pass numpy.eye to add a bias alone"
            )
        self.output_dim = context_dim if self.out_weight is None else self.out_weight.shape[0]
        self._whole = bool(self.head_dim and self.value_dim and self.output_dim)  # the tiled kernels take nothing empty
        for name in ("q", "k", "v", "out"):
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{name}_bias must have shape {weight.shape[:1]}, one per row of {name}_weight "
                    f"{weight.shape}, got {bias.shape}"
                )

    @classmethod
    def from_torch(cls, state_dict_or_path, num_heads, prefix=""):
        """The layer that torch.nn.MultiheadAttention stored; see `checkpoints.torch_weights`.

        Masks of this layer mean True = attend, the inverse of torch.nn.MultiheadAttention.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors or .npz file
        num_heads : int
        prefix : str
            What stands before "in_proj_weight", such as "encoder.layers.0.self_attn.".
        """
        return cls._build(num_heads, checkpoints.torch_weights(state_dict_or_path, num_heads, prefix))

    @classmethod
    def from_bert(cls, state_dict_or_path, prefix, num_heads):
        """The attention of one BERT layer; see `checkpoints.bert_weights`.

        The residual connection and output.LayerNorm, which BERT also calls attention, are not part of it.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors or .npz file
        prefix : str
            What stands before "self.query.weight", such as "encoder.layer.0.attention.".
        num_heads : int
        """
        return cls._build(num_heads, checkpoints.bert_weights(state_dict_or_path, prefix, num_heads))

    @classmethod
    def _build(cls, num_heads, weights, num_kv_heads=None):
        return cls(num_heads, **weights, num_kv_heads=num_kv_heads)

    def __call__(
        self,
        query,
        key=None,
        value=None,
        *,
        attn_mask=None,
        key_padding_mask=None,
        is_causal=False,
        causal_alignment=None,
        need_weights=False,
        out=None,
    ):
        """Attend from `query` to `key` and `value`.

        Parameters
        ----------
        query : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        key : (B, S, kdim) or (S, kdim) array, optional
            `query` unless given: self-attention.
        value : (B, S, vdim) or (S, vdim) array, optional
            `key` unless given.
        attn_mask : bool or float array, broadcastable to (B, H, L, S) or (H, L, S), optional
            bool: True = attend. float: added to the scaled scores; -inf = do not attend.
        key_padding_mask : (B, S) or (S,) bool array, optional
            True = a real token that may be attended to.
        is_causal : bool
            A query sees no key after its own position.
        causal_alignment : {"upper_left", "lower_right"}, optional
            Needed by `is_causal` when L != S, see `scaled_dot_product_attention`.
        need_weights : bool
            Return the probabilities of each head too.
        out : (B, L, Eo) or (L, Eo) array, optional
            Takes the result; of the result's dtype. It may overlap inputs.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype. A query with no permitted key gives `out_bias`: its heads are zeros.
        (B, H, L, S) or (H, L, S) array
            The probabilities, only with `need_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        if key is None and attn_mask is None and key_padding_mask is None and is_causal is False and (
                need_weights is False and out is None and type(query) is np.ndarray and query.dtype == np.float32
                and query.ndim == 3 and query.shape[2] == self.embed_dim == self.kdim == self.vdim
                and query.flags.carray and query.size and value is None and self._whole):
            # what small layers are called with, again and again: self-attention, nothing masked
            result = np.empty((*query.shape[:2], self.output_dim), np.float32)
            return self._kernel(query, query, query, result)
        need_weights = flag("need_weights", need_weights)
        query, key, value = self._inputs(query, key, value)
        dtype = result_dtype(query, key, value)
        lead, (queries, keys) = query.shape[:-2], (query.shape[-2], key.shape[-2])
        check_out(out, (*lead, queries, self.output_dim), dtype)
        mask = resolve_mask(
            (*lead, self.num_heads, queries, keys),
            attn_mask,
            key_padding_mask,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
        )
        if need_weights or not (queries and keys and self._whole):
            return self._attend_plainly(query, key, value, mask, need_weights, out, dtype)
        q, k, v = (to_float32(x).reshape(mask.shape[0], -1, x.shape[-1]) for x in (query, key, value))
        result = np.empty((*lead, queries, self.output_dim), np.float32)
        self._kernel(q, k, v, result.reshape(mask.shape[0], queries, self.output_dim), *mask.for_kernels())
        return deliver(result, out, dtype)

    @functools.cached_property
    def _kernel(self):
        return FloatLayer(
            self.num_heads, self.num_kv_heads, self.q_weight, self.k_weight, self.v_weight, self.out_weight,
            self.q_bias, self.k_bias, self.v_bias, self.out_bias, self.scale)

    def _attend_plainly(self, query, key, value, mask, need_weights, out, dtype):
        """The steps one by one: for when the probabilities are wanted, or an axis is empty."""
        lead, queries, batch = query.shape[:-2], query.shape[-2], mask.shape[0]
        q = _heads(_linear(query, self.q_weight, self.q_bias), batch, self.num_heads, self.head_dim)
        k = _heads(_linear(key, self.k_weight, self.k_bias), batch, self.num_kv_heads, self.head_dim)
        v = _heads(_linear(value, self.v_weight, self.v_bias), batch, self.num_kv_heads, self.value_dim)
        context = np.empty((batch, self.num_heads, queries, self.value_dim), np.float32)
        weights = np.empty(mask.shape, np.float32) if need_weights else None
        plain.attention(q, k, v, mask, scale=self.scale, softcap=0.0, out=context, weights=weights)
        result = context.swapaxes(1, 2).reshape(*lead, queries, self.num_heads * self.value_dim)
        if self.out_weight is not None:
            result = _linear(result, self.out_weight, self.out_bias)
        result = deliver(result, out, dtype)
        if not need_weights:
            return result
        return result, deliver(weights.reshape(*lead, *mask.shape[1:]), None, dtype)

    def __repr__(self):
        return (
            f"{type(self).__name__}(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, output_dim={self.output_dim})"
        )

    def _inputs(self, query, key, value):
        """The three inputs as float arrays of agreeing shapes."""
        if key is None and value is not None:
            raise ValueError("value needs key, got key=None; pass key=query to attend from query to itself")
        query = float_array(self._query_name, query)
        key = query if key is None else float_array("key", key)
        value = key if value is None else float_array("value", value)
        shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
        if query.ndim not in (2, 3):
            raise ValueError(f"{self._query_name} must be (B, L, E) or (L, E), got shape {query.shape}")
        for name, array, width in (
            (self._query_name, query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if array.ndim != query.ndim or array.shape[:-2] != query.shape[:-2]:
                raise ValueError(f"{name} must have query's batch axes {query.shape[:-2]}, got {shapes}")
            if array.shape[-1] != width:
                raise ValueError(
                    f"{name} must have a last axis of {width}, the columns of its weight, got {shapes}"
                )
        if value.shape[-2] != key.shape[-2]:
            raise ValueError(f"value must have as many rows as key, S = {key.shape[-2]}, got {shapes}")
        return query, key, value

    def _to_state(self):
        """(config, tensors): all that `_from_state` needs to build an equal layer."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}, tensors

    @classmethod
    def _from_state(cls, config, tensors):
        unexpected = sorted(set(tensors) - set(_TENSORS))
        missing = sorted({"q_weight", "k_weight", "v_weight"} - set(tensors))
        if missing or unexpected:
            raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}")
        return cls._build(config["num_heads"], tensors, config["num_kv_heads"])


class SelfAttention(MultiHeadAttention):
    """Attention of a sequence to itself with one head: softmax(Q K^T / sqrt(D)) V, then a projection.

    Parameters
    ----------
    q_weight, k_weight : (D, E) float array
    v_weight : (Dv, E) float array
    out_weight : (Eo, Dv) float array, optional
        Without it the head itself is the output.
    q_bias, k_bias, v_bias, out_bias : (D,), (D,), (Dv,), (Eo,) float arrays, optional
    """

    _query_name = "x"

    def __init__(
        self,
        q_weight,
        k_weight,
        v_weight,
        out_weight=None,
        *,
        q_bias=None,
        k_bias=None,
        v_bias=None,
        out_bias=None,
    ):
        super().__init__(
            1,
            q_weight,
            k_weight,
            v_weight,
            out_weight,
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            out_bias=out_bias,
        )
        for name in ("k_weight", "v_weight"):
            if getattr(self, name).shape[1] != self.embed_dim:
                raise ValueError(
                    f"{name} must have the columns of q_weight, E = {self.embed_dim}, got "
                    f"{getattr(self, name).shape}; MultiHeadAttention takes keys of another width"
                )

    @classmethod
    def _build(cls, num_heads, weights, num_kv_heads=None):
        if num_heads != 1 or num_kv_heads not in (None, 1):
            raise ValueError(
                f"num_heads must be 1 for SelfAttention, got {num_heads}; use MultiHeadAttention"
            )
        return cls(**weights)

    def __call__(
        self, x, *, attn_mask=None, key_padding_mask=None, is_causal=False, need_weights=False, out=None
    ):
        """Attend from `x` to itself.

        Parameters
        ----------
        x : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        attn_mask, key_padding_mask, is_causal, need_weights, out
            As for `MultiHeadAttention`, with H = 1 and S = L.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
        (B, 1, L, L) or (1, L, L) array
            The probabilities, only with `need_weights`.
        """
        return super().__call__(
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            out=out,
        )


def _parameter(name, value, axes, optional=False):
    """An owned, read-only float32 copy of a weight or bias, or None."""
    if value is None and optional:
        return None
    array = float_array(name, value)
    if array.ndim != axes:
        wanted = "(outputs, inputs)" if axes == 2 else "(outputs,)"
        raise ValueError(f"{name} must be {wanted}, got shape {array.shape}")
    array = np.array(to_float32(array))
    array.flags.writeable = False
    return array


def _split(name, weight, heads_name, heads):
    """Size of one head."""
    if weight.shape[0] % heads:
        raise ValueError(
            f"{name} must have rows for {heads_name} = {heads} heads of equal size, got shape {weight.shape}"
        )
    return weight.shape[0] // heads


def _linear(x, weight, bias):
    """(..., inputs) -> (..., outputs) in float32."""
    x = to_float32(x)
    # Infinities and NaN are data here, not a reason to warn.
    with np.errstate(invalid="ignore", over="ignore"):
        y = x.reshape(-1, x.shape[-1]) @ weight.T if x.size else np.zeros((_rows(x), len(weight)), np.float32)
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], len(weight))


def _rows(x):
    return int(np.prod(x.shape[:-1], dtype=np.int64))


def _heads(projected, batch, heads, size):
    """(..., length, heads * size) -> (B, heads, length, size) as kernels read it."""
    split = projected.reshape(batch, projected.shape[-2], heads, size)
    return to_float32(split.swapaxes(1, 2))
