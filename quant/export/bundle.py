"""Layers compiled ahead of time: a shared library of kernels and weights, and its header."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numba

import edgeattn
from edgeattn.bundle import ABI_VERSION, FOOTER, INPUTS, LARGEST, MAGIC, SIZES
from edgeattn.quantized import StaticMultiHeadAttention
from edgeattn.runtime.processor import HARDWARE_BITS
from edgeattn.runtime.targets import Target
from quant.export.c_text import check_header_name, fill_template, float_literal
from quant.export.linker import find_linker, link
from quant.export.targets import target_of

# Compiling for another machine leans on inner names of Numba: crosscompile.py and bundle_entry.py.
TESTED_NUMBA = ("0.68",)
# The instruction set is chosen before anything that reads it is imported.
_BUILD = ("import sys; from edgeattn.runtime import isa; isa.use(sys.argv[1]); "
          "from quant.export.bundle_build import main; main(*sys.argv[2:])")
# Those of a target's flags that compilers know a question for; no processor has these and lacks the others.
_QUESTIONS = {"avx2": "avx2", "fma": "fma", "bmi1": "bmi", "bmi2": "bmi2", "avx_vnni": "avxvnni", "avx512f": "avx512f",
              "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
              "avx512_vnni": "avx512vnni"}


def write_bundle(layer, name: str, target: str) -> dict[str, bytes]:
    """The files of a bundle.

    Parameters
    ----------
    layer : MultiHeadAttention, DynamicMultiHeadAttention or StaticMultiHeadAttention
    name : str
        Of the library, ending in ``.so``; what precedes that, with ``_`` for what C allows in no name, is the prefix of
        its functions.
    target : str
        A name in ``quant.export.targets.TARGETS``.

    Returns
    -------
    dict of str to bytes
        The library and its header.

    Raises
    ------
    ValueError
        For an unknown target, a layer the tiled kernels do not compute whole, and a name C cannot make a prefix of.
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
    _check_layer(layer)
    check_numba()
    find_linker(row.machine)
    about = _describe(layer, prefix, target, row)
    library = _compile(layer, row, target, prefix, name)
    body = library + json.dumps(about).encode("ascii")
    footer = FOOTER.pack(MAGIC, len(body) - len(library), zlib.crc32(body))
    return {name: body + footer, f"{stem}.h": _header(layer, stem, about).encode(errors="replace")}


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


def _check_layer(layer) -> None:
    if not all((layer.head_dim, layer.value_dim, layer.output_dim, layer.embed_dim, layer.kdim, layer.vdim)):
        raise ValueError(f"layer must have no empty axis to be compiled; got {layer!r}")
    if not isinstance(layer, StaticMultiHeadAttention) and (layer.extra_keys or layer.gated):
        raise ValueError("layer must have neither bias_k, bias_v, add_zero_attn nor gate_weight to be compiled: the "
                         "kernels know no keys that are no tokens, and no gate")


def _describe(layer, prefix: str, target: str, row: Target) -> dict:
    """What the loader must know before it runs anything."""
    about = {"abi": ABI_VERSION, "target": target, "machine": row.machine, "requires": list(row.requires),
             "prefix": prefix, "edgeattn": edgeattn.__version__, "scheme": getattr(layer, "scheme", "float32"),
             "sizes": {size: getattr(layer, size) for size in SIZES}}
    if isinstance(layer, StaticMultiHeadAttention):
        names = [INPUTS[source] for source in sorted(set(layer.sources))]
        tensors = {name: layer.tensors[f"{name}_input"] for name in names}
        tensors["output"] = layer.tensors["output" if "output" in layer.linears else "context"]
        lut_index = layer.lut_index
        shape = None if lut_index is None else [1] * (4 - lut_index.ndim) + list(lut_index.shape)
        about |= {"arithmetic": layer.arithmetic, "sources": list(layer.sources), "mask_shape": shape,
                  "quantization": {name: tensor.to_json() for name, tensor in tensors.items()}}
    return about


def _compile(layer, row: Target, target: str, prefix: str, name: str) -> bytes:
    """The shared library, compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        edgeattn.save(layer, Path(folder) / "layer.safetensors")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("EDGEATTN_", "NUMBA_"))}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        done = subprocess.run([sys.executable, "-c", _BUILD, row.isa, folder, target, prefix], env=environment,
                              capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise RuntimeError(f"compiling for {target} failed: {last[0]}")
        return link(row.machine, Path(folder), name, [f"{prefix}_run", f"{prefix}_scratch_bytes"])


def _header(layer, stem: str, about: dict) -> str:
    """The C header of a bundle."""
    static = isinstance(layer, StaticMultiHeadAttention)
    kind = {"static": f"static int8, arithmetic {about.get('arithmetic')}", "dynamic": "dynamic int8, float in and out",
            "float32": "float32"}[about["scheme"]]
    prefix = about["prefix"]
    if about["machine"] == "aarch64":
        mask = sum(1 << HARDWARE_BITS[flag] for flag in about["requires"])
        include = "#include <sys/auxv.h>\n"
        supported = f"(getauxval(AT_HWCAP) & {mask:#x}UL) == {mask:#x}UL"
    else:
        include = ""
        supported = "\n        && ".join(f'__builtin_cpu_supports("{_QUESTIONS[flag]}")' for flag in about["requires"]
                                        if flag in _QUESTIONS)
    quantization = ""
    for name, (scale, zero_point) in about.get("quantization", {}).items():
        quantization += (f"#define {prefix.upper()}_{name.upper()}_SCALE {float_literal(scale)}\n"
                         f"#define {prefix.upper()}_{name.upper()}_ZERO_POINT ({zero_point})\n")
    if quantization:
        quantization = "/* real = SCALE * (code - ZERO_POINT) */\n" + quantization
    shape = about.get("mask_shape")
    return fill_template("bundle.h", {
        "file": stem, "prefix": prefix, "PREFIX": prefix.upper(), "target": about["target"], "include": include,
        "title": f"{layer.num_heads}-head attention, {kind}", "abi": str(ABI_VERSION), "H": str(layer.num_heads),
        "EQ": str(layer.embed_dim), "EK": str(layer.kdim), "EV": str(layer.vdim), "EO": str(layer.output_dim),
        "largest": str(LARGEST), "quantization": quantization, "ctype": "int8_t" if static else "float",
        "supported": supported,
        "shape_note": "" if shape is None else f", or not those of the layer's mask, {tuple(shape)}",
        "pointer_note": ", or bias is not" if static else "", "bias_note": " Always NULL: codes take none." * static,
    })
