"""Layers and models with compiled kernels in one file: a shared library, and its header where C can call it."""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from pathlib import Path

import numba

import edgeattn
from edgeattn.bundle import ABI_VERSION, FOOTER, MAGIC
from edgeattn.files.storage import content_of
from edgeattn.kernels.cpu.entries import ENTRIES
from edgeattn.kinds import CACHES, KINDS
from edgeattn.layers import MultiHeadAttention
from edgeattn.layers.positions import POSITIONS
from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention
from edgeattn.quantized.layer import INPUTS
from edgeattn.runtime import prebuilt, sources
from edgeattn.runtime.processor import HARDWARE_BITS
from quant.export.bundle_entry import C_ABI, LARGEST
from quant.export.c_text import check_header_name, fill_template, float_literal
from quant.export.kernel_objects import SERVICE, file_of, objects, run_build
from quant.export.linker import DEVICE_LIBRARIES, find_linker, link
from quant.export.targets import target_of
from quant.model_calls import MODELS

# Compiling for another machine leans on inner names of Numba: crosscompile.py and bundle_entry.py.
TESTED_NUMBA = ("0.68",)
_BUILD = "from quant.export.bundle_build import main; main(*sys.argv[2:])"
SIZES = ("num_heads", "embed_dim", "kdim", "vdim", "head_dim", "value_dim", "output_dim")
# Those of a target's flags that compilers know a question for; no processor has these and lacks the others.
_QUESTIONS = {"avx2": "avx2", "fma": "fma", "bmi1": "bmi", "bmi2": "bmi2", "avx_vnni": "avxvnni", "avx512f": "avx512f",
              "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
              "avx512_vnni": "avx512vnni"}


def write_bundle(layer, name: str, target: str) -> dict[str, bytes]:
    """The files of a bundle.

    Parameters
    ----------
    layer : MultiHeadAttention, QuantizedMultiHeadAttention, TransformerEncoder, TextEncoder or ImageEncoder
    name : str
        Of the library, ending in ``.so``; what precedes that, with ``_`` for what C allows in no name, is the prefix of
        its functions.
    target : str
        A name in ``quant.export.targets.TARGETS``.

    Returns
    -------
    dict of str to bytes
        The library, and its header where C can call it: of an attention layer that one kernel computes whole.

    Raises
    ------
    ValueError
        For an unknown target, and a name C cannot make a prefix of.
    RuntimeError
        Where there is no linker for the target, or Numba is of another version than this leans on.
    """
    row = target_of(target)
    stem = name.removesuffix(".so")
    prefix = re.sub(r"[^A-Za-z0-9_]", "_", stem)
    if not re.match(r"[A-Za-z]", prefix):
        raise ValueError(f"path must be named by a letter and what follows it, for its functions get that name; got "
                         f"{name!r}")
    check_header_name(stem)
    check_numba()
    find_linker(row.machine)
    kernels, header = kernels_of(layer), has_header(layer)
    symbols = [prebuilt.symbol_of(kernel.py_func) for kernel in (*(ENTRIES[name].kernel for name in kernels), *SERVICE)]
    content = content_of(layer)
    stamp = sources.stamp()
    library = _linked(content, target, kernels, symbols, prefix if header else "", name)
    library += bytes(-len(library) % 64)
    about = {"abi": ABI_VERSION, "target": target, "machine": row.machine, "requires": list(row.requires),
             "edgeattn": edgeattn.__version__, "stamp": stamp, "kernels": symbols,
             "layer": [len(library), len(content)]}
    description = json.dumps(about).encode("ascii")
    body = library + content + description
    files = {name: body + FOOTER.pack(MAGIC, len(description), zlib.crc32(body))}
    if header:
        files[f"{stem}.h"] = _header(layer, stem, prefix, target).encode(errors="replace")
    return files


def kernels_of(layer) -> list[str]:
    """The names in ENTRIES of what a layer or a model calls."""
    config, tensors = layer.to_state()
    kinds = {type(layer).__name__, *_kinds(config)}
    left_out = CACHES if isinstance(layer, MODELS) else ()
    called = {name for kind in kinds if kind in KINDS for name in KINDS[kind].kernels}
    if any(name.rpartition(".")[2] == "outlier_columns" for name in tensors):
        called.add("linear dynamic")  # of attention too, where its fused kernel does not do what is asked
    return [name for name in ENTRIES if name in called.difference(left_out)]


def _kinds(config):
    """What layers are named in a config."""
    if isinstance(config, dict):
        yield from [config["kind"]] if isinstance(config.get("kind"), str) else []
        config = config.values()
    if not isinstance(config, (str, bytes)) and hasattr(config, "__iter__"):
        for each in config:
            yield from _kinds(each)


def check_numba() -> None:
    """Refuse a Numba whose inner names may be others.

    Raises
    ------
    RuntimeError
        Naming the version that is wanted.
    """
    if ".".join(numba.__version__.split(".")[:2]) not in TESTED_NUMBA:
        raise RuntimeError(f"target leans on inner names of Numba {', '.join(TESTED_NUMBA)}, and this is Numba "
                           f"{numba.__version__}: pip install 'numba=={TESTED_NUMBA[-1]}.*'")


def has_header(layer) -> bool:
    """Whether one kernel computes a layer whole, which C can call."""
    if isinstance(layer, StaticMultiHeadAttention):
        return all(getattr(layer, size) for size in SIZES)
    return (isinstance(layer, (MultiHeadAttention, DynamicMultiHeadAttention))
            and all(getattr(layer, size) for size in SIZES) and not layer.extra_keys and not layer.gated
            and not any(getattr(layer, part) is not None for part in POSITIONS))


def _linked(content: bytes, target: str, kernels: list[str], symbols: list[str], prefix: str, name: str) -> bytes:
    """The shared library of kernels and, with a prefix, of C's functions for a layer's file."""
    made = objects([target], kernels)[target]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for title, code in made.items():
            (folder / file_of(title)).write_bytes(code)
        files = [file_of(title) for title in made if title not in DEVICE_LIBRARIES]
        if prefix:
            (folder / "layer.safetensors").write_bytes(content)
            run_build(_BUILD, [target], folder, prefix)
            files.append("c.o")
            symbols = [*symbols, f"{prefix}_run", f"{prefix}_scratch_bytes"]
        return link(target_of(target).machine, folder, name, symbols, files)


def _header(layer, stem: str, prefix: str, target: str) -> str:
    """The C header of a bundle."""
    static, row = isinstance(layer, StaticMultiHeadAttention), target_of(target)
    kind = (f"static int8, arithmetic {layer.arithmetic}" if static else
            "dynamic int8, float in and out" if isinstance(layer, DynamicMultiHeadAttention) else "float32")
    if row.machine == "aarch64":
        mask = sum(1 << HARDWARE_BITS[flag] for flag in row.requires)
        include = "#include <sys/auxv.h>\n"
        supported = f"(getauxval(AT_HWCAP) & {mask:#x}UL) == {mask:#x}UL"
    else:
        include = ""
        supported = "\n        && ".join(f'__builtin_cpu_supports("{_QUESTIONS[flag]}")' for flag in row.requires
                                        if flag in _QUESTIONS)
    tensors, shape = {}, None
    if static:
        tensors = {INPUTS[source]: layer.tensors[f"{INPUTS[source]}_input"] for source in sorted(set(layer.sources))}
        tensors["output"] = layer.tensors["output" if "output" in layer.linears else "context"]
        if layer.lut_index is not None:
            shape = (1,) * (4 - layer.lut_index.ndim) + layer.lut_index.shape
    quantization = ""
    for name, (scale, zero_point) in ((name, tensor.to_json()) for name, tensor in tensors.items()):
        quantization += (f"#define {prefix.upper()}_{name.upper()}_SCALE {float_literal(scale)}\n"
                         f"#define {prefix.upper()}_{name.upper()}_ZERO_POINT ({zero_point})\n")
    if quantization:
        quantization = "/* real = SCALE * (code - ZERO_POINT) */\n" + quantization
    return fill_template("bundle.h", {
        "file": stem, "prefix": prefix, "PREFIX": prefix.upper(), "target": target, "include": include,
        "title": f"{layer.num_heads}-head attention, {kind}", "abi": str(C_ABI), "H": str(layer.num_heads),
        "EQ": str(layer.embed_dim), "EK": str(layer.kdim), "EV": str(layer.vdim), "EO": str(layer.output_dim),
        "largest": str(LARGEST), "quantization": quantization, "ctype": "int8_t" if static else "float",
        "supported": supported,
        "shape_note": "" if shape is None else f", or not those of the layer's mask, {shape}",
        "pointer_note": ", or bias is not" if static else "", "bias_note": " Always NULL: codes take none." * static,
    })
