"""The cases of cases.py that layers have, and a layer for each."""
import cases
import numpy as np

# Layers have neither windows, lengths, softcap nor a scale of their own.
CASES = [
    case
    for case in cases.CASES
    if case.H
    and case.window_size == (-1, -1)
    and not case.kv_lengths
    and not case.softcap
    and case.scale is None
]


def parameters(case, E=12, kdim=10, vdim=9, Eo=11):
    """All weights and biases of a layer with the case's heads."""
    random = case.random()
    shapes = {
        "q": (case.H * case.D, E),
        "k": (case.kv_heads * case.D, kdim),
        "v": (case.kv_heads * case.value_dim, vdim),
        "out": (Eo, case.H * case.value_dim),
    }
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}_weight"] = random.standard_normal(shape, np.float32) / np.float32(
            max(shape[1], 1) ** 0.5
        )
        tensors[f"{name}_bias"] = random.standard_normal(shape[0], np.float32)
    return tensors


def inputs(case, E=12, kdim=10, vdim=9):
    random = case.random()
    return [
        random.standard_normal(shape, np.float32)
        for shape in ((case.B, case.L, E), (case.B, case.S, kdim), (case.B, case.S, vdim))
    ]
