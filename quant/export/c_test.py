"""Test vectors of an exported layer as a C header, and a program that checks them."""

from __future__ import annotations

import numpy as np

from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.checks import count
from edgeattn.quantized import INPUTS
from quant.export.c_text import fill_template, numbers

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
    values = {
        "stem": stem, "PREFIX": stem.upper(), "count": str(how_many), "vectors": "\n".join(vectors),
        "indent": " " * len(f"{stem}_s8(   "),
        "fields": "".join(f"    int8_t {name}[{stem.upper()}_{name.upper()}_SIZE];\n" for name in names),
        "arguments": ", ".join(f"vector->{name}" for name in names),
        "first_arguments": ", ".join(f"first->{name}" for name in names),
    }
    return {f"{stem}_test.h": fill_template("test.h", values), f"{stem}_test.c": fill_template("test.c", values)}
