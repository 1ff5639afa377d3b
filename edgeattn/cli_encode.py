"""The command `edgeattn encode`: vectors of texts."""
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

import edgeattn
from edgeattn.alive import alive
from edgeattn.checks import count
from edgeattn.cli_open import open_model
from edgeattn.files.paths import check_output, write_atomic

TEXTS_AT_ONCE = 256  # between two words about how far it is
PATIENCE = 1.0  # seconds without one


def add_to(commands):
    """Add the command to those of `edgeattn`."""
    encode = commands.add_parser(
        "encode", help="Write a vector for each text to a .npy file.",
        description="Write a vector for each text to a .npy file, float32, in the order of the texts.")
    encode.add_argument("model", metavar="FILE",
                        help="A text encoder: a .safetensors, .so (bundle) or .onnx file, or a folder.")
    encode.add_argument("texts", nargs="*", metavar="TEXT", help="A text; - or none: standard input, a text per line.")
    encode.add_argument("--from", dest="files", action="append", default=[], metavar="FILE",
                        help="A file with a text per line, UTF-8; may be given again.")
    encode.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="The .npy file to write.")
    encode.add_argument("--batch-size", type=int, default=32, metavar="N",
                        help="Texts computed at a time; 32 unless given.")
    encode.add_argument("--max-length", type=int, default=None, metavar="N",
                        help="Cut texts after so many tokens; unless given, as the model's folder says.")
    encode.add_argument("--tokenizer", type=Path, default=None, metavar="FOLDER",
                        help="Of an .onnx file: where tokenizer.json is, unless that is its folder.")
    encode.add_reading_options()
    encode.add_argument("--json", action="store_true", help="Print what was written as JSON.")
    encode.set_defaults(run=_encode)


def _encode(chosen):
    """Vectors of texts."""
    output, files = chosen.output, [Path(path) for path in chosen.files]
    if output.suffix != ".npy":
        raise ValueError(f"--output must end in .npy, got {str(output)!r}")
    try:
        check_output(output, Path(chosen.model), *files)
    except FileNotFoundError:
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}") from None
    names, texts = _texts(chosen.texts, files)
    if chosen.tokenizer is not None and not chosen.model.endswith(".onnx"):
        raise ValueError(f"--tokenizer must be left out but for an .onnx file, got {chosen.model}: what else holds a "
                         "model holds its tokenizer")
    with alive(f"reading {chosen.model}"):
        model = open_model(chosen.model, texts=True, tokenizer=chosen.tokenizer, scheme=chosen.scheme,
                           arithmetic=chosen.arithmetic, part=chosen.part)
    if not isinstance(model, edgeattn.TextEncoder):
        raise TypeError(f"{chosen.model} must hold a TextEncoder to encode texts, got {type(model).__name__}")
    if chosen.max_length is not None:
        model.max_length = count("--max-length", chosen.max_length)
    vectors, began = [np.zeros((0, model.embed_dim), np.float32)], time.perf_counter()
    said = False
    for first in range(0, max(len(texts), 1), TEXTS_AT_ONCE):  # of no text, too: the model may be unfit
        some = texts[first:first + TEXTS_AT_ONCE]
        try:
            vectors.append(model.encode(some, chosen.batch_size))
        except ValueError as error:
            message = _in_words_of_the_command(str(error), names[first:])
            raise ValueError(message.replace("this TextEncoder", chosen.model)) from None
        if said or time.perf_counter() - began > PATIENCE:
            said = True
            print(f"\redgeattn: {first + len(some)} of {len(texts)} texts", end="", file=sys.stderr, flush=True)
    if said:
        print(file=sys.stderr)
    content, whole = io.BytesIO(), np.concatenate(vectors)
    np.save(content, whole)
    write_atomic(output, content.getvalue())
    if chosen.json:
        print(json.dumps({"output": str(output), "vectors": len(whole), "width": model.embed_dim, "dtype": "float32"}))
    else:
        print(f"wrote {output}: {len(whole):,} vector{'s'[:len(whole) != 1]} of {model.embed_dim}, float32")
    return 0


def _texts(given, files):
    """(what each text is called in errors, the texts)."""
    names, texts = [], []
    for path in files:
        with open(path, "rb") as file:
            _read_lines(file, str(path), names, texts)
    for i, text in enumerate(given if given or files else ["-"]):
        if text == "-":
            _read_lines(sys.stdin.buffer, "standard input", names, texts)
        elif os.path.exists(text):
            raise ValueError(f"TEXT {text!r} is the name of a file: --from {text} encodes what is in it")
        else:
            names.append(f"TEXT {i + 1}")
            texts.append(text)
    return names, texts


def _read_lines(file, name, names, texts):
    for i, line in enumerate(file, 1):
        names.append(f"line {i} of {name}")
        try:
            texts.append(line.decode("utf-8-sig" if i == 1 else "utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{names[-1]} must be UTF-8, and is not: {error.reason}; convert the file") from None


def _in_words_of_the_command(message, names):
    """What `TextEncoder.encode` says, for those who type commands."""
    message = re.sub(r"sentences\[(\d+)\]", lambda found: names[int(found[1])], message)
    for python, option in (("give the TextEncoder a max_length", "give --max-length"), ("batch_size", "--batch-size"),
                           ("max_length", "--max-length")):
        message = message.replace(python, option)
    return message
