"""What the operations of layers are on a GPU: launches, made when their rows are needed.

Rows are a View (tokens, features) or (B, L, features) of edgeattn.kernels.cuda.arrays, or `Pending`. So the rows of a
linear map go where the next launch reads them, as heads or straight to the result of the call, and what follows the map
joins its launch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.ops import Ops

if TYPE_CHECKING:
    from typing import Any


class Pending:
    """Rows that launches to come write.

    Parameters
    ----------
    shape : tuple of int
    into : function
        From a View to nothing: the launches, which fill it.
    """

    def __init__(self, shape, into):
        self.shape, self.into, self.made = shape, into, None


class Map(Pending):
    """What a linear map makes of rows x."""

    def __init__(self, x, linear, outputs, into):
        super().__init__((*x.shape[:-1], outputs), into)
        self.x, self.linear = x, linear


class Group(NamedTuple):
    """Equally long sequences that lie one after the other; `masks`: as `device_masks` gives them."""

    batch: int
    queries: int
    keys: int
    masks: dict[str, Any]


@dataclasses.dataclass(slots=True, eq=False)
class SequencesOnDevice:
    """`edgeattn.ops.Sequences` on a GPU.

    Attributes
    ----------
    groups : list of Group
    softcap : float
    cache : CacheOnCuda or None
    pieces : list
        Of the cache, as `edgeattn.ops.Sequences` has them.
    weights : View (B, H, L, columns) or None
        Takes the probabilities; there is one group then.
    """

    groups: list[Group]
    softcap: float = 0.0
    cache: Any = None
    pieces: list[Any] = dataclasses.field(default_factory=list)
    weights: Any = None


class DeviceOps(Ops["Any"]):
    """The operations upon rows on a GPU.

    Parameters
    ----------
    stream : int
    like : object
        An array of the kind that results and scratch memory are of.
    """

    dtype = np.float32

    def __init__(self, stream, like):
        self.stream, self.like = stream, like

    def rows(self, x):
        """The View of rows, written by now."""
        if not isinstance(x, Pending):
            return x
        if x.made is None:
            x.made = self._room(x.shape)
            x.into(x.made)
        return x.made

    def write(self, x, out):
        """The rows to `out`, a View of their shape."""
        x.into(out)

    def _room(self, shape):
        from edgeattn.kernels.cuda.host import scratch

        return scratch(shape, self.dtype, self.like)

    def attention(self, q, k, v, layer, sequences, name):
        """The heads side by side, group by group, right after their projections in one launch."""
        from edgeattn.kernels.cuda.host import part

        inputs = [self.rows(x.x) for x in (q, k, v)]
        linears = [x.linear for x in (q, k, v)]

        def into(out):
            if len(sequences.groups) == 1:
                batch = sequences.groups[0].batch
                parts = [_sequences(x, batch) for x in inputs]
                self._attend(parts, linears, layer, sequences, sequences.groups[0], _sequences(out, batch))
                return
            row = token = 0
            for group in sequences.groups:
                rows, tokens = (row, row + group.batch * group.queries), (token, token + group.batch * group.keys)
                row, token = rows[1], tokens[1]
                parts = [_sequences(part(x, 0, *at), group.batch)
                         for x, at in zip(inputs, (rows, tokens, tokens), strict=True)]
                self._attend(parts, linears, layer, sequences, group, _sequences(part(out, 0, *rows), group.batch))

        return Pending((*q.shape[:-1], layer.num_heads * layer.value_dim), into)


def _sequences(rows, batch):
    """Rows as (batch, tokens of a sequence, features)."""
    return rows if rows.ndim == 3 else rows.reshape(batch, rows.shape[0] // batch, rows.shape[1])


class CudaOps(DeviceOps):
    """Layers in float32 and in dynamic int8.

    Parameters
    ----------
    parameters : edgeattn.executors.cuda.parameters.Parameters
    stream, like
        As for `DeviceOps`.
    precision : str
        Of the two products of float attention.
    """

    def __init__(self, parameters, stream, like, precision="float32"):
        super().__init__(stream, like)
        self._parameters, self._precision, self._quantized = parameters, precision, {}

    def linear(self, x, linear, name):
        """x weight^T + bias."""
        placed = self._parameters.of(linear)
        return Map(x, linear, placed.outputs, lambda out: self._map(placed, self.rows(x), out))

    def activation(self, x, kind, name):
        """A gate's, which waits for what it opens."""
        if kind != "sigmoid":
            return super().activation(x, kind, name)
        return _Gate(x)

    def multiply(self, a, b, name):
        """A gate's rows times what it opens, in place."""
        if not isinstance(b, _Gate):
            return super().multiply(a, b, name)

        def into(out):
            from edgeattn.kernels.cuda.host import open_gate
            from edgeattn.kernels.cuda.layers import batched

            self.write(a, out)
            open_gate(self.rows(b.of), batched(out), self.stream)

        return Pending(a.shape, into)

    def _map(self, placed, x, out):
        """Rows x to out."""
        from edgeattn.kernels.cuda.layers import as_heads, batched

        self._project([placed], [batched(x)], [as_heads(batched(out), 1)])

    def _project(self, placed, inputs, outs):
        """Up to three linear maps in one launch: x (B, T, inputs) to out (B, heads, T, size) each."""
        from edgeattn.kernels.cuda.layers import FloatLinear, project, project_int8

        if isinstance(placed[0], FloatLinear):
            project([one.into(x, out) for one, x, out in zip(placed, inputs, outs, strict=True)], self.stream)
            return
        codes = [self._codes(x) for x in inputs]
        project_int8(None, [(one, *of, out, out.strides, one.size)
                            for one, of, out in zip(placed, codes, outs, strict=True)], self.stream)

    def _codes(self, x):
        """(codes, scales) of x (B, T, E), made once."""
        from edgeattn.kernels.cuda.layers import token_codes

        # what is one array in this call may be two in one like it
        key = (getattr(x.pointer, "place", None), getattr(x.pointer, "offset", int(x.pointer)), x.shape)
        if key not in self._quantized:
            self._quantized[key] = token_codes(x, self.stream, self.like)
        return self._quantized[key]

    def _attend(self, inputs, linears, layer, sequences, group, out):
        from edgeattn.kernels.cuda.host import attend, attend_int8, scratch
        from edgeattn.kernels.cuda.layers import FloatLinear, as_heads, repeated

        heads, cache = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), sequences.cache
        placed = [self._parameters.of(linear) for linear in linears]
        is_float = isinstance(placed[0], FloatLinear)
        precision = self._precision if is_float else "float32"
        in_place = cache is not None and cache.dtype == "float32" and len(sequences.pieces) == 1
        places = cache.places(inputs[1].shape[1], self.stream, self.like) if in_place else ()
        made = [scratch((group.batch, n, x.shape[1], one.outputs // n), np.float32, self.like)
                for x, n, one in zip(inputs, heads[:1] if places else heads, placed, strict=False)]
        q, k, v = *made, *places
        self._project(placed, inputs, [q, k, v])
        added = self._parameters.added(layer)
        options = dict(softcap=sequences.softcap, stream=self.stream, like=self.like, **group.masks)
        context, weights = as_heads(out, layer.num_heads), sequences.weights
        if cache is None and not is_float and weights is None and added is None and k.shape[2]:  # no key has no range
            attend_int8(q, k, v, context, layer.scale, **options)
            return
        options |= dict(precision=precision,
                        added=None if added is None else tuple(repeated(x, group.batch) for x in added))
        if cache is None:
            attend(q, k, v, context, layer.scale, weights=weights, **options)
        else:
            _attend_cached(sequences, q, None if in_place else (k, v), context, layer.scale, options)


class _Gate:
    """The sigmoid of rows, to be multiplied with others."""

    def __init__(self, of):
        self.of, self.shape = of, of.shape


def _attend_cached(sequences, q, rows, context, scale, options):
    """Keys and values `rows`, or those in place, into the cache, all of which the queries attend to, piece by piece."""
    from edgeattn.kernels.cuda.host import part

    cache, weights = sequences.cache, sequences.weights
    stream, like = options["stream"], options["like"]
    for at, taken in sequences.pieces:
        cache.append_device(taken[1] - taken[0], None if rows is None else [part(x, 2, *taken) for x in rows], stream,
                            like)
        cache.attend_device(part(q, 2, *at), part(context, 2, *at), scale, at,
                            weights=None if weights is None else part(weights, 2, *at), **options)
