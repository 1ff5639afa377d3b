"""Encoders, and models around them, whose weights lie on a GPU."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import result_dtype
from edgeattn.executors.cuda.call_cache import OUT
from edgeattn.executors.cuda.functional import result_array
from edgeattn.executors.cuda.layers import OnCuda, check_is_on_gpu
from edgeattn.executors.cuda.masks import arrays_read
from edgeattn.executors.cuda.ops import CudaOps, Group, SequencesOnDevice
from edgeattn.executors.cuda.parameters import Parameters
from edgeattn.layers.encoder import TransformerEncoder
from edgeattn.layers.encoder_call import FURTHEST, check_caches, checked_lengths, checked_list, narrower
from edgeattn.layers.ragged import runs_of
from edgeattn.masks import NO_WINDOW, window_bounds
from edgeattn.models import ImageEncoder, TextEncoder

if TYPE_CHECKING:
    from typing import Any

    from edgeattn.types import Flag, Window


class _Model(OnCuda):
    """What encoders and models share: a call with NumPy arrays is the CPU's, with its checks, but for `forward`."""

    def __init__(self, layer, parameters=None):
        for part in getattr(layer, "encoder", layer).layers:
            if "static" in (getattr(part.attention, "scheme", None), getattr(part.feed_forward, "scheme", None)):
                raise ValueError("a whole encoder must be a float or a dynamic int8 one on a GPU; got one in static "
                                 "int8: keep it on the CPU, or quantize with scheme='dynamic'")
        super().__init__(layer)
        self._parameters = Parameters(self._forward) if parameters is None else parameters

    def forward(self, ops, *inputs):
        """The layer's forward here: of NumPy arrays, to NumPy rows. `ops`, the CPU's, is not used."""
        from edgeattn.kernels.cuda.arrays import view
        from edgeattn.kernels.cuda.call import Call
        from edgeattn.kernels.cuda.driver import driver

        *inputs, sequences = inputs
        with driver().on(self._device):
            like = driver().empty((1,), np.float32)
            first, *others = inputs
            if first.dtype == np.float32:  # rows; ids are read here
                first = view("x", driver().array(first))
            with Call("x", like) as call:
                made = {id(seen): _uploaded(seen, call) for seen in sequences}
                ops = CudaOps(self._parameters, call.stream, like)
                rows = ops.rows(self.layer.forward(ops, first, *others, [made[id(seen)] for seen in sequences]))
                return rows.owner.numpy()


def _uploaded(sequences, call):
    """`edgeattn.ops.Sequences` as a GPU has them."""
    from edgeattn.kernels.cuda.layers import owned

    cache = sequences.cache
    held = 0 if cache is None else cache.length
    if cache is not None:
        check_is_on_gpu(cache)
        cache.used_by(call)
    groups = []
    for mask in sequences.masks:
        batch, _, queries, keys = mask.shape
        arrays = {name: owned(array) for name in ("keep", "bias") if (array := getattr(mask, name)) is not None}
        groups.append(Group(batch, queries, keys - held, dict(
            left=mask.left, right=mask.right, offset=int(mask.offset), at_end=False, **arrays)))
    return SequencesOnDevice(groups, sequences.softcap, cache, sequences.pieces)


class EncoderOnCuda(_Model):
    """A `TransformerEncoder` on the GPU; arguments and result as its own, float32 on the device.

    `kv_cache` is a list of caches on the GPU, as `make_caches` gives it here, and `lengths` an array in host memory.
    """

    query_name = "x"
    call_with_torch_masks = TransformerEncoder.call_with_torch_masks

    def _forward(self, ops):
        self.layer.forward(ops, None, [None] * len(self.layer.layers))

    def encode_list(self, x, lengths, out, **options):
        """A call for a list of sequences, as one of an array with room for each."""
        arrays, counts = checked_list(self.embed_dim, x, lengths, out, options)
        padded = np.zeros((len(arrays), max(counts), self.embed_dim), result_dtype(*arrays))
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        encoded = self(padded, lengths=counts, **options)
        return [row[:count] for row, count in zip(encoded, counts, strict=True)]

    def make_caches(self, batch, capacity, **options):
        """One empty cache on the GPU for each layer."""
        return [cache.to("cuda") for cache in self.layer.make_caches(batch, capacity, **options)]

    def __call__(self, x: Any, *, lengths: Any = None, key_padding_mask: Any = None, attn_mask: Any = None,
                 is_causal: Flag = False, window_size: Window = NO_WINDOW, kv_cache: Any = None, out: Any = None
                 ) -> Any:
        """Encode x: NumPy arrays, or those on the device."""
        from edgeattn.kernels.cuda.arrays import on_device

        if not on_device(x):
            return TransformerEncoder.__call__(
                self, x, lengths=lengths, key_padding_mask=key_padding_mask, attn_mask=attn_mask, is_causal=is_causal,
                window_size=window_size, kv_cache=kv_cache, out=out)
        arrays = x, None, None, out, attn_mask, key_padding_mask, None
        options = is_causal, window_size
        known = kv_cache is None and lengths is None
        result = self._calls.replay(arrays, options) if known else None
        return self._encode(arrays, options, known, lengths, kv_cache) if result is None else result

    def _encode(self, arrays, options, known, lengths, kv_cache):
        from edgeattn.kernels.cuda.launch_graph import as_argument, capture

        x, _, _, out, attn_mask, key_padding_mask, _ = arrays
        call, given, _ = self._arrived(np.dtype(np.float32), x, None, None)
        with call, capture(known) as record:
            x, *_ = self._inputs(call, np.dtype(np.float32), given)
            self.layer.check_shape(x)
            if lengths is not None and not (kv_cache is None and key_padding_mask is None):
                other = "key_padding_mask" if kv_cache is None else "kv_cache"
                raise ValueError(f"lengths must be left out with {other}, got both")
            counts = None if lengths is None else checked_lengths(lengths, x.shape[:-1])
            check_caches(self.layer.layers, kv_cache)
            seen, read = self._seen(call, x.shape, counts, kv_cache, *options, attn_mask=attn_mask,
                                    key_padding_mask=key_padding_mask)
            result, taken = result_array(call, out, x.shape, np.dtype(np.float32), (x, *read))
            if taken.size:
                batch = x.shape[0] if x.ndim == 3 else 1
                x, to = (one.reshape(batch, *x.shape[-2:]) for one in (x, as_argument(taken, OUT)))
                ops = CudaOps(self._parameters, call.stream, call.like)
                if counts is None:
                    ops.write(self.layer.forward(ops, x, seen), to)
                else:
                    self._encode_ragged(ops, x, counts, seen, to)
        if known:
            self._calls.record(arrays, options, record, (x, *read), [(OUT, taken)])
        return result

    def _seen(self, call, shape, counts, kv_cache, is_causal, window_size, **masks):
        """(the `SequencesOnDevice` of each layer, the arrays that they read)."""
        *lead, length, _ = shape
        batch = lead[0] if lead else 1
        window = window_bounds(window_size, FURTHEST)
        runs = None if counts is None else runs_of(counts)

        @functools.cache
        def resolved(heads, window, cache, layer):
            of, pieces = self._resolve(
                layer, call, (*lead, heads, length, length), None, cache, is_causal=is_causal, window_size=window,
                causal_alignment=None, **masks)
            groups = [Group(batch, length, length, of)] if runs is None else [
                Group(last - first, some, some, _part(of, first, last, some)) for first, last, some in runs]
            return SequencesOnDevice(groups, 0.0, cache, pieces), arrays_read(of)

        caches = [None] * len(self.layer.layers) if kv_cache is None else kv_cache
        found = [resolved(layer.attention.num_heads, narrower(window, layer.window_size), cache,
                          None if cache is None else layer.attention)
                 for layer, cache in zip(self.layer.layers, caches, strict=True)]
        return [seen for seen, _ in found], [array for _, read in found for array in read]

    def _encode_ragged(self, ops, x, counts, seen, out):
        """The first counts[b] tokens of each entry of x (B, L, E); the others of `out` become zeros."""
        from edgeattn.kernels.cuda.encoder import take_rows
        from edgeattn.kernels.cuda.host import scratch
        from edgeattn.kernels.cuda.layers import owned

        batch, length, width = x.shape
        real = np.flatnonzero(np.arange(length) < np.array(counts, np.int64)[:, None]).astype(np.int32)
        back = np.full(batch * length, -1, np.int32)
        back[real] = np.arange(len(real))
        rows = scratch((len(real), width), np.float32, ops.like)
        take_rows(x, owned(real), rows, ops.stream)
        take_rows(ops.rows(self.layer.forward(ops, rows, seen)) if len(real) else rows, owned(back), out, ops.stream)


def _part(masks, first, last, length):
    """Masks for the first `length` tokens of the entries from `first` on."""
    from edgeattn.kernels.cuda.host import masks_part, part

    found = masks_part(masks, (0, length), (0, length))
    for name in ("keep", "bias"):
        if found.get(name) is not None and found[name].shape[0] > 1:
            found[name] = part(found[name], 0, first, last)
    return found


class _WithEncoder(_Model):
    """A model around an encoder."""

    @functools.cached_property
    def encoder(self) -> EncoderOnCuda:
        """The model's `TransformerEncoder` there, with the weights that the model has there already."""
        return EncoderOnCuda(self.layer.encoder, self._parameters)


class TextsOnCuda(_WithEncoder):
    """A `TextEncoder` on the GPU: of ids in host memory, and of sentences."""

    __call__, encode = TextEncoder.__call__, TextEncoder.encode

    def _forward(self, ops):
        self.layer.forward(ops, None, None, None, [None] * len(self.layer.encoder.layers))


class ImagesOnCuda(_WithEncoder):
    """An `ImageEncoder` on the GPU: of pixels in host memory."""

    __call__ = ImageEncoder.__call__

    def _forward(self, ops):
        self.layer.forward(ops, None, self.layer.embedding.position_weight, 1, [None] * len(self.layer.encoder.layers))
