"""Measurements as tables for people, 100 columns wide."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.costs import steps_text
from benchmarks.targets import outcomes, share, speed
from benchmarks.timing import median_ratio

WIDTH = 100
SHORT = {  # column heads: the library over what is special
    "litert float32": "LiteRT\nf32", "litert int8": "LiteRT\nint8", "litert int8 usual": "LiteRT\nusual",
    "litert dynamic": "LiteRT\ndyn", "tflite-runtime float32": "tflrt\nf32", "tflite-runtime int8": "tflrt\nint8",
    "onnxruntime float32": "ORT\nf32", "onnxruntime mha": "ORT\nmha",
    "onnxruntime int8": "ORT\nint8", "onnxruntime GQA": "ORT\nGQA",
    "torch module": "torch\nmodule", "torch sdpa": "torch\nsdpa", "numpy": "numpy\nf32",
    "edgeattn float32": "ours\nf32", "edgeattn int8": "ours\nint8", "edgeattn dynamic": "ours\ndyn"}
BOUND = {"edgeattn float32": "float32 limit", "edgeattn int8": "int8 limit", "edgeattn dynamic": "int8 limit"}
READ_BOUND = {"edgeattn float32": "float32 read", "edgeattn int8": "int8 read"}  # of a decode step
OURS = tuple(BOUND)
_BESIDE_THE_POINT = {"edgeattn float32": {"litert int8 usual"}, "edgeattn int8": {"numpy"},
                     "edgeattn dynamic": {"numpy"}}
_HEADS = {"layer": "E/H/L", "cases": "of tests/cases.py", "decode": "H/Hkv/D/S", "functional": "H/L/D", "long": "H/L/D"}


def console() -> Console:
    """A console that keeps to the terminal, or to 100 columns where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def _table(title, *heads):
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
                  pad_edge=False, min_width=len(title))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _microseconds(times):
    value = np.median(times) * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def speed_table(records: Sequence[dict], section: str, ours: str, threads: int) -> Table | None:
    """Time, speed, part of the limit, and how many times as fast as each other contender; None if not measured."""
    rows = [r for r in records if r["section"] == section and r["threads"] == threads and ours in r["times"]]
    if not rows:
        return None
    others = [name for name in SHORT if name != ours and any(name in r["times"] for r in rows)
              and (section != "layer" or name not in {*OURS, *_BESIDE_THE_POINT[ours]})]
    title = f"{ours}, {section}, {threads} thread{'s' * (threads > 1)}: times as fast as"
    bound = READ_BOUND if section == "decode" else BOUND
    limit = "of read\nlimit" if section == "decode" else "limit"
    table = _table(title, _HEADS[section], "us", "GOP/s", limit, *(SHORT[name] for name in others))
    for r in rows:
        limit = f"{share(r, ours, bound[ours]):.0%}" if bound.get(ours) in r["times"] else ""
        ratios = [_ratio(median_ratio(r["times"][name], r["times"][ours])) if name in r["times"] else "-"
                  for name in others]
        table.add_row(r["case"], _microseconds(r["times"][ours]), f"{np.median(speed(r, ours)) / 1e9:.0f}", limit,
                      *ratios)
    return table


def limits_lines(found: dict) -> list[str]:
    """The machine's limits as measured between everything else."""
    lines = []
    for threads in sorted({r["threads"] for r in found["records"]}):
        rates = {}
        for r in found["records"]:
            for name in r["bounds"] if r["threads"] == threads and r["section"] != "decode" else ():
                rates.setdefault(name, []).append(np.median(speed(r, name)) / 1e9)
        if rates:
            text = ", ".join(f"{name} {np.median(values):.0f} GOP/s" for name, values in rates.items())
            lines.append(f"{threads} thread{'s' * (threads > 1)}: {text} (register loops, median over all cases)")
    for threads, rates in found.get("reads", {}).items():
        text = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in rates.items())
        lines.append(f"{threads} thread{'s' * (int(threads) > 1)}: reads of {text}")
    return lines


def _causal(found):
    rows = [r for r in found["records"] if r["section"].startswith("causal")]
    if not rows:
        return None
    table = _table("causal against full", "E/H/L, H/L/D", "threads", "operations", *OURS)
    for r in rows:
        shares = (f"{median_ratio(r['times'][f'{name} causal'], r['times'][name]):.0%}" if name in r["times"] else ""
                  for name in OURS)
        table.add_row(f"{r['section'].removeprefix('causal ')} {r['case']}", str(r["threads"]),
                      f"{r['causal_operations'] / r['operations']:.0%}", *shares)
    return table


def _long(found):
    if "long" not in found:
        return None
    table = _table("one head, long rows, 1 thread", "H/L/D", "ms", "GOP/s", "limit", "ns per score")
    for r in found["long"]:
        seconds = np.median(r["times"]["edgeattn float32"])
        length = int(r["case"].split("/")[1])
        table.add_row(r["case"], f"{seconds * 1e3:.2f}", f"{np.median(speed(r, 'edgeattn float32')) / 1e9:.0f}",
                      f"{share(r, 'edgeattn float32', 'float32 limit'):.0%}", f"{seconds * 1e9 / length**2:.3f}")
    return table


def _processes(found):
    if "process" not in found:
        return None
    process = found["process"]
    table = _table("a process of its own: processor time (time that passed)", "", "cold cache", "warm cache")
    cold, warm = process["cold"], process["warm"]

    def seconds(name, kind):
        return f"{kind[name]:.2f} ({kind[f'{name}_wall']:.2f})"

    table.add_row("import, s", seconds("import", cold), seconds("import", warm))
    table.add_row("  resident after it, MiB", f"{cold['import_mib']:.0f}", f"{warm['import_mib']:.0f}")
    for kind in ("float32", "int8", "dynamic"):
        table.add_row(f"then the first {kind} result, 128/4/64, s", seconds(kind, cold), seconds(kind, warm))
    for module, value in process["peers"].items():
        table.add_row(f"for comparison: import {module.partition('.')[0]}, s", "", f"{value:.2f}")
    for count, sizes in process["memory"].items():
        for kind, size in sizes.items():
            table.add_row(f"peak of {kind}, 384/12/512, threads: {count}, MiB", "", f"{size / 2**20:.2f}")
    return table


def _targets(found):
    table = _table("targets: cases that meet them; the worst case, and its figure", "target", "", "met", "worst case",
                   "figure")
    for row in outcomes(found):
        table.add_row(f"{row.number} {row.text}", "reached" if row.reached else "missed",
                      f"{row.met} of {len(row.cases)}", row.worst, row.figure)
    return table


def print_report(found: dict, out: Console) -> None:
    """Everything that was measured, the targets last."""
    machine, plain = found["machine"], {"markup": False, "soft_wrap": True}
    out.print(f"{machine['processor']}, {machine['instruction_set']}, {machine['cores']} cores, "
              f"load {', '.join(f'{x:.1f}' for x in machine['load'])} at the start; {machine['date']}", **plain)
    out.print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()), **plain)
    for line in limits_lines(found):
        out.print(line, **plain)
    out.print()
    tables = [speed_table(found["records"], section, ours, threads)
              for threads in sorted({r["threads"] for r in found["records"]})
              for section in ("layer", "functional", "cases", "decode") for ours in OURS]
    tables += [_causal(found), _long(found), _processes(found)]
    for table in tables:
        if table is not None:
            out.print(table)
    if "overhead" in found:
        text = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in found["overhead"]["seconds"].items())
        out.print(f"a call beside its kernel, {found['overhead']['case']}: {text}\n", **plain)
        out.print(f"{steps_text(found['overhead'])}\n", **plain)
    for r in found["records"]:
        for why in r["refused"].values():
            out.print(f"REFUSED: {why}", **plain)
    out.print(_targets(found))


def as_text(found: dict) -> str:
    """The report as plain text."""
    stream = io.StringIO()
    print_report(found, Console(file=stream, width=WIDTH, highlight=False))
    return stream.getvalue()
