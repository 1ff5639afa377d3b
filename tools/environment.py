"""Build the virtual environment that the Makefile's targets run in, with nothing but the standard library.

A stock Debian or Raspberry Pi OS has Python but neither pip nor ensurepip, and its user may not be root. So
pip is taken from the first place that has it: the environment itself, ensurepip, a wheel on the disk, another
pip on this machine, Debian's package of the wheel, downloaded and unpacked without installing it.

    python3 tools/environment.py --venv .venv --stamp .venv/.ready-test --extras test,examples
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEBIAN_WHEELS = "/usr/share/python-wheels"
RECORD = "edgeattn-extras.json"  # in the environment: what was asked for so far
QUIET_SECONDS = 15.0  # where no terminal redraws the line, one line of progress each so many seconds
# Shown when an environment is ready. Of these, some do not exist for every Python or processor.
SHOWN = ("numpy", "numba", "safetensors", "ai-edge-litert", "tflite-runtime", "tflite-micro", "pytest")
OPTIONAL = {
    "tflite-runtime": "needs Python 3.10 or 3.11 and numpy 1",
    "tflite-micro": "needs Linux on x86-64",
}


class SetupError(Exception):
    """The environment cannot be built; the message says why and what to do."""


class Progress:
    """One line per step with its elapsed time: redrawn on a terminal, repeated now and then elsewhere.

    Parameters
    ----------
    title : str
        What the step does, in a few words.
    """

    def __init__(self, title: str):
        self.title = title
        self.began = self.shown = time.monotonic()
        self.redraws = sys.stdout.isatty()
        if not self.redraws:
            print(f"  {title} ...", flush=True)

    def update(self, detail: str) -> None:
        """Say what the step is at, if it is time for another line."""
        now = time.monotonic()
        if not self.redraws and now - self.shown < QUIET_SECONDS:
            return
        self.shown = now
        self._draw(f"{detail}  {now - self.began:.0f} s", "" if self.redraws else "\n")

    def done(self, detail: str) -> None:
        """Close the step with its result."""
        self._draw(f"{detail}  ({time.monotonic() - self.began:.1f} s)", "\n")

    def _draw(self, text: str, end: str) -> None:
        line = f"  {self.title}: {text}"
        if self.redraws:
            width = shutil.get_terminal_size().columns - 1
            line = "\r\033[K" + (line if end else line[:width])
        print(line, end=end, flush=True)


def clean_environment() -> dict[str, str]:
    """Return the user's environment variables, less those that would install elsewhere."""
    blocked = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
    env = {name: value for name, value in os.environ.items() if name not in blocked}
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0", PYTHONUNBUFFERED="1")
    return env


def succeeds(command: list, **options) -> bool:
    """Run a command silently; return whether it exists and exits with 0."""
    try:
        done = subprocess.run(
            [str(part) for part in command], env=clean_environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options,
        )
    except OSError:
        return False
    return done.returncode == 0


# -- the environment itself ------------------------------------------------------------------------


def ensure_venv(folder: Path, exact: bool) -> Path:
    """Create the environment unless a working one is there.

    Parameters
    ----------
    folder : Path
        Where the environment is, or will be.
    exact : bool
        Whether an environment of another Python version than this one is replaced.

    Returns
    -------
    Path
        The environment's Python.
    """
    python = folder / "bin" / "python"
    if folder.exists():
        if not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
            raise SetupError(f"{folder} is no virtual environment: remove it, or name another with VENV=")
        same = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
        if succeeds([python, "-c", same if exact else "import encodings"]):
            return python
        shutil.rmtree(folder)
    step = Progress("virtual environment")
    venv.create(folder, symlinks=True, with_pip=False)
    step.done(f"{os.path.relpath(folder, ROOT)} with Python {sys.version.split()[0]}")
    return python


# -- pip -------------------------------------------------------------------------------------------


def pip_from_ensurepip(python: Path) -> bool:
    """Use the pip that comes with Python, where the distribution left it in."""
    return succeeds([python, "-m", "ensurepip", "--default-pip"])


def pip_from_wheel(python: Path, folder: str = DEBIAN_WHEELS) -> bool:
    """Let a pip wheel install itself: a wheel is a zip file that Python can run from."""
    wheels = sorted(glob.glob(os.path.join(folder, "pip-*.whl")))
    return bool(wheels) and succeeds(
        [python, os.path.join(wheels[-1], "pip"), "install", "--no-index", "--no-deps", wheels[-1]]
    )


def pip_from_other_pip(python: Path) -> bool:
    """Let a pip outside the environment (22.3 or newer) install another one in it."""
    return succeeds([sys.executable, "-m", "pip", "--python", python, "install", "pip"])


def pip_from_debian_package(python: Path) -> bool:
    """Download Debian's package of the pip wheel and unpack it in a temporary folder: neither needs root."""
    with tempfile.TemporaryDirectory() as scratch:
        lists = os.path.join(scratch, "lists")
        os.makedirs(os.path.join(lists, "partial"))
        # The machine's package lists may be missing or stale, and only root may renew them: use another.
        private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={scratch}"]
        for options, update in (([], False), (private, True)):
            if update and not succeeds(["apt-get", *options, "update"], cwd=scratch):
                continue
            if succeeds(["apt-get", *options, "download", "python3-pip-whl"], cwd=scratch):
                break
        for package in glob.glob(os.path.join(scratch, "*.deb")):
            if succeeds(["dpkg-deb", "-x", package, scratch]):
                return pip_from_wheel(python, scratch + DEBIAN_WHEELS)
    return False


PIP_SOURCES = (
    ("this Python's ensurepip", pip_from_ensurepip),
    ("the wheel in " + DEBIAN_WHEELS, pip_from_wheel),
    ("another pip on this machine", pip_from_other_pip),
    ("Debian's package python3-pip-whl, unpacked without root", pip_from_debian_package),
)


def ensure_pip(python: Path) -> None:
    """Put pip into the environment unless it is there, from the first source that has it."""
    if succeeds([python, "-m", "pip", "--version"]):
        return
    step = Progress("pip")
    for name, install in PIP_SOURCES:
        step.update(f"trying {name}")
        if install(python) and succeeds([python, "-m", "pip", "--version"]):
            step.done(f"from {name}")
            return
    step.done("found nowhere")
    tried = "; ".join(name for name, _ in PIP_SOURCES)
    raise SetupError(
        f"no pip for {sys.executable} (tried: {tried}). If this machine was offline, run the same command "
        "again once it is not. Else, on Debian or Raspberry Pi OS: sudo apt install python3-venv, then again."
    )


# -- packages --------------------------------------------------------------------------------------


def readable(line: str) -> str | None:
    """Return what a line of pip's output says about progress, or None when it says nothing of interest.

    Examples
    --------
    >>> readable("  Downloading numba-0.61.0-cp311-cp311-manylinux_x86_64.whl (3.8 MB)")
    'downloading numba (3.8 MB)'
    """
    words = line.split()
    if line.lstrip().startswith(("Downloading ", "Using cached ")) and len(words) > 1:
        name = words[-3 if words[-1].endswith(")") else -1].rsplit("/", 1)[-1].split("-")[0]
        size = " ".join(words[-2:]) if words[-1].endswith(")") else ""
        return f"downloading {name} {size}".rstrip()
    if line.startswith("Collecting ") and len(words) > 1:
        return "looking up " + words[1]
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def pip_install(python: Path, arguments: list[str], title: str, log: Path) -> None:
    """Run pip with its output in a log and one line of progress on the screen.

    Parameters
    ----------
    python : Path
        The environment's Python.
    arguments : list of str
        What follows ``pip install``.
    title : str
        The step's name on the screen.
    log : Path
        The file that receives everything pip says.
    """
    step = Progress(title)
    # Python writes the bytecode of what is imported, a small part of what is installed.
    later = [] if sys.dont_write_bytecode else ["--no-compile"]
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", *later, *arguments]
    with log.open("a+", encoding="utf-8") as written:
        begin = written.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(),
            stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT,
        )
        detail = "starting pip"
        with log.open(encoding="utf-8", errors="replace") as reading:
            reading.seek(begin)
            while process.poll() is None:
                for line in reading:
                    detail = readable(line) or detail
                step.update(detail)
                time.sleep(0.2)
            reading.seek(begin)
            said = reading.read().splitlines()
    if process.returncode:
        step.done("failed")
        # Failures stand at the end; warnings about places that pip did not find are not the reason.
        tail = [line for line in said if line.strip() and not line.startswith("WARNING: Location")][-12:]
        raise SetupError(
            "\n".join([f"pip could not install the packages. Its last words (all of them: {log}):", *tail, "",
                       "If the network was the reason, run the same command again: what is there is kept."])
        )
    step.done("done")


def installed_versions(python: Path) -> dict[str, str]:
    """Return name -> version of everything installed in the environment, names in lower case with dashes."""
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'].lower().replace('_', '-'), d.version)"
    )
    listing = subprocess.run([str(python), "-I", "-c", code], check=True, capture_output=True, text=True)
    return dict(line.split(maxsplit=1) for line in listing.stdout.splitlines())


def show(text: str) -> None:
    """Print a line of the list, or two where it is long."""
    print(textwrap.fill(text, 79, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def state() -> str:
    """What the packages follow from: a checksum of the files that name them."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in ("setup.cfg", "pyproject.toml"))).hexdigest()


def recorded(folder: Path) -> dict:
    """What is installed in the environment for the present setup.cfg; {} when nothing, or for another one."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("state") == state() else {}


def record(folder: Path, extras: list[str], alone: list[str], there: dict) -> None:
    """Add to what is installed."""
    installed = sorted({*extras, *alone, *there.get("installed", ())})
    alone = sorted({*alone, *there.get("alone", ())})
    (folder / RECORD).write_text(json.dumps({"state": state(), "installed": installed, "alone": alone}),
                                 encoding="utf-8")


def main() -> int:
    """Build or renew the environment, then write the stamp that tells make that it is ready."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--venv", required=True, type=Path, help="folder of the environment")
    add("--stamp", required=True, type=Path, help="file written when everything is installed")
    add("--extras", default="", help="extras of setup.cfg, separated by commas")
    add("--exact", action="store_true", help="replace an environment of another Python version")
    add("--alone", action="append", default=[], metavar="PACKAGE", help="PACKAGE too, without dependencies")
    arguments = parser.parse_args()
    folder = arguments.venv if arguments.venv.is_absolute() else ROOT / arguments.venv

    began = time.monotonic()
    wanted = [name for name in arguments.extras.split(",") if name]
    name, new = os.path.relpath(folder, ROOT), [*wanted, *arguments.alone]
    there = recorded(folder) if (folder / "bin" / "python").exists() else {}
    if there:
        new = [entry for entry in new if entry not in there["installed"]]
        print(f"Adding {', '.join(new)} to {name}" if new else f"Checking {name}", flush=True)
    else:
        print(f"Setting up {name} (once; again only when setup.cfg changes)", flush=True)
    try:
        python = ensure_venv(folder, arguments.exact)
        ensure_pip(python)
        log = folder / "setup.log"
        # An environment replaced by one of another Python has lost its record.
        there = recorded(folder)
        missing = [entry for entry in wanted if entry not in there.get("installed", ())]
        if missing or not there:
            # Those that are there are named again, so that pip keeps what they ask for.
            kept = set(there.get("installed", ())) - set(there.get("alone", ())) - set(wanted)
            extras = ",".join([*wanted, *sorted(kept)])
            pip_install(python, ["--editable", f".[{extras}]" if extras else "."],
                        f"packages for {', '.join(missing) or 'edgeattn'}", log)
        for package in arguments.alone:
            if package not in there.get("installed", ()):
                pip_install(python, ["--no-deps", package], package, log)
        record(folder, wanted, arguments.alone, there)
    except SetupError as error:
        print(f"\nSetting up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSetting up interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 130

    versions = installed_versions(python)
    if not there:
        show("has: " + ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions))
        for name, reason in OPTIONAL.items() if "pytest" in versions else ():
            if name not in versions:
                show(f"without {name}, which {reason}: tests against it are skipped here")
    arguments.stamp.write_text("", encoding="utf-8")
    print(f"Ready after {time.monotonic() - began:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
