"""How large float32 errors are beside those of a plain float32 implementation, both against float64.

Runs every case of tests/cases.py through the function, the layer, and a cache fed one token at a time, and prints the
ratio of the largest errors: 1 means as good as NumPy in float32, step by step; the tests allow 2. Each case is drawn
until its results are about NUMBERS numbers, and the largest error of all draws counts: that of a few numbers is an
accident of the order in which some library sums. Where PyTorch is installed its ratio stands beside ours.

    python -m benchmarks.accuracy
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cases  # noqa: E402
import reference  # noqa: E402

import edgeattn  # noqa: E402

try:
    import torch
except ImportError:
    torch = None


NUMBERS = 10_000
FEWEST, MOST = 5, 100  # draws


def error(result, oracle):
    """The largest difference, 0 where there is nothing to compare."""
    return float(np.abs(result - oracle).max()) if oracle.size else 0.0


def errors(ours, plain, oracle):
    """(error of ours, error of the plain one, half a unit in the last place of the largest result)"""
    largest = np.float32(np.abs(oracle).max()) if oracle.size else np.float32(0)
    return error(ours, oracle), error(plain, oracle), float(np.spacing(largest)) / 2


def function_errors(case):
    """{name: errors} of scaled_dot_product_attention, and of a cache where the case can be streamed."""
    masks, (q, k, v) = case.masks(), case.qkv()
    keep = masks["keep"]
    if masks["padding"] is not None:
        padding = masks["padding"][:, None, None]
        keep = padding if keep is None else keep & padding
    visible = reference.visible(
        case.B, case.H, case.L, case.S, keep=keep, causal=case.is_causal, alignment=case.causal_alignment,
        window=case.window_size, lengths=masks["lengths"])
    options = {"scale": case.scale, "softcap": case.softcap}
    oracle, plain = (
        reference.attention(q, k, v, visible, masks["bias"], **options, dtype=t)[0] for t in (np.float64, np.float32))
    mask = masks["bias"]
    if mask is None:
        mask = keep
    elif keep is not None:
        mask = np.where(keep, mask, np.float32(-np.inf))
    arguments = {
        "is_causal": case.is_causal, "causal_alignment": case.causal_alignment, "enable_gqa": True, **options,
        "window_size": case.window_size, "kv_lengths": masks["lengths"]}
    results = {"attention": edgeattn.scaled_dot_product_attention(q, k, v, mask, **arguments)}
    results["attention, probabilities asked for"] = edgeattn.scaled_dot_product_attention(
        q, k, v, mask, **arguments, return_weights=True)[0]
    if case.L == case.S and q.size and v.size and masks["lengths"] is None and mask is None:
        results["cache, one token at a time"] = streamed(case, q, k, v, options) if case.is_causal else None
    if torch is not None and q.size and case.softcap == 0:
        # the mask written out; rows that see nothing are zeros in torch too
        added = np.where(visible, 0 if masks["bias"] is None else masks["bias"], -np.inf).astype(np.float32)
        results["attention, PyTorch"] = torch.nn.functional.scaled_dot_product_attention(
            *map(torch.from_numpy, (q, k, v)), torch.from_numpy(added), scale=case.scale, enable_gqa=True).numpy()
    return {name: errors(result, plain, oracle) for name, result in results.items() if result is not None}


def streamed(case, q, k, v, options):
    """Results of a KVCache that gets one token at a time; only causal cases whose window looks back."""
    if case.window_size[1] > 0:
        return None
    cache = edgeattn.KVCache(case.B, case.kv_heads, case.S, case.D, value_dim=case.value_dim)
    rows = []
    for i in range(case.L):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        rows.append(cache.attend(q[:, :, i : i + 1], window_size=case.window_size, **options))
    return np.concatenate(rows, axis=2)


def layer_errors(case):
    """{name: errors} of a layer of width H * D with the case's heads and masks; empty where it has none."""
    if not case.H or case.kv_lengths or case.scale is not None or case.softcap:
        return {}
    random, width = case.random(), max(case.H * case.D, 1)
    shapes = {"q": (case.H * case.D, width), "k": (case.kv_heads * case.D, width),
              "v": (case.kv_heads * case.value_dim, width), "out": (width, case.H * case.value_dim)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}_weight"] = random.standard_normal(shape, np.float32) / np.float32(max(shape[1], 1) ** 0.5)
        tensors[f"{name}_bias"] = random.standard_normal(shape[0], np.float32)
    x, y = (random.standard_normal((case.B, n, width), np.float32) for n in (case.L, case.S))
    masks = case.masks()
    visible = reference.visible(
        case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"], causal=case.is_causal,
        alignment=case.causal_alignment, window=case.window_size)
    oracle, plain = (
        reference.multi_head_attention(
            tensors, case.H, x, y, y, visible, masks["bias"], num_kv_heads=case.kv_heads, dtype=t)[0]
        for t in (np.float64, np.float32))
    layer = edgeattn.MultiHeadAttention(case.H, **tensors, num_kv_heads=case.kv_heads)
    result = layer(
        x, y, attn_mask=masks["bias"] if masks["keep"] is None else masks["keep"], key_padding_mask=masks["padding"],
        is_causal=case.is_causal, causal_alignment=case.causal_alignment, window_size=case.window_size)
    results = {"layer": result}
    if torch is not None and x.size and y.size and case.D and case.value_dim:
        results["layer, PyTorch"] = torch_layer(case, tensors, x, y, visible, masks["bias"])
    return {name: errors(result, plain, oracle) for name, result in results.items()}


def torch_layer(case, tensors, x, y, visible, bias):
    """The same layer from torch's linear maps and attention, with the mask written out."""
    given = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def project(source, name, heads):
        rows = torch.nn.functional.linear(source, given[f"{name}_weight"], given[f"{name}_bias"])
        return rows.reshape(*source.shape[:2], heads, -1).transpose(1, 2)

    added = torch.from_numpy(np.where(visible, 0 if bias is None else bias, -np.inf).astype(np.float32))
    context = torch.nn.functional.scaled_dot_product_attention(
        project(x, "q", case.H), project(y, "k", case.kv_heads), project(y, "v", case.kv_heads), added, enable_gqa=True)
    merged = context.transpose(1, 2).reshape(*x.shape[:2], -1)
    return torch.nn.functional.linear(merged, given["out_weight"], given["out_bias"]).numpy()


def ratios(case):
    """{name: ours / plain}, without those whose plain result is never further off than its own rounding."""
    found, size = {}, case.B * case.H * case.L * case.value_dim
    for draw in range(min(max(NUMBERS // max(size, 1), FEWEST), MOST)):
        drawn = dataclasses.replace(case, name=f"{case.name} {draw}") if draw else case  # the name is the seed
        for name, triple in {**function_errors(drawn), **layer_errors(drawn)}.items():
            found.setdefault(name, []).append(triple)
    largest = {name: np.max(triples, axis=0) for name, triples in found.items()}
    return {name: ours / plain for name, (ours, plain, rounding) in largest.items() if plain > rounding}


def main():
    """Print one line per way of calling: cases, median and worst ratio, and the case that is worst."""
    found = {}
    for case in cases.CASES:
        for name, value in ratios(case).items():
            found.setdefault(name, []).append((value, case.name))
    print("error / error of plain float32    cases  median   worst  in case")
    for name, pairs in sorted(found.items()):
        worst, where = max(pairs)
        print(f"{name:34} {len(pairs):4} {np.median([value for value, _ in pairs]):7.2f} {worst:7.2f}  {where}")


if __name__ == "__main__":
    main()
