"""Build wheels that bring all kernels compiled: one for each machine, for every one of its processors.

    python tools/wheel.py                            for this machine, into dist
    python tools/wheel.py x86_64 aarch64             ... for these
    python tools/wheel.py cortex-a72 --out build     with the library of that processor alone
    python tools/wheel.py cortex-a72 --twice         ... compiled once more, where nothing is kept: the same bytes?

A wheel is what `pip wheel` makes of the tracked sources, and the libraries. Two of the same sources, made with the same
Numba and linker, are the same bytes; times in it are SOURCE_DATE_EPOCH, else 1980.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from environment import ROOT, clean_environment

MOST_BYTES = 10_000_000
# Libraries need functions that glibc 2.28 has, and nothing else: quant.export.linker.DEVICE_LIBRARIES.
TAG = "py3-none-manylinux_2_28_{}"
SOURCES = "edgeattn", "quant", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"
EARLIEST = 315532800  # what a zip file can say: 1980-01-01


def copy_sources(folder: Path) -> None:
    """Put what a package is built from, and nothing built before, into a new folder."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "libraries")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)


def pure_wheel(folder: Path) -> dict[str, bytes]:
    """What `pip wheel` makes of the sources in a folder of their own, where nothing built before lies: name -> content.

    Raises
    ------
    RuntimeError
        With pip's last words where it fails.
    """
    copy_sources(folder / "sources")
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "sources"],
                          env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("pip could not build the wheel. Its last words:\n"
                           + "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:]))
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist() if not entry.is_dir()}


def with_libraries(files: dict[str, bytes], machine: str, libraries: Path) -> tuple[str, dict[str, bytes]]:
    """The name of the wheel for a machine, and its files, in the order they are written in."""
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    about = record.removesuffix("RECORD")
    tag = TAG.format(machine)
    files = {name: content for name, content in files.items() if name != record}
    files[f"{about}WHEEL"] = (f"Wheel-Version: 1.0\nGenerator: edgeattn\nRoot-Is-Purelib: false\nTag: {tag}\n").encode()
    files |= {f"edgeattn/libraries/{path.name}": path.read_bytes() for path in libraries.iterdir()}
    files = dict(sorted(files.items()))  # "edgeattn-1.dist-info" comes before "edgeattn/"
    lines = [f"{name},sha256={digest(content)},{len(content)}\n" for name, content in files.items()]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    return f"{about.removesuffix('.dist-info/')}-{tag}.whl", files


def digest(content: bytes) -> str:
    """A checksum as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def write(path: Path, files: dict[str, bytes]) -> None:
    """Write a zip file that follows from nothing but its files and SOURCE_DATE_EPOCH."""
    moment = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH") or EARLIEST), EARLIEST))[:6]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, moment)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)


def differing(made: list[Path], targets: list[str]) -> list[str]:
    """The names of wheels that have other bytes when they are made from a copy of the sources, with nothing compiled.

    Raises
    ------
    RuntimeError
        With its last words where the second build fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_sources(folder / "tree")
        shutil.copytree(ROOT / "tools", folder / "tree" / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        environment = clean_environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
        environment.pop("NUMBA_CACHE_DIR", None)
        command = [sys.executable, folder / "tree" / "tools" / "wheel.py", *targets, "--out", folder / "made"]
        done = subprocess.run(command, env=environment, cwd=folder / "tree", capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the second build failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        print(done.stdout, end="")
        return [path.name for path in made if (folder / "made" / path.name).read_bytes() != path.read_bytes()]


def main() -> int:
    """Build them; 1 where one cannot be built, is too large, or is another when it is built again."""
    sys.path.insert(0, str(ROOT))
    from edgeattn.runtime.targets import TARGETS
    from quant.export.kernels import build, chosen

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=[platform.machine()], help="machines or processors")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    parser.add_argument("--twice", action="store_true", help="build once more from nothing, and compare bytes")
    given = parser.parse_args()
    try:
        targets = chosen(given.targets)
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    began, made = time.monotonic(), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = pure_wheel(Path(folder))
        for machine in sorted({TARGETS[name].machine for name in targets}):
            mine = [name for name in targets if TARGETS[name].machine == machine]
            print(f"compiling every kernel for {', '.join(mine)}: some minutes", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                build(mine, Path(folder))
                name, content = with_libraries(files, machine, Path(folder))
            write(given.out / name, content)
            made.append(given.out / name)
            size = made[-1].stat().st_size
            most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"{made[-1]}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s, processes of {most:.0f} MiB")
            if size > MOST_BYTES:
                raise RuntimeError(f"{name} is larger than the {MOST_BYTES / 1e6:.0f} MB it may be")
        if given.twice and (others := differing(made, targets)):
            raise RuntimeError(f"other bytes when built again: {', '.join(others)}")
        if given.twice:
            print("the same bytes twice")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
