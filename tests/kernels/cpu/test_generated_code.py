"""What the compiler makes of the inner loops, for every instruction set, those of other machines too."""
import os
import re
import subprocess
import sys

import pytest
from places import ROOT, TESTS

from edgeattn.runtime import isa

# name, its machine where this one cannot be described by features, multiply-add, what makes the four-way dot product
CASES = [("avx512vbmi", (), r"vfmadd\w+ps\b.*zmm", (r"vpdpbusd\b.*zmm",)), ("avx512vnni", (), r"vfmadd\w+ps\b.*zmm", (r"vpdpbusd\b.*zmm",)),
         ("avx2vnni", (), r"vfmadd\w+ps\b.*ymm", (r"vpdpbusd\b.*ymm",)),
         ("avx2", (), r"vfmadd\w+ps\b.*ymm", (r"vpmaddwd\b.*ymm",)),
         ("neondot", ("aarch64-unknown-linux-gnu", "cortex-a76"), r"fmla\b", (r"sdot\b",)),
         ("neon", ("aarch64-unknown-linux-gnu", "cortex-a72"), r"fmla\b", (r"smlsl2?\b", r"smull2?\b", r"sadalp\b")),
         ("neon", ("aarch64-unknown-linux-gnu", "cortex-a53"), r"fmla\b", (r"smlsl2?\b", r"smull2?\b", r"sadalp\b"))]
# What the instructions of the products of NEON multiply, and how many of all in a loop one product may take.
LANES = {"fmla": 4, "sdot": 16, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "smlsl": 8, "smlsl2": 8}
MOST = {("neon", "product float32"): 0.35, ("neondot", "product float32"): 0.35, ("neon", "product int8"): 0.265, ("neon", "product int8 of weights"): 0.22, ("neondot", "product int8"): 0.085}
# Where weights, none of them -128, are multiplied in another way than any codes.
OF_WEIGHTS = {"neon": (r"smlal2?\b", r"smull2?\b", r"sadalp\b")}


def loops(assembly):
    """The instructions of every innermost loop: from a label to a jump back to it."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:", line)}
    for end, line in enumerate(lines):
        target = re.match(r"\s+(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,|b)\s+(\.L\w+)$", line)
        start = labels.get(target[1], end) if target else end
        body = lines[start + 1:end]
        if start < end and not any(re.match(r"\.L\w+:", inner) for inner in body):
            yield body


def generated(name, *machine):
    """title -> assembly of the functions of generated_code.py."""
    environment = {key: value for key, value in os.environ.items() if key != "EDGEATTN_ISA"}
    environment |= {"EDGEATTN_JIT": "1", "PYTHONPATH": str(ROOT)}  # a library would leave nothing to compile
    done = subprocess.run([sys.executable, TESTS / "generated_code.py", name, *machine], cwd=ROOT, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(part.split("\n", 1) for part in done.stdout.split("### ")[1:])


@pytest.mark.parametrize("name, machine, multiply, dot", CASES, ids=["-".join((case[0], *case[1][1:])) for case in CASES])
def test_the_inner_loop_uses_the_instruction_and_spills_nothing(name, machine, multiply, dot):
    functions = generated(name, *machine)
    for title, instructions in (("product float32", (multiply,)), ("product float32 ahead", (multiply,)), ("product int8", dot),
                                ("product int8 of weights", OF_WEIGHTS.get(name, dot))):
        with_it = [body for body in loops(functions[title]) if any(re.search(r"^\s+(?:\{vex\}\s+)?" + instructions[0], line) for line in body)]
        assert with_it, f"no loop with {instructions[0]}"
        framed = re.search(r"%rsp, %rbp|x29, sp", functions[title])  # else rbp and x29 are registers like any other
        stack = r"\b(?:rsp|sp|rbp|x29)\b" if framed else r"\br?sp\b"
        for body in with_it:
            for instruction in instructions:
                assert any(re.search(r"^\s+(?:\{vex\}\s+)?" + instruction, line) for line in body), "\n".join(body)
            vectors = [line for line in body if re.search(r"\b[xyz]mm\d|\b[vq]\d", line)]
            assert not [line for line in vectors if re.search(stack, line)], "\n".join(body)
        if most := MOST.get((name, title)):  # rows come by fours: no load and no broadcast for each product
            words = [[line.split()[0] for line in body if re.match(r"\s+[a-z]", line)] for body in with_it]
            assert min(len(each) / sum(LANES.get(word, 0) for word in each) for each in words) <= most, "\n\n".join(map("\n".join, with_it))


@pytest.mark.parametrize("name", ["avx512vbmi", "avx2"])
def test_as_many_weights_are_brought_near_as_are_multiplied(name):
    table = next(table for table in isa.TABLES if table.name == name)
    body, = (body for body in loops(generated(name)["product float32 ahead"]) if any("prefetcht0" in line for line in body))
    products, lines = (sum(each in line for line in body) for each in ("vfmadd", "prefetcht0"))
    assert products * table.lanes // table.rows == lines * 16  # elements of a panel, and of cache lines


def test_a_spill_and_a_missing_instruction_would_be_seen():
    body, = loops(".LBB0_1:\n\tfmla\tv0.4s, v1.4s, v2.4s\n\tstr\tq3, [sp, #16]\n\tb.ne\t.LBB0_1\n")
    assert [line.split()[0] for line in body] == ["fmla", "str"]
    assert [list(loops(f".L1:\n\tnop\n\t{jump}\n")) for jump in ("b.eq\t.L1", "cbnz\tx8, .L1", "tbz\tw0, #0, .L1", "jne\t.L1")] == [[["\tnop"]]] * 4
