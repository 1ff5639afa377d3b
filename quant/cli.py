"""The command `quant`: calibrate, quantize, compare, export and inspect, as the functions of these names do."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from pathlib import Path

import click

import edgeattn
import quant
from edgeattn import messages
from edgeattn.alive import alive
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.cli_open import open_model
from edgeattn.cli_output import UNREAD, let_go_of_output
from edgeattn.cli_parser import EXIT_STATUS, SCHEMES, SHELLS, nearest
from edgeattn.files.paths import check_output, write_atomic
from edgeattn.files.tensor_files import read_npy
from edgeattn.summary import precision
from quant.calibration import Calibration
from quant.cli_source import layer_options, part_option, path_argument, with_file_names
from quant.cli_words import in_words_of_the_command
from quant.describe import arithmetic_of_tflite, describe_file, describe_masks, describe_seen, tokens_seen, values_of
from quant.export import FORMATS
from quant.export.targets import BOARDS, NATIVE, TARGETS
from quant.model_calibration import ModelCalibration
from quant.model_calls import MODELS
from quant.observers import OBSERVERS
from quant.tables import console, fill

arithmetic_option = click.option("--arithmetic", type=click.Choice(list(KERNEL_SETS)),
                                 help="The TFLite kernel set to compute with; by default the one stored, or litert.")
scheme_option = click.option("--scheme", type=click.Choice(SCHEMES),
                             help="Of an .onnx file with quantizers: static, its int8 layers by its own scales; "
                                  "float32 unless given.")
LAYER_AND_DATA = "`quant --help` says what LAYER and DATA may be."
json_option = click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 after one line about an error, 130 or 141 as the help says."""
    messages.show()
    try:
        status = commands.main(args=arguments, prog_name="quant", standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except (BrokenPipeError, SystemExit):  # what click makes of it
        let_go_of_output()
        return UNREAD
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        said = error.format_message()
        if isinstance(error, click.NoSuchOption):
            known = [name for option in context.command.params for name in option.opts]
            said = f"No such option {error.option_name!r}.{nearest(error.option_name, known)}"
        message = f"{context.command_path if context else 'quant'}: {said}"
    except click.Abort:
        print("quant: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename:
            message = f"quant: {error.filename}: {error.strerror}"
        else:  # of standard output
            let_go_of_output()
            message = f"quant: {error.strerror or error}"
    except (ImportError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        message = f"quant: {in_words_of_the_command(str(error))}"
    print(" ".join(message.split()), file=sys.stderr)
    return 2


class Commands(click.Group):
    """A group that names the nearest command there is."""

    def resolve_command(self, ctx, args):
        """The command that is asked for."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}.{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_STATUS)
@click.version_option(edgeattn.__version__, prog_name="quant", message="%(prog)s %(version)s")
def commands():
    """Turn a float attention layer, or a whole encoder or model, into an int8 one.

    LAYER is a .safetensors file that edgeattn.save or this command wrote, or a bundle (.so); a checkpoint
    (.safetensors, .npz, .pt) read with --prefix, --torch-prefix, --torch-encoder or --bert-prefix, and --num-heads;
    an .onnx, .keras or .h5 file, with --node where it holds several layers; or a folder with a model, as transformers
    and sentence-transformers save it.

    DATA are .npy files, each (B, L, E) or (L, E), or .npz files with arrays named as the arguments of the layer's
    call: query, key, value, attn_mask, key_padding_mask, is_causal, causal_alignment. Of an encoder or a model they
    are named as those of its call (x, lengths, ...; ids, attention_mask, ...; pixels), and .npy files hold the first;
    .txt files hold a text per line for a text encoder.
    """


@commands.command(short_help="Keep the range of every tensor on your data.", epilog=LAYER_AND_DATA)
@layer_options
@click.argument("data", nargs=-1, required=True, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .safetensors file to write.")
@click.option("--observer", type=click.Choice(list(OBSERVERS)), default="minmax", show_default=True,
              help="How ranges come from what is seen; a model has none.")
@json_option
def calibrate(source, data, output, observer, as_json):
    """Run LAYER over DATA and keep the range of every tensor."""
    check_paths(output, source.path, *data, suffix=".safetensors")
    layer = source.read()
    calls = 0

    def run(batches):
        def counted():
            nonlocal calls
            for batch in batches:
                calls += 1
                yield batch
        return quant.calibrate(layer, counted(), observer=observer)

    with alive("calibrating", bar=True):
        calibration = with_file_names(layer, data, run)
    calibration.save(output)
    times = f"{calls} call{'s' * (calls != 1)}"
    if isinstance(layer, MODELS):
        said = [f"saw {calibration.tokens:,} tokens in {times} of the model"]
    else:
        said = [f"saw {describe_seen(calibration, layer)} in {times} of the layer",
                f"masks: {describe_masks(calibration)}"]
    tokens = calibration.tokens if isinstance(layer, MODELS) else tokens_seen(calibration, layer)
    tell(as_json, {"output": output, "data": data, "calls": calls, "tokens": tokens},
         f"wrote {output}: calibrated on {', '.join(map(str, data))}", *said)


@commands.command(short_help="Make an int8 layer or model.", epilog=LAYER_AND_DATA)
@layer_options
@click.argument("calibration", required=False, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .safetensors file to write.")
@click.option("--scheme", type=click.Choice(["static", "dynamic"]),
              help="static: every range from CALIBRATION, as in a .tflite; dynamic: ranges are found at run time. "
                   "Unless given: static with CALIBRATION, dynamic for a model without.")
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
@json_option
def quantize(source, calibration, output, scheme, arithmetic, attention, room_for_masks, overrides, as_json):
    """Make an int8 layer of LAYER and of CALIBRATION, which `quant calibrate` wrote.

    A model needs no CALIBRATION unless it shall be static; with --scheme dynamic one chooses on your data which inputs
    stay float32.
    """
    check_paths(output, source.path, calibration, suffix=".safetensors")
    overrides = dict(map(read_override, overrides)) or None
    layer = source.read()
    if precision(layer) != "float32":
        raise click.UsageError(f"{source.path} is int8 already: give the float one that it was made of")
    if isinstance(layer, MODELS):
        scheme, attention = scheme or ("dynamic" if calibration is None else "static"), attention or "int8"
        if scheme == "static" and calibration is None:
            raise click.UsageError("CALIBRATION is missing: run `quant calibrate` first, or leave --scheme out")
        if calibration is None and "static" in (overrides or {}).values():
            raise click.UsageError("CALIBRATION is missing, which static int8 of an --override needs: run `quant "
                                   "calibrate` first")
        if scheme == "dynamic" and arithmetic is not None:
            raise click.UsageError("--arithmetic needs a static model: give CALIBRATION, and no --scheme dynamic")
        seen = None if calibration is None else ModelCalibration.load(calibration)
        with alive("quantizing"):
            edgeattn.save(quant.quantize(layer, seen, scheme=scheme, attention=attention,
                                         arithmetic=arithmetic or "litert", room_for_masks=room_for_masks,
                                         overrides=overrides), output)
        tell(as_json, {"output": output, "scheme": scheme, "attention": attention},
             f"wrote {output}: {scheme} int8, attention {attention}, float in and out")
        return
    if attention is not None:
        raise click.UsageError("--attention must be left out for a layer, which is nothing else")
    scheme = scheme or "static"
    if scheme == "static" and calibration is None:
        raise click.UsageError("CALIBRATION is missing: run `quant calibrate` first, or choose --scheme dynamic")
    if scheme == "dynamic" and (calibration is not None or arithmetic is not None):
        raise click.UsageError("--scheme dynamic takes neither CALIBRATION nor --arithmetic for a layer")
    if scheme == "dynamic":
        edgeattn.save(quant.quantize(layer, scheme=scheme, room_for_masks=room_for_masks, overrides=overrides), output)
        tell(as_json, {"output": output, "scheme": scheme}, f"wrote {output}: dynamic int8, float in and out")
        return
    quantized = quant.quantize(layer, Calibration.load(calibration), arithmetic=arithmetic or "litert",
                               room_for_masks=room_for_masks, overrides=overrides)
    edgeattn.save(quantized, output)
    tell(as_json, {"output": output, "scheme": scheme, "arithmetic": quantized.arithmetic},
         f"wrote {output}: static int8, equal to {quantized.arithmetic}")


@commands.command(short_help="Say what int8 cost, as a table.", epilog=LAYER_AND_DATA)
@layer_options
@click.argument("quantized", type=path_argument)
@click.argument("data", nargs=-1, required=True, type=path_argument)
@arithmetic_option
@json_option
@click.option("--model-explorer", type=path_argument, metavar="FILE.json",
              help="Also write signal over noise as node data of Google's Model Explorer, for the file of --tflite.")
@click.option("--tflite", type=path_argument, help="What `quant export` wrote of QUANTIZED; QUANTIZED where it is one.")
def compare(source, quantized, data, arithmetic, as_json, model_explorer, tflite):
    """Say what int8 cost: every tensor of QUANTIZED against LAYER on DATA; of a model each half of each layer."""
    tflite = tflite or (quantized if quantized.suffix == ".tflite" else None)
    if model_explorer is not None:
        if tflite is None:
            raise click.UsageError("--model-explorer needs --tflite, whose nodes are named")
        check_paths(model_explorer, source.path, quantized, tflite, *data)
    layer = source.read()
    int8 = read_quantized(quantized, arithmetic)
    with alive("comparing", bar=True):
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
        say(f"arithmetic: {getattr(int8, 'arithmetic', None) or precision(int8)}")
    click.echo(str(report))


@commands.command(short_help="Say what int8 cost, as a page.", epilog=LAYER_AND_DATA)
@layer_options
@click.argument("quantized", type=path_argument)
@click.argument("data", nargs=-1, required=True, type=path_argument)
@click.option("-o", "--output", required=True, type=path_argument, help="The .html file to write.")
@arithmetic_option
@json_option
def report(source, quantized, data, output, arithmetic, as_json):
    """Write what `quant compare` finds as one page: a verdict, tables, histograms, attention maps."""
    check_paths(output, source.path, quantized, *data, suffix=".html")
    title = f"{quantized.name} beside {source.path.name}"
    layer = source.read()
    int8 = read_quantized(quantized, arithmetic)
    with alive("comparing", bar=True):
        found = with_file_names(layer, data,
                                lambda batches: quant.write_report(layer, int8, batches, output, title=title))
    size, verdict = output.stat().st_size, found.verdict()
    tell(as_json, {"output": output, "bytes": size, "verdict": verdict}, f"wrote {output}: {size:,} bytes", verdict)


@commands.command(short_help="Write a layer or model in the format of another runtime.", epilog=LAYER_AND_DATA,
                  help="\n\n".join((
    "Write LAYER, float or int8, to OUT, in the format that its suffix names:",
    "\n".join(("\b", *(line for suffix, form in FORMATS.items() for line in textwrap.wrap(
        form.about, 76, initial_indent=f"{suffix:<13} ", subsequent_indent=" " * 14, break_on_hyphens=False)))),
    "With --target a folder stands for attention-TARGET.so in it.")))
@layer_options
@click.argument("path", metavar="OUT", type=path_argument)
@click.option("--batch", type=int, help="B of a .tflite, .onnx or .c; 1 unless given.")
@click.option("--sequence-length", type=int, multiple=True,
              help="L of a .tflite, .onnx or .c; a .tflite takes several, an .onnx without any length.")
@click.option("--key-length", type=int, help="S of a .tflite or .c whose keys are an input of their own.")
@click.option("--mask", help='"causal", or a .npy file: bool, True = attend; of a float layer also float32, added.')
@click.option("--test-vectors", type=int, help="How many to write beside a .c, with a program that checks them.")
@click.option("--target", type=click.Choice([*TARGETS, *BOARDS, NATIVE]),
              help="The processor of a .so, or the board; native: this machine's.")
@click.option("--opset", type=int, help="Of an .onnx: 17, unless given, to 23, where attention is one operator.")
@click.option("--padding", is_flag=True, help="An encoder's .tflite or .onnx has an input attention_mask.")
@scheme_option
@arithmetic_option
@json_option
def export(source, path, sequence_length, mask, scheme, arithmetic, as_json, **options):
    """Write LAYER to OUT."""
    target = options["target"]
    if target is not None and path.is_dir():
        path /= f"attention-{target}.so"
    mask_file = None if mask in (None, "causal") else Path(mask)
    check_paths(path, source.path, mask_file)
    layer = source.read(scheme, arithmetic)
    if mask_file is not None:
        mask = read_npy(mask_file)
    lengths = list(sequence_length) if len(sequence_length) > 1 else next(iter(sequence_length), None)
    with alive(f"compiling for {target}" if target else f"writing {path}"):
        path = quant.export(layer, path, sequence_length=lengths, mask=mask, **options)
    size = path.stat().st_size
    tell(as_json, {"output": path, "bytes": size}, f"wrote {path}: {size:,} bytes")


@commands.command(short_help="Show what a file holds.")
@click.argument("file", type=path_argument)
@scheme_option
@arithmetic_option
@part_option
@json_option
def inspect(file, scheme, arithmetic, part, as_json):
    """Show what FILE holds: a layer, a model, a calibration or a .tflite graph."""
    parts = list(describe_file(file, arithmetic=arithmetic, scheme=scheme, part=part))
    if as_json:
        click.echo(json.dumps({"file": str(file), **values_of(parts)}, indent=1))
        return
    shown = console()
    for part in parts:
        click.echo(part) if isinstance(part, str) else shown.print(part)


@commands.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell):
    """Print what SHELL needs to complete this command.

    In ~/.bashrc: eval "$(quant completion bash)"; for fish: quant completion fish | source
    """
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(commands, {}, "quant", "_QUANT_COMPLETE").source())


def tell(as_json: bool, values: dict, *lines: str) -> None:
    """Print what was done: as JSON, or in lines."""
    if as_json:
        def plain(value):
            return [str(each) for each in value] if isinstance(value, tuple) else str(value)

        known = {name: value for name, value in values.items() if value is not None}
        click.echo(json.dumps({name: value if isinstance(value, (int, str)) else plain(value)
                               for name, value in known.items()}))
        return
    for line in lines:
        say(line)


def say(text: str) -> None:
    """Print a line, or several where it is long."""
    click.echo(fill(text))


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


def read_quantized(path: Path, arithmetic: str | None):
    """QUANTIZED: of an .onnx file its static int8 layers; also of a bundle."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, of a float model: `quant quantize` makes the int8 file to give as "
                         "QUANTIZED")
    if path.suffix == ".onnx":
        return open_model(path, scheme="static", arithmetic=arithmetic)
    return open_model(path, arithmetic=arithmetic) if path.suffix == ".so" else edgeattn.load(
        path, arithmetic=arithmetic)


def check_paths(output: Path, *inputs: Path | None, suffix: str | None = None) -> None:
    """Refuse what cannot be written, or would replace what is read, before any work is done for it."""
    try:
        check_output(output, *inputs)
    except FileNotFoundError:
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}") from None
    if suffix is not None and output.suffix != suffix:
        raise ValueError(f"--output must end in {suffix}; got {str(output)!r}")


if __name__ == "__main__":
    sys.exit(main())
