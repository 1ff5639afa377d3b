"""Build aarch64 Python environments, one per CPU, that run on this x86-64 machine under qemu-user.

Nothing is installed system-wide and nobody needs to be root: Debian packages are downloaded through a package
state of our own, with the machine's configured sources and keys, and unpacked; wheels come from wherever pip is
configured to take them. Each CPU gets a Python that sees the /proc/cpuinfo of the Raspberry Pi it stands for,
so that LLVM finds the same CPU there as on the board, and that dies of an instruction the CPU lacks.

    python tools/arm64/build.py .arm64
    .arm64/cortex-a72/bin/python -c 'import numba; ...'

How long anything takes in there says nothing about a board.
"""

from __future__ import annotations

import configparser
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import ROOT, Progress, SetupError, clean_environment, pip_install

# Python, what the wheels link to, and the emulator itself (a static x86-64 program).
PACKAGES = ("python3:arm64", "libstdc++6:arm64", "libgomp1:arm64", "libatomic1:arm64")
# Debian 12 and before, then after: the static emulator changed its package.
EMULATORS = ("qemu-user-static", "qemu-user")
EMULATOR_FILES = ("qemu-aarch64-static", "qemu-aarch64")
# Minor version of the C library of the oldest aarch64 wheels (manylinux2014).
OLDEST_GLIBC = 17
_ARMV8_0 = "fp asimd evtstrm crc32 cpuid"
_ARMV8_2 = f"{_ARMV8_0} aes pmull sha1 sha2 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"


@dataclass(frozen=True)
class Cpu:
    """A CPU as the kernel of its board describes it in /proc/cpuinfo."""

    name: str  # qemu's and LLVM's
    part: str
    variant: str
    revision: int
    features: str
    board: str

    def cpuinfo(self) -> str:
        """Return the text of /proc/cpuinfo; each of these boards has four cores."""
        core = ("processor\t: {}\nBogoMIPS\t: 108.00\n"
                f"Features\t: {self.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
                f"CPU variant\t: {self.variant}\nCPU part\t: {self.part}\nCPU revision\t: {self.revision}\n\n")
        return "".join(core.format(number) for number in range(4)) + f"Model\t\t: {self.board}\n"


CPUS = (
    Cpu("cortex-a53", "0xd03", "0x0", 4, _ARMV8_0, "Raspberry Pi 3 Model B Plus Rev 1.3"),
    Cpu("cortex-a72", "0xd08", "0x0", 3, _ARMV8_0, "Raspberry Pi 4 Model B Rev 1.4"),
    Cpu("cortex-a76", "0xd0b", "0x4", 1, _ARMV8_2, "Raspberry Pi 5 Model B Rev 1.0"),
)


# -- Debian packages -------------------------------------------------------------------------------


def apt_options(folder: Path) -> list[str]:
    """Return the options that make apt-get keep its state in ``folder`` and know both architectures."""
    for name in ("state/lists/partial", "cache/archives/partial", "preferences"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    status = folder / "status"
    status.touch()
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    settings = {
        "Dir::State": folder / "state", "Dir::State::status": status, "Dir::Cache": folder / "cache",
        # Pins are about what is installed on this machine, and would hold back what is only unpacked.
        "Dir::Etc::preferencesparts": folder / "preferences", "Dir::Etc::preferences": "/dev/null",
        "APT::Architecture": "arm64", "APT::Sandbox::User": user, "APT::Install-Recommends": 0,
        "Acquire::Languages": "none", "Debug::NoLocking": 1,
    }
    options = [f"{name}={value}" for name, value in settings.items()]
    options += ["APT::Architectures::=arm64", "APT::Architectures::=amd64"]
    return [part for option in options for part in ("-o", option)]


def apt(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run apt-get with the state in ``folder``; its output is kept in the result."""
    try:
        return subprocess.run(
            ["apt-get", *apt_options(folder), "-q", "-y", *arguments], env={**clean_environment(), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise SetupError(f"apt-get cannot be run ({error}): this needs Debian, or a system made of it") from error


def download_packages(folder: Path) -> list[Path]:
    """Download the packages and all they depend on; return the files."""
    step = Progress("Debian packages for arm64")
    step.update("reading the package lists")
    said = apt(folder, "update").stdout
    for emulator in EMULATORS:
        step.update("downloading")
        done = apt(folder, "install", "--download-only", *PACKAGES, f"{emulator}:amd64")
        said += done.stdout
        files = sorted((folder / "cache" / "archives").glob("*.deb"))
        if done.returncode == 0 and files:
            step.done(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")
            return files
    step.done("failed")
    tail = "\n".join(said.strip().splitlines()[-12:])
    raise SetupError(f"apt-get could not download the packages. Its last words:\n{tail}\n\n"
                     "The configured package sources must offer arm64, as Debian's do (Ubuntu has it elsewhere).")


def unpack(packages: list[Path], root: Path) -> Path:
    """Unpack the packages into ``root``; return the emulator, which is moved beside it."""
    step = Progress("unpacking")
    for package in packages:
        step.update(package.name)
        # Not run here, and neither is anything that would need them.
        if not package.name.startswith(("dpkg_", "tar_", "perl")):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True, env=clean_environment())
    found = [root / "usr" / "bin" / name for name in EMULATOR_FILES if (root / "usr" / "bin" / name).is_file()]
    if not found:
        raise SetupError(f"the packages hold neither of {', '.join(EMULATOR_FILES)}")
    emulator = root.parent / "qemu-aarch64"
    shutil.move(found[0], emulator)
    for other in glob.glob(str(root / "usr" / "bin" / "qemu-*")):
        os.remove(other)  # the other machines' emulators, 200 MB
    version = subprocess.run([emulator, "--version"], check=True, capture_output=True, text=True).stdout
    step.done(version.splitlines()[0])
    return emulator


def python_of(root: Path) -> str:
    """Return the unpacked Python's minor version, as "3.11"."""
    found = [match.group(1) for path in (root / "usr" / "bin").iterdir()
             if (match := re.fullmatch(r"python(3\.\d+)", path.name))]
    if not found:
        raise SetupError("the packages hold no Python")
    return found[0]


def glibc_of(packages: list[Path]) -> int:
    """Return the minor version of the C library among the packages: 36 of 2.36."""
    for package in packages:
        if match := re.match(r"libc6_2\.(\d+)", package.name):
            return int(match.group(1))
    raise SetupError("the packages hold no libc6")


# -- wheels ----------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """Return what the tests need on aarch64, from setup.cfg.

    Lines with a marker are about other machines: pip would judge them by the one it runs on.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], *(extras[name] for name in ("quant", "tflite", "test-numpy2"))]
    wanted = [line.strip() for text in lines for line in text.splitlines()]
    return [line for line in wanted if line and not line.startswith(("#", "edgeattn")) and ";" not in line]


def install_wheels(python: str, glibc: int, site: Path, log: Path, wanted: list[str] | None = None) -> None:
    """Install wheels of another machine, what the tests need if not said, into ``site`` with this Python's pip."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(glibc, OLDEST_GLIBC - 1, -1)]
    platforms.append("manylinux2014_aarch64")
    arguments = ["--target", str(site), "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    arguments += [part for name in platforms for part in ("--platform", name)]
    arguments += wanted or requirements()
    pip_install(Path(sys.executable), arguments, f"aarch64 wheels for Python {python}", log)


# -- one environment per CPU -----------------------------------------------------------------------


def make_environment(cpu: Cpu, folder: Path, emulator: Path, root: Path, site: Path, python: str) -> Path:
    """Make a virtual environment whose Python is a script that starts the emulator; return that script.

    The emulator looks every file up beneath its prefix first. The prefix is the unpacked packages, by links, and
    a /proc/cpuinfo.
    """
    prefix = folder / "prefix"
    (prefix / "proc").mkdir(parents=True)
    for entry in root.iterdir():
        (prefix / entry.name).symlink_to(os.path.relpath(entry, prefix))
    (prefix / "proc" / "cpuinfo").write_text(cpu.cpuinfo(), encoding="ascii")

    packages = folder / "lib" / f"python{python}" / "site-packages"
    packages.parent.mkdir(parents=True)
    packages.symlink_to(os.path.relpath(site, packages.parent))
    (folder / "pyvenv.cfg").write_text(
        f"home = {root}/usr/bin\ninclude-system-site-packages = false\nversion = {python}\n", encoding="utf-8")
    script = folder / "bin" / "python"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        f"# Python as on a {cpu.board}.\n"
        "unset LD_PRELOAD LD_LIBRARY_PATH PYTHONHOME\n"
        # Python finds its environment by the name it was started under, and starts itself by that name.
        f'exec "{emulator}" -cpu {cpu.name} -L "{prefix}" -0 "{script}" "{root}/usr/bin/python{python}" "$@"\n',
        encoding="utf-8")
    script.chmod(0o755)
    return script


CHECK = """
import platform, subprocess, sys
import ai_edge_litert.interpreter, llvmlite.binding, numba, numpy
child = subprocess.run([sys.executable, "-c", "import platform; print(platform.machine())"],
                       capture_output=True, text=True, check=True).stdout.strip()
assert (platform.machine(), child) == ("aarch64", "aarch64"), (platform.machine(), child)
assert numba.njit(lambda x: x + 1)(41) == 42
print(llvmlite.binding.get_host_cpu_name(), "numpy", numpy.__version__, "numba", numba.__version__)
"""


def check(cpu: Cpu, script: Path) -> None:
    """Refuse an environment in which LLVM does not see the board's CPU, or a child process leaves the emulator."""
    step = Progress(cpu.name)
    done = subprocess.run([script, "-c", CHECK], env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.startswith(cpu.name + " "):
        step.done("does not work")
        raise SetupError(f"{script} does not work:\n{done.stdout}{done.stderr}")
    step.done(f"{done.stdout.strip()}, as on a {cpu.board}")


def build(folder: Path) -> None:
    """Build everything from the start in ``folder``."""
    if platform.machine() != "x86_64":
        raise SetupError(f"the emulator's package is for x86-64; this machine is {platform.machine()}. "
                         "On an ARM64 machine the suite runs as it is: make test")
    if folder.exists() and any(folder.iterdir()) and not (folder / "apt").exists():
        raise SetupError(f"{folder} is no folder of this program: remove it, or name another")
    for old in ("root", "site", *(cpu.name for cpu in CPUS)):
        shutil.rmtree(folder / old, ignore_errors=True)
    root, site, log = folder / "root", folder / "site", folder / "setup.log"
    (folder / "apt").mkdir(parents=True, exist_ok=True)

    packages = download_packages(folder / "apt")
    emulator = unpack(packages, root)
    python = python_of(root)
    install_wheels(python, glibc_of(packages), site, log)
    for cpu in CPUS:
        check(cpu, make_environment(cpu, folder / cpu.name, emulator, root, site, python))


def main() -> int:
    """Build the environments, then write the stamp that tells make that they are ready."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).absolute()
    began = time.monotonic()
    print(f"Setting up {os.path.relpath(folder, ROOT)} (once; about 550 MB)", flush=True)
    try:
        build(folder)
    except SetupError as error:
        print(f"\nSetting up stopped: {error}", file=sys.stderr)
        return 1
    (folder / ".ready").write_text("", encoding="utf-8")
    print(f"Ready after {time.monotonic() - began:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
