"""Numbers that say how far an int8 tensor is from the float one, and the table that shows them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.checks import number
from edgeattn.quantized import TensorQuantization
from quant.model_explorer import node_data
from quant.tables import fill, render, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from edgeattn.types import Codes, Floats, Path

MOST_IN_ORDER = 1000  # results whose pairs are put in order
# Mean and least cosine from which a sentence about a model holds.
VERDICTS = ((0.999, 0.997, "is the float model for most purposes"), (0.99, 0.97, "is near the float model"),
            (-2.0, -2.0, "differs from the float model"))
GOAL = VERDICTS[0][0]  # the mean cosine that `ModelReport.overrides` aims at
REMAINS = 0.1  # of the error of static int8 in dynamic int8, as measured of MiniLM


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
        self.saturated(real, quantization)
        self.add(real, quantization.dequantize(codes))

    def saturated(self, real: Floats, quantization: TensorQuantization) -> None:
        """Count the values that lie outside the range of codes."""
        half = float(quantization.scale) / 2
        low, high = (float(quantization.dequantize(code)) for code in (CODE_MIN, CODE_MAX))
        self.below += int(np.count_nonzero(real < low - half))
        self.above += int(np.count_nonzero(real > high + half))

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
            ratio = self.signal / self.noise if self.noise else math.inf
            sqnr = 10 * math.log10(ratio) if ratio else -math.inf
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

    def to_json(self) -> str:
        """The same as JSON; a number that is not finite is null.

        Returns
        -------
        str
        """
        return _json({"tensors": {name: _numbers(r) for name, r in self.tensors.items()},
                      "heads": [_numbers(r) for r in self.heads], "notes": self.lints})

    def to_model_explorer(self, tflite: Path) -> str:
        """Signal over noise as node data of Google's Model Explorer, JSON, for the .tflite exported of the int8 layer.

        Parameters
        ----------
        tflite : path
            The exported int8 layer or encoder.

        Returns
        -------
        str
            JSON.

        Raises
        ------
        OSError, ValueError
            Naming the file, where it cannot be read or holds something else.

        See Also
        --------
        quant.model_explorer.node_data : what it holds.
        """
        return node_data(self.tensors, tflite)

    def __rich__(self) -> Any:
        shown = table("tensor", "SQNR dB", "cosine", "saturated")
        rows = [*self.tensors.items(), *((f"context of head {h}", r) for h, r in enumerate(self.heads))]
        for i, (name, r) in enumerate(rows):
            shown.add_row(name, f"{r.sqnr_db:.1f}", f"{r.cosine:.5f}", f"{r.saturation:.2%}",
                          end_section=i + 1 == len(self.tensors))
        return shown

    def __str__(self) -> str:
        return "\n".join([render(self), *(fill(f"note: {lint}") for lint in self.lints)])

    def verdict(self) -> str:
        """What the figures say, in a sentence.

        Returns
        -------
        str
        """
        last, result = list(self.tensors.items())[-1]
        worst, figures = min(self.tensors.items(), key=lambda item: item[1].sqnr_db)
        most = "" if worst == last else f" The worst tensor is {worst}, with {figures.sqnr_db:.1f} dB."
        return (f"The {last} of the int8 layer has a cosine of {result.cosine:.4f} to the float one, and "
                f"{result.sqnr_db:.1f} dB of signal over noise.{most}")

    def _repr_html_(self) -> str:
        rows = [*self.tensors.items(), *((f"context of head {h}", r) for h, r in enumerate(self.heads))]
        return html_table(("tensor", "SQNR dB", "cosine", "saturated"),
                          [(name, f"{r.sqnr_db:.1f}", f"{r.cosine:.5f}", f"{r.saturation:.2%}") for name, r in rows],
                          self.verdict(), self.lints)


@dataclass(frozen=True)
class Cosines:
    """Cosine similarities of results, one for each sequence.

    Attributes
    ----------
    mean, minimum : float
        NaN where no result had a length.
    sequences : int
    """

    mean: float
    minimum: float
    sequences: int


def cosines(pairs: Sequence[tuple[Floats, Floats]]) -> Cosines:
    """Of each pair as two vectors; those without a length are left out."""
    found = []
    for real, got in pairs:
        a, b = real.astype(np.float64).ravel(), got.astype(np.float64).ravel()
        lengths = math.sqrt(float(a @ a) * float(b @ b))
        if lengths > 0:
            found.append(float(a @ b) / lengths)
    return Cosines(math.fsum(found) / len(found) if found else math.nan, min(found, default=math.nan), len(found))


def pair_order(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    """Spearman's rank correlation of the similarities of all pairs of results, one vector for each sequence.

    NaN where results are no vectors of one length, or fewer than three.
    """
    if len(pairs) < 3 or any(real.ndim != 1 for real, _ in pairs):
        return math.nan
    ranks = []
    for side in zip(*pairs[:MOST_IN_ORDER], strict=True):
        rows = np.stack([row.astype(np.float64) for row in side])
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
        similar = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        _, place, count = np.unique(similar, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count + 1) / 2)[place.ravel()])  # those that are equal share their mean
    a, b = (rank - rank.mean() for rank in ranks)
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else math.nan


@dataclass(frozen=True)
class ModelReport:
    """What ``quant.compare`` found of a whole encoder; ``str(report)`` is a table, what costs most first.

    A part is half a layer: attention or the feed-forward network, each with its residual and its norm. Embeddings and
    norms are float32 in both models.

    Attributes
    ----------
    alone : dict of TensorReport
        By part, in the order of the computation: its result where it alone is int8, on what the float model gives it.
    so_far : dict of TensorReport
        Its result in the int8 model, in which all before it are int8, too.
    output : TensorReport
        The results of the whole model.
    cosines : Cosines
        Of the results of each sequence: of a text its embedding, else of its tokens.
    lints : list of str
        What to look at.
    pair_order : float
        Spearman's rank correlation of the similarities of all pairs of results with those of the float model; NaN where
        results are no vectors.
    """

    alone: dict[str, TensorReport]
    so_far: dict[str, TensorReport]
    output: TensorReport
    cosines: Cosines
    lints: list[str]
    pair_order: float = math.nan

    def verdict(self) -> str:
        """What the figures say, in a sentence.

        Returns
        -------
        str
        """
        c = self.cosines
        if not c.sequences:
            return "No result of the float model has a length: nothing can be said."
        words = next(words for mean, least, words in VERDICTS if c.mean >= mean and c.minimum >= least)
        order = "" if math.isnan(self.pair_order) else f", and orders pairs alike to {self.pair_order:.4f}"
        cost = next(iter(self.shares().items()), None)
        most = "" if cost is None or not cost[1] else f" Most of its error, {cost[1]:.0%}, is made in {cost[0]}."
        return (f"The int8 model {words}: its results have a cosine of {c.mean:.4f} to the float ones on average, "
                f"{c.minimum:.4f} at least{order}.{most}")

    def shares(self) -> dict[str, float]:
        """How much of the errors that parts make is each one's, largest first: of noise to signal, 1 in all.

        Returns
        -------
        dict of float
            By part.
        """
        noise = {name: 10 ** (-r.sqnr_db / 10) if r.sqnr_db == r.sqnr_db else 0.0 for name, r in self.alone.items()}
        total = math.fsum(noise.values()) or 1.0
        return {name: noise[name] / total for name in sorted(noise, key=lambda name: -noise[name])}

    def overrides(self, cosine: float = GOAL) -> dict[str, str]:
        """Which halves of a static model to make dynamic, for ``overrides`` of ``quant.quantize``.

        Those that cost most, as many as it takes for the mean cosine that can be expected: the loss is each one's share
        of the error, of which a tenth remains. Compare again to see what it is.

        Parameters
        ----------
        cosine : float
            To reach, on average, from 0 to 1.

        Returns
        -------
        dict
            From names to "dynamic"; empty where nothing has to be done.

        Raises
        ------
        TypeError, ValueError
            If ``cosine`` is no number from 0 to 1.
        """
        if not 0 <= number("cosine", cosine) <= 1:
            raise ValueError(f"cosine must lie from 0 to 1; got {cosine!r}")
        chosen: dict[str, str] = {}
        whole = remaining = 1 - self.cosines.mean
        for name, share in self.shares().items():
            if not remaining > 1 - cosine or not share:
                break
            chosen[name] = "dynamic"
            remaining -= share * whole * (1 - REMAINS)
        return chosen

    def to_model_explorer(self, tflite: Path) -> str:
        """Signal over noise of each half alone as node data of Google's Model Explorer, JSON, for an exported .tflite.

        Parameters
        ----------
        tflite : path
            The exported int8 layer or encoder.

        Returns
        -------
        str
            JSON.

        Raises
        ------
        OSError, ValueError
            Naming the file, where it cannot be read or holds something else.

        See Also
        --------
        quant.model_explorer.node_data : what it holds.
        """
        return node_data(self.alone, tflite)

    def to_json(self) -> str:
        """The same as JSON, parts in the order of the table; a number that is not finite is null.

        Returns
        -------
        str
        """
        return _json({
            "parts": [{"name": name, "share": share, "alone": _numbers(self.alone[name]),
                       "so_far": _numbers(self.so_far[name])} for name, share in self.shares().items()],
            "output": _numbers(self.output),
            "cosine": {"mean": _finite(self.cosines.mean), "minimum": _finite(self.cosines.minimum),
                       "sequences": self.cosines.sequences},
            "pair_order": _finite(self.pair_order), "verdict": self.verdict(),
            "notes": self.lints})

    def __rich__(self) -> Any:
        shown = table("part", "share", "alone, dB", "cosine", "so far, dB", "cosine")
        for name, share in self.shares().items():  # each SQNR in dB
            alone, so_far = self.alone[name], self.so_far[name]
            shown.add_row(name, f"{share:.1%}", f"{alone.sqnr_db:.1f}", f"{alone.cosine:.5f}",
                          f"{so_far.sqnr_db:.1f}", f"{so_far.cosine:.5f}")
        return shown

    def __str__(self) -> str:
        c = self.cosines
        whole = (f"results: SQNR {self.output.sqnr_db:.1f} dB; cosine of {c.sequences:,} "
                 f"sequence{'s'[:c.sequences != 1]}: mean {c.mean:.5f}, least {c.minimum:.5f}")
        return "\n".join([render(self), whole, fill(self.verdict()), *(fill(f"note: {lint}") for lint in self.lints)])

    def _repr_html_(self) -> str:
        rows = [(name, f"{share:.1%}", self.alone[name], self.so_far[name]) for name, share in self.shares().items()]
        return html_table(
            ("part", "share", "alone, dB", "cosine", "so far, dB", "cosine"),
            [(name, share, f"{a.sqnr_db:.1f}", f"{a.cosine:.5f}", f"{s.sqnr_db:.1f}", f"{s.cosine:.5f}")
             for name, share, a, s in rows], self.verdict(), self.lints)


def html_table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: str, lints: Sequence[str]) -> str:
    """A table, a paragraph and what to look at, for notebooks."""
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    notes = "".join(f"<li>{escape(lint)}</li>" for lint in lints)
    return (f"<p>{escape(words)}</p><table><thead>{line(titles, 'th')}</thead><tbody>"
            f"{''.join(line(row, 'td') for row in rows)}</tbody></table>{f'<ul>{notes}</ul>' if notes else ''}")


def _numbers(report: TensorReport) -> dict[str, float | None]:
    return {"sqnr_db": _finite(report.sqnr_db), "cosine": _finite(report.cosine),
            "saturation": _finite(report.saturation)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, allow_nan=False)
