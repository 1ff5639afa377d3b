"""What int8 layers compute under one instruction set: EDGEATTN_ISA=NAME python tests/int8_layers.py FILE.npz.

A program of its own because the instruction set is chosen at import. Whole layers, which take long to compile, in one
set of rules; every other rule by itself.
"""
import sys

import numpy as np
from kernels_under_test import (
    ASYMMETRIC,
    MULTIPLIERS,
    SYMMETRIC,
    accumulators,
    make_layer,
    probabilities,
    run_cached,
    scaled,
    softmax_table,
)

import edgeattn
import quant
from edgeattn.kernels.cpu.requantize import RULES
from edgeattn.kernels.cpu.simd import byte_planes
from edgeattn.runtime.isa import ISA

LAYER_RULES, LAYER_SOFTMAX = ("float_rne", "float_rne", "float_rne"), "lut_f32"
# B, L, S, E, D, heads, Dv, Eo: less than a tile; heads that share a vector; whole and part groups of a matrix unit;
# rows whose exponentials are not all kept
SHAPES = ((2, 5, 9, 7, 8, 2, 5, 6), (1, 33, 31, 20, 24, 3, 8, 12), (1, 37, 70, 64, 16, 4, 16, 64),
          (1, 20, 90, 70, 96, 1, 40, 33), (1, 3, 650, 5, 4, 1, 4, 4), (1, 2, 150, 8, 48, 1, 8, 4),
          # one query, which a cache serves otherwise than several: blocks of keys, heads in more than one block of lanes
          (2, 1, 150, 20, 24, 3, 8, 12), (1, 1, 131, 40, 72, 2, 68, 33), (1, 1, 6, 9, 4, 35, 5, 7))
ROWS = np.arange(90)[:, None]
DYNAMIC_CASES = {  # tokens, masks
    "dynamic": (70, {}), "dynamic causal": (70, {"is_causal": True}),
    "dynamic, long rows": (600, {}), "dynamic window, long rows": (600, {"window_size": (333, 2)}),
    "dynamic left padding, huge mask": (90, {"attn_mask": np.where(ROWS < 40, -1e9, ROWS.T / 9).astype(np.float32),
                                             "key_padding_mask": ROWS.T >= 37})}


def static_cases():
    """name -> (layer, (xq, xk, xv), masks, what oracle_kernels.static_layer takes between them)."""
    cases = {}
    for number, (B, L, S, E, D, heads, Dv, Eo) in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        for name, zero_points in (("symmetric", SYMMETRIC), ("asymmetric", ASYMMETRIC)):
            layer, linears, tensors, table = make_layer(rng, heads, E, D, Dv, Eo, zero_points, LAYER_RULES, LAYER_SOFTMAX)
            x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
            masks = {} if name == "symmetric" or L == 1 else {"keep": rng.random((B, 1, L, S)) > 0.4, "band": (-S // 2, 3)}
            cases[f"{name} {number}"] = layer, x, masks, (heads, linears, tensors, LAYER_RULES, LAYER_SOFTMAX, table)
    return cases


def rule_cases():
    """name -> (rule, accumulators, multiplier)."""
    return {f"{rule} {m}": (rule, accumulators(m), m) for rule in RULES for m in MULTIPLIERS}


def softmax_cases():
    """name -> (rule, table, codes (queries, keys), keep or None); the longer rows' values are not all kept."""
    cases, rng = {}, np.random.default_rng(0)
    for rule in ("lut_f32", "lut_u16", "fixed"):
        table = softmax_table(rule, 0.06)
        for keys in (20, 528):
            codes = rng.integers(-128, 128, (32, keys)).astype(np.int8)
            cases[f"{rule} {keys}"] = rule, table, codes, None
            cases[f"{rule} {keys} masked"] = rule, table, codes, rng.random(codes.shape) > np.arange(32)[:, None] / 31
    return cases


def dynamic_answer(tokens, masks):
    """float32 output of a dynamic layer with three query heads to a key head and sizes that fill no vector."""
    rng = np.random.default_rng(9)

    def weight(o, i):
        return (rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32)

    layer = edgeattn.MultiHeadAttention(6, weight(72, 50), weight(24, 50), weight(20, 50), weight(50, 60), num_kv_heads=2)
    return quant.quantize(layer, scheme="dynamic")(rng.standard_normal((1, tokens, 50)).astype(np.float32), **masks)


def main(path):
    answers = {"instruction_set": ISA.name}
    for name, (layer, x, masks, _) in static_cases().items():
        answers[name] = np.zeros((x[0].shape[0], x[0].shape[1], layer.output_dim), np.int8)
        layer(*x, answers[name], **masks)
        answers[f"{name} cached"] = np.zeros_like(answers[name])
        run_cached(layer, *x, answers[f"{name} cached"], **masks)
    for name, (rule, values, m) in rule_cases().items():
        answers[name] = scaled(rule, values, m)
    for name, (rule, table, codes, keep) in softmax_cases().items():
        answers[name] = probabilities(byte_planes(table), rule == "fixed", codes, keep)
    for name, (tokens, masks) in DYNAMIC_CASES.items():
        answers[name] = dynamic_answer(tokens, masks)
    np.savez(path, **answers)


if __name__ == "__main__":
    main(sys.argv[1])
