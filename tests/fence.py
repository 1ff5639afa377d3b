"""Every kernel of the CPU between pages that may not be touched: EDGEATTN_ISA=NAME python tests/fence.py KERNEL ...

A program of its own: the instruction set is chosen at import, and who touches such a page is ended by the system.  It
prints each case before it runs, so the last line names the one that ended it.

A case runs on ordinary arrays and cleared scratch first.  Then every array it reads, writes, packs weights into or
borrows ends exactly where a page without permissions begins; then all begin where one ends.  Inputs may only be read.
Scratch, outputs and the unused part of a cache hold NaN in the first of these runs, bytes 0xA5 in the second.  The
bytes of the results are those of the first run; of float32 attention the numbers are those of an oracle as well.
"""
import argparse
import faulthandler
import sys
import zlib

import encoder_cases
import numpy as np
import oracle_kernels as oracle
import static_cases
from fence_pages import BYTES, NAN, Fenced, Plain, everything_from
from kernels_under_test import ASYMMETRIC, SYMMETRIC, make_layer, random_tables

import edgeattn
import quant
from edgeattn import threads
from edgeattn.kernels.cpu import (
    cache_int8,
    encoder_dynamic,
    encoder_float32,
    encoder_int8,
    functional_dynamic,
    functional_float32,
    projection_dynamic,
)
from edgeattn.kernels.cpu.attend_rows import FEW_QUERIES
from edgeattn.kernels.cpu.decode_blocks import BLOCK
from edgeattn.kernels.cpu.layer_dynamic import DynamicLayer
from edgeattn.kernels.cpu.layer_float32 import FloatLayer
from edgeattn.kernels.cpu.records import KernelMask
from edgeattn.kernels.cpu.simd import LANES, ROWS, WIDTH
from edgeattn.rotary import RotaryEmbedding
from edgeattn.runtime.isa import ISA
from edgeattn.runtime.plan_cache import PlanCache

FAR = 10**6  # of a bound of a window that there is not
CASES, LONG_CASES = 24, 480  # of each kernel


# --- what the cases draw -----------------------------------------------------------------------------------------

def length(rng, most=3 * WIDTH):
    """A number of tokens: around tiles and blocks, or any up to `most`."""
    edges = [n for tile in (LANES, ROWS, WIDTH, 2 * WIDTH, 3 * WIDTH, most) for n in (tile - 1, tile, tile + 1)
             if 0 < n <= most]
    return int(rng.choice(edges) if rng.random() < 0.5 else rng.integers(1, most + 1))


def size(rng):
    """A number of features of a head."""
    return int(rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, LANES - 1, LANES + 1, 2 * LANES + 3, 40, 64, 65]))


def heads(rng):
    """(H, Hkv)"""
    return [(1, 1), (2, 2), (3, 1), (4, 2), (5, 5), (6, 2)][rng.integers(6)]


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


BANDS = {
    "all": lambda rng, L, S: None,
    "causal": lambda rng, L, S: (-FAR, int(rng.choice([0, S - L]))),
    "window": lambda rng, L, S: (int(rng.integers(-S, 1)), int(rng.integers(0, S + 1))),
    "left": lambda rng, L, S: (int(rng.integers(-L, S + 1)), FAR),
    "right": lambda rng, L, S: (-FAR, int(rng.integers(-L, S))),
    "narrow": lambda rng, L, S: (lambda low: (low, low + int(rng.integers(0, ROWS))))(int(rng.integers(-L, S))),
}
KEEPS = {
    "keep": lambda B, H, L, S: (B, H, L, S), "keep per query": lambda B, H, L, S: (L, S),
    "keep of keys": lambda B, H, L, S: (B, 1, 1, S), "keep of queries": lambda B, H, L, S: (1, H, L, 1),
}
BIASES = {
    "bias": lambda B, H, L, S: (B, H, L, S), "bias per head": lambda B, H, L, S: (H, 1, S),
    "bias of keys": lambda B, H, L, S: (S,), "bias of queries": lambda B, H, L, S: (L, 1),
}
BOTH = ("keep of keys", "bias", "window"), ("keep", "bias of keys", "left")
FLOAT_MASKS = [(name,) for name in (*BANDS, *KEEPS, *BIASES)] + list(BOTH)
BYTE_MASKS = [(name,) for name in (*BANDS, *KEEPS)] + [("keep of keys", "left"), ("keep", "narrow")]


def draw_masks(rng, kinds, B, H, L, S):
    """keep, bias and band of these kinds, as kernels take them."""
    masks = {}
    for kind in kinds:
        if kind in BANDS:
            masks["band"] = BANDS[kind](rng, L, S)
        elif kind in KEEPS:
            masks["keep"] = rng.random(KEEPS[kind](B, H, L, S)) > 0.4
        else:
            masks["bias"] = numbers(rng, *BIASES[kind](B, H, L, S))
            masks["bias"][rng.random(masks["bias"].shape) < 0.2] = -np.inf
    return masks


def for_oracle(masks, B, H, L, S):
    """The same masks, what a bias of -inf hides as the oracle wants it: not kept."""
    if "bias" not in masks:
        return masks
    bias = np.broadcast_to(masks["bias"], (B, H, L, S))
    keep = np.isfinite(bias) & masks.get("keep", True)
    return {**masks, "keep": keep, "bias": np.where(keep, bias, 0)}


def for_kernels(place, masks):
    """(KernelMask, lengths): masks as float kernels take them."""
    given = placed(place, masks)
    return KernelMask(*map(given.get, KernelMask._fields)), given.get("lengths")


def placed(place, masks):
    """The same masks, their arrays from `place`."""
    return {name: place.input(mask) if isinstance(mask, np.ndarray) else mask for name, mask in masks.items()}


# --- one function for each kernel: its random cases ---------------------------------------------------------------
# (rng, number) -> (what it is, call(place) -> results, of the first of these what is right and how far it may be off)

def float32_function(rng, number):
    kinds = [*FLOAT_MASKS, ("lengths",), ("softcap",)][number % (len(FLOAT_MASKS) + 2)]
    B, (H, Hkv), L, S, D, Dv = int(rng.integers(1, 3)), heads(rng), length(rng), length(rng, 200), size(rng), size(rng)
    return _float32_function(rng, kinds, B, H, Hkv, L, S, D, Dv, rng.random() < 0.5)


def few_keys(rng, number):
    """As many keys as a tile has rows, or a few less or more, and few queries whose windows begin behind the first."""
    S, L = 1 + number % (ROWS + 2), int(rng.choice([1, ROWS, FEW_QUERIES + 1, FEW_QUERIES + 2]))
    D, Dv = int(rng.choice([1, LANES, 200])), int(rng.choice([1, ROWS, LANES]))
    low = number // (ROWS + 2) % S
    return _float32_function(rng, (low, [FAR, low, low + 1][number // 2 % 3]), 1, 2, 1, L, S, D, Dv, rng.random() < 0.5)


def _float32_function(rng, kinds, B, H, Hkv, L, S, D, Dv, tokens_first):
    def made(heads, tokens, features):
        if tokens_first:
            return numbers(rng, B, tokens, heads, features).transpose(0, 2, 1, 3)
        return numbers(rng, B, heads, tokens, features)

    q, k, v = made(H, L, D), made(Hkv, S, D), made(Hkv, S, Dv)
    masks = {}
    if isinstance(kinds[0], int):
        masks, kinds = {"band": kinds}, ("band",)
    elif kinds == ("lengths",):
        masks = {"lengths": rng.integers(0, S + 1, B), "band": BANDS["left"](rng, L, S) if rng.random() < 0.5 else None}
    elif kinds == ("softcap",):
        masks = {"softcap": 2.0, "band": BANDS["window"](rng, L, S)}
    else:
        masks = draw_masks(rng, kinds, B, H, L, S)

    def call(place):
        out = place.make((B, L, H, Dv), np.float32).transpose(0, 2, 1, 3) if tokens_first else place.make(
            (B, H, L, Dv), np.float32)
        functional_float32.attention(
            place.input(q), place.input(k), place.input(v), out, D ** -0.5, masks.get("softcap", 0.0),
            *for_kernels(place, masks))
        return [out]

    exact = oracle.attention(q, k, v, D ** -0.5, **for_oracle(masks, B, H, L, S))
    return f"{'+'.join(kinds)} {masks.get('band', '')} B={B} {H=} {Hkv=} {L=} {S=} {D=} {Dv=}", call, [(exact, 5e-6)]


def _layer_sizes(rng):
    (H, Hkv), L, S, D, Dv = heads(rng), length(rng), length(rng, 200), size(rng), size(rng)
    if rng.random() < 0.3:
        S = L
    return int(rng.integers(1, 3)), H, Hkv, L, S, D, Dv, int(rng.integers(1, 80)), int(rng.integers(1, 80))


def _positions(rng, D):
    """A rotation and norms of heads of D features, any of them."""
    turned = 2 * int(rng.integers(D // 2 + 1))
    norm = "layer", numbers(rng, D), numbers(rng, D), 1e-5
    return dict(rotary=RotaryEmbedding(turned, interleaved=bool(rng.integers(2)), offset=int(rng.integers(3)))
                if turned else None, q_norm=norm if rng.random() < 0.5 else None,
                k_norm=norm if rng.random() < 0.5 else None)


def _layer(kind, has_positions=False):
    def draw(rng, number):
        kinds = FLOAT_MASKS[number % len(FLOAT_MASKS)]
        B, H, Hkv, L, S, D, Dv, E, Eo = _layer_sizes(rng)
        shapes = ((H * D, E), (Hkv * D, E), (Hkv * Dv, E), (Eo, H * Dv))
        weights = [numbers(rng, *shape) / np.float32(np.sqrt(shape[1])) for shape in shapes]
        weights += [numbers(rng, n) for n in (H * D, Hkv * D, Hkv * Dv, Eo)]
        masks, alone, same = draw_masks(rng, kinds, B, H, L, S), rng.random() < 0.3, L == S
        x = [numbers(rng, B, n, E) for n in (L, S, S)]
        positions = _positions(rng, D) if has_positions else {}
        if kind is DynamicLayer:
            columns = rng.permutation(E)[:rng.integers(5)]
            positions |= {"columns": columns, "apart": [numbers(rng, n, len(columns)) for n in (H * D, Hkv * D, Hkv * Dv)]}

        def call(place):
            given = [*weights[:3], None, *weights[4:7], None] if alone else weights
            layer = kind(H, Hkv, given[:4], given[4:], D ** -0.5, **positions)
            out = place.make((B, L, layer.output_dim), np.float32)
            xq = place.input(x[0])
            layer(xq, *((xq, xq) if same else map(place.input, x[1:])), out, for_kernels(place, masks)[0])
            return [out]

        right = []
        if kind is FloatLayer and not (alone or has_positions):
            right = [(oracle.layer(*([x[0]] * 3 if same else x), weights, H, Hkv, **for_oracle(masks, B, H, L, S)), 1e-5)]
        return (f"{'+'.join(kinds)} {masks.get('band', '')} B={B} {H=} {Hkv=} {L=} {S=} {D=} {Dv=} {E=} {Eo=} "
                f"{'no output' if alone else ''}"), call, right
    return draw


def dynamic_function(rng, number):
    kinds = FLOAT_MASKS[number % len(FLOAT_MASKS)]
    B, (H, Hkv), L, S, D, Dv = int(rng.integers(1, 3)), heads(rng), length(rng), length(rng, 300), size(rng), size(rng)
    q, k, v = numbers(rng, B, H, L, D), numbers(rng, B, Hkv, S, D), numbers(rng, B, Hkv, S, Dv)
    masks = draw_masks(rng, kinds, B, H, L, S)

    def call(place):
        out = place.make((B, H, L, Dv), np.float32)
        functional_dynamic.attention(
            place.input(q), place.input(k), place.input(v), out, D ** -0.5, for_kernels(place, masks)[0])
        return [out]
    return f"{'+'.join(kinds)} {masks.get('band', '')} B={B} {H=} {Hkv=} {L=} {S=} {D=} {Dv=}", call, []


def static_layer(rng, number):
    kinds = [*BYTE_MASKS, ("score_luts",), ("step",)][number % (len(BYTE_MASKS) + 2)]
    B, H, _, L, S, D, Dv, E, Eo = _layer_sizes(rng)
    L = 1 if kinds == ("step",) else L
    rules, softmax = STATIC_RULES[number // 40 % len(STATIC_RULES)]
    layer_seed, zero_points = int(rng.integers(2**31)), (SYMMETRIC, ASYMMETRIC)[number % 2]
    x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
    masks = {}
    tables = random_tables(rng, zero_points) if number % 3 == 2 else None
    if kinds == ("score_luts",):
        masks = {"score_luts": rng.integers(-128, 128, (3, 256)).astype(np.int8),
                 "lut_index": rng.integers(0, 3, (B, 1, L, S)).astype(np.uint8)}
    elif kinds != ("step",):
        masks = draw_masks(rng, kinds, B, H, L, S)

    def call(place):
        layer, *_ = make_layer(np.random.default_rng(layer_seed), H, E, D, Dv, Eo, zero_points, rules, softmax, tables)
        given, shown = [place.input(codes) for codes in x], placed(place, masks)
        outs = [place.make((B, L, layer.output_dim), np.int8) for _ in range(2)]
        layer(*given, outs[0], **shown)
        # once more by way of a cache that ends with the last token, from slot 2 on
        caches = [place.make((B, H, S + 2, features), np.int8) for features in (D, Dv)]
        half = S // 2
        first, second = ([place.input(np.ascontiguousarray(c[:, part])) for c in x[1:]]
                         for part in (slice(half), slice(half, S)))
        if half:
            layer(given[0][:, :0], *first, outs[1][:, :0], cached=(*caches, 2, half))
        layer(given[0], *second, outs[1], **shown, cached=(*caches, 2, S))
        return outs
    _, linears, tensors, table = make_layer(
        np.random.default_rng(layer_seed), H, E, D, Dv, Eo, zero_points, rules, softmax)
    right = []
    if "score_luts" not in masks and B * H * L * S <= 2000:  # in integers of Python
        right = [(oracle.static_layer(*x, H, linears, tensors, rules, softmax, table, tables=tables, **masks), 0)] * 2
    kinds = kinds if tables is None else (*kinds, "tables")
    return f"{'+'.join(kinds)} {masks.get('band', '')} B={B} {H=} {L=} {S=} {D=} {Dv=} {E=} {Eo=} {softmax}", call, right


STATIC_RULES = [(("float_rne",) * 3, "lut_f32")]
MORE_STATIC_RULES = [(("ruy", "double", "double"), "lut_u16"), (("float64", "double", "ruy"), "fixed")]
WINDOWS = ("all", "last", "left", "window", "causal", "own", "lengths", "softcap", "slopes", "mask", "fixed scales")


def _cache(dtype):
    def draw(rng, number):
        kind = WINDOWS[number % len(WINDOWS)]
        B, (H, Hkv), D, Dv, S = int(rng.integers(1, 3)), heads(rng), size(rng), size(rng), length(rng, 3 * BLOCK)
        L = 1 if kind == "last" else int(rng.integers(1, min(S, 9) + 1))
        window = int(rng.integers(1, S + 1)) if kind == "own" else None
        capacity = S if rng.random() < 0.5 and kind != "own" else S + int(rng.integers(0, 9)) + L
        cut = int(rng.integers(0, S + 1))
        scales = (0.02, 0.03) if kind == "fixed scales" and dtype == "int8" else None
        key, value, query = numbers(rng, B, Hkv, S, D), numbers(rng, B, Hkv, S, Dv), numbers(rng, B, H, L, D)
        options = {
            "left": {"window_size": (int(rng.integers(0, S)), -1)},
            "window": {"window_size": (int(rng.integers(0, S)), int(rng.integers(0, 9)))},
            "causal": {"is_causal": True}, "softcap": {"softcap": 2.0},
            "own": {"is_causal": bool(rng.random() < 0.5)},
            "lengths": {"key_padding_mask": np.arange(S) < rng.integers(0, S + 1, B)[:, None]},
            "slopes": {"alibi_slopes": rng.random(H).astype(np.float32)},
            "mask": {"attn_mask": rng.random((L, S)) > 0.4},
        }.get(kind, {})

        def call(place):
            cache = edgeattn.KVCache(B, Hkv, capacity, D, value_dim=Dv, dtype=dtype, scales=scales, window=window)
            cache._keys, cache._values = place.storage(cache._keys), place.storage(cache._values)
            if dtype == "int8" and scales is None:
                cache._key_scales, cache._value_scales = map(place.storage, (cache._key_scales, cache._value_scales))
            x = place.input(query)
            ends = range(0, S + 1, max(window or S, 1)) if window else (0, cut, S)
            for begin, end in zip(ends, [*ends[1:], S], strict=True):
                cache.append(place.input(key[:, :, begin:end].copy()), place.input(value[:, :, begin:end].copy()))
            results = [cache.attend(x, **placed(place, options))]
            if not options and window is None and capacity > S:
                results.append(cache.attend(x[:, :, -1:].copy(), position=S))
            return results

        return f"{kind} {options.get('window_size', '')} B={B} {H=} {Hkv=} {L=} {S=} {D=} {Dv=} {capacity=} {window=}", call, []
    return draw


def left_windows(rng, number):
    """Several queries whose windows end with the cache: each sees one key less than the one before it."""
    S, D, Dv = length(rng, 2 * BLOCK + LANES), size(rng), size(rng)
    L, left = int(rng.integers(2, 9)), int(rng.integers(0, S))
    key, value, query = numbers(rng, 1, 1, S, D), numbers(rng, 1, 1, S, Dv), numbers(rng, 1, 1, L, D)

    def call(place):
        cache = edgeattn.KVCache(1, 1, S, D, value_dim=Dv, dtype="int8")
        for name in ("_keys", "_values", "_key_scales", "_value_scales"):
            setattr(cache, name, place.storage(getattr(cache, name)))
        cache.append(place.input(key), place.input(value))
        position = max(S - L, 0)
        return [cache.attend(place.input(query), window_size=(left, -1), position=position)]
    return f"{L=} {S=} {D=} {Dv=} {left=}", call, []


def projections(rng, number):
    """What layers with a cache project by, and store."""
    tokens, depth, outputs = length(rng), int(rng.integers(1, 200)), int(rng.integers(1, 100))
    x, weight, bias = numbers(rng, tokens, depth), numbers(rng, outputs, depth), numbers(rng, outputs)
    codes, scale = rng.integers(-127, 128, (outputs, depth)).astype(np.int8), rng.random(outputs).astype(np.float32)
    rows = x.reshape(1, 1, tokens, depth)

    def call(place):
        given = place.input(x)
        stored = [array for _ in "kv" for array in (place.make(rows.shape, np.int8), place.make(rows.shape[:3], np.float32))]
        cache_int8.store(PlanCache(), place.input(rows), place.input(rows), *stored, 0)
        return [edgeattn.Linear(weight, bias).packed(given), projection_dynamic.DynamicProjection(codes, scale, bias)(given),
                *stored]
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    return f"{tokens=} {depth=} {outputs=}", call, [(exact, 1e-4)]


def _public(of_layer):
    """Layers with a cache, as users call them: in chunks, then token by token."""
    def draw(rng, number):
        H, Hkv = heads(rng)
        D, Dv, S, B = size(rng), size(rng), length(rng, 60) + 2, int(rng.integers(1, 3))
        E = int(rng.integers(1, 60))
        shapes = ((H * D, E), (Hkv * D, E), (Hkv * Dv, E), (E, H * Dv))
        weights = [numbers(rng, *shape) / np.float32(np.sqrt(shape[1])) for shape in shapes]
        x, dtype, window = numbers(rng, B, S, E), ("float32", "int8")[number % 2], (None, 5)[number // 2 % 2]

        def call(place):
            layer = of_layer(edgeattn.MultiHeadAttention(H, *weights, num_kv_heads=Hkv))
            cache = edgeattn.KVCache.for_layer(layer, B, S + 5, dtype=dtype, window=window)
            results = []
            for begin, end in ((0, S - 2), (S - 2, S - 1), (S - 1, S)):
                results.append(layer(place.input(x[:, begin:end].copy()), kv_cache=cache, is_causal=True))
            return results
        return f"{dtype} {window=} B={B} {H=} {Hkv=} {S=} {D=} {Dv=} {E=}", call, []
    return draw


def _encoder(kind):
    def draw(rng, number):
        form = ("linear", "feed-forward", "gated", "norm")[number % 4]
        inputs, hidden, outputs = (int(rng.choice([1, 5, 31, 32, 33, 40, 64, 65, 100])) for _ in range(3))
        hidden = int(rng.choice([hidden, 255, 256, 257, 300]))
        norm_first = form != "linear" and rng.random() < 0.5
        case = encoder_cases.make(
            int(rng.integers(2**31)), inputs, 0 if form == "linear" else hidden, outputs,
            encoder_cases.ACTIVATIONS[rng.integers(5)], gated=form == "gated", norm=(None, "layer", "rms")[rng.integers(3)],
            norm_first=norm_first, residual=rng.random() < 0.7, bias=rng.random() < 0.7, rows=int(rng.integers(1, 70)),
            columns=(tuple(rng.integers(0, inputs, 1)), tuple(rng.integers(0, hidden, 2))), split=(None, 4)[number // 4 % 2])
        norm = "layer", numbers(rng, inputs), numbers(rng, inputs), 1e-5

        def call(place):
            kernel = encoder_float32.Norm(norm) if form == "norm" else case.kernel(kind)
            x = place.input(case.x)
            out = place.make((len(case.x), inputs if form == "norm" else outputs), np.float32)
            kernel(x, x if form == "norm" else place.input(case.residual), out)
            return [out]
        return f"{form} {len(case.x)} rows {inputs=} {hidden=} {outputs=} {norm_first=} {case.activation}", call, []
    return draw


def encoder_static(rng, number):
    """A feed-forward, rows and codes, and the two ends of a layer that takes codes."""
    inputs, hidden, outputs = (int(rng.choice([1, 5, 31, 32, 33, 40, 64, 65, 100])) for _ in range(3))
    more_inputs = tuple(int(rng.integers(0, inputs + i)) for i in range(rng.integers(0, 4)))
    more_outputs = tuple((int(rng.integers(0, outputs)), int(rng.choice([-128, 127]))) for _ in range(rng.integers(0, 4)))
    case = static_cases.make(
        int(rng.integers(2**31)), inputs, hidden, outputs, str(rng.choice(["gelu", "relu"])), gated=number % 2 > 0,
        arithmetic=static_cases.ARITHMETIC[number % 6], norm=(None, "layer", "rms")[rng.integers(3)],
        norm_first=rng.random() < 0.5, residual=rng.random() < 0.7, bias=rng.random() < 0.7, rows=int(rng.integers(1, 70)),
        more_inputs=more_inputs, more_outputs=more_outputs)

    def call(place):
        x, residual, kernel = place.input(case.x), place.input(case.residual), case.kernel()
        ends = encoder_int8.Ends(inputs, inputs, (0.1, 3), (0.2, -5), more_inputs=more_inputs)
        codes, nan = ends.to_codes(x)
        given = place.input(np.ascontiguousarray(codes[:, :inputs]))
        return [kernel(x, residual, place.make((len(x), outputs), np.float32)), codes,
                kernel.of_codes(codes, place.make((len(x), outputs + len(more_outputs)), np.int8)),
                ends.to_rows(given, nan, x)]
    return f"{len(case.x)} rows {inputs=} {hidden=} {outputs=} {more_inputs=} {more_outputs=}", call, []


KERNELS = {
    "float32-function": float32_function,
    "float32-few-keys": few_keys,
    "float32-layer": _layer(FloatLayer),
    "dynamic-function": dynamic_function,
    "dynamic-layer": _layer(DynamicLayer),
    "float32-layer-with-positions": _layer(FloatLayer, has_positions=True),
    "dynamic-layer-with-positions": _layer(DynamicLayer, has_positions=True),
    "static-layer": static_layer,
    "float32-cache": _cache("float32"),
    "int8-cache": _cache("int8"),
    "int8-cache-left-windows": left_windows,
    "projections": projections,
    "encoder-float32": _encoder(encoder_float32),
    "encoder-dynamic": _encoder(encoder_dynamic),
    "encoder-static": encoder_static,
    "float32-layer-with-cache": _public(lambda layer: layer),
    "dynamic-layer-with-cache": _public(lambda layer: quant.quantize(layer, scheme="dynamic")),
}


def check(name, call, right):
    """Run one case in all its places; raises AssertionError with its name."""
    results = []
    for place in (Plain(), Fenced(True, NAN), Fenced(False, BYTES)):
        with everything_from(place):
            results.append([np.array(result) for result in call(place)])
    for got, how in zip(results[1:], ("NaN", "0xA5"), strict=True):
        for one, wanted in zip(got, results[0], strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), wanted.view(np.uint8), f"{name}, scratch full of {how}")
    for one, (wanted, error) in zip(results[0], right, strict=False):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=error, err_msg=name)


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--long", action="store_true", help="twenty times as many cases, and more rules")
    parser.add_argument("--number", type=int, help="this case alone")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    threads.SMALLEST_SHARED_WORK = 0
    if options.long:
        STATIC_RULES.extend(MORE_STATIC_RULES)
    total = 0
    for count in (1, 2):
        threads.set_num_threads(count)
        for kernel in options.kernels:
            draw = KERNELS[kernel]
            for number in range(LONG_CASES if options.long else CASES):
                if options.number not in (None, number):
                    continue
                rng = np.random.default_rng([zlib.crc32(kernel.encode()), number])
                what, call, right = draw(rng, number)
                name = f"{kernel} {number} on {count} threads: {what}"
                print("case", name, flush=True)
                check(name, call, right)
                total += 1
    threads.set_num_threads(1)
    print(f"passed {total} cases under {ISA.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
