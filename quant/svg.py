"""Small pictures for a page without a network: curves and bars as SVG, maps as PNG in the page itself."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quant.observers import Statistics

WIDTH, HEIGHT = 320, 120
_BARS = 64  # of a histogram


def histograms(real: Statistics, got: Statistics) -> str:
    """Two histograms over one another, counts by their logarithms: filled the float one, a line the int8 one."""
    low, high = min(real.minimum, got.minimum), max(real.maximum, got.maximum)
    if not low < high:
        return f'<p class="quiet">every value is {low:.4g}</p>'
    edges = np.linspace(low, high, _BARS + 1)
    counts = [_counts(each, edges) for each in (real, got)]
    top = math.log1p(max(float(each.max()) for each in counts)) or 1.0

    def outline(count: NDArray[np.float64]) -> str:
        points = []
        for i, n in enumerate(count):
            y = HEIGHT - HEIGHT * math.log1p(n) / top
            points += [f"{WIDTH * i / _BARS:.1f},{y:.1f}", f"{WIDTH * (i + 1) / _BARS:.1f},{y:.1f}"]
        return " ".join(points)

    return _svg(f'<polygon class="float" points="0,{HEIGHT} {outline(counts[0])} {WIDTH},{HEIGHT}"/>'
                f'<polyline class="int8" points="{outline(counts[1])}"/>'
                + _below(f"{low:.3g}", f"{high:.3g}"), HEIGHT + 16)


def _counts(statistics: Statistics, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts of the bins of `statistics` by the bars their centres lie in."""
    own = statistics.edges()
    centres = np.clip((own[1:] + own[:-1]) / 2, statistics.minimum, statistics.maximum)
    seen = statistics.histogram > 0
    found, _ = np.histogram(centres[seen], edges, weights=statistics.histogram[seen].astype(np.float64))
    return found


def columns(series: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], line: tuple[str, Sequence[float]]
            ) -> str:
    """Bars side by side for each label, and a line over them; each series is (its class, values)."""
    everything = [value for _, values in [*series, line] for value in values if math.isfinite(value)]
    top = max(everything, default=0.0) or 1.0
    step, parts = WIDTH / max(len(labels), 1), []
    wide = 0.7 * step / max(len(series), 1)
    for k, (kind, values) in enumerate(series):
        for i, value in enumerate(values):
            height = HEIGHT * (value / top if math.isfinite(value) else 0)
            parts.append(_bar(kind, (i * step + 0.15 * step + k * wide, max(wide - 1, 0.5)), height,
                              f"{labels[i]}: {value:.3g}"))
    points = " ".join(f"{(i + 0.5) * step:.1f},{HEIGHT - HEIGHT * value / top:.1f}"
                      for i, value in enumerate(line[1]) if math.isfinite(value))
    parts.append(f'<polyline class="{line[0]}" points="{points}"/>')
    parts.append(f'<line class="axis" x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}"/>')
    parts.append(f'<text x="0" y="9">{top:.3g}</text>')
    return _svg("".join(parts) + _below(labels[0], labels[-1] if len(labels) > 1 else ""), HEIGHT + 16)


def magnitudes(before: NDArray[np.float32], after: NDArray[np.float32]) -> str:
    """Channels from the largest on, logarithms of what they reach: filled as they are, a line as codes have them."""
    before, after = np.nan_to_num(before), np.nan_to_num(after)
    order = np.argsort(-before, kind="stable")[:_BARS]
    tops = [np.maximum(each[order].astype(np.float64), 1e-12) for each in (before, after)]
    kept = tops[1][tops[1] > 1e-12]
    high, low = math.log10(float(tops[0].max())), math.log10(float(kept.min() if len(kept) else tops[0].min())) - 0.3
    parts, step = [], WIDTH / max(len(order), 1)
    for i, (a, b) in enumerate(zip(*tops, strict=True)):
        for kind, value in (("float", a), ("codes", b)):
            height = HEIGHT * max(math.log10(value) - low, 0) / max(high - low, 1e-9)
            parts.append(_bar(kind, (i * step, max(step - 0.7, 0.5)), height, f"channel {order[i]}: {a:.3g}"))
    names = f"{10**high:.3g} the largest", f"the {len(order)} largest channels"
    return _svg("".join(parts) + _below(*names), HEIGHT + 16)


def _bar(kind: str, across: tuple[float, float], height: float, title: str) -> str:
    """across: where it begins, and how wide it is."""
    return (f'<rect class="{kind}" x="{across[0]:.1f}" y="{HEIGHT - height:.1f}" width="{across[1]:.1f}" '
            f'height="{height:.1f}"><title>{escape(title)}</title></rect>')


def heads(values: NDArray[np.float64]) -> str:
    """Decibels (layers, heads) as a table of colours, the stronger the worse."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    size = min(24.0, WIDTH / values.shape[1])
    parts = []
    for i, row in enumerate(values):
        for h, value in enumerate(row):
            badness = (high - value) / max(high - low, 1e-9) if math.isfinite(value) else 0.0
            parts.append(f'<rect class="int8fill" fill-opacity="{0.08 + 0.92 * badness:.2f}" x="{h * size:.1f}" '
                         f'y="{i * size:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}">'
                         f"<title>layer {i}, head {h}: {value:.1f} dB</title></rect>")
    return _svg("".join(parts), size * len(values))


def probabilities(rows: NDArray[np.float32], title: str) -> str:
    """A map (L, S) of 0 to its largest."""
    top = float(rows.max(initial=0)) or 1.0
    return _image(np.clip(rows / top, 0, 1), np.zeros_like(rows), f"{title}, to {top:.2g}")


def difference(rows: NDArray[np.float32], title: str) -> str:
    """A map of what is more, and what is less."""
    top = float(np.abs(rows).max(initial=0)) or 1.0
    return _image(np.clip(rows / top, 0, 1), np.clip(-rows / top, 0, 1), f"{title}, to {top:.2g}")


def _image(more: NDArray[np.float32], less: NDArray[np.float32], title: str) -> str:
    height, width = more.shape
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = np.where((less > more)[..., None], (56, 120, 200), (230, 110, 30))
    pixels[..., 3] = np.rint(255 * np.sqrt(np.nan_to_num(np.maximum(more, less))))  # small ones shall be seen
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),
                           (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (f'<figure><img class="map" alt="{escape(title)}" src="{source}">'
            f"<figcaption>{escape(title)}</figcaption></figure>")


def _below(left: str, right: str) -> str:
    return (f'<text x="0" y="{HEIGHT + 13}">{escape(left)}</text>'
            f'<text x="{WIDTH}" y="{HEIGHT + 13}" text-anchor="end">{escape(right)}</text>')


def _svg(inside: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{inside}</svg>'
