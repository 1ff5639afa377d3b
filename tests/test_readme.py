"""What the README prints runs as it is printed, in the environment that make made, in the folder that was cloned."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

# What a comment above a block may say of it; what it needs is a key of `lacking`.
COMMENT = re.compile(r"<!-- (?:not run by tests/test_\w+\.py: (?P<reason>.+)|needs (?P<need>.+)) -->")
PAGES = ("README.md",)


def lacking():
    """What blocks may need -> what of that is not here, or None."""
    from quant.export.bundle import check_numba
    from quant.export.linker import find_linker

    found = {}
    for name, machine in (("a linker for aarch64", "aarch64"), ("a linker for this machine", platform.machine())):
        found[name] = None
        try:
            check_numba()
            find_linker(machine)
        except RuntimeError as error:
            found[name] = str(error)
    return found


def blocks(text, lacks):
    """(language, code, why it is not run or None) of every block between fences."""
    lines, found = iter(text.splitlines()), []
    before = ""
    for line in lines:
        if line.startswith("```"):
            code = []
            for inside in lines:
                if inside.startswith("```"):
                    break
                code.append(inside)
            comment = COMMENT.fullmatch(before)
            reason = comment and (comment["reason"] or lacks[comment["need"]])
            found.append((line[3:].strip(), "\n".join(code) + "\n", reason))
        before = line
    return found


def program(text, lacks):
    """One program for sh of all blocks that are run, in their order: what one of them set or wrote, the next finds."""
    parts = ["set -e\n"]
    for language, code, reason in blocks(text, lacks):
        if reason is None:
            parts.append(code if language == "sh" else f"python - <<'BLOCK'\n{code}BLOCK\n")
    return "".join(parts)


def test_every_block_says_its_language_and_is_run_or_says_why_not():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        nothing = dict.fromkeys(lacking())
        found = blocks(text, nothing)
        assert {language for language, _, _ in found} <= {"sh", "python"}
        assert sum(reason is None for _, _, reason in found) >= 5
        comments = list(COMMENT.finditer(text))
        assert sum(bool(comment["reason"]) for comment in comments) == sum(reason is not None for _, _, reason in found)
        everything = blocks(text, dict.fromkeys(nothing, "is not here"))
        assert len(comments) == sum(reason is not None for _, _, reason in everything)
        # commands that are only indented would be seen by no test
        assert not re.search(r"^ {4}(make|quant|edgeattn|python|pip) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)


def test_blocks_that_fail_fail():
    text = "<!-- not run by tests/test_readme.py: fails -->\n```sh\nfalse\n```\n```sh\na=3\n```\n```python\nprint(1)\n```\n"
    assert subprocess.run(["sh", "-c", program(text, {})]).returncode == 0
    for code in ("```sh\nfalse\ntrue\n```", "```python\nassert False\n```"):
        assert subprocess.run(["sh", "-c", program(text + code, {})], stderr=subprocess.DEVNULL).returncode != 0


def test_the_readme_runs_as_printed(tmp_path):
    commands = [Path(sys.prefix) / "bin" / name for name in ("activate", "python", "quant", "edgeattn")]
    missing = [path.name for path in commands if not path.exists()]
    if missing:
        pytest.skip(f"needs the environment of `make test`; this one has no {', '.join(missing)}")
    lacks = lacking()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["sh", "-c", program((ROOT / "README.md").read_text(encoding="utf-8"), lacks)], cwd=tmp_path, text=True,
                          capture_output=True, env={**environment, "PYTHONPATH": str(ROOT)}, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    wanted = {"attention.tflite", "int8.safetensors", "pi.safetensors"}
    wanted |= {file for file, need in (("attention.so", "a linker for aarch64"), ("here.so", "a linker for this machine"))
               if lacks[need] is None}
    assert wanted <= made
