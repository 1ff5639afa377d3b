"""Attention layers in float32: projections, attention, output projection."""

import functools

import numpy as np

from edgeattn import checkpoints
from edgeattn.checks import check_out, count, deliver, flag, float_array, result_dtype, to_float32
from edgeattn.cpu import functional_float32, plain
from edgeattn.cpu.layer_float32 import FloatLayer
from edgeattn.cpu.linear import Linear
from edgeattn.functional import checked_softcap, default_scale
from edgeattn.kv_cache import KVCache
from edgeattn.masks import resolve_mask, torch_masks

_TENSORS = ("q_weight", "k_weight", "v_weight", "out_weight", "q_bias", "k_bias", "v_bias", "out_bias")
_NO_WINDOW = (-1, -1)
_KEY_TENSORS = ("bias_k", "bias_v")  # of a key that is no token, where a layer has one


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
    bias_k, bias_v : (Hkv * D,), (Hkv * Dv,) or (1, 1, Hkv * D), (1, 1, Hkv * Dv) float arrays, optional
        Key and value of one more key that every query sees, whatever the masks, as in
        torch.nn.MultiheadAttention; both or neither. Not `k_bias` and `v_bias`, which the projections add.
    add_zero_attn : bool
        One more key of zeros, with a value of zeros, after that.

    Attributes
    ----------
    q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias : float32 array or None
        Read-only, in C order.
    bias_k, bias_v : float32 array (Hkv * D,), (Hkv * Dv,) or None
        Read-only.
    add_zero_attn : bool
    extra_keys : int
        0 to 2: the keys that `bias_k` and `add_zero_attn` add to every call.
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
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
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
        self.bias_k = _key_tensor("bias_k", bias_k, self.num_kv_heads * self.head_dim)
        self.bias_v = _key_tensor("bias_v", bias_v, self.num_kv_heads * self.value_dim)
        if (bias_k is None) != (bias_v is None):
            given, missing = ("bias_k", "bias_v") if bias_v is None else ("bias_v", "bias_k")
            raise ValueError(f"{missing} must be given with {given}: the added key needs a value, got None")
        self.add_zero_attn = flag("add_zero_attn", add_zero_attn)
        self.extra_keys = (self.bias_k is not None) + self.add_zero_attn

    @classmethod
    def from_torch(cls, state_dict_or_path, num_heads, prefix="", *, add_zero_attn=False):
        """The layer that torch.nn.MultiheadAttention stored; see `checkpoints.torch_weights`.

        Masks of this layer mean True = attend, the inverse of torch.nn.MultiheadAttention. Inputs are (B, L, E)
        whatever batch_first was.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
            A .pt, .pth, .bin or .ckpt file is read by torch.load(weights_only=True), which needs torch.
        num_heads : int
        prefix : str
            What stands before "in_proj_weight", such as "encoder.layers.0.self_attn.".
        add_zero_attn : bool
            What the layer was made with, which its state dict does not say.
        """
        weights = checkpoints.torch_weights(state_dict_or_path, num_heads, prefix)
        return cls._build(num_heads, {**weights, "add_zero_attn": add_zero_attn})

    @classmethod
    def from_bert(cls, state_dict_or_path, prefix, num_heads):
        """The attention of one BERT layer; see `checkpoints.bert_weights`.

        The residual connection and output.LayerNorm, which BERT also calls attention, are not part of it. The
        attention_mask of BERT models, 1 = a real token, is key_padding_mask=attention_mask != 0.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        prefix : str
            What stands before "self.query.weight", such as "encoder.layer.0.attention.".
        num_heads : int
        """
        return cls._build(num_heads, checkpoints.bert_weights(state_dict_or_path, prefix, num_heads))

    @classmethod
    def from_gpt2(cls, state_dict_or_path, prefix, num_heads):
        """The attention of one GPT-2 layer; see `checkpoints.gpt2_weights`.

        GPT-2 is causal: call the layer with is_causal=True. Its attention_mask, 1 = a real token, is
        key_padding_mask=attention_mask != 0. The scale is 1 / sqrt(D): models whose configuration asks for another
        (scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True) do not say so in their weights.

        Parameters
        ----------
        state_dict_or_path : mapping of str to array, or path of a .safetensors, .npz or torch file
        prefix : str
            What stands before "c_attn.weight", such as "transformer.h.0.attn.".
        num_heads : int
        """
        return cls._build(num_heads, checkpoints.gpt2_weights(state_dict_or_path, prefix, num_heads))

    @classmethod
    def from_keras(cls, weights_or_path, layer=None):
        """A MultiHeadAttention or GroupQueryAttention of Keras; see `checkpoints.keras_weights`.

        Masks mean True = attend in both. Keras is called (query, value, key), this layer (query, key, value).
        use_causal_mask=True is is_causal=True, with causal_alignment="upper_left" where L != S. A query with no
        permitted key gives zeros here, in Keras the mean of all values.

        Parameters
        ----------
        weights_or_path : path, mapping of str to array, or sequence of arrays
            A .keras, .weights.h5, .h5 (these need h5py), .npz or .safetensors file, variables by their paths, or
            layer.get_weights(). Numbers of heads are in the shapes of the kernels.
        layer : str, optional
            The layer's name or its path in the file; not needed where there is one attention layer.
        """
        num_heads, num_kv_heads, weights = checkpoints.keras_weights(weights_or_path, layer)
        return cls._build(num_heads, weights, num_kv_heads)

    @classmethod
    def from_onnx(cls, path_or_model, node=None):
        """The layer around an attention node of an ONNX model; see `checkpoints.onnx_weights`.

        Bool masks mean True = attend in both. What the node itself says of masks (is_causal, unidirectional, a
        window) is told by a warning, and is to be given with each call. Inputs are (B, L, E), those of the
        projections before the node.

        Parameters
        ----------
        path_or_model : path or onnx.ModelProto
            Needs the onnx package.
        node : str or int, optional
            Name of an Attention (opsets 23 to 25, com.microsoft) or MultiHeadAttention (com.microsoft) node, or
            its index among these; not needed where there is one.
        """
        num_heads, num_kv_heads, weights = checkpoints.onnx_weights(path_or_model, node)
        return cls._build(num_heads, weights, num_kv_heads)

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
        window_size=_NO_WINDOW,
        softcap=0.0,
        alibi_slopes=None,
        kv_cache=None,
        need_weights=False,
        average_attn_weights=False,
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
        window_size : (int, int)
            (left, right): a query at position p sees keys p - left to p + right; -1 = unbounded.
        softcap : float
            Bound of the scores, 0 = none.
        alibi_slopes : (H,) or (B, H) float array, optional
            Adds -slope * |p - j| to the score of the query at position p and key j.
        kv_cache : KVCache, optional
            The projected keys and values of this chunk are appended to it, and the queries attend to everything
            it holds: S is its length after that, in masks and weights too. The first query stands at the
            position that was the cache's length before; that takes the place of `causal_alignment`. A chunk
            too long for a cache with a window is cut by itself where queries see no later key.
        need_weights : bool
            Return the probabilities of each head too.
        average_attn_weights : bool
            Return their mean over the heads instead. torch.nn.MultiheadAttention does unless told otherwise.
        out : (B, L, Eo) or (L, Eo) array, optional
            Takes the result; of the result's dtype. It may overlap inputs.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype. A query with no permitted key gives `out_bias`: its heads are zeros.
        (B, H, L, S) or (H, L, S) array
            The probabilities, only with `need_weights`; without the axis H when averaged. S counts `extra_keys`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        if key is None and attn_mask is None and key_padding_mask is None and is_causal is False and (
                need_weights is False and out is None and type(query) is np.ndarray and query.dtype == np.float32
                and query.ndim == 3 and query.shape[2] == self.embed_dim == self.kdim == self.vdim
                and query.flags.carray and query.size and value is None and self._whole
                and window_size is _NO_WINDOW and alibi_slopes is None and kv_cache is None
                and average_attn_weights is False and type(softcap) is float and not softcap and not self.extra_keys):
            # what small layers are called with, again and again: self-attention, nothing masked
            result = np.empty((*query.shape[:2], self.output_dim), np.float32)
            return self._kernel(query, query, query, result)
        if kv_cache is not None:
            return self._attend_cached(
                query, key, value, kv_cache, causal_alignment, softcap, need_weights, average_attn_weights, out,
                attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
                window_size=window_size, alibi_slopes=alibi_slopes)
        need_weights = flag("need_weights", need_weights)
        average = flag("average_attn_weights", average_attn_weights)
        softcap = checked_softcap(softcap)
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
            window_size=window_size,
            alibi_slopes=alibi_slopes,
        )
        plainly = need_weights or not (queries and keys and self._whole)
        if plainly or softcap or self.extra_keys:
            return self._attend_in_steps(query, key, value, mask, softcap, plainly, need_weights, average, out, dtype)
        q, k, v = (to_float32(x).reshape(mask.shape[0], -1, x.shape[-1]) for x in (query, key, value))
        result = np.empty((*lead, queries, self.output_dim), np.float32)
        self._kernel(q, k, v, result.reshape(mask.shape[0], queries, self.output_dim), *mask.for_kernels())
        return deliver(result, out, dtype)

    @functools.cached_property
    def _kernel(self):
        return FloatLayer(
            self.num_heads, self.num_kv_heads, self.q_weight, self.k_weight, self.v_weight, self.out_weight,
            self.q_bias, self.k_bias, self.v_bias, self.out_bias, self.scale)

    def call_with_torch_masks(
        self,
        query,
        key=None,
        value=None,
        *,
        attn_mask=None,
        key_padding_mask=None,
        is_causal=False,
        need_weights=False,
        average_attn_weights=True,
        out=None,
    ):
        """Attend with masks as torch.nn.MultiheadAttention takes them: True = blocked.

        Inputs are (B, L, E), as there with batch_first=True. A query with no permitted key has heads of zeros,
        where torch gives NaN.

        Parameters
        ----------
        query, key, value : array
            As for a call of the layer.
        attn_mask : (L, S) or (B * H, L, S) bool or float array, optional
            bool: True = do not attend. float: added to the scores.
        key_padding_mask : (B, S) or (S,) bool or float array, optional
            bool: True = padding. float: added to the scores.
        is_causal : bool
            A query sees no key after its own position, the first query standing at the first key. Unlike torch's
            this is no hint: it needs no `attn_mask`.
        need_weights, average_attn_weights, out
            As for a call of the layer; the weights are averaged over the heads unless told otherwise.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
        (B, L, S) or (L, S) array
            The probabilities, only with `need_weights`; (B, H, L, S) or (H, L, S) when not averaged.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        query, key, value = self._inputs(query, key, value)
        shape = (*query.shape[:-2], self.num_heads, query.shape[-2], key.shape[-2])
        attn_mask, key_padding_mask = torch_masks(shape, attn_mask, key_padding_mask)
        return MultiHeadAttention.__call__(
            self, query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
            causal_alignment="upper_left", need_weights=need_weights, average_attn_weights=average_attn_weights,
            out=out)

    def _attend_in_steps(self, query, key, value, mask, softcap, plainly, need_weights, average, out, dtype):
        """The steps one by one: for what the fused kernel does not do; `plainly` where the scores are wanted."""
        batch, queries = mask.shape[0], query.shape[-2]
        q = _heads(_linear(query, self.q_weight, self.q_bias), batch, self.num_heads, self.head_dim)
        k = _heads(_linear(key, self.k_weight, self.k_bias), batch, self.num_kv_heads, self.head_dim)
        v = _heads(_linear(value, self.v_weight, self.v_bias), batch, self.num_kv_heads, self.value_dim)
        if self.extra_keys:
            k, v = self._with_extra_keys(k, self.bias_k), self._with_extra_keys(v, self.bias_v)
            mask = mask.with_keys(self.extra_keys)
        context = np.empty((batch, self.num_heads, queries, self.value_dim), np.float32)
        weights = np.empty(mask.shape, np.float32) if need_weights else None
        if plainly:
            plain.attention(q, k, v, mask, scale=self.scale, softcap=softcap, out=context, weights=weights)
        else:
            functional_float32.attention(q, k, v, context, self.scale, softcap, *mask.for_kernels())
        return self._finish(context, weights, query.shape[:-2], average, out, dtype, self._project_out)

    def _with_extra_keys(self, heads, bias):
        """(B, Hkv, S, size) with the rows of `bias` and zeros behind, read-only."""
        batch, kv_heads, _, size = heads.shape
        extra = np.zeros((batch, kv_heads, self.extra_keys, size), np.float32)
        if bias is not None:
            extra[:, :, 0] = bias.reshape(kv_heads, size)
        return to_float32(np.concatenate((heads, extra), axis=2))

    def _project_out(self, context):
        return context if self.out_weight is None else _linear(context, self.out_weight, self.out_bias)

    def _finish(self, context, weights, lead, average, out, dtype, project_out):
        """Results as the caller asked for them, from context (B, H, L, Dv) and weights (B, H, L, S) or None."""
        queries = context.shape[2]
        result = project_out(context.swapaxes(1, 2).reshape(*lead, queries, self.num_heads * self.value_dim))
        result = deliver(result, out, dtype)
        if weights is None:
            return result
        weights = weights.reshape(*lead, *weights.shape[1:])
        return result, deliver(weights.mean(axis=-3) if average else weights, None, dtype)

    @functools.cached_property
    def _linears(self):
        """Projections that give a token the same bits alone and in a chunk."""
        pairs = {
            "q": (self.q_weight, self.q_bias), "k": (self.k_weight, self.k_bias), "v": (self.v_weight, self.v_bias),
            "out": (self.out_weight, self.out_bias)}
        return {name: Linear(*pair) for name, pair in pairs.items() if pair[0] is not None}

    def _attend_cached(self, query, key, value, cache, causal_alignment, softcap, need_weights, average, out, **masks):
        """Append this chunk's keys and values to the cache, and attend to what it holds."""
        need_weights = flag("need_weights", need_weights)
        average = flag("average_attn_weights", average)
        softcap = checked_softcap(softcap)
        self._check_cache(cache, causal_alignment)
        query, key, value = self._inputs(query, key, value)
        lead, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
        batch = int(np.prod(lead, dtype=np.int64))
        if batch != cache.batch:
            raise ValueError(f"query must have the cache's batch, B = {cache.batch}, got shape {query.shape}")
        dtype = result_dtype(query, key, value)
        check_out(out, (*lead, queries, self.output_dim), dtype)
        masks["window_size"] = cache._narrow(masks["window_size"])
        before = cache.length
        mask = resolve_mask((*lead, self.num_heads, queries, before + keys), position=before, **masks)
        # Without later keys to see, a chunk may come in pieces that fit into the window.
        piece = keys
        if cache.window is not None and queries == keys and mask.right == 0:
            piece = min(keys, cache.capacity - cache.window + 1)
        cache._check_room(piece)

        def split(name, x, heads, size):
            rows = self._linears[name](to_float32(x).reshape(-1, x.shape[-1]))
            return to_float32(rows.reshape(batch, x.shape[-2], heads, size).swapaxes(1, 2))

        q = split("q", query, self.num_heads, self.head_dim)
        k = split("k", key, self.num_kv_heads, self.head_dim)
        v = split("v", value, self.num_kv_heads, self.value_dim)
        context = np.empty((batch, self.num_heads, queries, self.value_dim), np.float32)
        weights = np.zeros(mask.shape, np.float32) if need_weights else None
        if piece == keys:
            cache._append(k, v)
            cache._attend(q, mask, self.scale, softcap, context, weights)
        for begin in range(0, keys if piece < keys else 0, max(piece, 1)):
            end = min(begin + piece, keys)
            cache._append(k[:, :, begin:end], v[:, :, begin:end])
            part = mask.part((begin, end), (0, cache.length))
            some = np.empty((batch, self.num_heads, end - begin, self.value_dim), np.float32)
            some_weights = np.zeros(part.shape, np.float32) if need_weights else None
            cache._attend(to_float32(q[:, :, begin:end]), part, self.scale, softcap, some, some_weights)
            context[:, :, begin:end] = some
            if need_weights:
                weights[:, :, begin:end, :cache.length] = some_weights
        return self._finish(context, weights, lead, average, out, dtype, self._project_out_alike)

    def _project_out_alike(self, context):
        """`_project_out`, the same bits for a token alone and in a chunk."""
        if self.out_weight is None:
            return context
        rows = self._linears["out"](context.reshape(-1, context.shape[-1]))
        return rows.reshape(*context.shape[:-1], self.output_dim)

    def _check_cache(self, cache, causal_alignment):
        if not isinstance(cache, KVCache):
            raise TypeError(f"kv_cache must be an edgeattn.KVCache, got {type(cache).__name__}")
        if causal_alignment is not None:
            raise ValueError(
                f"causal_alignment must be None with kv_cache, which knows the positions, got {causal_alignment!r}")
        if self.extra_keys:
            raise ValueError(
                "kv_cache needs a layer without bias_k, bias_v and add_zero_attn: a cache holds tokens only")
        wanted = (self.num_kv_heads, self.head_dim, self.value_dim)
        given = (cache.num_kv_heads, cache.head_dim, cache.value_dim)
        if wanted != given:
            raise ValueError(
                f"kv_cache must have the layer's num_kv_heads, head_dim and value_dim {wanted}, got {given}")

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
        names = _TENSORS + _KEY_TENSORS
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        config = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        return {**config, "add_zero_attn": True} if self.add_zero_attn else config, tensors

    @classmethod
    def _from_state(cls, config, tensors):
        unexpected = sorted(set(tensors) - set(_TENSORS + _KEY_TENSORS))
        missing = sorted({"q_weight", "k_weight", "v_weight"} - set(tensors))
        if missing or unexpected:
            raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}")
        arguments = {**tensors, "add_zero_attn": config.get("add_zero_attn", False)}
        return cls._build(config["num_heads"], arguments, config["num_kv_heads"])


class SelfAttention(MultiHeadAttention):
    """Attention of a sequence to itself with one head: softmax(Q K^T / sqrt(D)) V, then a projection.

    Parameters
    ----------
    q_weight, k_weight : (D, E) float array
    v_weight : (Dv, E) float array
    out_weight : (Eo, Dv) float array, optional
        Without it the head itself is the output.
    q_bias, k_bias, v_bias, out_bias : (D,), (D,), (Dv,), (Eo,) float arrays, optional
    bias_k, bias_v, add_zero_attn
        As for `MultiHeadAttention`.
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
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
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
            bias_k=bias_k,
            bias_v=bias_v,
            add_zero_attn=add_zero_attn,
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
        self,
        x,
        *,
        attn_mask=None,
        key_padding_mask=None,
        is_causal=False,
        window_size=_NO_WINDOW,
        softcap=0.0,
        alibi_slopes=None,
        kv_cache=None,
        need_weights=False,
        out=None,
    ):
        """Attend from `x` to itself.

        Parameters
        ----------
        x : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        attn_mask, key_padding_mask, is_causal, window_size, softcap, alibi_slopes, kv_cache, need_weights, out
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
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            kv_cache=kv_cache,
            need_weights=need_weights,
            out=out,
        )


def _key_tensor(name, value, size):
    """An owned, read-only float32 (size,) of `bias_k` or `bias_v`, or None."""
    if value is None:
        return None
    array = float_array(name, value)
    if array.shape not in ((size,), (1, 1, size)):
        raise ValueError(
            f"{name} must have shape {(size,)} or {(1, 1, size)}, Hkv heads side by side, got {array.shape}")
    array = np.array(to_float32(array)).reshape(size)
    array.flags.writeable = False
    return array


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
