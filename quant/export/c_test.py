"""Test vectors of an exported layer as a C header, and a program that checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.checks import count
from edgeattn.quantized import INPUTS
from quant.export.c_text import fill_template, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeattn.layers import TransformerEncoder

SEED = 20


def make_vectors(layer, lengths, how_many: int) -> list[tuple[str, str, list[np.ndarray], np.ndarray]]:
    """Inputs that each find a certain mistake, then random ones.

    Returns
    -------
    list of (name, what it catches, inputs, output)
        Inputs int8 (B, L or S, E), one per distinct source; output int8 (B, L, EO) by ``layer.run_int8``.
    """
    rng = np.random.default_rng(SEED)
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    sources = sorted(set(layer.sources))
    shapes = [(lengths.batch, lengths.queries if s == 0 else lengths.keys, widths[s]) for s in sources]
    zeros = [layer.tensors[f"{INPUTS[s]}_input"].zero_point for s in sources]

    def filled(codes):
        return [np.full(shape, code, np.int8) for shape, code in zip(shapes, codes, strict=True)]

    def alternating():
        return [np.where(np.arange(shape[1])[:, None] % 2, CODE_MAX, CODE_MIN).astype(np.int8)
                * np.ones(shape, np.int8) for shape in shapes]

    def random():
        return [rng.integers(CODE_MIN, CODE_MAX + 1, shape).astype(np.int8) for shape in shapes]

    rows = [
        ("random 0", "anything, and rows that are mixed up", random()),
        ("all at the zero point", "a zero point left out of a bias, or of a product", filled(zeros)),
        ("all lowest", "rounding of negative sums, saturation", filled([CODE_MIN] * len(zeros))),
        ("all highest", "saturation", filled([CODE_MAX] * len(zeros))),
        ("tokens lowest and highest in turn", "the smallest exponentials of the softmax", alternating()),
    ]
    rows += [(f"random {n}", "rounding that is wrong for few sums", random())
             for n in range(1, how_many - len(rows) + 1)]
    vectors = []
    for name, catches, inputs in rows[:how_many]:
        arguments = dict(zip((INPUTS[s] for s in sources), inputs, strict=True))
        vectors.append((name, catches, inputs, layer.run_int8(**arguments)))
    return vectors


def vectors_c(layer, stem: str, names: list[str], lengths, how_many: int) -> dict[str, str]:
    """The files ``stem_test.h`` and ``stem_test.c``, by name."""
    how_many = count("test_vectors", how_many)
    vectors = []
    for name, catches, inputs, output in make_vectors(layer, lengths, how_many):
        arrays = ",\n".join(f"     {{\n{numbers(array)}}}" for array in (*inputs, output))
        vectors.append(f'    {{"{name}", "{catches}",\n{arrays}}},')
    return _files(stem, how_many, vectors, function=f"{stem}_s8", ctype="int8_t", unit="code", libraries="",
                  expected="the expected codes are those of\n * StaticMultiHeadAttention.run_int8 under the kernel set "
                           "\"tflm\", which equals TFLite Micro.",
                  fields=[("int8_t", name, name) for name in names])


def encoder_vectors_c(encoder: TransformerEncoder, stem: str, length: int, how_many: int,
                      shortened: Callable[[TransformerEncoder, int], TransformerEncoder]) -> dict[str, str]:
    """The same of an encoder; shortened: the encoder for fewer tokens, with the first of its masks."""
    how_many = count("test_vectors", how_many)
    vectors = []
    for name, catches, tokens, x in encoder_inputs(length, encoder.embed_dim, how_many):
        whole = np.zeros_like(x)
        whole[:tokens] = (encoder if tokens == length else shortened(encoder, tokens))(x[:tokens])
        arrays = ",\n".join(f"     {{\n{numbers(array)}\n     }}" for array in (x, whole))
        vectors.append(f'    {{"{name}", "{catches}", {tokens},\n{arrays}}},')
    return _files(stem, how_many, vectors, function=f"{stem}_f32", ctype="float", unit="number", libraries=" -lm",
                  expected="the expected numbers are those\n * of the encoder itself, whose attention carries the "
                           "masks of the file.",
                  fields=[("int32_t", "length", ""), ("float", "input", "input")])


def encoder_inputs(length: int, features: int, how_many: int) -> list[tuple[str, str, int, np.ndarray]]:
    """(name, what it catches, tokens, float32 (length, features)); behind the tokens numbers that must not matter."""
    rng = np.random.default_rng(SEED)

    def random(tokens: int = length, factor: float = 1.0) -> np.ndarray:
        x = (rng.standard_normal((length, features)) * factor).astype(np.float32)
        x[tokens:] = 999
        return x

    rows = [
        ("random 0", "anything, and rows that are mixed up", length, random()),
        ("half of the tokens", "what lies behind the end of a sequence", (length + 1) // 2, random((length + 1) // 2)),
        ("zeros", "a zero point or a bias left out", length, np.zeros((length, features), np.float32)),
        ("large numbers", "saturation", length, random(factor=1000)),
        ("one token", "sizes of the longest sequence in place of those of this one", 1, random(1)),
    ]
    for n in range(1, how_many - len(rows) + 1):
        tokens = length if n % 2 else int(rng.integers(1, length + 1))
        rows.append((f"random {n}", "rounding that is wrong for few numbers", tokens, random(tokens)))
    return rows[:how_many]


def _files(stem: str, how_many: int, vectors: list[str], *, fields: list[tuple[str, str, str]], **values: str
           ) -> dict[str, str]:
    """The two files of vectors in C; fields: type, name, and what of its size macro comes before _SIZE."""
    values |= {
        "stem": stem, "PREFIX": stem.upper(), "count": str(how_many), "vectors": "\n".join(vectors),
        "indent": " " * len(f"{values['function']}(   "),
        "fields": "".join(f"    {ctype} {name}{f'[{stem.upper()}_{size.upper()}_SIZE]' if size else ''};\n"
                          for ctype, name, size in fields),
    }
    for key, vector in (("arguments", "vector"), ("first_arguments", "first")):
        values[key] = ", ".join(f"{vector}->{name}" for _, name, _ in sorted(fields, key=lambda f: f[1] == "length"))
    return {f"{stem}_test.h": fill_template("test.h", values), f"{stem}_test.c": fill_template("test.c", values)}
