"""Runs cases of tests/readers.py one after the other, each within bounds: reads lines "READER NUMBER", answers one line each.

A case that ends the process, or holds it up, is seen by who started it.
"""

import faulthandler
import json
import pathlib
import resource
import shutil
import sys
import tempfile
import warnings

import readers

HEADROOM = 512 * 2**20
SECONDS = 2.0  # of processor time, also of processes started
GIVEN_UP = 30  # seconds, on a machine that does other things too


def used():
    times = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(t.ru_utime + t.ru_stime for t in times)


def address_space():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(name, number, folder):
    """{"title", "outcome", "seconds"} of a case; outcome: "read", "refused", or what is wrong."""
    title, content = readers.case(name, number)
    path = folder / f"a{readers.READERS[name].suffix}"
    path.write_bytes(content(folder) if callable(content) else content)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + HEADROOM, resource.RLIM_INFINITY))
    faulthandler.dump_traceback_later(GIVEN_UP, exit=True)
    began = used()
    try:
        readers.READERS[name].read(path)
        outcome = "read"
    except BaseException as error:  # noqa: BLE001 - what is not documented is what is looked for
        outcome = readers.fault(error, path) or "refused"
        error.__traceback__ = None
    seconds = used() - began
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    if seconds > SECONDS * max(1, size / 2**20):
        outcome = f"took {seconds:.1f} s ({outcome})"
    return {"title": title, "outcome": outcome, "seconds": seconds, "size": size}


def main():
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", UserWarning)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="readers"))
    try:
        for line in sys.stdin:
            name, _, number = line.strip().rpartition(" ")
            print(json.dumps(run(name, int(number), folder)), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
