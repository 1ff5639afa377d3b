"""The command `quant`: calibrate, quantize, compare, export and inspect, as the functions of these names do."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

import edgeattn
import quant
from edgeattn import messages
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.files.paths import check_output, reading, write_atomic
from edgeattn.files.tensor_files import read_npy, read_tensors
from edgeattn.layers import MultiHeadAttention
from edgeattn.models import ImageEncoder, TextEncoder
from quant.calibration import Calibration
from quant.describe import arithmetic_of_tflite, describe_file, describe_masks, describe_seen
from quant.export import FORMATS
from quant.export.targets import BOARDS, NATIVE, TARGETS
from quant.model_calibration import ModelCalibration
from quant.model_calls import MODELS
from quant.observers import OBSERVERS
from quant.tables import console, fill

# Of a .npy file: the results are the same however it is cut, and the (B, H, L, S) scores shall fit memory.
ROWS_AT_ONCE = 32

# What errors advise in terms of Python, and what does the same here.
ADVICE = {
    "read checkpoints of other libraries with MultiHeadAttention.from_torch or from_bert, a whole model from its "
    "folder with edgeattn.from_pretrained":
        "read checkpoints of other libraries with --prefix or --torch-prefix, and --num-heads; a whole model by "
        "its folder",
    "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path)":
        "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path) in Python",
    "give quant.calibrate calls with attn_mask, key_padding_mask or is_causal, or pass the mask to each call of this "
    "layer": "run `quant calibrate` on DATA in .npz files that hold attn_mask, key_padding_mask or is_causal, too",
    "mask must be 'causal' or a bool array": "--mask must be \"causal\" or a .npy file with a bool array",
    "mask='causal' needs sequence_length, and as many keys as queries": "--mask causal needs --sequence-length, and no "
                                                                        "other --key-length",
    "(run quant.calibrate first)": "(run `quant calibrate` first)",
    "export layer.with_arithmetic('tflm'), or quantize with arithmetic='tflm'":
        "make it with `quant quantize --arithmetic tflm`",
    "quantize it first, quant.quantize(layer, calibration, arithmetic='tflm')":
        "quantize it first, with `quant calibrate` and `quant quantize --arithmetic tflm`",
    "quantize the float encoder with quant.quantize(encoder, quant.calibrate(encoder, batches), arithmetic='tflm')":
        "make it of the float encoder with `quant calibrate` and `quant quantize --arithmetic tflm`",
    "quant.quantize makes one": "`quant quantize --scheme static` makes one",
    "quantize with scheme=": "quantize with --scheme ",
    "a layer of scheme=": "a layer of --scheme ",
    "; scheme=": "; --scheme ",
    "pass numpy.asarray(": "store numpy.asarray(",
    "attention='float32' leaves": "--attention float32 leaves",
    "overrides=report.overrides() makes what costs most dynamic": "`quant quantize --override NAME=dynamic` makes what "
                                                                  "costs most dynamic",
    "which edgeattn.save writes to a .safetensors file and edgeattn.load reads":
        "which a .safetensors file holds whole",
}

# Arguments that are options here.
OPTIONS = ("num_heads", "opset", "target", "test_vectors", "sequence_length", "key_length", "batch", "mask",
           "arithmetic", "scheme", "observer", "room_for_masks")

path_argument = click.Path(path_type=Path)
arithmetic_option = click.option("--arithmetic", type=click.Choice(list(KERNEL_SETS)),
                                 help="The TFLite kernel set to compute with; by default the one stored, or litert.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 after one line about an error."""
    messages.show()
    try:
        return commands.main(args=arguments, prog_name="quant", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        message = f"{context.command_path if context else 'quant'}: {error.format_message()}"
    except click.Abort:
        message = "quant: interrupted"
    except OSError as error:
        message = f"quant: {error.filename}: {error.strerror}" if error.filename else f"quant: {error}"
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        message = f"quant: {in_words_of_the_command(str(error))}"
    print(" ".join(message.split()), file=sys.stderr)
    return 2


def in_words_of_the_command(message: str) -> str:
    """What a Python function says, for those who type commands."""
    for python, option in ADVICE.items():
        message = message.replace(python, option)
    # the file stands before it where there is one
    message = re.sub(rf"(^|: )({'|'.join(OPTIONS)})(?= must | is | needs )",
                     lambda found: f"{found[1]}--{found[2].replace('_', '-')}", message)
    return re.sub(r"(--scheme )'(static|dynamic)'", r"\1\2", message)


def layer_options(command):
    """Give a command LAYER and the options that say how to read it."""
    for option in (
        click.option("--num-heads", type=int, help="Number of heads in the checkpoint."),
        click.option("--bert-prefix", help='LAYER is a BERT checkpoint; what stands before "self.query.weight".'),
        click.option("--prefix", help="LAYER is a checkpoint whose names tell its family, BERT, ViT, CLIP, T5, Llama, "
                                      "GPT-2 ...; what stands before one attention layer's."),
        click.option("--torch-prefix", help="LAYER holds a torch.nn.MultiheadAttention; what stands before "
                                            '"in_proj_weight", "" if nothing does.'),
        click.argument("layer", type=path_argument),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeattn.__version__, prog_name="quant", message="%(prog)s %(version)s")
def commands():
    """Turn a float attention layer, or a whole encoder or model, into an int8 one.

    LAYER is a .safetensors file written by edgeattn.save; a checkpoint (.safetensors, .npz) read with --prefix,
    --torch-prefix or --bert-prefix, and --num-heads; or a folder with a model, as edgeattn.from_pretrained reads it.

    DATA are .npy files, each (B, L, E) or (L, E), or .npz files with arrays named as the arguments of the layer's
    call: query, key, value, attn_mask, key_padding_mask, is_causal, causal_alignment. Of an encoder or a model they
    are named as those of its call (x, lengths, ...; ids, attention_mask, ...; pixels), and .npy files hold the first;
    .txt files hold a text per line for a text encoder.
    """


@commands.command()
@layer_options
@click.argument("data", nargs=-1, required=True, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .safetensors file to write.")
@click.option("--observer", type=click.Choice(list(OBSERVERS)), default="minmax", show_default=True,
              help="How ranges come from what is seen; a model has none.")
def calibrate(layer, prefix, torch_prefix, bert_prefix, num_heads, data, output, observer):
    """Run LAYER over DATA and keep the range of every tensor."""
    check_paths(output, layer, *data)
    layer = read_layer(layer, prefix, torch_prefix, bert_prefix, num_heads)
    calls = 0

    def run(batches):
        def counted():
            nonlocal calls
            for batch in batches:
                calls += 1
                yield batch
        return quant.calibrate(layer, counted(), observer=observer)

    calibration = with_file_names(layer, data, run)
    calibration.save(output)
    say(f"wrote {output}: calibrated on {', '.join(map(str, data))}")
    if isinstance(layer, MODELS):
        say(f"saw {calibration.tokens:,} tokens in {calls} call{'s' * (calls != 1)} of the model")
        return
    say(f"saw {describe_seen(calibration, layer)} in {calls} call{'s' * (calls != 1)} of the layer")
    say(f"masks: {describe_masks(calibration)}")


@commands.command()
@layer_options
@click.argument("calibration", required=False, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .safetensors file to write.")
@click.option("--scheme", type=click.Choice(["static", "dynamic"]),
              help="static: int8 in and out, as a .tflite; dynamic: float in and out, without CALIBRATION. Unless "
                   "given: static for a layer, dynamic for a model.")
@click.option("--arithmetic", type=click.Choice(list(KERNEL_SETS)),
              help="The TFLite kernel set that a static layer equals; litert unless given.")
@click.option("--attention", type=click.Choice(["int8", "float32"]),
              help="Of a model: float32 leaves its attention as it is; int8 unless given.")
@click.option("--room-for-masks", is_flag=True,
              help="static: leave room below the scores for a mask that a .tflite, .onnx or .c shall hold.")
@click.option("--override", "overrides", multiple=True, metavar="NAME=VALUE",
              help="Several may be given. Half a layer of a model, layers.0.feed_forward or layers.*.attention: "
                   "static, dynamic or float32. A tensor of static attention, scores or layers.*.attention.scores: "
                   "minmax, mse, percentile, percentile:SHARE or LOW:HIGH.")
def quantize(layer, prefix, torch_prefix, bert_prefix, num_heads, calibration, output, scheme, arithmetic, attention,
             room_for_masks, overrides):
    """Make an int8 layer of LAYER and of CALIBRATION, which `quant calibrate` wrote.

    A model needs no CALIBRATION unless it shall be static: one chooses on your data which inputs stay float32.
    """
    check_paths(output, layer, calibration)
    overrides = dict(map(read_override, overrides)) or None
    given, layer = layer, read_layer(layer, prefix, torch_prefix, bert_prefix, num_heads)
    if isinstance(layer, edgeattn.QuantizedMultiHeadAttention):
        raise click.UsageError(f"{given} is int8 already: give the float layer that it was made of")
    if isinstance(layer, MODELS):
        scheme, attention = scheme or "dynamic", attention or "int8"
        if scheme == "static" and calibration is None:
            raise click.UsageError("CALIBRATION is missing: run `quant calibrate` first, or leave --scheme out")
        if scheme == "dynamic" and arithmetic is not None:
            raise click.UsageError("--arithmetic needs --scheme static for a model")
        seen = None if calibration is None else ModelCalibration.load(calibration)
        edgeattn.save(quant.quantize(layer, seen, scheme=scheme, attention=attention,
                                     arithmetic=arithmetic or "litert", room_for_masks=room_for_masks,
                                     overrides=overrides), output)
        say(f"wrote {output}: {scheme} int8, attention {attention}, float in and out")
        return
    if attention is not None:
        raise click.UsageError("--attention must be left out for a layer, which is nothing else")
    scheme = scheme or "static"
    if scheme == "static" and calibration is None:
        raise click.UsageError("CALIBRATION is missing: run `quant calibrate` first, or choose --scheme dynamic")
    if scheme == "dynamic" and (calibration is not None or arithmetic is not None):
        raise click.UsageError("--scheme dynamic takes neither CALIBRATION nor --arithmetic for a layer")
    if scheme == "dynamic":
        edgeattn.save(quant.quantize(layer, scheme=scheme, overrides=overrides), output)
        say(f"wrote {output}: dynamic int8, float in and out")
        return
    quantized = quant.quantize(layer, Calibration.load(calibration), arithmetic=arithmetic or "litert",
                               overrides=overrides)
    edgeattn.save(quantized, output)
    say(f"wrote {output}: static int8, equal to {quantized.arithmetic}")


@commands.command()
@layer_options
@click.argument("quantized", type=path_argument)
@click.argument("data", nargs=-1, required=True, type=path_argument)
@arithmetic_option
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@click.option("--model-explorer", type=path_argument, metavar="FILE.json",
              help="Also write signal over noise as node data of Google's Model Explorer, for the file of --tflite.")
@click.option("--tflite", type=path_argument, help="What `quant export` wrote of QUANTIZED; QUANTIZED where it is one.")
def compare(layer, prefix, torch_prefix, bert_prefix, num_heads, quantized, data, arithmetic, as_json, model_explorer,
            tflite):
    """Say what int8 cost: every tensor of QUANTIZED against LAYER on DATA; of a model each half of each layer."""
    tflite = tflite or (quantized if quantized.suffix == ".tflite" else None)
    if model_explorer is not None:
        if tflite is None:
            raise click.UsageError("--model-explorer needs --tflite, whose nodes are named")
        check_paths(model_explorer, layer, quantized, tflite, *data)
    layer = read_layer(layer, prefix, torch_prefix, bert_prefix, num_heads)
    int8 = edgeattn.load(quantized, arithmetic=arithmetic)
    report = with_file_names(layer, data, lambda batches: quant.compare(layer, int8, batches))
    report = dataclasses.replace(report, lints=[in_words_of_the_command(lint) for lint in report.lints])
    if model_explorer is not None:
        write_atomic(model_explorer, report.to_model_explorer(tflite).encode())
    if as_json:
        click.echo(report.to_json())
        return
    if quantized.suffix == ".tflite":
        say(f"arithmetic: {arithmetic_of_tflite(arithmetic)}")
    else:
        say(f"arithmetic: {getattr(int8, 'arithmetic', 'our own, dynamic')}")
    click.echo(str(report))


@commands.command()
@layer_options
@click.argument("quantized", type=path_argument)
@click.argument("data", nargs=-1, required=True, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .html file to write.")
@arithmetic_option
def report(layer, prefix, torch_prefix, bert_prefix, num_heads, quantized, data, output, arithmetic):
    """Write what `quant compare` finds as one page: a verdict, tables, histograms, attention maps."""
    check_paths(output, layer, quantized, *data)
    title = f"{quantized.name} beside {layer.name}"
    layer = read_layer(layer, prefix, torch_prefix, bert_prefix, num_heads)
    int8 = edgeattn.load(quantized, arithmetic=arithmetic)
    found = with_file_names(layer, data, lambda batches: quant.write_report(layer, int8, batches, output, title=title))
    say(f"wrote {output}: {output.stat().st_size:,} bytes")
    say(found.verdict())


@commands.command(help="\n\n".join((
    "Write LAYER, float or int8, to OUT, in the format that its suffix names:",
    "\n".join(("\b", *(f"{suffix:<13} {form.about}" for suffix, form in FORMATS.items()))),
    "With --target a folder stands for attention-TARGET.so in it.")))
@layer_options
@click.argument("path", metavar="OUT", type=path_argument)
@click.option("--batch", type=int, help="B of a .tflite, .onnx or .c; 1 unless given.")
@click.option("--sequence-length", type=int, multiple=True,
              help="L of a .tflite, .onnx or .c; a .tflite takes several, an .onnx without any length.")
@click.option("--key-length", type=int, help="S of a .tflite or .c whose keys are an input of their own.")
@click.option("--mask", help='"causal", or a .npy file with a bool mask, True = attend.')
@click.option("--test-vectors", type=int, help="How many to write beside a .c, with a program that checks them.")
@click.option("--target", type=click.Choice([*TARGETS, *BOARDS, NATIVE]),
              help="The processor of a .so, or the board; native: this machine's.")
@click.option("--opset", type=int, help="Of an .onnx: 17, unless given, to 23, where attention is one operator.")
@click.option("--padding", is_flag=True, help="An encoder's .tflite or .onnx has an input attention_mask.")
def export(layer, prefix, torch_prefix, bert_prefix, num_heads, path, batch, sequence_length, key_length, mask,
           test_vectors, target, opset, padding):
    """Write LAYER to OUT."""
    if target is not None and path.is_dir():
        path /= f"attention-{target}.so"
    mask_file = None if mask in (None, "causal") else Path(mask)
    check_paths(path, layer, mask_file)
    layer = read_layer(layer, prefix, torch_prefix, bert_prefix, num_heads)
    if mask_file is not None:
        mask = read_npy(mask_file)
    lengths = list(sequence_length) if len(sequence_length) > 1 else next(iter(sequence_length), None)
    path = quant.export(layer, path, batch=batch, sequence_length=lengths, key_length=key_length, mask=mask,
                        test_vectors=test_vectors, target=target, opset=opset, padding=padding)
    say(f"wrote {path}: {path.stat().st_size:,} bytes")


@commands.command()
@click.argument("file", type=path_argument)
@arithmetic_option
def inspect(file, arithmetic):
    """Show what FILE holds: a layer, a model, a calibration or a .tflite graph."""
    shown = console()
    for part in list(describe_file(file, arithmetic=arithmetic)):
        click.echo(part) if isinstance(part, str) else shown.print(part)


def say(text: str) -> None:
    """Print a line, or several where it is long."""
    click.echo(fill(text))


def check_paths(output: Path, *inputs: Path | None) -> None:
    """Refuse what cannot be written, or would replace what is read, before any work is done for it."""
    try:
        check_output(output, *inputs)
    except FileNotFoundError:
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}") from None


def read_layer(path: Path, prefix: str | None, torch_prefix: str | None, bert_prefix: str | None,
               num_heads: int | None):
    """The layer that LAYER and its options name."""
    given = {name: value for name, value in (
        ("--prefix", prefix), ("--torch-prefix", torch_prefix), ("--bert-prefix", bert_prefix)) if value is not None}
    if not given:
        if num_heads is not None:
            raise click.UsageError("--num-heads needs --prefix or --torch-prefix: a saved layer knows its heads")
        if path.suffix == ".npz":
            raise click.UsageError(f"{path} is a checkpoint: give --prefix or --torch-prefix, and --num-heads")
        return edgeattn.from_pretrained(path) if path.is_dir() else edgeattn.load(path)
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other")
    if num_heads is None:
        raise click.UsageError("--num-heads is required for a checkpoint, which does not name it")
    if prefix is not None:
        return MultiHeadAttention.from_checkpoint(path, prefix, num_heads)
    if torch_prefix is not None:
        return MultiHeadAttention.from_torch(path, num_heads, torch_prefix)
    return MultiHeadAttention.from_bert(path, bert_prefix, num_heads)


def read_override(text: str) -> tuple[str, object]:
    """The name and the value of one --override."""
    name, sign, value = text.partition("=")
    first, colon, last = value.partition(":")
    if not (name and sign and value):
        raise click.UsageError(f"--override must be NAME=VALUE; got {text!r}")
    if not colon:
        return name, value
    try:
        return name, (first if first == "percentile" else float(first), float(last))
    except ValueError:
        raise click.UsageError(f"--override must end in percentile:SHARE or LOW:HIGH, numbers; got {text!r}") from None


def with_file_names(layer, data: tuple[Path, ...], run):
    """``run(batches)``, with the names of files in its error messages where they say ``batches[i]``."""
    names = []

    def batches():
        for path in data:
            for batch in read_batches(layer, path):
                names.append(path)
                yield batch

    try:
        return run(batches())
    except (TypeError, ValueError) as error:
        raise type(error)(re.sub(r"batches\[(\d+)\]", lambda match: str(names[int(match[1])]), str(error))) from None


def read_batches(layer, path: Path) -> Iterator[np.ndarray | dict | list]:
    """The batches for ``layer`` of one DATA file."""
    if path.suffix == ".npy":
        array = read_npy(path)
        axes = 2 if isinstance(layer, TextEncoder) else 4 - layer.spectrogram if isinstance(layer, ImageEncoder) else 3
        yield from pieces_of(array) if array.ndim == axes else [array]
    elif path.suffix == ".npz":
        tensors, _ = read_tensors(path)
        # single values: is_causal and causal_alignment
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        yield {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}
    elif path.suffix == ".txt" and isinstance(layer, TextEncoder):
        with open(path, "rb") as file, reading(path, ".txt file of UTF-8"):
            lines = file.read().decode("utf-8-sig").split("\n")
        yield from pieces_of([line.rstrip("\r") for line in lines if line.strip()])
    else:
        texts = " or .txt files" if isinstance(layer, TextEncoder) else " files"
        raise ValueError(f"DATA must be .npy{',' if texts != ' files' else ' or'} .npz{texts}; got {path}")


def pieces_of(rows):
    """At most ROWS_AT_ONCE rows at a time; what has none is one piece."""
    return [rows[start:start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)] or [rows]


if __name__ == "__main__":
    sys.exit(main())
