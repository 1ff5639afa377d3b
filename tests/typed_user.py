"""What a user's type checker makes of these packages: read by mypy in `make lint` and by pyright in
`make typecheck`, never run.

A line with `type: ignore` is a mistake that has to be one to the checkers too: they say so where it is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import edgeattn
import edgeattn.bundle
import quant
from edgeattn import KVCache, MultiHeadAttention, QuantizedMultiHeadAttention, SelfAttention
from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention, TensorQuantization
from edgeattn.types import Codes, Float32s, Floats, Window

x: NDArray[np.float32] = np.zeros((1, 4, 8), np.float32)
heads: NDArray[np.float64] = np.zeros((1, 2, 4, 8))
mask: NDArray[np.bool_] = np.tri(4, dtype=np.bool_)
codes: Codes = np.zeros((1, 4, 8), np.int8)
weights = [np.eye(8, dtype=np.float32) for _ in range(4)]
window: Window = edgeattn.sliding_window(3)


def functions() -> None:
    attend = edgeattn.scaled_dot_product_attention
    assert_type(attend(heads, heads, heads, mask, is_causal=True, window_size=window), Floats)
    assert_type(attend(heads, heads, heads, return_weights=True), tuple[Floats, Floats])
    assert_type(attend(heads, heads, heads, return_lse=True, scale=np.float32(1)), tuple[Floats, Float32s])
    assert_type(attend(heads, heads, heads, return_weights=True, return_lse=True), tuple[Floats, Floats, Float32s])
    attend(heads, heads)  # type: ignore[call-overload]
    attend(heads, heads, heads, causal_alignment="upper-left")  # type: ignore[call-overload]
    attend(heads, heads, heads, precision="bfloat16")  # type: ignore[call-overload]
    attend(heads, heads, heads, causal=True)  # type: ignore[call-overload]
    cos, sin = edgeattn.rotary_cache(4, np.int64(8))
    assert_type(edgeattn.apply_rotary_embedding(heads, cos, sin, position_ids=[[0, 1, 2, 3]]), Floats)
    edgeattn.set_num_threads("2")  # type: ignore[arg-type]
    print(edgeattn.scaled_dot_product_atention)  # type: ignore[attr-defined]


def layers(path: Path) -> None:
    layer = MultiHeadAttention(2, *weights, num_kv_heads=2, q_bias=None)
    assert_type(layer.embed_dim, int)
    assert_type(layer.out_bias, Float32s | None)
    assert_type(layer(x, attn_mask=mask, out=x), Floats)
    result, probabilities = layer(x, x, x, need_weights=True)
    assert_type(result, Floats)
    assert_type(probabilities, Floats)
    assert_type(layer.call_with_torch_masks(x, attn_mask=~mask), Floats)
    assert_type(layer.to("cpu"), MultiHeadAttention)
    layer(x, window_size=3)  # type: ignore[call-overload]
    layer(x, softcap="0")  # type: ignore[call-overload]
    layer(x, out=codes)  # type: ignore[arg-type]
    layer.to("gpu")  # type: ignore[call-overload]
    MultiHeadAttention(2.0, *weights)  # type: ignore[arg-type]

    one = SelfAttention(*weights[:3])
    assert_type(one(x, is_causal=True), Floats)
    assert_type(SelfAttention.from_torch({"in_proj_weight": x}, 1), SelfAttention)
    one(x, x)  # type: ignore[call-overload]

    cache = KVCache.for_layer(layer, 1, 16, dtype=np.dtype(np.int8))
    layer(x, kv_cache=cache, is_causal=True)
    cache.append(heads, heads)
    assert_type(cache.attend(heads), Floats)
    assert_type(cache.attend(heads, return_weights=True), tuple[Floats, Floats])
    assert_type(cache.held(), tuple[Float32s, Float32s])
    KVCache(1, 2, 16, 4, dtype="float16")  # type: ignore[arg-type]

    edgeattn.save(layer, path)
    read = edgeattn.load(path)
    assert_type(read(x), Floats)
    edgeattn.save(x, path)  # type: ignore[arg-type]
    edgeattn.load(path, arithmetic="cmsis")  # type: ignore[arg-type]


class OnGPU:
    """An array as torch and CuPy have it."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {}


def on_a_gpu(layer: MultiHeadAttention, static: StaticMultiHeadAttention, there: OnGPU) -> None:
    assert_type(edgeattn.scaled_dot_product_attention(there, there, there, precision="tf32"), Any)
    cache = KVCache(1, 2, 16, 4).to("cuda")
    assert_type(cache.held(), tuple[Float32s, Float32s])
    layer.to("cuda", precision="tf32")(there, kv_cache=cache, is_causal=True)
    static.to("cuda").run_int8(there, need_weights=True)
    layer.to("cuda", precision="int8")  # type: ignore[call-overload]
    static.to("cuda").run_int8(there, softcap=1.0)  # type: ignore[call-arg]


def bundles(path: Path) -> Floats:
    bundle = edgeattn.bundle.load(path)
    assert_type(bundle.num_heads, int)
    if isinstance(bundle, edgeattn.bundle.StaticBundle):
        assert_type(bundle.run_int8(bundle.quantize_input(x)), Codes)
    return bundle(x, is_causal=True, window_size=(3, 0))


def quantization(layer: MultiHeadAttention, path: Path) -> QuantizedMultiHeadAttention:
    calibration = quant.calibrate(layer, [x, {"query": x, "attn_mask": mask, "is_causal": True}], observer="mse")
    calibration.merge(quant.Calibration.load(path)).save(str(path))
    assert_type(calibration.range("scores"), tuple[float, float])
    static = quant.quantize(layer, calibration, arithmetic="tflm")
    assert_type(static, StaticMultiHeadAttention)
    assert_type(static.run_int8(static.quantize_input(x)), Codes)
    assert_type(static.with_mask(mask).run_int8(static.quantize_input(x), need_weights=True), tuple[Codes, Codes])
    assert_type(static.tensors["scores"], TensorQuantization)
    TensorQuantization(0.5, 0).dequantize(static.quantize_input(x))
    dynamic = quant.quantize(layer, scheme="dynamic")
    assert_type(dynamic, DynamicMultiHeadAttention)
    assert_type(dynamic(x, need_weights=True), tuple[Floats, Floats])
    report = quant.compare(layer, static, [x])
    assert_type(report.tensors["output"].sqnr_db, float)
    assert_type(quant.export(static, path, sequence_length=16, mask="causal"), Path)
    either: QuantizedMultiHeadAttention = static
    assert_type(either(x), Floats)
    quant.calibrate(layer, [x], observer="median")  # type: ignore[call-overload]
    quant.calibrate(layer, 3)  # type: ignore[call-overload]
    quant.quantize(layer)  # type: ignore[call-overload]
    quant.export(x, path)  # type: ignore[arg-type]
    quant.export(layer, path, target="cortex-a72 ")  # type: ignore[arg-type]
    return either
