"""Instructions that calls of layers execute on emulated Raspberry Pis, beside other runtimes' wheels.

    python tools/arm64/count_instructions.py .arm64
    python tools/arm64/count_instructions.py .arm64 --cpu cortex-a53 --site FOLDER --size 64/4/32

Sizes of three numbers are attention layers; a fourth, of hidden features, makes it an encoder layer of MiniLM's kind,
and a fifth says how many of these: 384/12/32/1536/6 is MiniLM behind its embedding.

For each CPU a process a runtime, counted by a plugin of the emulator (count_plugin.c): a call is a quarter of what
eight calls execute more than four. A count is no speed: instructions take unlike times, and the emulator has no
pipelines.
edgeattn runs from a wheel with these CPUs' kernels, without Numba; LiteRT and onnxruntime as their wheels come, on one
thread. Needs a C compiler, apt-get as build.py does, and the package onnx; where ai-edge-quantizer is, LiteRT's
dynamic int8 is counted, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from build import CPUS, Progress, SetupError, apt, install_wheels, python_of
from run import ROOT, clean_environment, install_wheel

sys.path.insert(0, str(ROOT))

import onnx_graphs

import edgeattn
import quant

CALLS = 4  # as count_calls.py has it
SIZES = "64/4/32", "384/12/32", "384/12/128", "384/12/32/1536"  # width, heads, tokens, hidden features
FORMATS = "float32", "dynamic", "static"
PEERS = {"litert": FORMATS, "onnxruntime": ("float32", "dynamic")}
PEERS_OF_ENCODERS = {"litert": FORMATS, "onnxruntime": FORMATS}
HERE = Path(__file__).resolve().parent


def counting_emulator(folder: Path) -> tuple[list[Path | str], Path]:
    """What starts an emulator that takes plugins, as the static one does not, and the plugin; made where missing."""
    emulator, plugin = folder / "usr" / "bin" / "qemu-aarch64", folder / "count.so"
    if not emulator.exists():
        state = folder / "apt"
        state.mkdir(parents=True, exist_ok=True)
        apt(state, "", "update")
        done = apt(state, "", "install", "--download-only", "qemu-user:amd64")
        packages = sorted((state / "cache" / "archives").glob("*_amd64.deb"))
        if done.returncode or not packages:
            raise SetupError(f"apt-get could not download qemu-user:\n{done.stdout[-1000:]}")
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    if not plugin.exists() or plugin.stat().st_mtime < (HERE / "count_plugin.c").stat().st_mtime:
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", plugin, HERE / "count_plugin.c"], check=True)
    # It is linked to libraries that this machine need not have: those that came with it, and their own loader.
    libraries = [folder / parent / "x86_64-linux-gnu" for parent in ("lib", "usr/lib")]
    loader = next(path for each in libraries if (path := each / "ld-linux-x86-64.so.2").exists())
    return [loader, "--library-path", ":".join(map(str, libraries)), emulator], plugin


def make_files(folder: Path, sizes: list[str]) -> dict[tuple[str, str, str], tuple[Path, Path]]:
    """(runtime, size, format) -> (a layer's file, its input's)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for size in sizes:
        E, H, L, *hidden = (int(number) for number in size.split("/"))
        rng, stem = np.random.default_rng(E + L), folder / size.replace("/", "-")
        weights = [rng.standard_normal((E, E), np.float32) / np.float32(E**0.5) for _ in range(4)]
        names = "q_bias", "k_bias", "v_bias", "out_bias"
        biases = dict(zip(names, rng.standard_normal((4, E), np.float32), strict=True))
        layer, x = edgeattn.MultiHeadAttention(H, *weights, **biases), rng.standard_normal((1, L, E), np.float32)
        if hidden:
            layer = encoder(layer, *hidden, rng=rng)
        made = {"float32": layer, "dynamic": quant.quantize(layer, scheme="dynamic"),
                "static": quant.quantize(layer, quant.calibrate(layer, [x]))}
        inputs, codes = Path(f"{stem}.npy"), Path(f"{stem}-codes.npy")
        np.save(inputs, x)
        np.save(codes, rng.integers(-128, 128, (1, L, E)).astype(np.int8))
        for name, each in made.items():
            path = Path(f"{stem}-{name}.safetensors")
            edgeattn.save(each, path)
            files["edgeattn", size, name] = path, codes if name == "static" and not hidden else inputs
        peers = PEERS_OF_ENCODERS if hidden else PEERS
        for name in peers["litert"]:
            path = Path(f"{stem}-{name}.tflite")
            if name != "dynamic":
                quant.export(made[name], path, sequence_length=L)
            elif not quantize_dynamic(Path(f"{stem}-float32.tflite"), path):
                continue
            files["litert", size, name] = path, codes if name == "static" and not hidden else inputs
        for name in peers["onnxruntime"]:
            path = Path(f"{stem}-{name}.onnx")
            if name == "static":
                quant.export(made[name], path, sequence_length=L)
            else:
                onnx_graphs.write(layer, x.shape, name == "dynamic", path)
            files["onnxruntime", size, name] = path, inputs
    return files


def quantize_dynamic(plain: Path, path: Path) -> bool:
    """Write what LiteRT's quantizer makes of a float32 file, int8 weights and dynamic ranges; whether it is there."""
    try:
        import ai_edge_quantizer
    except ImportError:
        return False
    quantizer = ai_edge_quantizer.Quantizer(str(plain), ai_edge_quantizer.recipe.dynamic_wi8_afp32())
    path.write_bytes(bytes(quantizer.quantize().quantized_model))
    return True


def encoder(attention: edgeattn.MultiHeadAttention, hidden: int, layers: int = 1, *, rng: np.random.Generator
            ) -> edgeattn.TransformerEncoder:
    """Layers around the same attention, as MiniLM has six: GELU, norms behind the sums."""
    width = attention.embed_dim

    def linear(outputs: int, inputs: int) -> edgeattn.Linear:
        return edgeattn.Linear(rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5),
                               rng.standard_normal(outputs, np.float32))

    def layer() -> edgeattn.TransformerEncoderLayer:
        norms = [edgeattn.LayerNorm(1 + rng.standard_normal(width, np.float32) / 8) for _ in range(2)]
        feed_forward = edgeattn.FeedForward(linear(hidden, width), linear(width, hidden), activation="gelu")
        return edgeattn.TransformerEncoderLayer(attention, feed_forward, *norms)

    return edgeattn.TransformerEncoder([layer() for _ in range(layers)])


def count(folder: Path, cpu: str, site: Path, peers: Path, runtime: str, files: list[tuple[Path, Path]]) -> list[int]:
    """Instructions of one call of each file's layer."""
    counting = folder / "counting"
    emulator, plugin = counting_emulator(counting)
    out = counting / f"{cpu}-{runtime}.txt"
    root = folder / "root"
    command = [*emulator, "-plugin", f"{plugin},out={out}", "-cpu", cpu, "-L", folder / cpu / "prefix", "-0",
               folder / cpu / "bin" / "python", root / "usr" / "bin" / f"python{python_of(root)}",
               HERE / "count_calls.py", runtime, *(part for each in files for part in each)]
    paths = [str(site)] if runtime == "edgeattn" else [str(peers)] if runtime == "onnxruntime" else []
    environment = {name: value for name, value in clean_environment().items()
                   if name not in ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONHOME")}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SetupError(f"{runtime} on {cpu} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    marks = [int(line) for line in out.read_text().split()]
    starts, middles, ends = marks[::3], marks[1::3], marks[2::3]
    return [((end - middle) - (middle - start)) // CALLS
            for start, middle, end in zip(starts, middles, ends, strict=True)]


def main() -> int:
    """Read the command line, count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where tools/arm64/build.py built")
    add("--cpu", action="append", choices=[cpu.name for cpu in CPUS], help="this CPU alone; may be repeated")
    add("--size", action="append", help="as said above; may be repeated")
    add("--format", action="append", choices=FORMATS, help="this alone; may be repeated")
    add("--site", type=Path, help="where edgeattn is installed with libraries; else a wheel is built")
    add("--runtime", action="append", choices=["edgeattn", *PEERS], help="this alone; may be repeated")
    given = parser.parse_args()
    folder, cpus, sizes = given.folder.absolute(), given.cpu or [cpu.name for cpu in CPUS], given.size or list(SIZES)
    runtimes, formats = given.runtime or ["edgeattn", *PEERS], given.format or FORMATS
    peers = folder / "counting" / "peers"
    try:
        counting_emulator(folder / "counting")
        if "onnxruntime" in runtimes and not peers.exists():
            install_wheels(["onnxruntime"], python_of(folder / "root"), 28, peers, folder / "setup.log")
        site = given.site or (install_wheel(folder, cpus) if "edgeattn" in runtimes else folder)
        files = make_files(folder / "counting" / "layers", sizes)
        step, counts = Progress("counting"), {}
        for cpu in cpus:
            for runtime in runtimes:
                step.update(f"{runtime} on {cpu}")
                mine = [key for key in files if key[0] == runtime and key[2] in formats]
                found = count(folder, cpu, site.absolute(), peers, runtime, [files[key] for key in mine])
                counts |= {(cpu, *key): each for key, each in zip(mine, found, strict=True)}
        step.done(f"{len(counts)} layers")
    except SetupError as error:
        print(f"\nStopped: {error}", file=sys.stderr)
        return 1
    print("| layer | processor | " + " | ".join(runtimes) + " |\n|" + "---|" * (2 + len(runtimes)))
    for name in FORMATS:
        for size in sizes:
            for cpu in cpus:
                row = [counts.get((cpu, runtime, size, name)) for runtime in runtimes]
                if any(row):
                    cells = ("" if each is None else f"{each / 1e6:.3f}" for each in row)
                    print(f"| {name} {size} | {cpu} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    if shutil.which("cc") is None:
        sys.exit("needs a C compiler: apt-get install gcc")
    sys.exit(main())
