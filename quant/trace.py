"""Every intermediate tensor of a layer, for calibration and comparison: the float layer's and the static int8 layer's.

The workbench may hold the (B, H, L, S) scores that the kernels never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array
from edgeattn.executors.numpy import NumpyOps
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.layers import MultiHeadAttention
from edgeattn.layers.attention import forward
from edgeattn.layers.linear import Linear
from edgeattn.masks import Mask, resolve_mask
from edgeattn.ops import Sequences
from edgeattn.quantized import INPUTS, StaticMultiHeadAttention
from quant.progress import track

if TYPE_CHECKING:
    from typing import Any, TypeVar

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Bools, Codes, Float32s, Sources
    from quant.types import Batch

    _Scalar = TypeVar("_Scalar", bound=np.generic)

CALL_MASKS = ("attn_mask", "key_padding_mask", "is_causal", "causal_alignment")


@dataclass(frozen=True)
class Call:
    """One call of a layer as three inputs and what is permitted.

    Attributes
    ----------
    where : str
        Which batch this is, for messages.
    query, key, value : float32 (B, L, Eq), (B, S, Ek), (B, S, Ev)
    sources : tuple of int
        Which of the three are the same array: (0, 0, 0), (0, 1, 1) or (0, 1, 2).
    permitted : bool (B, H, L, S) or None
        None: every key, and no mask was given. Where query and key are one array, padding by ``key_padding_mask`` has
        no permitted key either: nobody reads what it attends to.
    """

    where: str
    query: Float32s
    key: Float32s
    value: Float32s
    sources: Sources
    permitted: Bools | None


def describe_sources(sources: tuple[int, ...]) -> str:
    """The inputs of a call, in words."""
    words: dict[tuple[int, ...], str] = {(0, 0, 0): "a query alone", (0, 1, 1): "a query and a key"}
    return words.get(sources, "a query, a key and a value")


def check_batches(batches: object) -> None:
    """TypeError for what is no iterable of batches."""
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches; got {type(batches).__name__} (put a single batch "
                        f"into a list)")


def read_calls(layer: MultiHeadAttention, batches: Iterable[Batch], description: str) -> Iterator[Call]:
    """Every batch as a Call that fits ``layer``, under a progress bar. Batches are as ``quant.calibrate`` takes them.

    Raises
    ------
    TypeError, ValueError
        Naming the batch and the argument.
    """
    check_batches(batches)
    for i, batch in enumerate(track(batches, description)):
        yield _read_call(layer, batch, f"batches[{i}]")


def _read_call(layer: MultiHeadAttention, batch: Any, where: str) -> Call:
    # an opened .npz has keys, too, but is no Mapping in every NumPy
    arguments = dict(batch) if hasattr(batch, "keys") else {"query": batch}
    unknown = sorted(set(arguments) - {*INPUTS, *CALL_MASKS}, key=str)
    if unknown or arguments.get("query") is None:
        raise ValueError(f"{where} must be an array or a mapping with 'query' and any of "
                         f"{', '.join(map(repr, (*INPUTS[1:], *CALL_MASKS)))}; got {sorted(arguments, key=str)}")
    inputs: list[Any] = [arguments.get(name) for name in INPUTS]
    query, key, value = inputs
    if key is None and value is not None:
        raise ValueError(f"{where} has a value without a key")
    key = query if key is None else key
    value = key if value is None else value
    sources = (0, 0, 0) if key is query and value is query else (0, 1, 1) if value is key else (0, 1, 2)
    itself = key is query
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    query, key, value = (_read_input(array, width, f"{name} of {where}")
                         for name, array, width in zip(INPUTS, (query, key, value), widths, strict=True))
    lead = query.shape[:-2]
    if key.shape[:-2] != lead or value.shape[:-2] != lead or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{where}: query, key and value must share the batch, and key and value their length; "
                         f"got {query.shape}, {key.shape}, {value.shape}")
    masks = {name: arguments[name] for name in CALL_MASKS if name in arguments}
    attn_mask = masks.get("attn_mask")
    if attn_mask is not None and (given := as_array(f"attn_mask of {where}", attn_mask).dtype) != np.bool_:
        raise TypeError(f"attn_mask of {where} must be bool (True = attend) for static int8; got {given}; a layer of "
                        "scheme='dynamic' adds float masks, and needs no calibration")
    try:
        mask = resolve_mask((*lead, layer.num_heads, query.shape[-2], key.shape[-2]), **masks)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    permitted = mask.permitted()
    if (padding := masks.get("key_padding_mask")) is not None and itself:
        permitted = permitted & as_array("key_padding_mask", padding).reshape(mask.shape[0], 1, -1, 1)
    if permitted is not None:
        permitted = np.broadcast_to(permitted, mask.shape)
    if not lead:
        query, key, value = query[None], key[None], value[None]
    return Call(where, query, key, value, sources, permitted)


def _read_input(array: ArrayLike, width: int, name: str) -> Float32s:
    """A checked float32 array."""
    array = as_array(name, array)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be a float array; got {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must be (B, L, E) or (L, E); got shape {array.shape}")
    if array.shape[-1] != width:
        raise ValueError(f"{name} must have {width} features in its last axis; got shape {array.shape}")
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values, or values beyond float32")
    return array


def counted(name: str, values: NDArray[_Scalar], call: Call) -> NDArray[_Scalar]:
    """The elements of a traced tensor that may reach a result.

    No masked score; no key or value that no query sees; nothing of a query without a permitted key. A token that is
    both query and key counts where either does.
    """
    if call.permitted is None:
        return values if call.key.shape[1] else values[:0]
    return values[_counts(name, call.permitted, call.sources)]


def _counts(name: str, permitted: Bools, sources: Sources) -> Bools:
    """Which leading axes of a traced tensor hold what `counted` gives."""
    if name == "scores":
        return permitted
    rows: Bools = permitted.any(3)
    keys: Bools = permitted.any(2)
    if name in ("query", "probabilities", "context"):
        return rows
    if name in ("key", "value"):
        return keys
    rows, keys = rows.any(1), keys.any(1)
    if name == "query_input":
        return rows | keys if sources[1] == 0 else rows
    return rows if name == "output" else keys


def float_trace(layer: MultiHeadAttention, call: Call, *, key_bias: bool = False) -> dict[str, Float32s]:
    """Every tensor of ``MultiHeadAttention`` in float32.

    Parameters
    ----------
    layer : MultiHeadAttention
    call : Call
    key_bias : bool
        Whether keys hold the layer's ``k_bias``. It adds the same to all scores of a row, which softmax does not see,
        and an int8 range of keys or scores would waste codes on it.

    Returns
    -------
    dict
        "query_input" (and "key_input", "value_input" where they are arrays of their own), "query", "key", "value"
        (B, H, length, size), "scores" (scaled), "probabilities" (B, H, L, S), "context" (B, H, L, Dv) and, with an
        output projection, "output".

    Raises
    ------
    ValueError
        When a tensor leaves the range of float32.
    """
    trace: dict[str, Float32s] = {}
    inputs = (call.query, call.key, call.value)
    with np.errstate(over="ignore", invalid="ignore"):
        forward(FloatTrace(trace, key_bias), layer, *inputs, _sequences(layer, call))
    trace |= {f"{INPUTS[i]}_input": inputs[i] for i in set(call.sources)}
    trace = _in_order(trace, call.sources)
    for name, values in trace.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{call.where}: the layer's {name} leaves the range of float32")
    return trace


class FloatTrace(NumpyOps):
    """The float layer as it is quantized: where the key bias adds nothing, without it."""

    def __init__(self, record: dict[str, Float32s], key_bias: bool):
        super().__init__(record)
        self.key_bias = key_bias

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        if name == "key" and not self.key_bias:
            linear = Linear(linear.weight)
        return super().linear(x, linear, name)


def static_trace(layer: StaticMultiHeadAttention, call: Call) -> dict[str, Codes]:
    """Every tensor of a static layer as int8 codes; names and shapes as in ``float_trace``."""
    trace: dict[str, Codes] = {}
    ops = Int8Ops(layer, trace)
    read = {i: ops.quantize(x, f"{INPUTS[i]}_input")
            for i, x in enumerate((call.query, call.key, call.value)) if i in layer.sources}
    query, key, value = (read[i] for i in layer.sources)
    forward(ops, layer, query, key, value, _sequences(layer, call))
    return _in_order(trace, layer.sources)


def _sequences(layer: MultiHeadAttention | StaticMultiHeadAttention, call: Call) -> Sequences:
    shape = (len(call.query), layer.num_heads, call.query.shape[1], call.key.shape[1])
    return Sequences([Mask(shape, call.permitted, None, None, -1, -1, 0, None)])


def _in_order(trace: dict[str, NDArray[_Scalar]], sources: tuple[int, ...]) -> dict[str, NDArray[_Scalar]]:
    """The tensors that have a quantization, in the order of the computation."""
    names = (*(f"{INPUTS[i]}_input" for i in sorted(set(sources))), *INPUTS, "scores", "probabilities", "context",
             "output")
    return {name: trace[name] for name in names if name in trace}
