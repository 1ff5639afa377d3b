"""Embed a folder of text on a cluster of workers, in int8; what is there already is not computed again.

    python examples/corpus_dask.py [FOLDER] [--out OUT] [--model FOLDER] [--workers N] [--kill]

1. every paragraph of the .txt and .md files under FOLDER (the documentation here unless given) is a text;
2. the model, all-MiniLM-L6-v2 unless given, becomes int8 once, and its file is what workers load, each once;
3. each worker embeds a piece of the corpus at a time and writes it as a shard, OUT/<piece>-<checksum>.npy, whole or not
   at all: a run that was ended goes on where it was, one after an edit computes the pieces that changed;
4. --kill ends a worker in the middle, as a machine may: the cluster gives its pieces to the others.

One text has one embedding, whichever worker computes it and beside which others: the shards are the same bytes on
every run. On a real cluster give Client its address, and OUT in a folder that all workers see.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import edgeattn
import quant
from edgeattn.files.paths import write_atomic

ROOT = Path(__file__).resolve().parents[1]
TEXTS_OF_A_PIECE = 32


def paragraphs(folder: Path) -> list[str]:
    """The texts of a folder, in an order that does not depend on the machine."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
    found = [" ".join(part.split()) for path in files for part in path.read_text(encoding="utf-8").split("\n\n")]
    return [text for text in found if len(text) > 3]


def pieces_of(texts: list[str], model: str) -> dict[str, list[str]]:
    """Name of a shard -> its texts; the name is another when the texts or the model are."""
    found = {}
    for number, begin in enumerate(range(0, len(texts), TEXTS_OF_A_PIECE)):
        some = texts[begin:begin + TEXTS_OF_A_PIECE]
        checksum = hashlib.sha256("\0".join([model, *some]).encode()).hexdigest()[:12]
        found[f"{number:05d}-{checksum}.npy"] = some
    return found


@functools.lru_cache(maxsize=1)
def loaded(path: str) -> edgeattn.TextEncoder:
    """The model of a worker."""
    edgeattn.set_num_threads(1)  # there is a worker for each core
    return edgeattn.load(path)


def embed(model: str, shard: str, texts: list[str]) -> int:
    """Write the embeddings of some texts to a shard; how many there are. What a worker does."""
    data = io.BytesIO()
    np.save(data, loaded(model).encode(texts))
    write_atomic(shard, data.getvalue())
    return len(texts)


def int8_model(folder: Path | None, out: Path) -> Path:
    """The file of the int8 model, made where it is not there yet."""
    if folder is None:
        sys.path.insert(0, str(ROOT / "examples" / "minilm"))
        from run import model_folder

        folder = model_folder()
    path = out / "model.safetensors"
    model = quant.quantize(edgeattn.from_pretrained(folder), scheme="dynamic")
    if not (path.exists() and edgeattn.load(path) == model):
        edgeattn.save(model, path)
    return path


def run(folder: Path, out: Path, model: Path | None, client, kill=None) -> dict[str, int]:
    """Embed a folder by a Dask client; how many texts each shard that was computed now holds.

    Parameters
    ----------
    kill : function, optional
        Called once, when the first shard is there.
    """
    from distributed import as_completed

    out.mkdir(parents=True, exist_ok=True)
    path = int8_model(model, out)
    pieces = pieces_of(paragraphs(folder), hashlib.sha256(path.read_bytes()).hexdigest())
    for old in out.glob("*.npy"):
        if old.name not in pieces:
            old.unlink()
    names = {}
    for name, texts in pieces.items():
        if not (out / name).exists():
            # its name is the task's: one that ran twice, after a lost worker, writes the same bytes
            names[client.submit(embed, str(path), str(out / name), texts, key=name, retries=3)] = name
    made = {}
    for future in as_completed(names):
        made[names[future]] = future.result()
        if kill is not None:
            kill()
            kill = None
    return made


def read_shards(out: Path) -> np.ndarray:
    """All embeddings, in the order of the texts."""
    return np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))])


def end_a_worker(client) -> None:
    """Kill the process of a worker, as a machine that fails would."""
    import signal

    pids = client.run(os.getpid)
    os.kill(min(pids.values()), signal.SIGKILL)
    print(f"killed one of {len(pids)} workers")


def main(arguments: list[str] | None = None) -> None:
    """Embed, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    parser.add_argument("--out", type=Path, help="where shards go; a temporary folder unless given")
    parser.add_argument("--model", type=Path, help="as edgeattn.from_pretrained reads it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="end a worker in the middle")
    options = parser.parse_args(arguments)
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise SystemExit("this example needs dask: pip install 'edgeattn[dask]'") from error
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        with (LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
              Client(cluster) as client):
            for turn in ("embedded", "and again"):
                began = time.perf_counter()
                kill = functools.partial(end_a_worker, client) if options.kill and turn == "embedded" else None
                made = run(options.folder, out, options.model, client, kill)
                seconds = time.perf_counter() - began
                print(f"{turn}: {sum(made.values()):,} texts in {len(made)} shards, {seconds:.1f} s")
        rows = read_shards(out)
        print(f"{rows.shape[0]:,} embeddings of {rows.shape[1]} numbers, {rows.nbytes:,} bytes"
              + (f", in {options.out}" if options.out else ""))


if __name__ == "__main__":
    main()
