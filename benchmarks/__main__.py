"""How fast edgeattn is on this machine, alone and beside other libraries.

Every contender's answer is checked first; a wrong one is refused, not timed, and makes the exit status 1 when it is
ours. All of a case are timed in one process, in turn, round after round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks import machine, measure
from benchmarks.problem import GRID, QUICK, Point
from benchmarks.report import console, print_report
from edgeattn import messages

SECONDS, QUICK_SECONDS = 3.0, 0.3


def _points(text):
    try:
        return [Point.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _arguments(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", action="store_true", help="also time LiteRT, tflite-runtime, onnxruntime and torch, "
                                                             "as far as they are installed")
    parser.add_argument("--points", type=_points, help="layers to time, as E/H/L,E/H/L,... (default: the whole grid)")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N",
                        help="numbers of threads (default: 1, and 2 where there are cores for it)")
    parser.add_argument("--seconds", type=float, help=f"to time each case, about (default: {SECONDS:g})")
    parser.add_argument("--sections", nargs="+", choices=measure.SECTIONS, metavar="SECTION",
                        help=f"of {', '.join(measure.SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="three layers only, a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: report what FILE holds")
    parser.add_argument("--docs", action="store_true", help="rewrite the tables of docs/performance.md and its plots")
    found = parser.parse_args(arguments)
    if found.threads is None:
        found.threads = [1] if found.quick or machine.cores() == 1 else [1, 2]
    if min(found.threads) < 1:
        parser.error(f"--threads must be at least 1; got {min(found.threads)}")
    if found.quick and (found.points or found.sections):
        parser.error("--quick chooses points and sections itself; leave out --points and --sections")
    return found


def main(arguments=None) -> int:
    """Measure or read, report, write what is asked for; 1 when an answer of ours was wrong."""
    options = _arguments(arguments)
    messages.show()
    out = console()
    if options.from_json:
        found = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        found = _measure(options, out)
    print_report(found, out)
    if options.json:
        options.json.write_text(json.dumps(found, default=float) + "\n", encoding="utf-8")
        out.print(f"wrote {options.json}", markup=False)
    if options.docs:
        from benchmarks.pages import write_plots, write_table
        for path in (write_table(found), *write_plots(found)):
            out.print(f"wrote {path}", markup=False)
    refused = {name for record in found["records"] for name in record["refused"]}
    return int(any(name.startswith("edgeattn") for name in refused))


def _measure(options, out):
    points = QUICK if options.quick else options.points or GRID
    sections = ("layer",) if options.quick else options.sections or measure.SECTIONS
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    begin = time.perf_counter()
    found = {"machine": machine.describe()}

    def progress(text):
        if out.is_terminal:
            out.print(f"[{time.perf_counter() - begin:5.0f} s] {text}", end="\r", markup=False)

    found |= measure.run(sections, points, options.threads, seconds, options.peers, progress)
    found["machine"]["load_after"] = machine.describe()["load"]
    found["machine"]["seconds"] = time.perf_counter() - begin
    return found


if __name__ == "__main__":
    sys.exit(main())
