"""What every reader promises (docs/formats.md), held against every reader: files made by hand, cut off, changed at random.

A file of 1 MB is read or refused within 2 seconds of processor time and 512 MiB, by ValueError, TypeError or OSError with
the file's name, whatever it holds. Each case runs in a process that may have no more, so that one that crashes or hangs is
found too. `--reader-cases N` asks for more random changes.
"""

import json
import pathlib
import subprocess
import sys

import pytest
import readers
import readers_worker
from readers import READERS

WORKER = pathlib.Path(readers_worker.__file__)


class Worker:
    """A process that runs cases; another one after one that ended it."""

    def __init__(self):
        self.process = None

    def run(self, name, number):
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(f"{name} {number}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        status = self.end()
        return {"title": readers.case(name, number)[0], "outcome": f"ended the process, or held it up: status {status}"}

    def end(self):
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.stdin.close()
        process.stdout.close()
        return process.wait()


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.end()


@pytest.mark.parametrize("name", READERS)
def test_files_of_strangers_are_read_or_refused_within_bounds(name, worker, request, record_property):
    pytest.importorskip("h5py", reason="the extra edgeattn[checkpoints] brings h5py")
    pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
    count = readers.handmade(name) + round(READERS[name].share * request.config.getoption("--reader-cases"))
    outcomes = [worker.run(name, number) for number in range(count)]
    wrong = [f"{number} ({o['title']}): {o['outcome']}" for number, o in enumerate(outcomes) if o["outcome"] not in ("read", "refused")]
    record_property("cases", count)
    record_property("slowest", max(o.get("seconds", 0) for o in outcomes))
    assert not wrong, f"{len(wrong)} of {count} cases; run one by python tests/readers.py '{name}' NUMBER:\n" + "\n".join(wrong)
    # a list of refusals only would be no test of the reader
    assert outcomes[0]["outcome"] == ("refused" if name == "bundle" else "read")
    assert any(o["outcome"] == "refused" for o in outcomes)


@pytest.mark.parametrize("title", ["bombs: 40 MiB, which is read", "graphs: data beside, which is read", "graphs: 9 on the way"])
def test_what_is_large_but_right_is_read(title, worker):
    name = "onnx" if title.startswith("graphs") else "torch npz"
    number = 1 + list(readers._of(name)[2]).index(title)
    assert worker.run(name, number)["outcome"] == "read"


def test_the_harness_finds_what_is_wrong(tmp_path):
    path = tmp_path / "a.npz"
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise ValueError(f"{path} is damaged") from cause
    except ValueError as error:
        assert readers.fault(error, path) == "takes more than 512 MiB"
    assert readers.fault(ValueError("damaged"), path).startswith("does not name the file")
    assert readers.fault(KeyError("a.npz"), path).startswith("KeyError")
    assert readers.fault(ValueError("a.npz is damaged"), path) is None
    try:
        readers.read_npy(path)
    except FileNotFoundError as error:
        assert readers.fault(error, path) is None
