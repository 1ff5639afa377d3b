"""The contract between layers and executors.

A layer is written once, as `forward(ops, x, ..., name)`: a handful of lines that say which operations follow each
other. An executor is what gives these operations their meaning: `executors/numpy.py` computes them with NumPy and can
keep every intermediate, `executors/compiled.py` with our kernels; others record stages, quantize, or write a file.

Between operations there are rows, one per token, whatever sequences the tokens belong to: (tokens, features), or
(B, L, features) where all are equally long. Only `attention` and `pool` ask which rows are a sequence. So a batch
without padding costs what its tokens cost, and a token's result cannot depend on what else is in the batch.

A name is a path such as "layers.0.feed_forward.linear1", the same in every call of a model: what an operation's result
is known by, to whoever records, calibrates, quantizes or exports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

from edgeattn.masks import Mask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.kernels.cpu.records import KernelMask
    from edgeattn.kv_cache import KVCache
    from edgeattn.types import Float32s

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "relu", "silu", "sigmoid"]
Pooling: TypeAlias = Literal["mean", "cls", "max", "last"]
T = TypeVar("T")  # what an executor hands from one operation to the next: a float32 array (tokens, features), a name


class Sequences:
    """Which rows are a sequence, and which of its tokens each token sees.

    Attributes
    ----------
    masks : list of Mask
        One for each group of equally long sequences, which lie one after the other. A mask's shape (B, H, L, S) says
        that the group has B * L rows of queries and B * S of keys; with a cache S counts the tokens held before too.
    softcap : float
        Bound of the scores, 0 = none.
    cache : KVCache or None
        Takes in the keys and values of this call, and has room for them; there is one group then.
    pieces : list
        Of the cache: (first, last) query and (first, last) token of each piece in which it takes them.
    calls : dict
        What stages have prepared for these sequences, by stage: those of an encoder come again.
    """

    __slots__ = "_for_kernels", "cache", "calls", "masks", "pieces", "softcap"

    def __init__(self, masks: list[Mask], softcap: float = 0.0, cache: KVCache | None = None,
                 pieces: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()):
        self.masks, self.softcap, self.cache, self.pieces = masks, softcap, cache, pieces
        self._for_kernels: list[KernelMask] | None = None
        self.calls: dict[Any, Any] = {}

    def for_kernels(self) -> list[KernelMask]:
        """`Mask.for_kernels` of each mask, made once: the layers of an encoder share their masks."""
        if self._for_kernels is None:
            self._for_kernels = [mask.for_kernels() for mask in self.masks]
        return self._for_kernels


class Norm(Protocol):
    """What executors read of a LayerNorm or RMSNorm."""

    @property
    def weight(self) -> Float32s: ...  # noqa: D102
    @property
    def bias(self) -> Float32s | None: ...  # noqa: D102
    @property
    def eps(self) -> float: ...  # noqa: D102

    def rows(self, x: Float32s) -> Float32s:
        """The norm of x (..., E), with NumPy."""


class Ops(Protocol[T]):
    """The operations that layers are written in. `name` is that of the result.

    An executor derived from this has those that it defines, and refuses the others.
    """

    def linear(self, x: T, linear: Any, name: str) -> T:
        """x weight^T + bias: (tokens, inputs) -> (tokens, outputs)."""
        raise _lacks(self, "linear")

    def attention(self, q: T, k: T, v: T, layer: Any, sequences: Sequences, name: str) -> T:
        """The heads side by side, without projections: softmax(scale q k^T + masks) v in each.

        q (queries, H * D), k (keys, Hkv * D), v (keys, Hkv * Dv) -> (queries, H * Dv). `name` stands
        before the names of its parts: "query", "key", "value", "scores", "masked_scores", "probabilities", "context".

        What `layer` has of `q_norm` and `k_norm` comes first, then `rotary`; its `position_bias` is added with the
        masks; keys that it adds stand after those of the tokens. A query that sees no key gives zeros.
        """
        raise _lacks(self, "attention")

    def layer_norm(self, x: T, norm: Norm, name: str) -> T:
        """(x - mean) / sqrt(variance + eps) * weight + bias, row by row: the shape of x."""
        raise _lacks(self, "layer_norm")

    def rms_norm(self, x: T, norm: Norm, name: str) -> T:
        """The same without the mean: x / sqrt(mean(x^2) + eps) * weight, row by row: the shape of x."""
        raise _lacks(self, "rms_norm")

    def activation(self, x: T, kind: Activation, name: str) -> T:
        """Element by element: "gelu" x * Phi(x), "gelu_tanh" its approximation by tanh, "relu", "silu" x * sigmoid(x),
        "sigmoid".
        """
        raise _lacks(self, "activation")

    def add(self, a: T, b: T, name: str) -> T:
        """The sum a + b, of equal shapes."""
        raise _lacks(self, "add")

    def multiply(self, a: T, b: T, name: str) -> T:
        """The product a * b, element by element, of equal shapes."""
        raise _lacks(self, "multiply")

    def embed(self, table: Float32s, ids: NDArray[Any], name: str) -> T:
        """Rows of table (entries, E): ids (tokens,) int -> (tokens, E). The ids have been checked."""
        raise _lacks(self, "embed")

    def pool(self, x: T, lengths: Sequence[int], kind: Pooling, name: str) -> T:
        """One row per sequence: rows x (sum of lengths, E) -> (sequences, E); no length is 0.

        "mean", "max" over its tokens, "cls" its first, "last" its last.
        """
        raise _lacks(self, "pool")

    def block(self, layer: Any, x: T, sequences: Sequences, name: str) -> T:
        """A whole encoder layer, which an executor may run otherwise than by the operations of its forward."""
        result: T = layer.forward(self, x, sequences, name)
        return result

    def static(self, x: T, layer: Any, sequences: Sequences | None, name: str) -> T:
        """A layer of static int8 upon rows: codes of them, what the layer makes of codes, and the reals of that.

        `name` stands before the names of its tensors.
        """
        raise _lacks(self, "static")

    def quantize(self, x: Any, name: str) -> T:
        """Codes of reals, by the quantization of the tensor of that name."""
        raise _lacks(self, "quantize")

    def dequantize(self, x: T, name: str) -> Any:
        """The reals that codes stand for."""
        raise _lacks(self, "dequantize")


class LacksOperationError(ValueError):
    """An executor does not have an operation that a layer is written with."""


def _lacks(ops: object, operation: str) -> LacksOperationError:
    return LacksOperationError(
        f"layer must do without the operation {operation}, which {type(ops).__name__} does not have")
