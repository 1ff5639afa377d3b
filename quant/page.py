"""The report of a comparison as one page that needs nothing else: a verdict, tables, pictures; the worst first."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.files.paths import as_path, write_atomic
from edgeattn.hints import hinted
from quant import svg
from quant.compare import compare
from quant.detail import Detail
from quant.model_calls import MODELS, encoder_of
from quant.report import ModelReport, Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from edgeattn.types import Path as PathLike
    from quant.report import Comparison

MOST_TENSORS, MOST_HISTOGRAMS, MOST_MAPS = 24, 12, 4
OUTLIER = 20.0  # times the median of channels: worth a note where the codes have it
SATURATION = 0.01

_STYLE = Path(__file__).with_name("page.css")


@hinted
def write_report(layer: Any, quantized: Any, batches: Iterable[Any], path: PathLike, *, title: str | None = None
                 ) -> Report | ModelReport:
    """Compare ``quantized`` with the float ``layer``, and write what was found as a page of HTML.

    One file, without anything from a network: a verdict in words; what to look at, and what helps; the error of each
    part, tensor and head, the worst first; histograms, attention maps, and the largest channels of inputs before and
    after they are kept from the codes.

    Parameters
    ----------
    layer, quantized, batches : float layer or model, the same in int8, iterable
        As for ``compare``.
    path : str or path-like
        Ends in ".html". An existing file is replaced, by a whole one.
    title : str, optional
        Of the page.

    Returns
    -------
    Report or ModelReport
        What ``compare`` gives.

    Raises
    ------
    TypeError, ValueError
        As ``compare`` does; for another suffix.
    OSError
        Where it cannot be written.
    """
    path = as_path(path)
    if path.suffix != ".html":
        raise ValueError(f"path must end in .html; got {str(path)!r}")
    detail = Detail()
    report: Report | ModelReport = compare(layer, quantized, batches, detail=detail)
    report.lints.extend(_lints(detail, quantized))
    write_atomic(path, page(report, detail, title or f"{type(layer).__name__} in int8").encode())
    return report


def page(report: Report | ModelReport, detail: Detail, title: str) -> str:
    """The HTML of a comparison."""
    parts = [f"<h1>{escape(title)}</h1>", _verdict(report), _notes(report)]
    if isinstance(report, ModelReport):
        parts += [_by_layer(report), _parts(report)]
    parts += [_tensors(detail), _heads(detail), _histograms(detail), _maps(detail), _channels(detail)]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{_STYLE.read_text()}</style></head><body><main>{''.join(parts)}</main></body></html>\n")


def _verdict(report: Report | ModelReport) -> str:
    figures = []
    if isinstance(report, ModelReport):
        c = report.cosines
        kind = "good" if c.mean >= 0.999 and c.minimum >= 0.997 else "poor" if not c.mean >= 0.99 else ""
        figures = [("mean cosine", f"{c.mean:.5f}"), ("least cosine", f"{c.minimum:.5f}"),
                   ("signal over noise", f"{report.output.sqnr_db:.1f} dB"), ("sequences", f"{c.sequences:,}")]
        if not math.isnan(report.pair_order):
            figures.insert(2, ("order of pairs", f"{report.pair_order:.5f}"))
    else:
        cosine = list(report.tensors.values())[-1].cosine
        kind = "good" if cosine >= 0.999 else "poor" if not cosine >= 0.99 else ""
    shown = "".join(f'<div class="card"><span class="quiet">{name}</span><b>{value}</b></div>'
                    for name, value in figures)
    return f'<p class="card verdict {kind}">{escape(report.verdict())}</p><div class="figures">{shown}</div>'


def _notes(report: Report | ModelReport) -> str:
    if not report.lints:
        return ""
    return f"<h2>What to look at</h2><ul>{''.join(f'<li>{escape(lint)}</li>' for lint in report.lints)}</ul>"


def _key(colour: str, words: str) -> str:
    return f'<span class="keys"><span class="key" style="background:var(--{colour})"></span>{words}</span> '


def _by_layer(report: ModelReport) -> str:
    count = 1 + max(int(name.split(".")[1]) for name in report.alone)
    series = []
    for kind, part in (("float", "attention"), ("int8", "feed_forward")):
        series.append((kind, [_percent(report.alone[f"layers.{i}.{part}"].sqnr_db) for i in range(count)]))
    labels = [f"layer {i}" for i in range(count)]
    line = [_percent(report.so_far[f"layers.{i}.feed_forward"].sqnr_db) for i in range(count)]
    return ('<h2>Error by layer</h2><p class="quiet">Noise in per cent of the signal\'s size. '
            f'{_key("float", "attention alone")}{_key("int8", "feed-forward alone")}{_key("ink", "all so far")}</p>'
            f'<div class="card" style="max-width:640px">{svg.columns(series, labels, ("sofar", line))}</div>')


def _percent(decibels: float) -> float:
    return 100 * 10 ** (-decibels / 20) if decibels == decibels else 0.0


def _parts(report: ModelReport) -> str:
    shares = report.shares()
    most = max(shares.values(), default=1) or 1
    rows = []
    for name, share in shares.items():
        a, s = report.alone[name], report.so_far[name]
        bar = f'<span class="bar" style="width:{max(100 * share / most, 0.5):.0f}%"></span>'
        figures = (f"{a.sqnr_db:.1f}", f"{a.cosine:.5f}", f"{s.sqnr_db:.1f}", f"{s.cosine:.5f}")
        rows.append((_name(name), bar, f"{share:.1%}", *figures))
    return ('<h2>Halves of layers</h2><p class="quiet">Each alone in int8, on what the float model gives it, and '
            "in the int8 model, after all before it.</p>" + _table(
                ("part", "", "share", "alone, dB", "cosine", "so far, dB", "cosine"), rows, wide=1))


def _tensors(detail: Detail) -> str:
    found = sorted(detail.tensors.items(), key=lambda item: _worst_first(item[1].comparison))
    rows = []
    for name, tensor in found[:MOST_TENSORS]:
        r = tensor.result()
        rows.append((_name(name), f"{r.sqnr_db:.1f}", f"{r.cosine:.5f}",
                     f"{r.saturation:.2%}" if tensor.has_range else "-",
                     f"{tensor.real.minimum:.3g} .. {tensor.real.maximum:.3g}"))
    more = "" if len(found) <= MOST_TENSORS else f" The {MOST_TENSORS} worst of {len(found)}."
    return ("<h2>Tensors</h2><p class=\"quiet\">Each computed in both precisions from the same input, the worst first."
            f"{more}</p>" + _table(("tensor", "SQNR, dB", "cosine", "saturated", "range in float32"), rows))


def _worst_first(comparison: Comparison) -> float:
    decibels = comparison.result().sqnr_db
    return decibels if decibels == decibels else math.inf


def _name(name: str) -> str:
    """A name that may go on in a second line behind a dot."""
    return escape(name).replace(".", ".<wbr>")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], wide: int = -1) -> str:
    """Cells are HTML."""
    def cells(row: Sequence[str], tag: str) -> str:
        kind = [' class="wide"' if i == wide else "" for i in range(len(row))]
        return "<tr>" + "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kind, row, strict=True)) + "</tr>"

    return (f'<div class="card scroll"><table><thead>{cells(titles, "th")}</thead><tbody>'
            f"{''.join(cells(row, 'td') for row in rows)}</tbody></table></div>")


def _heads(detail: Detail) -> str:
    if not detail.heads:
        return ""
    width = max(len(each) for each in detail.heads.values())
    decibels = np.full((len(detail.heads), width), np.nan)
    for i, each in enumerate(detail.heads.values()):
        decibels[i, :len(each)] = [comparison.result().sqnr_db for comparison in each]
    if np.isnan(decibels).all():
        return ""
    return ('<h2>Heads</h2><p class="quiet">Signal over noise of each head\'s context, layers down, heads across: '
            f"from {np.nanmin(decibels):.1f} dB, the strongest colour, to {np.nanmax(decibels):.1f} dB.</p>"
            f'<div class="card" style="max-width:520px">{svg.heads(decibels)}</div>')


def _histograms(detail: Detail) -> str:
    found = sorted((item for item in detail.tensors.items() if item[1].real.count),
                   key=lambda item: _worst_first(item[1].comparison))[:MOST_HISTOGRAMS]
    cards = "".join(f'<div class="card"><h3>{escape(name)}</h3>{svg.histograms(tensor.real, tensor.got)}</div>'
                    for name, tensor in found)
    return ('<h2>Values</h2><p class="quiet">Histograms of the worst tensors, counts on a logarithmic scale. '
            f'{_key("float", "float32")}{_key("int8", "int8")}</p><div class="grid">{cards}</div>')


def _maps(detail: Detail) -> str:
    every = [(float(np.abs(m.real - m.got).max()), name, h, m) for name, maps in detail.maps.items()
             for h, m in enumerate(maps)]
    every.sort(key=lambda item: -item[0])
    shown = []
    for _, name, h, m in every[:MOST_MAPS]:
        pictures = (svg.probabilities(m.real, "float32") + svg.probabilities(m.got, "int8")
                    + svg.difference(m.got - m.real, "int8 - float32"))
        shown.append(f'<div class="card"><h3>{escape(name)}, head {h}</h3><div class="maps">{pictures}</div></div>')
    if not shown:
        return ""
    return ('<h2>Attention</h2><p class="quiet">Probabilities of the first sequence, of the heads that differ most: a '
            "row for each query, a column for each key. In the differences orange is more, blue less.</p>"
            f'<div class="grid broad">{"".join(shown)}</div>')


def _channels(detail: Detail) -> str:
    cards = "".join(f'<div class="card"><h3>{escape(name)}</h3>{svg.magnitudes(c.before, c.after)}</div>'
                    for name, c in detail.channels.items() if c.before.any())
    if not cards:
        return ""
    return ('<h2>Channels of attention\'s input</h2><p class="quiet">The largest magnitude of each channel, largest '
            'channels first, on a logarithmic scale; outliers are float32, or go on in further columns. '
            f'{_key("float", "as they are")}{_key("int8", "as codes hold them")}</p><div class="grid">{cards}</div>')


def _lints(detail: Detail, quantized: Any) -> list[str]:
    """What to look at, and what helps."""
    lints = []
    for name, channels in detail.channels.items():
        middle = float(np.median(channels.after))
        if middle > 0 and channels.after.max() > OUTLIER * middle:
            times = f"{channels.after.max() / middle:.0f}"
            lints.append(f"outliers: the codes of {name}'s input have a channel {times} times the median "
                         f"of all; {_remedy(name, quantized)}")
    outside = {name: each.result().saturation for name, each in detail.tensors.items()
               if "." in name and not name.endswith("probabilities")}
    worst = max(outside, key=outside.__getitem__, default=None)
    if worst is not None and outside[worst] > SATURATION:
        lints.append(f"saturation: {outside[worst]:.1%} of {worst} lies outside its int8 range; calibrate on data like "
                     "this")
    return lints


def _remedy(name: str, quantized: Any) -> str:
    """What helps against a large channel of attention's input."""
    if not isinstance(quantized, MODELS):
        return "quantize the whole encoder, which keeps the four largest in float32"
    attention: Any = encoder_of(quantized).layers[int(name.split(".")[1])].attention
    if attention.scheme == "static":
        return "scheme='dynamic' keeps the four largest in float32"
    return "quantize with a calibration on data like this, which says which four stay float32"
