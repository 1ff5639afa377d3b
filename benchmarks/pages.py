"""The tables of docs/performance.md between two marks, and the plots in docs/: written from what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.costs import steps_text
from benchmarks.problem import LENGTHS, Point
from benchmarks.targets import ALL_PEERS, FLOAT_PEERS, fastest, outcomes, speed
from benchmarks.timing import median_ratio

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ROWS = (Point(64, 4, 32), Point(64, 4, 128), Point(128, 8, 128), Point(256, 4, 128), Point(256, 8, 256),
        Point(384, 12, 128), Point(384, 12, 512))
_KINDS = (("float32", "edgeattn float32", "#1f77b4", "-"), ("int8", "edgeattn int8", "#d62728", "-"),
          ("dynamic", "edgeattn dynamic", "#2ca02c", "-"), ("LiteRT f32", "litert float32", "#1f77b4", ":"),
          ("LiteRT int8", "litert int8", "#d62728", ":"), ("LiteRT dynamic", "litert dynamic", "#2ca02c", ":"),
          ("onnxruntime f32", "onnxruntime float32", "#1f77b4", "--"),
          ("onnxruntime int8", "onnxruntime int8", "#2ca02c", "--"), ("torch sdpa", "torch sdpa", "#1f77b4", "-."))


def _layers(found):
    threads = min(r["threads"] for r in found["records"])
    return {Point.parse(r["case"]): r for r in found["records"]
            if r["section"] == "layer" and r["threads"] == threads}


def table(found: dict) -> str:
    """Markdown: what it was measured on, one row per shape, and the targets."""
    layers = _layers(found)
    machine, versions = found["machine"], found["machine"]["versions"]
    peers = [name for name in ("ai-edge-litert", "tflite-runtime", "onnxruntime", "torch") if name in versions]
    lines = [
        f"{machine['processor']}, instruction set {machine['instruction_set']}, one thread, {machine['date'][:10]}; "
        + ", ".join(f"{name} {versions[name]}" for name in peers) + ". Microseconds of a whole layer, and how many "
        "times as fast as the peer it is.", "",
        "| E / H / L | float32 | fastest float32 peer | int8 (static) | LiteRT int8, best form | LiteRT int8, usual "
        "form | int8 (dynamic) | fastest peer of all |", "|---|---|---|---|---|---|---|---|"]
    for point in ROWS:
        if point not in layers:
            continue
        r = layers[point]

        def time(name, r=r):
            return f"{np.median(r['times'][name]) * 1e6:.0f}"

        def times(ours, peer, r=r):
            return "" if peer not in r["times"] else f"{median_ratio(r['times'][peer], r['times'][ours]):.1f} x"

        best_float, best = fastest(r, FLOAT_PEERS), fastest(r, ALL_PEERS)
        cells = [time("edgeattn float32"), f"{times('edgeattn float32', best_float)} {best_float or ''}",
                 time("edgeattn int8"), times("edgeattn int8", "litert int8"),
                 times("edgeattn int8", "litert int8 usual"), time("edgeattn dynamic"),
                 f"{times('edgeattn dynamic', best)} {best or ''}"]
        lines.append(f"| {str(point).replace('/', ' / ')} | {' | '.join(cell.strip() for cell in cells)} |")
    if "overhead" in found:
        text = steps_text(found["overhead"])
        lines += ["", f"{text[0].upper()}{text[1:]}."]
    lines += ["", "| target, over all shapes measured | | met | worst |", "|---|---|---|---|"]
    lines += [f"| {row.text} | {'reached' if row.reached else 'missed'} | {row.met} of {len(row.cases)} | "
              f"{row.worst}: {row.figure} |" for row in outcomes(found)]
    return "\n".join(lines)


def write_table(found: dict) -> Path:
    """Replace what stands between the marks in docs/performance.md.

    Raises
    ------
    ValueError
        When the marks are missing.
    """
    path = ROOT / "docs" / "performance.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"docs/performance.md must hold one line {BEGIN} and after it one line {END}; the table goes "
                         "between")
    before, after = text[:text.index(BEGIN)], text[text.index(END):]
    path.write_text(f"{before}{BEGIN}\n{table(found)}\n{after}", encoding="utf-8")
    return path


def write_plots(found: dict) -> list[Path]:
    """docs/speed.png: operations per second over L, one panel per width; docs/decode.png: a decode step over S."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = _layers(found)
    most_heads = {point.E: point.H for point in sorted(layers)}
    written = []
    if layers:
        figure, panels = pyplot.subplots(1, len(most_heads), figsize=(3.4 * len(most_heads), 3.6), sharey=True,
                                         squeeze=False)
        for panel, (E, H) in zip(panels[0], most_heads.items(), strict=True):
            points = [point for point in (Point(E, H, L) for L in LENGTHS) if point in layers]
            for label, name, colour, style in _KINDS:
                shown = [point for point in points if name in layers[point]["times"]]
                panel.plot([point.L for point in shown],
                           [np.median(speed(layers[point], name)) / 1e9 for point in shown], style, color=colour,
                           label=label, marker="." if style == "-" else None)
            panel.set(title=f"E = {E}, H = {H}", xlabel="L", xscale="log", yscale="log")
            panel.set_xticks([point.L for point in points], [str(point.L) for point in points], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
        panels[0][0].set_ylabel("GOP/s, one thread")
        written.append(_save(figure, panels[0][0], "speed.png"))
    steps = [r for r in found["records"] if r["section"] == "decode" and r["threads"] == 1]
    if steps:
        groups = sorted({tuple(map(int, r["case"].split("/")[:2])) for r in steps}, reverse=True)
        figure, panels = pyplot.subplots(1, len(groups), figsize=(3.8 * len(groups), 3.6), sharey=True, squeeze=False)
        for panel, (H, Hkv) in zip(panels[0], groups, strict=True):
            chosen = [r for r in steps if r["case"].startswith(f"{H}/{Hkv}/")]
            for name in chosen[0]["times"]:
                if name not in chosen[0]["bounds"] and name != "numpy":
                    panel.plot([int(r["case"].rpartition("/")[2]) for r in chosen],
                               [np.median(r["times"][name]) * 1e6 for r in chosen], marker=".", label=name)
            panel.set(title=f"H = {H}, Hkv = {Hkv}", xlabel="keys in the cache", xscale="log", yscale="log")
            panel.grid(alpha=0.3)
        panels[0][0].set_ylabel("microseconds a step")
        written.append(_save(figure, panels[0][0], "decode.png"))
    return written


def _save(figure, first, name):
    from matplotlib import pyplot
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 5), frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    path = ROOT / "docs" / name
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
