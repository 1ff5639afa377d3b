"""`make fuzz`: every reader of files, for so many seconds each, two at a time where there are two processors.

    make fuzz ARGS="--seconds 600 onnx keras"     # longer, and only these

Inputs that were of use stay in build/fuzz/READER, where the next run begins; what broke a reader lies beside them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fuzz"
SLOWEST = 30  # seconds, on a machine that does other things too; the tests hold the promise of 2
MEMORY = 1200  # MiB: an interpreter with everything imported, and the 512 that are promised


def main() -> int:
    """Run the targets; 1 where one found something."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    parser = argparse.ArgumentParser(description="Fuzz the readers of files.")
    parser.add_argument("--seconds", type=int, default=20, help="for each (default: %(default)s)")
    parser.add_argument("readers", nargs="*", metavar="READER", help="as in tests/readers.py; all unless given")
    chosen = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("Nothing was fuzzed: the package atheris, of the extra `fuzz`, has no wheel for this Python.")
        return 0
    import readers

    unknown = [name for name in chosen.readers if name not in readers.READERS]
    if unknown:
        parser.error(f"no reader {', '.join(unknown)}; there are: {', '.join(readers.READERS)}")
    failed = []
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, runs, error in pool.map(lambda name: fuzz(name, chosen.seconds), chosen.readers or readers.READERS):
            print(f"  {name:28} {runs:>9,} files" + (f"   FAILED\n{error}" if error else ""), flush=True)
            failed += [name] * bool(error)
    print(f"found something in: {', '.join(failed)}" if failed else "found nothing")
    return bool(failed)


def fuzz(name: str, seconds: int) -> tuple[str, int, str]:
    """(name, files tried, what was found) of one target."""
    folder = FOLDER / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fuzz" / "target.py"), name, str(folder / "corpus"), "-max_len=65536",
         f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={folder}/",
         "-print_final_stats=1"], cwd=ROOT, capture_output=True, text=True, errors="replace")
    said = done.stderr + done.stdout
    runs = re.search(r"number_of_executed_units:\s+(\d+)", said)
    runs = int(runs[1]) if runs else max(map(int, re.findall(r"^#(\d+)", said, re.M)), default=0)
    return name, runs, "" if done.returncode == 0 else "\n".join(said.strip().splitlines()[-40:])


if __name__ == "__main__":
    sys.exit(main())
