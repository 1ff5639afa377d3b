"""What the operations of layers are on a GPU: launches, made when their rows are needed.

Rows are a View (tokens, features) or (B, L, features) of edgeattn.kernels.cuda.arrays, or `Pending`. So the rows of a
linear map go where the next launch reads them, as heads or straight to the result of the call, and what follows the map
joins its launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.executors.fused import go_together
from edgeattn.ops import LacksOperationError, Ops

if TYPE_CHECKING:
    from typing import Any


class Pending:
    """Rows that launches to come write.

    Parameters
    ----------
    shape : tuple of int
    launch : function
        From the View that is to take them to nothing.
    """

    def __init__(self, shape, launch):
        self.shape, self._launch, self.made = shape, launch, None

    def into(self, out):
        """Launch what writes the rows to `out`, a View of their shape."""
        self._launch(out)


class Map(Pending):
    """What a linear map makes of rows x, and what is done with that in the same launch.

    That is activation(x weight^T + bias) * factor + residual: `activation`, a Map with one as `factor`, and `residual`,
    each or None. `becomes_bytes`: what reads it quantizes it by groups of hidden features.
    """

    def __init__(self, x, linear, outputs, write, activation=None, factor=None, residual=None):
        super().__init__((*x.shape[:-1], outputs), None)
        self.x, self.linear, self.write, self.becomes_bytes = x, linear, write, False
        self.activation, self.factor, self.residual = activation, factor, residual

    def into(self, out):
        """As of others; not a function of its own, which would hold its memory until the next collection."""
        self.write(self, out)

    @property
    def is_followed(self):
        """Whether anything is done with it."""
        return not (self.activation is None and self.factor is None and self.residual is None)

    def followed_by(self, **what):
        """The same with one of these."""
        return Map(self.x, self.linear, self.shape[-1], self.write, **what)


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
        if is_hidden(x) and linear.quantized is not None and go_together(
                x.linear, (x.factor or x).linear, linear):
            x.becomes_bytes = True
            if x.factor is not None:
                x.factor.becomes_bytes = True
        return Map(x, linear, self._parameters.of(linear).outputs, self._map)

    def activation(self, x, kind, name):
        """Of a linear map, in its launch; a gate's waits for what it opens."""
        if kind == "sigmoid":
            return _Gate(x)
        if not isinstance(x, Map) or x.is_followed:
            raise LacksOperationError(f"layer must have {kind} of what a linear map gives, on CUDA, got it of another")
        return x.followed_by(activation=kind)

    def multiply(self, a, b, name):
        """A feed-forward's gate and what it opens, in one launch; or an attention layer's, in place."""
        if isinstance(a, Map) and a.activation is not None and isinstance(b, Map) and not b.is_followed:
            return b.followed_by(factor=a)
        if not isinstance(b, _Gate):
            raise LacksOperationError("layer must multiply by a gate, on CUDA, got another product")

        def into(out):
            from edgeattn.kernels.cuda.host import open_gate
            from edgeattn.kernels.cuda.layers import batched

            self.write(a, out)
            open_gate(self.rows(b.of), batched(out), self.stream)

        return Pending(a.shape, into)

    def add(self, a, b, name):
        """The sum, in the launch of b where that is a linear map."""
        if isinstance(b, Map) and not b.is_followed and self._parameters.of(b.linear).takes_a_residual:
            return b.followed_by(residual=a)

        def into(out):
            from edgeattn.kernels.cuda.encoder import add_rows

            add_rows(self.rows(a), self.rows(b), out, self.stream)

        return Pending(b.shape, into)

    def layer_norm(self, x, norm, name):
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        return self._norm(x, norm)

    def rms_norm(self, x, norm, name):
        """x / sqrt(mean(x^2) + eps) * weight."""
        return self._norm(x, norm)

    def _norm(self, x, norm):
        def into(out):
            from edgeattn.kernels.cuda.encoder import norm_rows

            norm_rows(self.rows(x), self._parameters.of(norm), out, self.stream)

        return Pending(x.shape, into)

    def embed(self, table, ids, name):
        """Rows of a table."""
        from edgeattn.kernels.cuda.encoder import take_rows
        from edgeattn.kernels.cuda.layers import owned

        def into(out):
            take_rows(self._parameters.of(table) or owned(table), owned(ids.astype(np.int32)), out, self.stream)

        return Pending((len(ids), table.shape[1]), into)

    def block(self, layer, x, sequences, name):
        """An encoder layer, whose scratch memory the next one uses again."""
        read = self.rows(x)

        def into(out):
            with reused_scratch():
                self.write(layer.forward(self, read, sequences, name), out)
                self._quantized.clear()

        return Pending(x.shape, into)

    def _map(self, made, out):
        """What a Map is, to out."""
        from edgeattn.kernels.cuda.encoder import DynamicRows, linear_dynamic, linear_float
        from edgeattn.kernels.cuda.layers import FloatLinear, as_heads, batched

        placed, x = self._parameters.of(made.linear), self.rows(made.x)
        follows = {"activation": made.activation or "identity",
                   "factor": None if made.factor is None else self.rows(made.factor),
                   "residual": None if made.residual is None else self.rows(made.residual)}
        if isinstance(placed, DynamicRows):
            if made.becomes_bytes and made.activation == "gelu":
                follows["activation"] = "gelu_roughly"
            codes = self._codes_of_rows(x, placed.columns, is_hidden(made.x) and made.x.becomes_bytes)
            linear_dynamic(codes, x, placed, out, self.stream, self.like, **follows)
        elif isinstance(placed, FloatLinear) and made.is_followed:
            linear_float(x, placed, out, self.stream, **follows)
        else:
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

        key = _where(x)
        if key not in self._quantized:
            self._quantized[key] = x, token_codes(x, self.stream, self.like)
        return self._quantized[key][1]

    def _codes_of_rows(self, x, columns, grouped):
        """What `quantize` makes of rows x, made once."""
        from edgeattn.kernels.cuda.encoder import quantize

        key = (*_where(x), tuple(columns), grouped)
        if key not in self._quantized:  # with x, whose memory nobody else gets while it is known by its address
            self._quantized[key] = x, quantize(x, columns, grouped, self.stream, self.like)
        return self._quantized[key][1]

    def _made_of(self, x, placed):
        """What int8 weights, and float32 ones of a few inputs, make of x (B, T, E): (B, T, outputs)."""
        from edgeattn.kernels.cuda.encoder import linear_dynamic
        from edgeattn.kernels.cuda.host import scratch

        rows = scratch((*x.shape[:2], placed.outputs), np.float32, self.like)
        linear_dynamic(self._codes_of_rows(x, placed.columns, False), x, placed, rows, self.stream, self.like)
        return rows

    def _attend(self, inputs, linears, layer, sequences, group, out):
        from edgeattn.kernels.cuda.attend import attend, attend_int8
        from edgeattn.kernels.cuda.encoder import DynamicRows
        from edgeattn.kernels.cuda.host import scratch
        from edgeattn.kernels.cuda.layers import FloatLinear, as_heads, repeated

        heads, cache = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), sequences.cache
        placed = [self._parameters.of(linear) for linear in linears]
        is_float, apart = isinstance(placed[0], FloatLinear), isinstance(placed[0], DynamicRows)
        precision = self._precision if is_float else "float32"
        in_place = cache is not None and cache.dtype == "float32" and len(sequences.pieces) == 1 and not apart
        places = cache.places(inputs[1].shape[1], self.stream, self.like) if in_place else ()
        if apart:
            q, k, v = (as_heads(self._made_of(x, one), n) for x, one, n in zip(inputs, placed, heads, strict=True))
        else:
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


def _where(x):
    """What tells rows from others: what is one array in this call may be two in one like it."""
    return getattr(x.pointer, "place", None), getattr(x.pointer, "offset", int(x.pointer)), x.shape


def is_hidden(x):
    """Whether rows are the hidden features of a feed-forward."""
    return isinstance(x, Map) and x.residual is None and (x.factor or x).activation is not None


@contextlib.contextmanager
def reused_scratch():
    """A block after which nobody reads the scratch memory that it made."""
    from edgeattn.kernels.cuda.launch_graph import capturing

    record = capturing()
    with contextlib.nullcontext() if record is None else record.reusing():
        yield


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
