"""Rank the inner loops of the NEON kernels by what llvm-mca says of them, as docs/arm64-kernels.md.

    python tools/arm64/inner_loops.py                              to the screen
    python tools/arm64/inner_loops.py > docs/arm64-kernels.md

llvm-mca (Debian package llvm) counts cycles on a model of the processor's pipelines. It knows of no memory and no
cache: what it says ranks loops against each other, and is no speed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from test_generated_code import generated, loops

CPUS = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neondot"}
ITERATIONS = 200
# How many products an instruction adds.
PRODUCTS = {"fmla": 4, "sdot": 16, "sadalp": 8}
INTRODUCTION = """\
# NEON inner loops, ranked

What llvm-mca (LLVM {version}) says of the inner loops that Numba makes for Raspberry Pi's processors, written by
`python tools/arm64/inner_loops.py`. It counts cycles on a model of a processor's pipelines, and knows of no memory and
no cache. **This is a ranking of loops, not a speed**: no ARM board was measured. That the loops hold the instructions
they should, and spill no tile, is checked by `test_generated_code.py`. LLVM models Cortex-A72 and A76 alike, as a
Cortex-A57, and Cortex-A53 as the in-order processor it is.

"Product" is one step of a register tile of 8 rows by 8 columns, or two where the loop is unrolled: of float32 (`fmla`),
or of bytes, four at a time (`sdot` on Cortex-A76, `mul` and `sadalp` elsewhere). "Requantization" turns such sums
into codes by a rule of [edgeattn/arithmetic.py](../edgeattn/arithmetic.py). "Each": a product, exponential or code.

| loop | processor | instructions | cycles | each, cycles | bound by |
|---|---|---|---|---|---|
"""


def main_loop(assembly: str) -> list[str]:
    """The instructions of the innermost loop with the most vectors; directives left out."""
    found = [[line for line in body if re.match(r"\s+[a-z]", line)] for body in loops(assembly)]
    return max(found, key=lambda body: sum(bool(re.search(r"\b[vq]\d", line)) for line in body))


def results_of(title: str, body: list[str]) -> int:
    """How many numbers one turn of the loop computes: products, or what is stored."""
    names = [line.split()[0] for line in body]
    if title.startswith("product"):
        return sum(PRODUCTS.get(name, 0) for name in names)
    quads = [line.split()[0] for line in body if re.search(r"\bq\d", line)]
    return 4 * sum({"str": 1, "stur": 1, "stp": 2}.get(name, 0) for name in quads)


def analyse(body: list[str], cpu: str) -> tuple[float, str]:
    """(cycles of one turn, what keeps it from being faster) by llvm-mca."""
    command = ["llvm-mca", "-mtriple=aarch64-unknown-linux-gnu", f"-mcpu={cpu}", f"-iterations={ITERATIONS}",
               "-bottleneck-analysis"]
    said = subprocess.run(command, input="\n".join(body) + "\n", capture_output=True, text=True, check=True).stdout
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", said)[1]) / ITERATIONS
    throughput = float(re.search(r"Block RThroughput:\s+([\d.]+)", said)[1])
    return cycles, "pipelines" if cycles < 1.1 * throughput else "latencies"


def main() -> int:
    """Print the page."""
    if shutil.which("llvm-mca") is None:
        print("needs llvm-mca: apt-get install llvm", file=sys.stderr)
        return 2
    version = re.search(r"LLVM version (\S+)", subprocess.run(["llvm-mca", "--version"], capture_output=True,
                                                             text=True, check=True).stdout)[1]
    rows = []
    for cpu, instructions in CPUS.items():
        functions = generated(instructions, "aarch64-unknown-linux-gnu", cpu)
        for order, (title, assembly) in enumerate(functions.items()):
            body = main_loop(assembly)
            cycles, bound = analyse(body, cpu)
            rows.append((order, cycles / results_of(title, body), title, cpu, len(body), cycles, bound))
    print(INTRODUCTION.format(version=version), end="")
    for _, each, title, cpu, count, cycles, bound in sorted(rows):
        print(f"| {title} | {cpu} | {count} | {cycles:.1f} | {each:.3f} | {bound} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
