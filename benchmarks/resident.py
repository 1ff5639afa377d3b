"""What a process with edgeattn takes from its neighbours: python -m benchmarks.resident

1. memory after so many calls of random lengths and batches, beside that after the first hundred;
2. processor time while no call is made, the threads of one before asleep;
3. memory of a process that loads an int8 encoder of MiniLM's sizes and encodes: its own, and pages of files, which the
   system can take back; and whether it runs where it may have 64 MiB in all (Linux control groups, as root).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import edgeattn
import quant
from benchmarks.minilm import random_model

ROOT = Path(__file__).resolve().parents[1]
FIRST = 100  # calls that may still grow
LIMIT = 64 * 2**20
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # of version 1 and 2
LIMITS = {"memory.limit_in_bytes", "memory.max"}


def kibibytes(*names: str, process: str = "self") -> list[int]:
    """Fields of /proc/self/status, as RssAnon, in KiB."""
    text = Path("/proc", process, "status").read_text()
    return [int(re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)[1]) for name in names]


def random_calls(seed: int = 0) -> Callable[[], object]:
    """A call of a random one of several models, with random batches and lengths, each time it is called."""
    rng = np.random.default_rng(seed)
    path = ROOT / "examples" / "sensor" / "sensor.safetensors"
    encoder = edgeattn.TransformerEncoder.from_torch(path, 4, activation="gelu", norm_first=True, prefix="encoder.")
    int8 = quant.quantize(encoder, scheme="dynamic")
    x = rng.standard_normal((4, 64, 64), np.float32)

    def call() -> object:
        batch, length = int(rng.integers(1, 5)), int(rng.integers(1, 65))
        model, form = encoder if rng.integers(4) == 0 else int8, rng.integers(3)
        given = x[:batch, :length]
        if form == 0:
            return model(given)
        if form == 1:
            return model([row[: rng.integers(1, length + 1)] for row in given])
        return model(given, key_padding_mask=rng.random((batch, length)) < 0.8)

    return call


def growth(calls: int) -> int:
    """KiB that the resident size grew by after the first hundred of so many calls."""
    call = random_calls()
    for _ in range(FIRST):
        call()
    before, = kibibytes("VmRSS")
    for _ in range(calls - FIRST):
        call()
    after, = kibibytes("VmRSS")
    return after - before


def idle(threads: int, seconds: float) -> float:
    """The share of a processor that this process takes after a call on so many threads."""
    edgeattn.set_num_threads(threads)
    call = random_calls()
    for _ in range(5):
        call()
    for _ in range(20):  # threads look for work for a while, which is long on a busy machine
        began = time.process_time()
        time.sleep(0.05)
        if time.process_time() - began < 1e-4:
            break
    began = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - began) / seconds


CHILD = """
import sys
from pathlib import Path
group, path = sys.argv[1:]
if group:
    Path(group, "cgroup.procs").write_text("0")
import numpy, edgeattn
from benchmarks.resident import kibibytes
from edgeattn.runtime import prebuilt
started = kibibytes("RssAnon")
model = edgeattn.load(path)
for length in (1, 8, 32, 128, 512):
    model(numpy.arange(1000, 1000 + length)[None])
source = "a library" if prebuilt.LIBRARY else "compiled here"
print(source, *started, *kibibytes("RssAnon", "RssFile", "VmHWM"), sep=", ")
"""


def fresh(path: Path, group: str = "") -> subprocess.CompletedProcess:
    """A process that loads the model and encodes up to 512 tokens, in a control group."""
    code = CHILD.replace("from benchmarks.resident import kibibytes", _source())
    return subprocess.run([sys.executable, "-c", code, group, path], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def _source() -> str:
    import inspect

    return f"import re\n{inspect.getsource(kibibytes)}"


def forget(path: Path) -> None:
    """Have the system drop the file's pages, which would count for whoever read them first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limited_group(most: int = LIMIT) -> Path | None:
    """A new control group that may have so many bytes; None where that is not allowed."""
    for parent in GROUPS:
        group = parent / f"edgeattn-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        for name in LIMITS & {each.name for each in group.iterdir()}:
            (group / name).write_text(str(most))
            return group
        group.rmdir()
    return None


def main() -> None:
    """Print the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10**6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.safetensors"
        edgeattn.save(quant.quantize(random_model(), scheme="dynamic"), path)
        done = fresh(path)
        size = path.stat().st_size / 2**20
        print(f"an int8 encoder of MiniLM's sizes, a file of {size:.1f} MiB, in its own process; where kernels are\n"
              "  from, KiB of its own before it is loaded and after calls, of files, most at any time:\n"
              f"  {done.stdout.strip() or done.stderr}")
        group = limited_group()
        if group is None:
            print("  no control group can be made here (not root?): not run under a limit")
        else:
            try:
                forget(path)
                done = fresh(path, str(group))
                said = done.stdout.strip() if done.returncode == 0 else f"ended with status {done.returncode}"
                print(f"  with {LIMIT / 2**20:.0f} MiB in all: {said}")
            finally:
                group.rmdir()
    for threads in (1, 2, 4):
        print(f"processor time while idle, {threads} thread(s): {idle(threads, 2.0):.2%}")
    edgeattn.set_num_threads(1)
    began = time.perf_counter()
    grown = growth(options.calls)
    print(f"resident size after {options.calls:,} calls: {grown:+,} KiB from that after {FIRST}, "
          f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
