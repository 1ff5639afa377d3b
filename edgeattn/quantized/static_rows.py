"""Rows of float32 around a layer that takes codes: what the layers of a static int8 encoder have in common."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.layers.saveable import Saveable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Literal

    from edgeattn.executors.numpy import Recorder
    from edgeattn.ops import Sequences
    from edgeattn.quantized.parameters import TensorQuantization
    from edgeattn.types import Codes, Float32s


class StaticRows(Saveable):
    """float32 rows in and out, every scale between fixed at calibration.

    Attributes
    ----------
    more_inputs : tuple of int
        Of each column of the codes behind those of the features, the column whose rest it holds: a feature that
        reaches beyond the range of the codes has one column or more for what the range leaves of it.
    """

    scheme: Literal["static"] = "static"
    more_inputs: tuple[int, ...]

    if TYPE_CHECKING:
        def rows_of(self, codes_ops: Any, x: Float32s, sequences: Any) -> Float32s: ...  # noqa: D102

    def numpy_rows(self, ops: Recorder, x: Float32s, sequences: Sequences | None, name: str) -> Float32s:
        """What `Ops.static` says, by NumPy; `ops` keeps tensors by their names, which begin with `name`."""
        made: list[tuple[str, Int8Ops]] = []

        def codes_ops(of: Any, part: str) -> Int8Ops:
            made.append((part, Int8Ops(of, {})))
            return made[-1][1]

        result = self.rows_of(codes_ops, x, sequences)
        if ops.record is not None:
            ops.record |= {name + part + key: array for part, each in made for key, array in (each.record or {}).items()
                           if ops.keeps(name + part + key)}
        return result


def codes_of_rows(x: Float32s, quantization: TensorQuantization, more: Iterable[int]) -> Codes:
    """int8 codes of rows (rows, features), with the columns of `more_inputs` behind them."""
    columns = list(x.T)
    with np.errstate(invalid="ignore"):
        for source in more:
            rest = columns[source] - quantization.dequantize(quantization.quantize(columns[source]))
            columns.append(rest)
    return quantization.quantize(np.stack(columns, axis=1))


def checked_more(name: str, more: Iterable[Any], first: int) -> tuple[int, ...]:
    """`more_inputs`, the first of which stands at column `first`; each must continue a column before it."""
    found = tuple(operator.index(each) for each in more)
    for i, source in enumerate(found):
        if not 0 <= source < first + i:
            raise ValueError(f"{name} must each be a column before their own, from 0 to {first + i - 1}; got {source}")
    return found
