"""Bugs planted in the CPU's kernels are found: a few of planted_bugs.py here, with `--long` (`make test-mutations`) all."""
import planted_bugs
import pytest
from planted_bugs import BUGS, SHORT


def pytest_generate_tests(metafunc):
    if "bug" in metafunc.fixturenames:
        bugs = BUGS if metafunc.config.getoption("long") else SHORT
        metafunc.parametrize("bug", bugs, ids=[bug.what for bug in bugs])


def test_a_planted_bug_is_found_by_its_test(bug):
    planted_bugs.found(bug)


@pytest.mark.parametrize("file", sorted({bug.file for bug in BUGS}))
def test_the_place_of_every_bug_is_there_once(file):
    text = (planted_bugs.ROOT / "edgeattn" / "kernels" / "cpu" / file).read_text(encoding="utf-8")
    for bug in BUGS:
        if bug.file == file:
            assert text.count(bug.old) == 1, bug.what
            assert bug.old != bug.new


def test_what_is_not_found_and_what_does_not_compile_is_said(monkeypatch):
    bug = BUGS[0]
    for status, output, message in ((0, "passed", "did not find"), (2, "no such test", "did not find"),
                                    (1, "TypingError: no", "does not compile")):
        monkeypatch.setattr(planted_bugs, "run", lambda test, folder, now=(status, output): now)
        with pytest.raises(AssertionError, match=message):
            planted_bugs.found(bug)
    monkeypatch.setattr(planted_bugs, "run", lambda test, folder: (-11, "case 7\nFatal Python error"))
    assert planted_bugs.found(bug) == "signal 11 at case 7"
