"""What the int8 layers have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from edgeattn.layers.attention import SHORT
from edgeattn.layers.saveable import Saveable
from edgeattn.layers.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import Self, Unpack

    from edgeattn.layers.options import CallOptions
    from edgeattn.types import Flag, Floats, Input

__all__ = ["INPUTS", "SHORT", "QuantizedMultiHeadAttention"]
INPUTS: tuple[Input, Input, Input] = ("query", "key", "value")


class QuantizedMultiHeadAttention(Sizes, Saveable):
    """Multi-head attention in int8, as ``quant.quantize`` makes it: a static or a dynamic layer, see ``scheme``."""

    scheme: Literal["static", "dynamic"]
    query_name = "query"  # what the caller calls it

    if TYPE_CHECKING:  # what either has

        @overload
        def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                     need_weights: Literal[False] = False, **options: Unpack[CallOptions]) -> Floats: ...

        @overload
        def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                     need_weights: Literal[True], **options: Unpack[CallOptions]) -> tuple[Floats, Floats]: ...

        @overload
        def __call__(self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
                     need_weights: Flag, **options: Unpack[CallOptions]) -> Floats | tuple[Floats, Floats]: ...

        def __call__(self, query: Any, key: ArrayLike | None = None, value: ArrayLike | None = None,
                     **options: Any) -> Floats | tuple[Floats, Floats]:
            """Attend from ``query`` to ``key`` and ``value``, as ``MultiHeadAttention``."""

        def to_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
            """(config, tensors): all that ``from_state`` needs to build an equal layer."""

        @classmethod
        def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> Self:
            """The layer of which ``to_state`` gave these."""
