"""Multi-head attention in int8 throughout, every scale fixed: equal, bit for bit, to a TFLite kernel set."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy import empty, ndarray

from edgeattn.checks import (
    FLOAT32,
    as_array,
    check_out,
    checked_softcap,
    flag,
    float_array,
    is_one_of,
    result_dtype,
    write_result,
)
from edgeattn.device import place
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.kernels.cpu.quantize import Quantizer
from edgeattn.layers.attention import forward
from edgeattn.layers.call import resolve_call_mask
from edgeattn.layers.fast_path import attend_again
from edgeattn.masks import NO_WINDOW, bool_mask, resolve_mask
from edgeattn.ops import Sequences
from edgeattn.prepared import is_read_as_it_is
from edgeattn.quantized.layer import INPUTS
from edgeattn.quantized.score_ops import SelectMask
from edgeattn.quantized.static_calls import StaticCalls

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import Self, Unpack

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.options import CallOptions, CodeOptions
    from edgeattn.quantized.parameters import TensorQuantization
    from edgeattn.types import (
        Bools,
        CausalAlignment,
        Codes,
        Device,
        Flag,
        Float32s,
        Floats,
        Input,
        MaskOptions,
        Real,
        StaticOnDevice,
        Window,
    )

_INT8 = np.dtype(np.int8)


class StaticMultiHeadAttention(StaticCalls):
    """int8 in, int8 out, every scale fixed at calibration: equal, bit for bit, to a TFLite kernel set.

    ``scores = q k^T`` (1/sqrt(D) lies in q's scale), ``probabilities = softmax(scores)``,
    ``context = probabilities v``, each requantized to int8 as the named kernel set rounds (see
    ``edgeattn.arithmetic``).

    Parameters
    ----------
    num_heads : int
        H. Every head has its own key and value head; grouped heads are repeated at quantization.
    linears : mapping
        "query" (H * D, Eq), "key" (H * D, Ek), "value" (H * Dv, Ev) and, with an output projection, "output"
        (Eo, H * Dv): QuantizedLinear.
    tensors : mapping
        TensorQuantization of "query_input" (and "key_input", "value_input" where ``sources`` has them), "query", "key",
        "value", "scores", "context" and, with an output projection, "output". "probabilities" are always 1/256, -128.
    sources : tuple of int
        Which input feeds the query, key and value projection: (0, 0, 0) self-attention, (0, 1, 1) the value is the
        key, (0, 1, 2) three inputs.
    score_ops : sequence of MulConstant, AddMask, SelectMask, Requantize
        What happens to the scores' codes before the softmax.
    query_ops, key_ops : sequence of MulConstant
        What happens to the codes of "query" and "key", which the projections give, before their product: none where
        1/sqrt(D) lies in a scale.
    arithmetic : str
        A name in ``edgeattn.arithmetic.KERNEL_SETS``.
    mask_margin : float, optional
        How far the scores' range reaches below the lowest row maximum seen at calibration: the room that a masked score
        needs. 0 when calibration saw no mask, None when it is not known.
    lowest_single_score : float, optional
        The lowest score of a row with a single permitted key at calibration, None without one or when it is not known.
        The scores' range need not hold it, for such a row gives its key the whole weight; ``with_mask`` makes it do so.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    scheme: Literal["static"] = "static"

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(num_heads={self.num_heads}, embed_dim={self.embed_dim}, kdim={self.kdim}, "
                f"vdim={self.vdim}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
                f"output_dim={self.output_dim}, sources={self.sources}, "
                f"score_ops=[{', '.join(type(op).__name__ for op in self.score_ops)}], "
                f"query_ops={len(self.query_ops)}, key_ops={len(self.key_ops)}, "
                f"arithmetic={self.arithmetic!r}, mask_margin={self.mask_margin})")

    @overload
    def to(self, device: Literal["cpu"]) -> Self: ...

    @overload
    def to(self, device: Literal["cuda"]) -> StaticOnDevice: ...

    def to(self, device: Device) -> Self | StaticOnDevice:
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
        placed: Self | StaticOnDevice = place(self, device)
        return placed

    # -- on reals ------------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[False] = False, **options: Unpack[CallOptions]) -> Floats: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[True], **options: Unpack[CallOptions]) -> tuple[Floats, Floats]: ...

    @overload
    def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Flag, **options: Unpack[CallOptions]) -> Floats | tuple[Floats, Floats]: ...

    def __call__(
        self,
        query: Any,  # an ArrayLike; where the kernel reads it as it is, an array
        key: ArrayLike | None = None,
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
        """Attention on reals: quantize the inputs, ``run_int8``, dequantize.

        Parameters
        ----------
        query, key, value : float16, float32 or float64 arrays
            Otherwise as for ``run_int8``, like the masks. Infinite values saturate.
        attn_mask, key_padding_mask : bool array, optional
            True = attend, as for ``MultiHeadAttention``.
        is_causal, causal_alignment, window_size, kv_cache, need_weights : as for ``MultiHeadAttention``
        softcap, alibi_slopes : 0, None
            Of float and dynamic layers: refused unless 0 and None.
        average_attn_weights : bool
            Return the mean of the probabilities over the heads.
        out : (B, L, Eo) or (L, Eo) array, optional
            Takes the result; of the result's dtype.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
            Of the inputs' dtype. The row of a query is NaN when it, or a key or value it may see, holds NaN; with
            ``kv_cache``, whose codes have no NaN, it is refused.
        (B, H, L, S) or (H, L, S) array
            The probabilities, multiples of 1/256, only with ``need_weights``; without the axis H when averaged.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        if type(softcap) is not float or softcap or alibi_slopes is not None:
            _refuse(softcap, alibi_slopes)
        if (key is None and value is None and self.sources == (0, 0, 0) and need_weights is False
                and average_attn_weights is False and is_read_as_it_is(query)):
            check_out(out, (*query.shape[:-1], self.output_dim), FLOAT32)
            codes, some_nan = self._source_quantizer.to_codes(query)
            if not some_nan:
                reals = self._last_quantizer.to_reals(
                    self.run_int8(codes, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
                                  causal_alignment=causal_alignment, window_size=window_size, kv_cache=kv_cache))
                return write_result(reals, out, FLOAT32)
        average = flag("average_attn_weights", average_attn_weights)
        masks: MaskOptions = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal,
                              "causal_alignment": causal_alignment, "window_size": window_size}
        inputs: list[Any] = [None if x is None else as_array(name, x)
                  for name, x in zip(INPUTS, self.distinct_inputs(query, key, value), strict=True)]
        codes = [None if x is None else self.quantize_input(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        nan: list[Any] = [None if x is None else np.isnan(x).any(-1) for x in inputs]
        dtype = result_dtype(*(x for x in inputs if x is not None))
        check_out(out, (*inputs[0].shape[:-1], self.output_dim), dtype)
        some_nan = any(x is not None and x.any() for x in nan)
        if some_nan and kv_cache is not None:
            raise ValueError("query, key and value must hold no NaN with kv_cache: codes cannot keep it")
        given = self.run_int8(*codes, **masks, kv_cache=kv_cache, need_weights=need_weights)
        context, weights = given if isinstance(given, tuple) else (given, None)
        result = self.dequantize_output(context)
        if some_nan:
            result[self._nan_rows([nan[source] for source in self.sources], masks)] = np.nan
        delivered = write_result(result, out, dtype)
        if weights is None:
            return delivered
        probabilities = self.tensors["probabilities"].dequantize(weights)
        return delivered, write_result(probabilities.mean(axis=-3) if average else probabilities, None, dtype)

    def _nan_rows(self, nan: Sequence[Bools], masks: MaskOptions) -> Bools:
        """Whether NaN reaches a query, (..., L); ``nan``: which queries, keys and values hold any, (..., L or S)."""
        query, keys = nan[0], nan[1] | nan[2]
        mask = resolve_mask((*query.shape[:-1], self.num_heads, query.shape[-1], keys.shape[-1]), **masks)
        permitted = mask.permitted()
        seen = np.ones(mask.shape, bool) if permitted is None else np.broadcast_to(permitted, mask.shape)
        for op in self.score_ops:
            if isinstance(op, SelectMask):
                seen = seen & op.keep
        reached: Bools = (seen & keys.reshape(mask.shape[0], 1, 1, -1)).any((1, 3)).reshape(query.shape)
        return query | reached

    def quantize_input(self, x: ArrayLike, name: Input = "query") -> Codes:
        """int8 codes of a float input; ``name`` is "query", "key" or "value".

        Parameters
        ----------
        x : float array
            What is infinite saturates; NaN has no code of its own, so look for it before.
        name : {"query", "key", "value"}
            Whose scale.

        Returns
        -------
        int8 array of the shape of ``x``

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        if not is_one_of(name, INPUTS):
            raise ValueError(f"name must be 'query', 'key' or 'value'; got {name!r}")
        x = as_array(name, x)
        if x.dtype == np.int8:
            raise TypeError(f"{name} must be a float array; got int8 (codes go to run_int8)")
        return self.tensors[f"{INPUTS[self.sources[INPUTS.index(name)]]}_input"].quantize(float_array(name, x))

    def dequantize_output(self, codes: ArrayLike) -> Float32s:
        """float32 reals of ``run_int8``'s codes.

        Parameters
        ----------
        codes : int8 array

        Returns
        -------
        float32 array of the shape of ``codes``

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        return self._last.dequantize(codes)

    @property
    def _last(self) -> TensorQuantization:
        """The quantization of the result."""
        return self.tensors["output" if "output" in self.linears else "context"]

    @functools.cached_property
    def _source_quantizer(self) -> Quantizer:
        """What makes codes of the one input of a layer with one."""
        source = self.tensors["query_input"]
        return Quantizer(source.scale, source.zero_point)

    @functools.cached_property
    def _last_quantizer(self) -> Quantizer:
        """What makes reals of the result."""
        return Quantizer(self._last.scale, self._last.zero_point)

    # -- on codes ------------------------------------------------------------------------------------------------------

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[False] = False, **options: Unpack[CodeOptions]) -> Codes: ...

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Literal[True], **options: Unpack[CodeOptions]) -> tuple[Codes, Codes]: ...

    @overload
    def run_int8(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                 need_weights: Flag, **options: Unpack[CodeOptions]) -> Codes | tuple[Codes, Codes]: ...

    def run_int8(
        self,
        query: Any,  # an ArrayLike, and from the checks on an array
        key: Any = None,
        value: Any = None,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        causal_alignment: CausalAlignment | None = None,
        window_size: Window = NO_WINDOW,
        kv_cache: KVCache | None = None,
        need_weights: Flag = False,
        out: Codes | None = None,
    ) -> Codes | tuple[Codes, Codes]:
        """Attention on codes, equal to the named kernel set.

        Parameters
        ----------
        query : int8 (B, L, Eq) or (L, Eq)
        key : int8 (B, S, Ek), optional
            Required when the layer has an input of its own for it, and left out otherwise; likewise ``value``.
        value : int8 (B, S, Ev), optional
        attn_mask : bool, broadcastable to (B, H, L, S), optional
            True = attend. A masked key is not there at all; a row with no key gives a context of real 0.
        key_padding_mask : bool (B, S), optional
            True = a real key.
        is_causal : bool
        causal_alignment : {"upper_left", "lower_right"}, optional
            Required for causal attention with L != S.
        window_size : (int, int)
            (left, right): a query at position p sees keys p - left to p + right; -1 = unbounded.
        kv_cache : KVCache, optional
            From ``KVCache.for_layer(layer, ...)``: keeps the codes of keys and values, otherwise as for
            ``MultiHeadAttention``. Results do not depend on how a sequence was cut into chunks, bit for bit.
        need_weights : bool
            Return the codes of the probabilities too.
        out : int8 (B, L, Eo), optional
            Where to write the result.

        Returns
        -------
        int8 (B, L, Eo) or (L, Eo)
        int8 (B, H, L, S) or (H, L, S)
            Only with ``need_weights``: the probability of a code is (code + 128) / 256.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        signature = None
        if (need_weights is False and (key is not None or not self.sources[1])
                and (value is not None or self.sources[2] < 2)):
            if (key is None and value is None and attn_mask is None and key_padding_mask is None and kv_cache is None
                    and is_causal is False and causal_alignment is None and window_size is NO_WINDOW and out is None
                    and type(query) is ndarray and query.dtype is _INT8 and query.flags.carray
                    and (prepared := self.prepared_calls.get(query.shape)) is not None):
                result = empty(prepared.shape, query.dtype)
                prepared.call.run_four(query, query, query, result)  # type: ignore[union-attr]
                return result
            again, signature = attend_again(self, query, key, value, out, kv_cache, attn_mask, key_padding_mask,
                                            is_causal, causal_alignment, window_size, None)
            if again is not None:
                return again
        need_weights = flag("need_weights", need_weights)
        query, key, value = self._check_codes(query, key, value)
        lead, L, S = query.shape[:-2], query.shape[-2], key.shape[-2]
        check_out(out, (*lead, L, self.output_dim), _INT8)
        if attn_mask is not None:
            attn_mask = bool_mask(attn_mask)
        if signature is not None and kv_cache is None and query.size and key.size and self.output_dim:
            first = self._run_first(signature, query, key, value, attn_mask, key_padding_mask, is_causal,
                                    causal_alignment, window_size)
            if first is not None:
                return write_result(first, out, _INT8)
        if kv_cache is not None:
            self._check_cache(kv_cache, causal_alignment)
        mask, pieces = resolve_call_mask(
            (*lead, self.num_heads, L, S), kv_cache, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
            is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size)
        B = mask.shape[0]
        if not lead:
            given, query = (query, key, value), query[None]
            key = query if given[1] is given[0] else key[None]
            value = key if given[2] is given[1] else value[None]
        result = np.empty((B, L, self.output_dim), np.int8)
        record: dict[str, Codes] = {}
        if need_weights:
            with contextlib.nullcontext() if kv_cache is None else kv_cache.transaction():
                result = forward(Int8Ops(self, record, {"probabilities"}), self, query, key, value,
                                 Sequences([mask], cache=kv_cache, pieces=pieces))
        elif kv_cache is not None:
            with kv_cache.transaction():
                self._run_cached(query, key, value, mask, kv_cache, pieces, result)
            self.prepared_calls.learn_step(signature, result.reshape(*lead, L, self.output_dim))
        elif result.size:
            self._run_fused(query, key, value, mask, result)
        result = write_result(result.reshape(*lead, L, self.output_dim), out, _INT8)
        weights = record.get("probabilities")
        return result if weights is None else (result, weights.reshape(*lead, *weights.shape[1:]))

    def _check_codes(self, query: Any, key: Any, value: Any) -> tuple[Codes, Codes, Codes]:
        """The three inputs as int8 arrays of agreeing shapes."""
        if (key is None and value is None and self.sources == (0, 0, 0) and is_read_as_it_is(query, _INT8)
                and query.ndim in (2, 3) and query.shape[-1] == self.embed_dim):
            return query, query, query
        inputs = self.distinct_inputs(query, key, value)
        arrays: list[Any] = [None if x is None else _codes(x, name) for name, x in zip(INPUTS, inputs, strict=True)]
        query, key, value = (arrays[source] for source in self.sources)
        if key is query and value is query and query.shape[-1] == self.embed_dim:
            return query, key, value
        lead, S = query.shape[:-2], key.shape[-2]
        for name, x, width in zip(INPUTS, (query, key, value), (self.embed_dim, self.kdim, self.vdim), strict=True):
            if x.ndim != query.ndim:
                raise ValueError(f"{name} must have as many axes as query, {query.ndim}; got shape {x.shape}")
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features in its last axis; got shape {x.shape}")
        if key.shape[:-2] != lead or value.shape[:-1] != (*lead, S):
            raise ValueError(f"query, key and value must share the batch, and key and value their length; "
                             f"got {query.shape}, {key.shape}, {value.shape}")
        return query, key, value

    def distinct_inputs(self, query: Any, key: Any, value: Any) -> list[Any]:
        """The inputs this layer reads, None where it reads an earlier one; refuses others."""
        given = [query, key, value]
        for i, name in enumerate(INPUTS):
            source = self.sources[i]
            if source < i:
                if given[i] is not None and given[i] is not given[source]:
                    raise ValueError(f"{name} must be left out: this layer was quantized with {INPUTS[source]} as its "
                                     f"{name}")
                given[i] = None
            elif given[i] is None:
                raise ValueError(f"{name} is required: this layer was quantized with a {name} of its own")
        return given


def _refuse(softcap: Real, alibi_slopes: ArrayLike | None) -> None:
    """Raise unless both leave the scores as they are."""
    given = [("softcap", "0")] if checked_softcap(softcap) else []
    given += [("alibi_slopes", "None")] if alibi_slopes is not None else []
    for name, none in given:
        raise ValueError(f"{name} must be {none} for a static int8 layer: its scores are codes, and no TFLite kernel "
                         "set has it; layers of quant.quantize(layer, scheme='dynamic') take it")


def _codes(x: ArrayLike, name: str) -> Codes:
    """A C-contiguous int8 view or copy of an input."""
    x = as_array(name, x)
    if x.dtype != np.int8:
        raise TypeError(f"{name} must be int8; got {x.dtype} (floats go to the call itself)")
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be (B, L, E) or (L, E); got shape {x.shape}")
    return np.ascontiguousarray(x)
