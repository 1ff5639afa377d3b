"""Rank the inner loops of the NEON kernels by what llvm-mca says of them, as the first table of docs/arm64-kernels.md.

    python tools/arm64/inner_loops.py

llvm-mca (Debian package llvm-19, or llvm) counts cycles on a model of the processor's pipelines. It knows of no memory
and no cache: what it says ranks loops against each other, and is no speed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels" / "cpu"))

from test_generated_code import LANES, generated, loops

CPUS = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neondot"}
# Models: LLVM's own of Cortex-A76 is that of a Cortex-A57; Neoverse N1 is its sibling. Cortex-A55 stands beside A53, in
# order as that one is, for LLVM's model of A53 lets no loads overlap with products.
MODELS = {"cortex-a53": ("cortex-a53", "cortex-a55"), "cortex-a72": ("cortex-a72",), "cortex-a76": ("neoverse-n1",)}
ITERATIONS = 200


def main_loop(assembly: str) -> list[str]:
    """The instructions of the innermost loop with the most vectors; directives left out."""
    found = [[line for line in body if re.match(r"\s+[a-z]", line)] for body in loops(assembly)]
    return max(found, key=lambda body: sum(bool(re.search(r"\b[vq]\d", line)) for line in body))


def results_of(title: str, body: list[str]) -> int:
    """How many numbers one turn of the loop computes: products, or what is stored."""
    names = [line.split()[0] for line in body]
    if title.startswith("product"):
        return sum(LANES.get(name, 0) for name in names)
    quads = [line.split()[0] for line in body if re.search(r"\bq\d", line)]
    return 4 * sum({"str": 1, "stur": 1, "stp": 2}.get(name, 0) for name in quads)


def analyse(tool: str, body: list[str], cpu: str) -> tuple[float, str]:
    """(cycles of one turn, what keeps it from being faster) by llvm-mca."""
    command = [tool, "-mtriple=aarch64-unknown-linux-gnu", f"-mcpu={cpu}", f"-iterations={ITERATIONS}",
               "-bottleneck-analysis"]
    said = subprocess.run(command, input="\n".join(body) + "\n", capture_output=True, text=True, check=True).stdout
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", said)[1]) / ITERATIONS
    throughput = float(re.search(r"Block RThroughput:\s+([\d.]+)", said)[1])
    return cycles, "pipelines" if cycles < 1.1 * throughput else "latencies"


def main() -> int:
    """Print the table."""
    tool = shutil.which("llvm-mca-19") or shutil.which("llvm-mca")
    if tool is None:
        print("needs llvm-mca: apt-get install llvm-19, or llvm", file=sys.stderr)
        return 2
    rows = []
    for cpu, instructions in CPUS.items():
        functions = generated(instructions, "aarch64-unknown-linux-gnu", cpu)
        for order, (title, assembly) in enumerate(functions.items()):
            body = main_loop(assembly)
            for model in MODELS[cpu]:
                cycles, bound = analyse(tool, body, model)
                rows.append((order, title, cpu, model, len(body), results_of(title, body), cycles, bound))
    print("| loop | processor | model | instructions | cycles | each, instructions | each, cycles | bound by |\n"
          "|---|---|---|---|---|---|---|---|")
    for _, title, cpu, model, count, results, cycles, bound in sorted(rows):
        print(f"| {title} | {cpu} | {model} | {count} | {cycles:.1f} | {count / results:.3f} | "
              f"{cycles / results:.3f} | {bound} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
