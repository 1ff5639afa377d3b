"""Multi-head attention in float32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, overload

from numpy import empty, ndarray

from edgeattn.checks import FLOAT32
from edgeattn.device import place
from edgeattn.kernels.cpu.layer_float32 import FloatLayer
from edgeattn.layers import attention, fast_path
from edgeattn.layers.call import check_inputs
from edgeattn.layers.linear import Linear, joined
from edgeattn.layers.positions import refuse_positions
from edgeattn.layers.projected_kv import project_kv
from edgeattn.layers.weights import AttentionWeights
from edgeattn.masks import NO_WINDOW, torch_masks
from edgeattn.prepared import PreparedCalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import Self, Unpack

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.options import CallOptions
    from edgeattn.layers.projected_kv import ProjectedKV
    from edgeattn.ops import Ops, Sequences, T
    from edgeattn.types import CausalAlignment, Flag, Float32s, Floats, LayerOnDevice, Real, TorchOptions, Window


class MultiHeadAttention(AttentionWeights):
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
    gate_weight, gate_bias : (H * Dv, E), (H * Dv,) float arrays, optional
        The heads side by side are multiplied by sigmoid(query gate_weight^T + gate_bias), before the output
        projection, as in Keras layers with use_gate=True.
    rotary : RotaryEmbedding, optional
        Turns queries and keys by their positions, which a cache counts on.
    q_norm, k_norm : LayerNorm or RMSNorm of D features, optional
        Of each head's query and key, before `rotary`.
    position_bias : (H, L, S) float array or RelativePositionBias, optional
        Added to the scores, as a float `attn_mask` is; of an array the first L and S positions.

    Attributes
    ----------
    q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias : float32 array or None
        Read-only, in C order.
    gate_weight, gate_bias : float32 array or None
        Likewise.
    bias_k, bias_v : float32 array (Hkv * D,), (Hkv * Dv,) or None
        Read-only.
    add_zero_attn : bool
    extra_keys : int
        0 to 2: the keys that `bias_k` and `add_zero_attn` add to every call.
    gated : bool
        Whether there is a `gate_weight`.
    num_heads, num_kv_heads, embed_dim, kdim, vdim, head_dim, value_dim, output_dim : int
        H, Hkv, E, width of key, width of value, D, Dv, Eo.
    scale : float
        1 / sqrt(D).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    query_name = "query"  # what the caller calls it

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | ProjectedKV | None = None,
                 value: ArrayLike | None = None, *, need_weights: Literal[False] = False,
                 **options: Unpack[CallOptions]) -> Floats: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | ProjectedKV | None = None,
                 value: ArrayLike | None = None, *, need_weights: Literal[True],
                 **options: Unpack[CallOptions]) -> tuple[Floats, Floats]: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | ProjectedKV | None = None,
                 value: ArrayLike | None = None, *, need_weights: Flag,
                 **options: Unpack[CallOptions]) -> Floats | tuple[Floats, Floats]: ...

    def __call__(
        self,
        query: Any,  # an ArrayLike; where the kernel reads it as it is, an array
        key: ArrayLike | ProjectedKV | None = None,
        value: ArrayLike | None = None,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        causal_alignment: CausalAlignment | None = None,
        window_size: Window = NO_WINDOW,
        softcap: Real = 0.0,
        alibi_slopes: ArrayLike | None = None,
        kv_cache: KVCache | None = None,
        need_weights: Flag = False,
        average_attn_weights: Flag = False,
        out: Floats | None = None,
    ) -> Floats | tuple[Floats, Floats]:
        """Attend from `query` to `key` and `value`.

        Parameters
        ----------
        query : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        key : (B, S, kdim) or (S, kdim) array, or what `project_kv` returned, optional
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
        if (key is None and value is None and attn_mask is None and key_padding_mask is None and is_causal is False
                and window_size is NO_WINDOW and kv_cache is None and alibi_slopes is None and causal_alignment is None
                and need_weights is False and average_attn_weights is False and out is None and type(softcap) is float
                and not softcap and type(query) is ndarray and query.dtype is FLOAT32 and query.flags.carray
                and (prepared := self.prepared_calls.get(query.shape)) is not None):
            result = empty(prepared.shape, FLOAT32)
            prepared.call.run_four(query, query, query, result)  # type: ignore[union-attr]
            return result
        return attention.call(self, query, key, value, attn_mask, key_padding_mask, is_causal, causal_alignment,
                              window_size, softcap, alibi_slopes, kv_cache, need_weights, average_attn_weights, out)

    def project_kv(self, key: ArrayLike, value: ArrayLike | None = None, *,
                   key_padding_mask: ArrayLike | None = None) -> ProjectedKV:
        """Keys and values of what many calls attend to, as an encoder's output: projected once.

        `layer(query, layer.project_kv(key, value))` gives the bytes of `layer(query, key, value)`; of a dynamic int8
        layer where each of these keys, but for padding, is seen by one of the queries.

        Parameters
        ----------
        key : (B, S, kdim) or (S, kdim) float array
        value : (B, S, vdim) or (S, vdim) float array, optional
            `key` unless given.
        key_padding_mask : (B, S) or (S,) bool array, optional
            True = a real token that may be attended to, by all of these calls.

        Returns
        -------
        ProjectedKV
            For this layer's `key`. Calls then take no softcap, no `need_weights` and no `kv_cache`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        return project_kv(self, key, value, key_padding_mask)

    @overload
    def to(self, device: Literal["cpu"], *, precision: Literal["float32"] = "float32") -> Self: ...

    @overload
    def to(self, device: Literal["cuda"], *,
           precision: Literal["float32", "float16", "tf32"] = "float32") -> LayerOnDevice: ...

    def to(self, device: Literal["cpu", "cuda"], *,
           precision: Literal["float32", "float16", "tf32"] = "float32") -> Self | LayerOnDevice:
        """The layer on `device`: "cpu", or "cuda", a GPU (docs/cuda.md); `.layer` of that is this one.

        Parameters
        ----------
        device : {"cpu", "cuda"}
        precision : {"float32", "float16", "tf32"}
            Of attention's two products on "cuda", as in `scaled_dot_product_attention`; projections are float32.

        Returns
        -------
        the layer itself, or one whose calls take and give arrays on the GPU, and NumPy arrays

        Raises
        ------
        ValueError
            For another device or precision.
        RuntimeError
            Where there is no CUDA, saying what of it is missing.
        """
        if device == "cpu" and precision != "float32":
            raise ValueError(f"precision must be 'float32' on the CPU, got {precision!r}, which tensor cores have")
        if device == "cuda":
            refuse_positions(self, "keep it on the CPU")
        placed: Self | LayerOnDevice = place(self, device, precision=precision)
        return placed

    @functools.cached_property
    def fusible(self) -> bool:
        """Whether the fused kernel can be the layer: with no empty weights, added keys or gate."""
        whole = self.head_dim and self.value_dim and self.output_dim
        return bool(whole and not self.extra_keys and not self.gated)

    @property
    def fused_kernel(self) -> Any:
        """The kernel that is the whole layer: (q, k, v, out, mask, position); None of none."""
        return self._kernel if self.fusible else None

    take_step = fast_path.take_step

    @functools.cached_property
    def prepared_calls(self) -> PreparedCalls:
        """What the checks of calls found, for the next like these."""
        return PreparedCalls()

    @functools.cached_property
    def _kernel(self) -> FloatLayer:
        return FloatLayer(
            self.num_heads, self.num_kv_heads, (self.q_weight, self.k_weight, self.v_weight, self.out_weight),
            (self.q_bias, self.k_bias, self.v_bias, self.out_bias), self.scale, **self.head_positions)

    @functools.cached_property
    def projections(self) -> dict[str, Linear]:
        """The layer's linear maps: "query", "key", "value", and "output" and "gate" where it has them."""
        return {name: Linear(weight, getattr(self, f"{short}_bias")) for name, short in attention.SHORT.items()
                if (weight := getattr(self, f"{short}_weight")) is not None}

    @functools.cached_property
    def joined_projections(self) -> Callable[[Float32s], Float32s]:
        """The maps of an input to queries, keys and values as one, for tokens that come one by one."""
        return joined([self.projections[name] for name in ("query", "key", "value")])

    def forward(self, ops: Ops[T], query: T, key: T, value: T, sequences: Sequences, name: str = "") -> T:
        """Rows of queries (tokens, E), keys and values -> (tokens, Eo)."""
        return attention.forward(ops, self, query, key, value, sequences, name)

    @overload
    def call_with_torch_masks(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        need_weights: Literal[False] = False, **options: Unpack[TorchOptions],
    ) -> Floats: ...

    @overload
    def call_with_torch_masks(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        need_weights: Literal[True], **options: Unpack[TorchOptions],
    ) -> tuple[Floats, Floats]: ...

    @overload
    def call_with_torch_masks(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        need_weights: Flag, **options: Unpack[TorchOptions],
    ) -> Floats | tuple[Floats, Floats]: ...

    def call_with_torch_masks(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        need_weights: Flag = False,
        average_attn_weights: Flag = True,
        out: Floats | None = None,
    ) -> Floats | tuple[Floats, Floats]:
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
        need_weights, average_attn_weights, out : bool, bool, array
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
        query, key, value = check_inputs(self, query, key, value)
        shape = (*query.shape[:-2], self.num_heads, query.shape[-2], key.shape[-2])
        attn_mask, key_padding_mask = torch_masks(shape, attn_mask, key_padding_mask)
        return MultiHeadAttention.__call__(
            self, query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
            causal_alignment="upper_left", need_weights=need_weights, average_attn_weights=average_attn_weights,
            out=out)

