"""The wheel and the sdist in clean environments, of every Python and NumPy there is: python tools/pythons.py

A wheel with compiled kernels is made for this machine (or taken: --wheel), and an sdist. In an environment of each
Python from 3.10 on and each NumPy series that has a wheel for it:

- the wheel with NumPy and safetensors alone: tests/call_hashes.py, whose checksum must be the same in all of them, and
  Numba is not imported;
- Numba comes, the wheel's own requirement, with the newest NumPy: one kernel compiles;
- the sdist: it builds, installs and imports.

Pythons are taken from PATH, from pyenv, and from --python. Where one is missing that is said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, clean_environment, ensure_pip
from wheel import copy_sources

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Series of NumPy -> the Pythons that it has wheels for.
NUMPYS = {"numpy==1.26.*": VERSIONS[:3], "numpy>=2": VERSIONS}
BUILD_SDIST = "import os, sys, setuptools.build_meta as back; os.chdir(sys.argv[1]); back.build_sdist(sys.argv[2])"
MAKE_CALLS = """
import pathlib, sys
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests"]
import call_hashes
call_hashes.make(pathlib.Path(sys.argv[2]))
"""
ONE_KERNEL = """
import edgeattn
from edgeattn.runtime import compiler, prebuilt
from edgeattn.kernels.cpu import entries
assert prebuilt.LIBRARY is None and "site-packages" in edgeattn.__file__
entries.ENTRIES["quantize"].compile()
assert compiler.compiled() >= 1
"""


def pythons(given: list[str]) -> dict[str, str]:
    """Version -> the Python of it."""
    found = {}
    roots = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in VERSIONS:
        candidates = [*given, f"python{version}", *map(str, sorted(roots.glob(f"{version}.*/bin/python{version}")))]
        for python in candidates:
            if asked(python) == version:
                found[version] = python
                break
    return found


def asked(python: str) -> str | None:
    """The version that a Python says it has; None where it does not run, or makes no environments."""
    try:
        done = subprocess.run([python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
                              capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run(*command: object, **environment: str) -> str:
    """What a command printed; its last words where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False,
                          cwd=tempfile.gettempdir(), env={**clean_environment(), **environment})
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-12:]))
    return done.stdout


def tried(python: str, numpy: str, wheel: Path, sdist: Path, calls: Path, compile_one: bool) -> str:
    """What the wheel and the sdist do in an environment of their own: the checksum of all calls."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", "--without-pip", folder)
        inside = Path(folder, "bin/python")
        ensure_pip(inside)
        pip = (inside, "-m", "pip", "install", "-q")
        run(*pip, numpy, "safetensors")
        run(*pip, "--no-deps", wheel)
        said = run(inside, "-W", "error", ROOT / "tests/call_hashes.py", calls).splitlines()[-1]
        if compile_one:
            run(*pip, numpy, wheel)
            run(inside, "-W", "error", "-c", ONE_KERNEL, EDGEATTN_JIT="1", NUMBA_CACHE_DIR=f"{folder}/kernels")
        run(*pip, "--no-deps", "--force-reinstall", sdist)
        run(inside, "-W", "error", "-c", "import edgeattn, sys; assert edgeattn.__file__.startswith(sys.prefix)")
        return said


def main() -> int:
    """Try them; 1 where one fails or gives other bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="one with compiled kernels; made without")
    parser.add_argument("--python", action="append", default=[], help="another Python to try; may be given again")
    given = parser.parse_args()
    found = pythons(given.python)
    failed, sums = [], set()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        copy_sources(made / "sources")
        run(sys.executable, "-m", "pip", "install", "-q", "--target", made / "setuptools", "setuptools")
        run(sys.executable, "-c", BUILD_SDIST, made / "sources", made, PYTHONPATH=str(made / "setuptools"))
        sdist = next(made.glob("*.tar.gz"))
        wheel = given.wheel and given.wheel.resolve()
        if wheel is None:
            subprocess.run([sys.executable, ROOT / "tools/wheel.py", "--out", folder], check=True)
            wheel = next(made.glob("*.whl"))
        run(sys.executable, "-c", MAKE_CALLS, ROOT, made / "calls")
        for version in VERSIONS:
            if version not in found:
                print(f"{version:5} not tried: there is no such Python here; --python names one", flush=True)
                continue
            for numpy, supported in NUMPYS.items():
                if version not in supported:
                    continue
                began = time.monotonic()
                try:
                    said = tried(found[version], numpy, wheel, sdist, made / "calls", numpy == "numpy>=2")
                    sums.add(said)
                except RuntimeError as error:
                    failed.append(version)
                    said = f"FAILED\n{error}"
                print(f"{version:5} {numpy:14} {said}  ({time.monotonic() - began:.0f} s)", flush=True)
    if len(sums) > 1:
        print("FAILED: the same calls gave other bytes")
    return 1 if failed or len(sums) != 1 else 0


if __name__ == "__main__":
    sys.exit(main())
