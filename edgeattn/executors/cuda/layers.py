"""Layers whose weights lie on a GPU: what `layer.to("cuda")` gives."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import check_out, checked_softcap, flag, float_array, result_dtype, to_float32, write_result
from edgeattn.executors.cuda.call_cache import OUT, RESULTS, CallCache
from edgeattn.executors.cuda.functional import result_array
from edgeattn.executors.cuda.masks import arrays_read, device_masks
from edgeattn.executors.cuda.ops import CudaOps, Group, SequencesOnDevice
from edgeattn.executors.cuda.parameters import Parameters
from edgeattn.executors.cuda.static_ops import StaticOps
from edgeattn.layers import attention
from edgeattn.layers.call import check_input_shapes
from edgeattn.masks import NO_WINDOW, no_bool_mask
from edgeattn.quantized.score_ops import fit_mask

if TYPE_CHECKING:
    from typing import Any

    from edgeattn.kv_cache import KVCache
    from edgeattn.types import CausalAlignment, Device, Flag, Real, Window

# Of a call's arrays, as edgeattn.executors.cuda.call_cache counts them, behind the inputs and `out`.
_PLACES = {"attn_mask": 4, "key_padding_mask": 5, "alibi_slopes": 6}


class OnCuda:
    """A layer on the GPU.

    Arrays on the device are read where they lie, on their kind's current stream; the result is a new array of the same
    kind, or `out`, and nothing waits for it. NumPy arrays are copied to the device by the call, and the result back,
    after which it is there; a call has one or the other.

    Attributes
    ----------
    layer : object
        The layer it was made of, which `to("cpu")` gives back.
    """

    def __init__(self, layer):
        from edgeattn.kernels.cuda.driver import driver

        self.layer, self._calls = layer, CallCache()
        self._device = driver().device()  # where the weights go; the driver says what is missing

    def to(self, device: Device) -> Any:
        """The layer on another device: "cpu" gives the one this was made of."""
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
        return self.layer if device == "cpu" else self

    def __getattr__(self, name: str) -> Any:
        # sizes and parameters are those of the layer on the CPU
        if name == "layer":
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __repr__(self) -> str:
        return f"{self.layer!r}.to('cuda')"

    def _arrived(self, dtype, query, key, value):
        """(call, arrays, host): the inputs by their names, on the device, where those of NumPy are copied.

        host : dtype that a NumPy result shall have, or None for arrays on the device.
        """
        from edgeattn.kernels.cuda.arrays import on_device
        from edgeattn.kernels.cuda.call import Call
        from edgeattn.kernels.cuda.driver import driver

        first, host = self.query_name, None
        given = {first: query, "key": key, "value": value}
        if not on_device(query):
            arrays = {n: float_array(n, x) if dtype == np.float32 else np.asarray(x)
                      for n, x in given.items() if x is not None}
            host = result_dtype(*arrays.values())
            moved, made = {}, {}
            with driver().on(self._device):
                for name, array in arrays.items():
                    source = next((n for n in made if given[n] is given[name]), None)
                    if source is None:
                        moved[name] = driver().array(to_float32(array) if dtype == np.float32 else array)
                        made[name] = moved[name]
                    else:
                        moved[name] = moved[source]
            given = {name: moved.get(name) for name in given}
        call = Call(first, given[first])
        if call.device != self._device:
            raise ValueError(f"{first} must lie on the GPU of the layer's weights, number {self._device}, got an array "
                             f"on number {call.device}; call to('cuda') while that GPU is the current one")
        return call, given, host

    def _inputs(self, call, dtype, given):
        """The inputs as C-contiguous Views."""
        from edgeattn.kernels.cuda.launch_graph import as_argument

        first = self.query_name
        found = {name: None if x is None else as_argument(call.view(name, x), place)
                 for place, (name, x) in enumerate(given.items())}
        q = found[first]
        k = q if found["key"] is None else found["key"]
        v = k if found["value"] is None else found["value"]
        for name, x in ((first, q), ("key", k), ("value", v)):
            if x.dtype != dtype:
                raise TypeError(f"{name} must be {np.dtype(dtype)} on CUDA, got dtype {x.dtype}; convert it")
            if not x.contiguous:
                raise ValueError(f"{name} must be contiguous on CUDA, got strides {x.strides} bytes")
        return q, k, v

    def _device_array(self, call, host):
        """A function from a name and an array argument to its View; NumPy arrays are copied where the inputs were."""
        from edgeattn.kernels.cuda.arrays import on_device, view
        from edgeattn.kernels.cuda.driver import driver
        from edgeattn.kernels.cuda.launch_graph import as_argument

        def moved(name, array):
            if host is None:
                return as_argument(call.view(name, array), _PLACES[name])
            if on_device(array):
                raise TypeError(f"{name} must be a NumPy array like query, got {type(array).__name__} on the device; "
                                "pass all arrays of a call there, or none")
            array = np.asarray(array)
            if array.dtype.kind == "f":
                array = to_float32(array)
            return view(name, driver().array(array))

        return moved

    def _resolve(self, layer, call, shape, host, kv_cache, **masks):
        """(`device_masks` of a call of a layer, the pieces in which the cache, if any, takes it); shape (..., H, L, S).

        With a cache, tokens it has seen stand before the S keys, and the masks are over all.
        """
        from edgeattn.kernels.cuda.host import both

        *lead, heads, queries, keys = shape
        before = None
        if kv_cache is not None:
            _check_cache(layer, kv_cache, lead[0] if lead else 1, masks)
            kv_cache.used_by(call)
            before, masks["window_size"] = kv_cache.length, kv_cache.within_window(masks["window_size"])
        masks = device_masks((*lead, heads, queries, keys + (before or 0)), self._device_array(call, host), **masks,
                             position=before, join=functools.partial(both, stream=call.stream, like=call.like))
        return masks, [] if kv_cache is None else kv_cache.pieces(queries, keys, masks["right"])


class FloatOnCuda(OnCuda):
    """A float or dynamic layer on the GPU; arguments and result as `MultiHeadAttention`'s, float32 on the device.

    In a dynamic one every product is int8, and the softmax float32; with `kv_cache`, `need_weights` and added keys
    attention itself is float32.
    """

    def __init__(self, layer, precision="float32"):
        if precision not in ("float32", "float16", "tf32"):
            raise ValueError(f"precision must be 'float32', 'float16' or 'tf32', got {precision!r}; for int8 see "
                             "quant.quantize")
        super().__init__(layer)
        self._precision = precision
        self._parameters = Parameters(lambda ops: layer.forward(ops, None, None, None, None))

    def __call__(self, query: Any, key: Any = None, value: Any = None, *, attn_mask: Any = None,
                 key_padding_mask: Any = None, is_causal: Flag = False, causal_alignment: CausalAlignment | None = None,
                 window_size: Window = NO_WINDOW, softcap: Real = 0.0, alibi_slopes: Any = None,
                 kv_cache: KVCache | None = None, need_weights: Flag = False, average_attn_weights: Flag = False,
                 out: Any = None) -> Any:
        """Attend from `query` to `key` and `value`; `kv_cache` is one on the GPU."""
        return self._attend(
            query, key, value, softcap, kv_cache, need_weights, average_attn_weights, out, attn_mask=attn_mask,
            key_padding_mask=key_padding_mask, is_causal=is_causal, causal_alignment=causal_alignment,
            window_size=window_size, alibi_slopes=alibi_slopes)

    def _attend(self, query, key, value, softcap, kv_cache, need_weights, average_attn_weights, out, attn_mask=None,
                key_padding_mask=None, alibi_slopes=None, **masks):
        arrays = query, key, value, out, attn_mask, key_padding_mask, alibi_slopes
        options = softcap, need_weights, average_attn_weights, *masks.values()
        result = self._calls.replay(arrays, options) if kv_cache is None else None
        if result is not None:
            return result
        from edgeattn.kernels.cuda.host import mean_of_heads, scratch
        from edgeattn.kernels.cuda.launch_graph import as_argument as at
        from edgeattn.kernels.cuda.launch_graph import capture

        layer = self.layer
        need_weights = flag("need_weights", need_weights)
        average = flag("average_attn_weights", average_attn_weights) and need_weights
        if key is None and value is not None:
            raise ValueError("value needs key, got key=None; pass key=query to attend from query to itself")
        softcap = checked_softcap(softcap)
        float32 = np.dtype(np.float32)
        call, given, host = self._arrived(float32, query, key, value)
        with call, capture(kv_cache is None) as record:
            q, k, v = self._inputs(call, float32, given)
            like, stream = call.like, call.stream
            check_input_shapes(layer, q, k, v)
            lead, (queries, keys) = q.shape[:-2], (q.shape[-2], k.shape[-2])
            shape = (*lead, queries, layer.output_dim)
            batch = lead[0] if lead else 1
            masks, pieces = self._resolve(
                layer, call, (*lead, layer.num_heads, queries, keys), host, kv_cache, attn_mask=attn_mask,
                key_padding_mask=key_padding_mask, alibi_slopes=alibi_slopes, **masks)
            read = (q, k, v, *arrays_read(masks))
            if host is not None:
                check_out(out, shape, host)
            result, taken = result_array(call, None if host is not None else out, shape, float32, read)
            made, weights, by_head = [(OUT, taken)], None, None
            if need_weights:
                seen = keys + (0 if kv_cache is None else kv_cache.length) + layer.extra_keys
                of_heads = (*lead, layer.num_heads, queries, seen)
                weights, to = result_array(call, None, (*lead, queries, seen) if average else of_heads, float32, ())
                made.append((RESULTS, to))
                to = at(to, RESULTS)
                by_head = scratch(of_heads, float32, like) if average else to
                by_head = by_head.reshape(batch, *of_heads[-3:])
            if taken.size or (by_head is not None and by_head.size):
                q, k, v, taken = (x.reshape(batch, *x.shape[-2:]) for x in (q, k, v, at(taken, OUT)))
                ops = CudaOps(self._parameters, stream, like, self._precision)
                seen = SequencesOnDevice([Group(batch, queries, keys, masks)], softcap, kv_cache, pieces, by_head)
                ops.write(layer.forward(ops, q, k, v, seen), taken)
            if average:
                mean_of_heads(by_head, to, stream)
        if host is None and kv_cache is None:
            self._calls.record(arrays, options, record, read, made)
        result = result if host is None else write_result(result.numpy(), out, host)
        if not need_weights:
            return result
        return result, weights if host is None else write_result(weights.numpy(), None, host)


def check_is_on_gpu(cache):
    """Raise unless a cache is one on a GPU."""
    from edgeattn.executors.cuda.kv_cache import CacheOnCuda

    if not isinstance(cache, CacheOnCuda):
        raise TypeError(f'kv_cache must be on the GPU, KVCache(...).to("cuda"), got {type(cache).__name__}')


def _check_cache(layer, cache, batch, masks):
    """Raise unless `cache` is one of the sizes of `layer` on a GPU."""
    check_is_on_gpu(cache)
    if masks["causal_alignment"] is not None:
        raise ValueError("causal_alignment must be None with kv_cache, which knows the positions, got "
                         f"{masks['causal_alignment']!r}")
    wanted = (batch, layer.num_kv_heads, layer.head_dim, layer.value_dim)
    given = (cache.batch, cache.num_kv_heads, cache.head_dim, cache.value_dim)
    if wanted != given:
        raise ValueError(f"kv_cache must have the call's B and the layer's num_kv_heads, head_dim and value_dim "
                         f"{wanted}, got {given}")


class StaticOnCuda(OnCuda):
    """A static int8 layer on the GPU, equal to the CPU's bit for bit."""

    def __init__(self, layer):
        super().__init__(layer)
        from edgeattn.kernels.cuda.arrays import view
        from edgeattn.kernels.cuda.driver import driver
        from edgeattn.kernels.cuda.static_layer import StaticLayer

        self._kernels = StaticLayer(**layer.kernel_parameters())
        self.score_luts = None if layer.score_luts is None else view("score_luts", driver().array(layer.score_luts))
        self.lut_index = None if layer.lut_index is None else view("lut_index", driver().array(layer.lut_index))

    def __call__(self, query: Any, key: Any = None, value: Any = None, **masks_and_out: Any) -> Any:
        """Attention on reals in NumPy arrays; codes of arrays on the device go to `run_int8`."""
        from edgeattn.kernels.cuda.arrays import on_device

        if on_device(query):
            raise TypeError("query must be a NumPy array, or int8 codes on the device given to run_int8: quantizing "
                            "reals on the device is missing for static layers")
        return type(self.layer).__call__(self, query, key, value, **masks_and_out)

    def run_int8(self, query: Any, key: Any = None, value: Any = None, *, attn_mask: Any = None,
                 key_padding_mask: Any = None, is_causal: Flag = False, causal_alignment: CausalAlignment | None = None,
                 window_size: Window = NO_WINDOW, kv_cache: KVCache | None = None, need_weights: Flag = False,
                 out: Any = None) -> Any:
        """Attention on codes, equal to the named kernel set; arguments and result as the layer's on the CPU."""
        query, key, value = self.layer.distinct_inputs(query, key, value)  # refuses what a known call would not look at
        arrays = query, key, value, out, attn_mask, key_padding_mask, None
        options = is_causal, causal_alignment, window_size, need_weights
        result = self._calls.replay(arrays, options) if kv_cache is None else None
        if result is not None:
            return result
        from edgeattn.kernels.cuda.launch_graph import as_argument, capture

        layer = self.layer
        need_weights = flag("need_weights", need_weights)
        int8 = np.dtype(np.int8)
        call, given, host = self._arrived(int8, query, key, value)
        with call, capture(kv_cache is None) as record:
            q, k, v = self._inputs(call, int8, given)
            like, stream = call.like, call.stream
            check_input_shapes(self, q, k, v)
            lead, (L, S) = q.shape[:-2], (q.shape[-2], k.shape[-2])
            shape, batch = (*lead, L, layer.output_dim), lead[0] if lead else 1
            masks, pieces = self._resolve(
                layer, call, (*lead, layer.num_heads, L, S), host, kv_cache, attn_mask=attn_mask,
                key_padding_mask=key_padding_mask, is_causal=is_causal, causal_alignment=causal_alignment,
                window_size=window_size)
            if "bias" in masks:
                raise no_bool_mask(masks["bias"].dtype)
            if kv_cache is not None:
                layer.check_codes_of(kv_cache)
            elif self.lut_index is not None:
                fit_mask(layer.lut_index, (batch, layer.num_heads, L, S))
            read = (q, k, v, *arrays_read(masks))
            if host is not None:
                check_out(out, shape, int8)
            result, taken = result_array(call, None if host is not None else out, shape, int8, read)
            made, weights, to = [(OUT, taken)], None, None
            if need_weights:
                keys = S + (0 if kv_cache is None else kv_cache.length)
                weights, to = result_array(call, None, (*lead, layer.num_heads, L, keys), int8, ())
                made.append((RESULTS, to))
                to = as_argument(to.reshape(batch, *to.shape[-3:]), RESULTS)
            if taken.size or (to is not None and to.size):
                q, k, v, taken = (x.reshape(batch, *x.shape[-2:]) for x in (q, k, v, as_argument(taken, OUT)))
                lut_index = self.lut_index if kv_cache is None else None
                if lut_index is not None and lut_index.ndim < 4:
                    lut_index = lut_index.reshape(*(1,) * (4 - lut_index.ndim), *lut_index.shape)
                ops = StaticOps(self._kernels, stream, like, score_luts=self.score_luts, lut_index=lut_index)
                seen = SequencesOnDevice([Group(batch, L, S, masks)], 0.0, kv_cache, pieces, to)
                ops.write(attention.forward(ops, layer, q, k, v, seen), taken)
        if host is None and kv_cache is None:
            self._calls.record(arrays, options, record, read, made)
        result = result if host is None else write_result(result.numpy(), out, int8)
        if not need_weights:
            return result
        return result, weights if host is None else write_result(weights.numpy(), None, int8)
