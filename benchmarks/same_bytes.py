"""Whether a sentence's embedding keeps its bytes, here and in other runtimes: python -m benchmarks.same_bytes

Each runtime computes all-MiniLM-L6-v2 (benchmarks/models.py says which weights) for 20 sentences: alone on one thread,
which is what the rest is compared with; with its instruction sets limited by its own switch, a process for each; on
two threads; padded by ten tokens; in one batch. A cell says of how many sentences the bytes are the same, and how far
the others' numbers are off at most; docs/same-bytes.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import edgeattn
import quant
from benchmarks import encoder_peers, models
from benchmarks.encoder_torch import Encoder, padded
from edgeattn.runtime import isa, processor

ROOT = Path(__file__).resolve().parents[1]
LONGER = 10  # tokens of padding
ATTENTION = {"edgeattn int8": "int8", "edgeattn int8, attention float32": "float32"}
# name: the switch, and what it may say on a processor with a feature that Linux calls so
SWITCHES: dict[str, tuple[str, dict[str, str]]] = {
    "OpenVINO": ("ONEDNN_MAX_CPU_ISA", {"SSE41": "sse4_1", "AVX": "avx", "AVX2": "avx2", "AVX512_CORE": "avx512f",
                                        "AVX512_CORE_VNNI": "avx512_vnni"}),
    "CTranslate2": ("CT2_FORCE_CPU_ISA", {"GENERIC": "sse2", "AVX": "avx", "AVX2": "avx2", "AVX512": "avx512f"}),
    "onnxruntime": ("", {}),
    "edgeattn": ("EDGEATTN_ISA", {}),
}


def file_of(name: str, folder: Path) -> Path:
    """Where the int8 model of ours is stored."""
    return folder / f"{ATTENTION[name]}.safetensors"


def call_of(name: str, common: encoder_peers.Common, threads: int) -> Callable:
    """(x, mask) -> states."""
    runtime = name.split()[0]
    if runtime != "edgeattn":
        return encoder_peers.BUILDERS[runtime](common, threads)[name]
    edgeattn.set_num_threads(threads)
    return edgeattn.load(file_of(name, common.folder))


def embeddings(name: str, folder: Path, threads: int) -> dict[str, np.ndarray]:
    """way -> (sentences, E)."""
    subject = models.minilm()
    common = encoder_peers.Common(subject.model, None, folder / "model.onnx", subject.samples, folder)
    call, rows = call_of(name, common, threads), subject.judged

    def pooled(state: np.ndarray, row: np.ndarray) -> np.ndarray:
        return np.array(state[: len(row)]).mean(axis=0)

    return {"alone": np.stack([pooled(call(*padded([row]))[0], row) for row in rows]),
            "padded": np.stack([pooled(call(*padded([row], len(row) + LONGER))[0], row) for row in rows]),
            "batch": np.stack([pooled(*pair) for pair in zip(call(*padded(rows)), rows, strict=True)])}


def run(name: str, folder: Path, threads: int, setting: dict[str, str]) -> dict[str, np.ndarray]:
    """`embeddings` in a process of its own."""
    out = folder / "out.npz"
    command = [sys.executable, "-m", "benchmarks.same_bytes", "--child", name, str(folder), str(threads)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **setting, "EDGEATTN_JIT": "1"},
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if setting else None)
    with np.load(out) as found:
        return dict(found)


def cell(found: np.ndarray, exact: np.ndarray) -> str:
    """Of how many rows the bytes are the same; the largest difference of the others."""
    same = (found.view(np.int32) == exact.view(np.int32)).all(axis=1)
    return f"{same.sum()} of {len(same)}" + ("" if same.all() else f", {np.abs(found - exact).max():.1g}")


def row_of(name: str, folder: Path) -> str:
    """A row of the table."""
    switch, known = SWITCHES[name.split()[0]]
    flags = processor.flags()
    sets = [value for value, flag in known.items() if flag in flags]
    if name.startswith("edgeattn"):
        sets = [table.name for table in isa.runnable(isa._host_features())]
    first = run(name, folder, 1, {})
    exact, limited = first["alone"], []
    for value in sets:
        try:
            limited.append(f"{value}: {cell(run(name, folder, 1, {switch: value})['alone'], exact)}")
        except subprocess.CalledProcessError:  # what its switch names and the runtime cannot compute with
            limited.append(f"{value}: does not run")
    two = run(name, folder, 2, {})
    cells = ("; ".join(limited) or "it has no switch", cell(two["alone"], exact), cell(first["padded"], exact),
             cell(first["batch"], exact))
    return f"| {name} | {' | '.join(cells)} |"


def prepare(folder: Path) -> list[str]:
    """Make the models' files; the names of what there is."""
    subject = models.minilm()
    common = encoder_peers.Common(subject.model, Encoder(subject.model), folder / "model.onnx", subject.samples, folder)
    common.module.exported(subject.samples[0], str(common.graph))
    for name, attention in ATTENTION.items():
        edgeattn.save(quant.quantize(subject.model, scheme="dynamic", attention=attention), file_of(name, folder))
    found = list(ATTENTION)
    for runtime in SWITCHES:
        try:
            found += [] if runtime == "edgeattn" else encoder_peers.BUILDERS[runtime](common, 1)
        except (ImportError, RuntimeError) as error:
            print(f"without {runtime}: {' '.join(str(error).split())[:200]}")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3, metavar=("NAME", "FOLDER", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="runtimes whose name holds this")
    options = parser.parse_args()
    if options.child:
        name, folder, threads = options.child
        np.savez(Path(folder) / "out.npz", **embeddings(name, Path(folder), int(threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = prepare(Path(folder))
        print(f"| | instruction sets | two threads | padded by {LONGER} | in one batch |\n{'|---' * 5}|", flush=True)
        for name in names:
            if options.only in name:
                print(row_of(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
