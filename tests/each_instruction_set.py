"""What a program of the tests computes under each instruction set that this machine can execute: one process for each."""
import concurrent.futures
import functools
import os
import subprocess
import sys

import numpy as np
from njit import COMPILER
from places import ROOT, TESTS

from edgeattn.runtime import isa

# Under emulation the one that there is a library of: kernels of others would be compiled there, for minutes each.
RUNNABLE = [isa.ISA.name] if COMPILER else [table.name for table in isa.runnable(isa._host_features())]


def answers_of(program, folder):
    """Instruction set -> the arrays that `program`, called with a path, writes there under it."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(RUNNABLE, pool.map(functools.partial(_answers, program, folder), RUNNABLE), strict=True))


def _answers(program, folder, name):
    path = folder / f"{name}.npz"
    done = subprocess.run([sys.executable, TESTS / program, path], text=True, capture_output=True, cwd=ROOT,
                          env={**os.environ, "EDGEATTN_ISA": name, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"})
    assert done.returncode == 0, done.stderr
    with np.load(path) as answers:
        return dict(answers)
