"""What the compiler makes of the tiled product, for every instruction set, those of other machines too."""
import os
import re
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

# name, its machine where this one cannot be described by features, multiply-add, four-way dot product
CASES = [("avx512vnni", (), r"vfmadd\w+ps\b.*zmm", r"vpdpbusd\b.*zmm"), ("avx2vnni", (), r"vfmadd\w+ps\b.*ymm", r"vpdpbusd\b.*ymm"),
         ("avx2", (), r"vfmadd\w+ps\b.*ymm", r"vpmaddwd\b.*ymm"),
         ("neondot", ("aarch64-unknown-linux-gnu", "cortex-a76"), r"fmla\b", r"sdot\b"),
         ("neon", ("aarch64-unknown-linux-gnu", "cortex-a72"), r"fmla\b", r"sadalp\b")]


def loops(assembly):
    """The instructions of every innermost loop: from a label to a jump back to it."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:", line)}
    for end, line in enumerate(lines):
        target = re.match(r"\s+(?:j\w+|b\.\w+|cbn?z\s+\w+,|b)\s+(\.L\w+)$", line)
        start = labels.get(target[1], end) if target else end
        body = lines[start + 1:end]
        if start < end and not any(re.match(r"\.L\w+:", inner) for inner in body):
            yield body


@pytest.mark.parametrize("name, machine, multiply, dot", CASES, ids=[case[0] for case in CASES])
def test_the_inner_loop_uses_the_instruction_and_spills_nothing(name, machine, multiply, dot):
    done = subprocess.run([sys.executable, os.path.join(HERE, "generated_code.py"), name, *machine], cwd=ROOT, text=True,
                          capture_output=True, env={**{k: v for k, v in os.environ.items() if k != "EDGEATTN_ISA"}, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    floats, codes = done.stdout.split("### bytes")
    for assembly, instruction in ((floats, multiply), (codes, dot)):
        with_it = [body for body in loops(assembly) if any(re.search(r"^\s+(?:\{vex\}\s+)?" + instruction, line) for line in body)]
        assert with_it, f"no loop with {instruction}"
        for body in with_it:
            vectors = [line for line in body if re.search(r"\b[xyz]mm\d|\b[vq]\d", line)]
            assert not [line for line in vectors if re.search(r"\brsp\b|\bsp\b", line)], "\n".join(body)
