"""The command `edgeattn`: what a device has, what files hold, how fast they run, and vectors of texts."""
import contextlib
import json
import statistics
import sys
import time

import numpy as np

import edgeattn
from edgeattn import cli_encode, cli_info, messages
from edgeattn.alive import alive
from edgeattn.cli_open import FORMS, open_model
from edgeattn.cli_output import UNREAD, let_go_of_output
from edgeattn.cli_parser import SHELLS, Parser, completion
from edgeattn.cli_words import in_words_of_the_command
from edgeattn.files.paths import named
from edgeattn.kernels.cpu import entries, fused
from edgeattn.runtime import compiler, prebuilt
from edgeattn.runtime.isa import ISA


def main(arguments=None):
    """Run the command; returns its exit status. Without a command it prints its help."""
    parser = _parser()
    chosen, left = parser.parse_known_args(arguments)
    if getattr(chosen, "texts", None) == [] and not any(text.startswith("-") and text != "-" for text in left):
        chosen.texts, left = left, []  # argparse takes all of TEXT that stand behind FILE, even none before an option
    if left:
        chosen.parser.refuse(left)
    messages.show()
    try:
        status = chosen.run(chosen)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        let_go_of_output()
        return UNREAD
    except OSError as error:
        if error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:  # of standard output
            let_go_of_output()
            message = error.strerror or str(error)
    except (ImportError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        message = in_words_of_the_command(str(error))
    except KeyboardInterrupt:
        print("edgeattn: interrupted", file=sys.stderr)
        return 130
    print("edgeattn:", " ".join(message.split()), file=sys.stderr)
    return 2


def _parser():
    parser = Parser(prog="edgeattn", description="Small Transformers on small computers.")
    parser.add_argument("--version", action="version", version=f"edgeattn {edgeattn.__version__}",
                        help="Show the version and exit.")
    parser.set_defaults(run=lambda _: parser.print_help() or 2, parser=parser)
    commands = parser.add_subparsers(title="Commands", metavar="COMMAND")
    cli_info.add_to(commands)
    for name, run, text, files, otherwise in (
            ("warmup", _warmup, "Compile ahead of time what layers and models need, so that no later process waits.",
             "*", " None: every kernel, for minutes."),
            ("bench", _bench, "Time layers, encoders and models on this machine.", "+", "")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("layers", nargs=files, metavar="FILE", help=f"{FORMS}.{otherwise}")
        command.add_argument("--length", type=int, nargs="+", default=None, metavar="L",
                             help="Tokens per call; an image has as many as it has.")
        command.add_reading_options()
        command.add_argument("--json", action="store_true", help="Print the same as JSON.")
        command.set_defaults(run=run)
    cli_encode.add_to(commands)
    shell = commands.add_parser("completion", help="Print what a shell needs to complete this command.",
                                description="Print what SHELL needs to complete this command. In ~/.bashrc: "
                                            'eval "$(edgeattn completion bash)"; for fish: edgeattn completion fish '
                                            "| source")
    shell.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    shell.set_defaults(run=lambda chosen: print(completion(parser, chosen.shell)) or 0)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _warmup(chosen):
    """Use every layer in each way; say what that cost, and whether a later process will find the machine code."""
    did = [] if chosen.json else _Told()
    if not chosen.layers:
        with _compiling(did, "every kernel"):
            for entry in entries.ENTRIES.values():
                entry.compile()
    for path in chosen.layers:
        layer = open_model(path, scheme=chosen.scheme, arithmetic=chosen.arithmetic, part=chosen.part)
        for length in _lengths(layer, chosen.length, [16]):
            with named(path), _compiling(did, f"{path}, {_what(layer, length)}", file=path, length=length):
                _call(layer, length)
                for cache in _caches(layer, (length or 0) + 1):
                    _call(layer, length, kv_cache=cache, is_causal=True)
    library, folder = prebuilt.LIBRARY and str(prebuilt.LIBRARY.path), None
    if library is None:
        from edgeattn.runtime import kernel_cache

        folder = kernel_cache.kept_in(fused.layer_float32.py_func)
    if chosen.json:
        print(json.dumps({"compiled": did, "library": library, "cache": folder}, indent=1))
        return 0
    print(f"Kernels come compiled, in {library}" if library else f"Machine code is kept in {folder}" if folder else
          "Nothing is kept: no cache folder is writable; set NUMBA_CACHE_DIR to one that is.")
    return 0


class _Told(list):
    """What was compiled, each told as it is done: what comes after it may fail, or take minutes."""

    def append(self, each):
        """Print it."""
        new = each["kernels"]
        print(f"{each['what']}: {each['seconds']:.2f} s, "
              + (f"{new} kernel{'s'[:new != 1]} compiled" if new else "nothing to compile"), flush=True)


@contextlib.contextmanager
def _compiling(did, what, **about):
    """Add to `did` how long it took, and how many kernels were compiled."""
    before, began = compiler.compiled(), time.perf_counter()
    with alive(what):
        yield
    did.append({"what": what, **about, "seconds": time.perf_counter() - began, "kernels": compiler.compiled() - before})


def _bench(chosen):
    """Median time of a call, batch 1, for every layer and length."""
    found = []
    title = f"{edgeattn.get_num_threads()} thread(s), {ISA.name}; batch 1, median of calls over half a second\n"
    for path in chosen.layers:
        layer = open_model(path, scheme=chosen.scheme, arithmetic=chosen.arithmetic, part=chosen.part)
        for length in _lengths(layer, chosen.length, [16, 64, 256]):
            what = f"{path}, {_what(layer, length)}"
            with named(path), alive(what):
                call = _call(layer, length)
            times, until = [], time.perf_counter() + 0.5
            while len(times) < 5 or time.perf_counter() < until:
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            microseconds = statistics.median(times) * 1e6
            found.append({"file": path, "length": length, "microseconds": microseconds, "calls": len(times)})
            if not chosen.json:
                print(f"{title}{what}: {microseconds:.1f} us")
                title = ""
    if chosen.json:
        about = {"threads": edgeattn.get_num_threads(), "instruction set": ISA.name}
        print(json.dumps({**about, "calls": found}, indent=1))
    return 0


def _is_model(layer):
    return not hasattr(layer, "num_heads")  # no attention layer alone


def _lengths(layer, asked, usual):
    """The lengths to call with: those asked for, or those of `usual` that the model has positions for."""
    if isinstance(layer, edgeattn.ImageEncoder):
        return [None]
    longest = layer.embedding.longest if isinstance(layer, edgeattn.TextEncoder) else None
    return asked or [length for length in usual if longest is None or length <= longest] or [longest]


def _what(layer, length):
    return f"{length} token{'s'[:length != 1]}" if length is not None else f"images of {layer.embedding.image_size}"


def _caches(layer, capacity):
    """An empty cache of every dtype that goes with the layer; a causal model's are lists of them."""
    if _is_model(layer):
        return [layer.encoder.make_caches(1, capacity)] if getattr(layer, "is_causal", False) is True else []
    if getattr(layer, "lut_index", None) is not None:  # a mask of its own, which is for one length
        return []
    try:
        if hasattr(layer, "cache_scales"):
            return [edgeattn.KVCache.for_layer(layer, 1, capacity)]
    except ValueError:  # keys or values with a zero point
        return []
    return [edgeattn.KVCache.for_layer(layer, 1, capacity, dtype=dtype) for dtype in ("float32", "int8")]


def _call(layer, length, **arguments):
    """A call of the layer on made-up data of ``length`` tokens, made once already; then, with a cache, of one more."""
    if length is not None and length < 1:
        raise ValueError(f"--length must be at least 1, got {length}")
    if _is_model(layer):
        return _call_model(layer, length, arguments.get("kv_cache"))
    run = getattr(layer, "run_int8", layer)
    dtype = np.int8 if run is not layer else np.float32
    made = np.random.default_rng(0)
    sources = getattr(layer, "sources", (0, 0, 0) if layer.embed_dim == layer.kdim == layer.vdim else (0, 1, 2))
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    inputs = [made.integers(-9, 10, (1, length, width)).astype(dtype)
              for i, width in enumerate(widths) if sources[i] == i]
    run(*inputs, **arguments)
    if run is not layer:  # reals to codes, and back
        layer(*(x.astype(np.float32) for x in inputs))
    if arguments:
        run(*(x[:, :1] for x in inputs), **arguments)
    return lambda: run(*inputs)


def _call_model(model, length, kv_cache):
    """The same of an encoder or a model."""
    made = np.random.default_rng(0)
    if isinstance(model, edgeattn.TextEncoder):
        x = made.integers(0, len(model.embedding.token_weight), (1, length))
    elif isinstance(model, edgeattn.ImageEncoder):
        height, width = model.embedding.image_size
        shape = (width, height) if model.spectrogram else (model.embedding.channels, height, width)
        x = made.standard_normal((1, *shape), np.float32)
    else:
        x = made.standard_normal((1, length, getattr(model, "embed_dim", None) or model.inputs), np.float32)
    if kv_cache is not None:
        model(x[:, 1:], kv_cache=kv_cache)
        model(x[:, :1], kv_cache=kv_cache)
    model(x)
    return lambda: model(x)


if __name__ == "__main__":
    sys.exit(main())
