"""Multi-head attention with int8 weights and activations quantized at run time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import numpy as np
from numpy import empty, ndarray

from edgeattn.checks import FLOAT32, count, default_scale
from edgeattn.device import place
from edgeattn.kernels.cpu.encoder_dynamic import MOST_OUTLIERS
from edgeattn.kernels.cpu.layer_dynamic import DynamicLayer
from edgeattn.kernels.cpu.projection_dynamic import DynamicProjection
from edgeattn.layers import attention, fast_path
from edgeattn.layers.dynamic_linear import DynamicLinear, indices
from edgeattn.layers.positions import Positions, refuse_positions
from edgeattn.layers.projected_kv import project_kv
from edgeattn.layers.weights import KEY_TENSORS, added_keys, added_keys_state, positions_of, positions_state
from edgeattn.masks import NO_WINDOW
from edgeattn.prepared import PreparedCalls
from edgeattn.quantized.layer import INPUTS, SHORT, QuantizedMultiHeadAttention
from edgeattn.quantized.parameters import QuantizedLinear, frozen

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self, Unpack

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.norm import LayerNorm, RMSNorm
    from edgeattn.layers.options import CallOptions
    from edgeattn.layers.positions import PositionBias
    from edgeattn.layers.projected_kv import ProjectedKV
    from edgeattn.ops import Ops, Sequences, T
    from edgeattn.rotary import RotaryEmbedding
    from edgeattn.types import CausalAlignment, Device, Flag, Float32s, Floats, LayerOnDevice, Real, Window


class Projection(NamedTuple):
    """One linear map of a dynamic layer; `packed`: float32 (tokens, inputs) -> (tokens, outputs)."""

    weight: QuantizedLinear
    bias: Float32s | None
    packed: Callable[[Float32s], Float32s]


_OF_INPUT = (*INPUTS, "gate")  # the projections that read what the layer is given


class DynamicMultiHeadAttention(QuantizedMultiHeadAttention, Positions):
    """Float in, float out, int8 inside: nothing is calibrated, every token is quantized by its own range at run time.

    Weights are int8 per output channel, activations int8 per token, products accumulate in int32, the softmax is
    float32, and probabilities are quantized per row and 256 keys. Biases, masks and the softmax never meet an int8
    range, so long rows and masks cost nothing.

    Parameters
    ----------
    num_heads : int
        H.
    weights : mapping
        "query" (H * D, Eq), "key" (Hkv * D, Ek), "value" (Hkv * Dv, Ev) and, where there are an output projection and a
        gate, "output" (Eo, H * Dv) and "gate" (H * Dv, Eq): QuantizedLinear without a bias.
    biases : mapping
        By the same names float32 (out_features,), where there is one. A key bias matters to norms and rotations, added
        keys, a softcap and what a float32 cache holds, to nothing else.
    num_kv_heads : int, optional
        Hkv, H unless given.
    bias_k, bias_v, add_zero_attn : (Hkv * D,), (Hkv * Dv,) float arrays, bool, optional
        The added keys, as for ``MultiHeadAttention``.
    rotary, q_norm, k_norm, position_bias : RotaryEmbedding, norms, (H, L, S) array or RelativePositionBias, optional
        Likewise: in float32, before queries and keys are quantized.
    outlier_columns : (n,) int array, optional
        Features of the inputs, all of one width, whose products are float32, at most 4: those much larger than the
        others, which would set the scale of every token. Their codes in "query", "key", "value" and "gate" are 0.
    outlier_weights : mapping, optional
        By these names float32 (out_features, n): the weights of `outlier_columns`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    scheme: Literal["dynamic"] = "dynamic"

    def __init__(self, num_heads: SupportsIndex, weights: Mapping[str, QuantizedLinear],
                 biases: Mapping[str, ArrayLike], *, num_kv_heads: SupportsIndex | None = None,
                 bias_k: ArrayLike | None = None, bias_v: ArrayLike | None = None, add_zero_attn: Flag = False,
                 rotary: RotaryEmbedding | None = None, q_norm: LayerNorm | RMSNorm | None = None,
                 k_norm: LayerNorm | RMSNorm | None = None, position_bias: ArrayLike | PositionBias | None = None,
                 outlier_columns: ArrayLike | None = None, outlier_weights: Mapping[str, ArrayLike] | None = None):
        self.num_heads = count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        self.weights = dict(weights)
        self.biases: dict[str, Float32s] = {}
        unknown = sorted(set(self.weights) - set(SHORT)) + sorted(set(biases) - set(self.weights))
        missing = [name for name in INPUTS if name not in self.weights]
        if missing or unknown:
            raise ValueError(f"weights and biases must be of {', '.join(SHORT)}; "
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
        fits = fits and merged == H * self.value_dim
        fits = fits and shapes.get("gate", (merged, self.embed_dim)) == (merged, self.embed_dim)
        if not fits or not (self.head_dim and self.value_dim):
            raise ValueError(f"weights of shapes {shapes} do not fit num_heads = {H} and num_kv_heads = {Hkv}")
        self.output_dim = shapes.get("output", (H * self.value_dim,))[0]
        self.scale = default_scale(self.head_dim)
        self.bias_k, self.bias_v, self.add_zero_attn, self.extra_keys = added_keys(
            bias_k, bias_v, add_zero_attn, Hkv * self.head_dim, Hkv * self.value_dim)

        def pair(name: str) -> tuple[NDArray[np.int8], Float32s] | None:
            return (self.weights[name].weight, self.weights[name].scale) if name in self.weights else None

        self._set_positions(H, self.head_dim, rotary, q_norm, k_norm, position_bias)
        self.gated = "gate" in self.weights
        self.outlier_columns = indices("outlier_columns", outlier_columns, self.embed_dim, once=True)
        self.outlier_weights = self._checked_outliers({} if outlier_weights is None else outlier_weights)
        self.k_bias = self.biases.get("key")
        self.fusible = bool(self.output_dim) and not (self.extra_keys or self.gated)
        self.prepared_calls = PreparedCalls()
        fused = (*INPUTS, "output")
        self._kernel = DynamicLayer(
            H, Hkv, [pair(name) for name in fused], [self.biases.get(name) for name in fused], self.scale,
            columns=self.outlier_columns, apart=[self.outlier_weights[name] for name in INPUTS], **self.head_positions)

    def _checked_outliers(self, weights: Mapping[str, ArrayLike]) -> dict[str, Float32s]:
        """The weights of `outlier_columns` by the names of projections."""
        count, names = len(self.outlier_columns), [name for name in _OF_INPUT if name in self.weights]
        if not count:
            if weights:
                raise ValueError(f"outlier_columns must name the inputs that outlier_weights are of, got weights of "
                                 f"{', '.join(weights)}")
            return {name: np.zeros((len(self.weights[name].scale), 0), np.float32) for name in names}
        widths = self.embed_dim, self.kdim, self.vdim
        if len(set(widths)) > 1:
            raise ValueError("outlier_columns must be left out where query, key and value have inputs of different "
                             f"widths, got {', '.join(map(str, widths))}")
        if count > MOST_OUTLIERS:
            raise ValueError(f"outlier_columns must be at most {MOST_OUTLIERS} inputs, got {self.outlier_columns}")
        if sorted(weights) != sorted(names):
            raise ValueError(f"outlier_weights must be of {', '.join(names)}; got {sorted(weights)}")
        found = {name: frozen(weights[name], np.float32, f"outlier_weights of {name}") for name in names}
        for name, array in found.items():
            if array.shape != (shape := (len(self.weights[name].scale), count)):
                raise ValueError(f"outlier_weights of {name} must have shape {shape}; got {array.shape}")
        return found

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
        """Attend from ``query`` to ``key`` and ``value``; arguments and result as ``MultiHeadAttention``'s.

        With ``softcap``, ``kv_cache``, ``need_weights``, added keys or a gate the projections alone are int8: what lies
        between them is computed in float32, or as the cache stores it. So steps through a cache give the same bytes
        whatever the chunks, where the cache is int8, but not those of the whole sequence without one.

        Parameters
        ----------
        query, key, value : as for ``MultiHeadAttention``
        attn_mask, key_padding_mask, is_causal, causal_alignment, window_size, softcap : likewise
        alibi_slopes, kv_cache, need_weights, average_attn_weights, out : likewise

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype.
        (B, H, L, S) or (H, L, S) array
            The probabilities, only with ``need_weights``.

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
        """Keys and values of what many calls attend to, projected and quantized once: as ``MultiHeadAttention``.

        Parameters
        ----------
        key, value : (B, S, kdim), (B, S, vdim) or (S, kdim), (S, vdim) float arrays
        key_padding_mask : (B, S) or (S,) bool array, optional

        Returns
        -------
        ProjectedKV
            For this layer's ``key``.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        return project_kv(self, key, value, key_padding_mask)

    @overload
    def to(self, device: Literal["cpu"]) -> Self: ...

    @overload
    def to(self, device: Literal["cuda"]) -> LayerOnDevice: ...

    def to(self, device: Device) -> Self | LayerOnDevice:
        """The layer on ``device``: "cpu", or "cuda", a GPU (docs/cuda.md); ``.layer`` of that is this one.

        Parameters
        ----------
        device : {"cpu", "cuda"}

        Returns
        -------
        the layer itself, or one on the GPU

        Raises
        ------
        ValueError
            For another device.
        RuntimeError
            Where there is no CUDA, saying what of it is missing.
        """
        if device == "cuda":
            refuse_positions(self, "keep it on the CPU")
        placed: Self | LayerOnDevice = place(self, device)
        return placed

    @property
    def fused_kernel(self) -> Any:
        """The kernel that is the whole layer, as of ``MultiHeadAttention``; None where there is none."""
        return self._kernel if self.fusible else None

    take_step = fast_path.take_step

    def forward(self, ops: Ops[T], query: T, key: T, value: T, sequences: Sequences, name: str = "") -> T:
        """Rows of queries (tokens, E), keys and values -> (tokens, Eo)."""
        return attention.forward(ops, self, query, key, value, sequences, name)

    @functools.cached_property
    def projections(self) -> dict[str, Projection]:
        """The layer's linear maps by their names, as every attention layer has them."""
        return {name: self._projection(name, linear, self.biases.get(name)) for name, linear in self.weights.items()}

    def _projection(self, name: str, linear: QuantizedLinear, bias: Float32s | None) -> Any:
        if name in _OF_INPUT and len(self.outlier_columns):
            return DynamicLinear(linear.weight, linear.scale, bias, outlier_columns=self.outlier_columns,
                                 outlier_weight=self.outlier_weights[name])
        return Projection(linear, bias, DynamicProjection(linear.weight, linear.scale, bias))

    @functools.cached_property
    def joined_projections(self) -> Callable[[Float32s], Float32s]:
        """The maps of an input to queries, keys and values as one, for tokens that come one by one."""
        linears = [self.weights[name] for name in INPUTS]
        biases = [self.biases.get(name, np.zeros(len(self.weights[name].scale), np.float32)) for name in INPUTS]
        codes, scale = (np.concatenate([getattr(linear, part) for linear in linears]) for part in ("weight", "scale"))
        bias = np.concatenate(biases)
        if not len(self.outlier_columns):
            return DynamicProjection(codes, scale, bias)
        return DynamicLinear(codes, scale, bias, outlier_columns=self.outlier_columns, outlier_weight=np.concatenate(
            [self.outlier_weights[name] for name in INPUTS])).packed

    def to_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(config, tensors): all that ``from_state`` needs to build an equal layer."""
        tensors = {f"{name}.{part}": getattr(linear, part) for name, linear in self.weights.items()
                   for part in ("weight", "scale")}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        if len(self.outlier_columns):
            tensors |= {f"{name}.outlier_weight": weight for name, weight in self.outlier_weights.items()}
            tensors["outlier_columns"] = self.outlier_columns
        config, added = added_keys_state(self)
        tensors |= added
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, **config,
                **positions_state(self, tensors)}, tensors

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> Self:
        """The layer of which ``to_state`` gave these."""
        tensors = dict(tensors)
        positions = positions_of(config, tensors)
        groups: dict[str, dict[str, Any]] = {}
        added: dict[str, Any] = {}
        for name, array in tensors.items():
            if name in KEY_TENSORS or name == "outlier_columns":
                added[name] = array
                continue
            group, _, part = name.rpartition(".")
            groups.setdefault(group, {})[part] = array
        biases, apart = ({name: parts.pop(part) for name, parts in groups.items() if part in parts}
                         for part in ("bias", "outlier_weight"))
        return cls(config["num_heads"], {name: QuantizedLinear(**parts) for name, parts in groups.items()}, biases,
                   num_kv_heads=config["num_kv_heads"], add_zero_attn=config.get("add_zero_attn", False), **added,
                   outlier_weights=apart, **positions)
