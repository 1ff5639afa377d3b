"""Types of arguments and results, for type checkers: nothing imports this module when it runs.

A program may, to annotate what it hands on: `def heads(x: Floats, window: Window) -> Floats`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from typing_extensions import Unpack

Floats: TypeAlias = NDArray[np.floating[Any]]  # float16, float32 or float64: results have the dtype of their inputs
Float32s: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8]
Bools: TypeAlias = NDArray[np.bool_]

Flag: TypeAlias = bool | np.bool_
Real: TypeAlias = float | np.floating[Any] | np.integer[Any]
Shape: TypeAlias = tuple[int, ...]
MaskShapes: TypeAlias = tuple[Shape | None, Shape | None, Shape | None, tuple[int, int] | None, Shape | None]
Window: TypeAlias = tuple[SupportsIndex, SupportsIndex]
Path: TypeAlias = str | os.PathLike[str]

CausalAlignment: TypeAlias = Literal["upper_left", "lower_right"]
Precision: TypeAlias = Literal["float32", "int8", "float16", "tf32"]
Device: TypeAlias = Literal["cpu", "cuda"]
Input: TypeAlias = Literal["query", "key", "value"]
Sources: TypeAlias = tuple[int, int, int]
# The names in edgeattn.arithmetic.KERNEL_SETS.
Arithmetic: TypeAlias = Literal["litert", "litert-arm", "litert-builtin", "litert-reference", "tflite-runtime", "tflm"]
# What from_onnx makes of a file with quantizers.
OnnxScheme: TypeAlias = Literal["float32", "static"]
# What from_pretrained reads of a folder, where that is not the whole.
ModelPart: TypeAlias = Literal["text", "vision", "encoder"]
CacheDtype: TypeAlias = (Literal["float32", "int8"] | np.dtype[np.float32] | np.dtype[np.int8]
                         | type[np.float32] | type[np.int8])


class LayerSizes(Protocol):
    """What every attention layer has, one on a GPU too."""

    num_heads: int
    num_kv_heads: int
    embed_dim: int
    kdim: int
    vdim: int
    head_dim: int
    value_dim: int
    output_dim: int


class DeviceArray(Protocol):
    """An array that can lie on a GPU: of torch, CuPy or Numba. The result of a call is one of its kind."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class OnnxModel(Protocol):
    """An onnx.ModelProto."""

    @property
    def graph(self) -> Any: ...  # noqa: D102


class MaskOptions(TypedDict, total=False):
    """What restricts attention in a call of a layer."""

    attn_mask: ArrayLike | None
    key_padding_mask: ArrayLike | None
    is_causal: Flag
    causal_alignment: CausalAlignment | None
    window_size: Window


class TorchOptions(TypedDict, total=False):
    """The same of `MultiHeadAttention.call_with_torch_masks`."""

    attn_mask: ArrayLike | None
    key_padding_mask: ArrayLike | None
    is_causal: Flag
    average_attn_weights: Flag
    out: Floats | None


class FunctionOptions(TypedDict, total=False):
    """Keywords of `scaled_dot_product_attention` but `return_weights` and `return_lse`."""

    is_causal: Flag
    causal_alignment: CausalAlignment | None
    scale: Real | None
    enable_gqa: Flag
    softcap: Real
    window_size: Window
    kv_lengths: ArrayLike | None
    alibi_slopes: ArrayLike | None
    precision: Precision
    out: Floats | None


class DeviceOptions(TypedDict, total=False):
    """The same for arrays on a GPU, and those two."""

    is_causal: Flag
    causal_alignment: CausalAlignment | None
    scale: Real | None
    enable_gqa: Flag
    softcap: Real
    window_size: Window
    kv_lengths: DeviceArray | None
    alibi_slopes: DeviceArray | None
    return_weights: Flag
    return_lse: Flag
    precision: Precision
    out: DeviceArray | None


class CacheOptions(TypedDict, total=False):
    """Keywords of `KVCache.attend` but `return_weights`."""

    attn_mask: ArrayLike | None
    key_padding_mask: ArrayLike | None
    is_causal: Flag
    scale: Real | None
    softcap: Real
    window_size: Window
    alibi_slopes: ArrayLike | None
    position: SupportsIndex | None
    out: Floats | None


class DeviceMasks(TypedDict, total=False):
    """Keywords of a static layer's `run_int8` on a GPU; the arrays are NumPy's or lie there."""

    attn_mask: Any
    key_padding_mask: Any
    is_causal: Flag
    causal_alignment: CausalAlignment | None
    window_size: Window
    kv_cache: CacheOnDevice | None
    need_weights: Flag
    out: Any


class DeviceCall(DeviceMasks, total=False):
    """The same of a layer's call there."""

    softcap: Real
    alibi_slopes: Any
    average_attn_weights: Flag


class DeviceCacheOptions(TypedDict, total=False):
    """Keywords of a cache's `attend` there."""

    attn_mask: Any
    key_padding_mask: Any
    is_causal: Flag
    scale: Real | None
    softcap: Real
    window_size: Window
    alibi_slopes: Any
    position: SupportsIndex | None
    return_weights: Flag
    out: Any


class LayerOnDevice(Protocol):
    """What `layer.to("cuda")` gives; it has the layer's sizes too."""

    layer: Any

    def __call__(self, query: Any, key: Any = None, value: Any = None, **options: Unpack[DeviceCall]) -> Any:
        """Attend from `query` to `key` and `value`, as the layer does."""

    def to(self, device: Device) -> Any:
        """`layer` for "cpu"."""

    def __getattr__(self, name: str) -> Any: ...


class StaticOnDevice(LayerOnDevice, Protocol):
    """What a static layer's `to("cuda")` gives."""

    def run_int8(self, query: Any, key: Any = None, value: Any = None, **options: Unpack[DeviceMasks]) -> Any:
        """Attend on codes, as the layer does."""


class EncoderOnDevice(Protocol):
    """What `TransformerEncoder.to("cuda")` and a model's gives; it has the encoder's sizes too."""

    layer: Any

    def __call__(self, x: Any, *arguments: Any, **options: Any) -> Any:
        """Encode x, as the encoder does."""

    def to(self, device: Device) -> Any:
        """`layer` for "cpu"."""

    def __getattr__(self, name: str) -> Any: ...


class CacheOnDevice(Protocol):
    """What `KVCache.to("cuda")` gives; it has all that the cache has."""

    length: int

    def append(self, key: Any, value: Any) -> None:
        """Add the keys and values of tokens, float32 arrays there."""

    def attend(self, query: Any, **options: Unpack[DeviceCacheOptions]) -> Any:
        """Attend from queries there to the tokens in the cache."""

    def held(self) -> tuple[Float32s, Float32s]:
        """The tokens held, as NumPy copies."""

    def __getattr__(self, name: str) -> Any: ...
