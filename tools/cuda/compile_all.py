"""Compile and load the kernels that the tests launch, in as many processes as there are cores.

    python tools/cuda/compile_all.py [--seconds 90]

What is not done by then is compiled where it is first called. Where there is no card they are only compiled, for sm_90.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WITHOUT_A_CARD = (9, 0)


def kernels() -> dict:
    """By their names; those that take longest come first."""
    from cuda_limits import DYNAMIC_ACTIVATIONS, LIMITS

    from edgeattn.arithmetic import KERNEL_SETS
    from edgeattn.kernels.cuda import attention, linear_dynamic, linear_int8, masks, merge, quantize, static_attention

    both, sizes = (True, False), list(itertools.product((32, 64), (32, 64)))
    made = [row[0] for row in LIMITS if not row[0].name.startswith("static")]  # whose flags are told in calls
    for (rows, chunk), wide in itertools.product(sizes, both):
        made += [attention.attention(precision, rows, chunk, "float32", "float32", wide, "float32")
                 for precision in ("float32", "float16", "tf32")]
        made.append(attention.attention("float32", rows, chunk, "float32", "float32", wide, "float32", True))
    for rows, chunk in sizes:
        made += [attention.attention(precision, rows, chunk, "float16", "float16", True, "float16")
                 for precision in ("float32", "float16")]
        made.append(attention.attention("float32", rows, chunk, "float32", "int8", True, "float32"))
    made += [attention.attention("float16", 32, 128, "float32", "float32", wide, "float32") for wide in both]
    for row in KERNEL_SETS.values():
        made += [linear_int8.linear_int8(row.fully_connected, *flags) for flags in itertools.product(both, both)]
        made += [static_attention.static_attention(row.batch_matmul, row.batch_matmul, row.softmax, *flags)
                 for flags in itertools.product(both, both)]
    made += [linear_int8.linear_int8(None, wide) for wide in both]
    made += [linear_dynamic.linear_rows(name, True) for name in DYNAMIC_ACTIVATIONS]
    made += [quantize.store_rows(rule) for rule in (None, "cache", "dynamic", "fixed")]
    made += [merge.merge("float16"), masks.both()]
    found = {kernel.name: kernel for kernel in made}
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith(("attention", "static"))))


def build(name: str) -> tuple[str, float, float]:
    """(PTX version, seconds to compile, seconds to load) of a kernel; nothing is loaded where there is no card."""
    from edgeattn.kernels.cuda import cache
    from edgeattn.kernels.cuda.driver import driver, why_not

    kernel, card = kernels()[name], why_not() is None
    start = time.perf_counter()
    text, _ = cache.ptx(kernel, driver().capability() if card else WITHOUT_A_CARD)
    middle = time.perf_counter()
    if card:
        driver().starter(kernel, driver().device())
    return text.split(".version ")[1].split()[0], middle - start, time.perf_counter() - middle


def main(arguments: list[str] | None = None) -> int:
    """Build all; 1 where one fails, or time does not do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--only", default="", help="kernels whose names begin so")
    options = parser.parse_args(arguments)
    names = [name for name in kernels() if name.startswith(options.only)]
    done, failed, versions, slowest = 0, 0, set(), (0.0, "")
    workers = max(1, min(14, len(os.sched_getaffinity(0)) - 1))
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures = {pool.submit(build, name): name for name in names}
    processes = list(pool._processes.values())
    try:
        for future in concurrent.futures.as_completed(futures, options.seconds):
            name = futures[future]
            try:
                version, compiled, loaded = future.result()
            except Exception as error:  # noqa: BLE001 - the others go on
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}".replace("\n", " ")[:300], flush=True)
                continue
            done, slowest = done + 1, max(slowest, (compiled, name))
            versions.add(version)
            print(f"{name}: compiled in {compiled:.1f} s, loaded in {loaded:.2f} s", flush=True)
    except concurrent.futures.TimeoutError:
        print(f"{options.seconds:.0f} s have passed: the others are compiled where they are first called")
    print(f"{done} of {len(names)} kernels, {failed} failed, PTX {', '.join(sorted(versions)) or '-'}; slowest "
          f"{slowest[0]:.1f} s, {slowest[1] or '-'}", flush=True)
    for process in {*processes, *(pool._processes or {}).values()}:  # which may be in the middle of one
        process.kill()
    os._exit(int(failed > 0 or done < len(names)))


if __name__ == "__main__":
    sys.exit(main())
