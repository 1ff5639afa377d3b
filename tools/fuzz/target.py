"""One atheris target, for a reader of tests/readers.py: python tools/fuzz/target.py READER CORPUS [OPTIONS].

The first byte of an input says what the others are: the file, or a part of it that a checksum, a length or a
compression would keep from being changed. An input that is not read or refused as docs/formats.md promises is a crash.
"""

import json
import os
import pathlib
import sys
import tempfile
import warnings

import atheris
from google.protobuf.message import DecodeError

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Whatever Numba compiles must keep its bytecode: only these are watched.
WATCHED = [
    "edgeattn.bundle", "edgeattn.files.checkpoints", "edgeattn.files.npy", "edgeattn.quantized.score_ops",
    "edgeattn.files.safetensors_file", "edgeattn.files.storage", "edgeattn.files.stored",
    "edgeattn.files.tensor_files", "edgeattn.files.tflite", "edgeattn.files.tflite_file",
    "edgeattn.files.tflite_graph", "edgeattn.files.tflite_scores", "edgeattn.files.zip_members", "quant.calibration",
    "quant.cli_source", "quant.describe", "zipfile"]

with atheris.instrument_imports(include=WATCHED):
    import readers



def target(name: str, path: pathlib.Path):
    """What atheris calls."""
    reader, (_, parts, _) = readers.READERS[name], readers._of(name)

    def test_one_input(data: bytes) -> None:
        if not data:
            return
        part, content = data[0] % (1 + len(parts or ())), data[1:]
        if part:
            whole, again = parts[part - 1]
            if not isinstance(whole, bytes):
                content = parsed(whole, content)
                if content is None:
                    return  # no change of this part
            content = again(content)
        path.write_bytes(content)
        try:
            reader.read(path)
        except Exception as error:
            wrong = readers.fault(error, path)
            if wrong is not None:
                raise RuntimeError(wrong) from error

    return test_one_input


def parsed(whole, content: bytes):
    """JSON or a message, as ``whole`` is; None for what is neither."""
    try:
        return json.loads(content) if isinstance(whole, dict | list) else type(whole).FromString(content)
    except (ValueError, RecursionError, DecodeError):
        return None


def write_corpus(name: str, folder: pathlib.Path) -> None:
    """The whole file and its parts, and small files made by hand."""
    whole, parts, made = readers._of(name)
    seeds = [b"\0" + whole]
    for number, (part, _) in enumerate(parts or (), 1):
        text = part if isinstance(part, bytes) else (
            json.dumps(part).encode() if isinstance(part, (dict, list)) else part.SerializeToString())
        seeds.append(bytes([number]) + text)
    for title in made:
        content = made[title](folder)
        if len(content) < 4096:
            seeds.append(b"\0" + content)
    for number, seed in enumerate(seeds):
        (folder / f"seed{number:03}").write_bytes(seed)


def main() -> None:
    """Fuzz the reader that the command line names."""
    name, corpus, *options = sys.argv[1:]
    warnings.simplefilter("ignore")
    os.makedirs(corpus, exist_ok=True)
    write_corpus(name, pathlib.Path(corpus))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"a{readers.READERS[name].suffix}"
        atheris.Setup([sys.argv[0], corpus, *options], target(name, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
