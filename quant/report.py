"""Numbers that say how far an int8 tensor is from the float one, and the table that shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.quantized import TensorQuantization
from quant.tables import fill, render, table

if TYPE_CHECKING:
    from typing import Any

    from edgeattn.types import Codes, Floats


@dataclass(frozen=True)
class TensorReport:
    """One tensor's agreement.

    Attributes
    ----------
    sqnr_db : float
        Signal to quantization noise ratio in dB; infinite when equal, NaN without a signal.
    cosine : float
        Of all elements as one vector; NaN without a signal.
    saturation : float
        Share of real elements more than half a step outside the int8 range, 0 to 1. That of the scores is cut below
        where no row would notice, so theirs may be large without harm.
    """

    sqnr_db: float
    cosine: float
    saturation: float


class Comparison:
    """Sums over batches that a TensorReport is made of."""

    def __init__(self) -> None:
        self.signal = self.noise = self.dot = self.other = 0.0
        self.below = self.above = self.count = 0

    def update(self, real: Floats, codes: Codes, quantization: TensorQuantization) -> None:
        """Take in float values and the int8 codes that stand for them, of one shape."""
        half = float(quantization.scale) / 2
        low, high = (float(quantization.dequantize(code)) for code in (CODE_MIN, CODE_MAX))
        self.below += int(np.count_nonzero(real < low - half))
        self.above += int(np.count_nonzero(real > high + half))
        self.add(real, quantization.dequantize(codes))

    def add(self, real: Floats, got: Floats) -> None:
        """Take in float values and what was computed in their place, of one shape."""
        real, got = real.astype(np.float64), got.astype(np.float64)
        self.signal += float(np.sum(real * real))
        self.noise += float(np.sum((real - got) ** 2))
        self.dot += float(np.sum(real * got))
        self.other += float(np.sum(got * got))
        self.count += real.size

    def result(self) -> TensorReport:
        """The numbers of everything taken in."""
        if self.signal == 0:
            sqnr = cosine = math.nan
        else:
            sqnr = math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)
            cosine = self.dot / math.sqrt(self.signal * self.other) if self.other else 0.0
        return TensorReport(sqnr, cosine, (self.below + self.above) / self.count if self.count else 0.0)


@dataclass(frozen=True)
class Report:
    """What ``quant.compare`` found; ``str(report)`` is a table.

    Attributes
    ----------
    tensors : dict of TensorReport
        By tensor name, in the order of the computation.
    heads : list of TensorReport
        Of each head's context.
    lints : list of str
        What to look at.
    """

    tensors: dict[str, TensorReport]
    heads: list[TensorReport]
    lints: list[str]

    def __rich__(self) -> Any:
        shown = table("tensor", "SQNR dB", "cosine", "saturated")
        rows = [*self.tensors.items(), *((f"context of head {h}", r) for h, r in enumerate(self.heads))]
        for i, (name, r) in enumerate(rows):
            shown.add_row(name, f"{r.sqnr_db:.1f}", f"{r.cosine:.5f}", f"{r.saturation:.2%}",
                          end_section=i + 1 == len(self.tensors))
        return shown

    def __str__(self) -> str:
        return "\n".join([render(self), *(fill(f"note: {lint}") for lint in self.lints)])
