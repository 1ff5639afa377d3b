"""The CUDA tests on a GPU: the suite, then NVIDIA's compute-sanitizer over a part of it. Run as ``make test-cuda``.

What racecheck finds is what the emulator cannot: a barrier that is missing between warps.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One block shape of each kernel: a sanitizer slows a kernel down a hundredfold.
SANITIZED = ["tests/test_cuda_float32.py", "tests/test_cuda_precision.py", "tests/test_cuda_int8_functional.py",
             "tests/test_cuda_int8.py", "tests/test_cuda_layers.py", "tests/test_cuda_probabilities.py", "-k",
             "length-17 or everything or pieces or decode-split or not_finite or score_tables or float_layer "
             "or dynamic or decoding or padding_together"]


def main(arguments: list[str]) -> int:
    """Run the suite on the GPU; 1 and a line that says why where there is none."""
    sys.path.insert(0, str(ROOT))
    from edgeattn.cuda.driver import driver, why_not

    reason = why_not()
    if reason:
        print(f"test-cuda: not run. {reason}. What needs no GPU: make test-cuda-offline.", file=sys.stderr)
        return 1
    print(f"test-cuda: {driver().name()}, compute capability {'.'.join(map(str, driver().capability()))}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "--cuda"]
    status = subprocess.run([*pytest, *map(str, sorted((ROOT / "tests").glob("test_cuda_*.py"))), *arguments],
                            cwd=ROOT).returncode
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("test-cuda: compute-sanitizer not run: it is not on PATH (CUDA toolkit, cuda-sanitizer)", file=sys.stderr)
        return status or 1
    for tool in ("memcheck", "racecheck"):
        print(f"test-cuda: compute-sanitizer --tool {tool}", flush=True)
        status |= subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-q", *SANITIZED],
                                 cwd=ROOT).returncode
    return min(status, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
