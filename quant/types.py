"""Types of arguments, for type checkers: nothing imports this module when it runs. See edgeattn.types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from numpy.typing import ArrayLike

Scheme: TypeAlias = Literal["static", "dynamic"]
# Of names: a scheme of half a layer, or of a tensor an observer, ("percentile", share) or (low, high).
Overrides: TypeAlias = Mapping[str, Literal["static", "dynamic", "float32", "minmax", "percentile", "mse"]
                               | tuple[Literal["percentile"], float] | tuple[float, float]]
# The names in quant.observers.OBSERVERS.
Observer: TypeAlias = Literal["minmax", "percentile", "mse"]
# The names in quant.export.targets.TARGETS.
TargetName: TypeAlias = Literal["aarch64", "cortex-a53", "cortex-a72", "cortex-a76", "x86-64-v2", "x86-64-v3",
                                "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni", "x86-64-v4-vbmi", "x86-64-v4-amx",
                                "native"]
# A query, or the arguments of a call by name.
Batch: TypeAlias = ArrayLike | Mapping[str, Any]
# Of a whole encoder: what it is called with, its arguments by name, or texts.
ModelBatch: TypeAlias = ArrayLike | Sequence[ArrayLike] | Sequence[str] | Mapping[str, Any]
