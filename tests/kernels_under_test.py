"""Small kernels that apply one operation of edgeattn.kernels.cpu to whole arrays, for the tests."""
import numpy as np
from njit import njit

from edgeattn.arithmetic import batch_matmul_multiplier, fully_connected_multiplier, lut_f32_table
from edgeattn.kernels.cpu import requantize, softmax_int8
from edgeattn.kernels.cpu.byte_products import linear
from edgeattn.kernels.cpu.int8_operands import FLIP
from edgeattn.kernels.cpu.int8_views import BytePanels, Groups, Part
from edgeattn.kernels.cpu.layer_int8 import StaticLayer
from edgeattn.kernels.cpu.one_row import linear_of_tokens
from edgeattn.kernels.cpu.requantize import encode
from edgeattn.kernels.cpu.simd import (
    LANES,
    WIDTH,
    address_of,
    load,
    matrix_configure,
    matrix_release,
    store,
    tile_store,
)
from edgeattn.kernels.cpu.softmax_int8 import KEPT_GROUPS
from edgeattn.runtime.jit import inline


@njit(error_model="numpy")
def apply_rule(rule, accumulators, parameters, out):
    """accumulators by the rule of that number, LANES at a time; parameters (2, LANES) flat."""
    for i in range(0, accumulators.size, LANES):
        store(out, i, requantize.requantize(load(accumulators, i), rule, parameters, 0, LANES))


EDGES = [0, 1, -1, 2, -2, 127, -128, 2**15, -2**15, 2**20 + 1, -2**20 - 1, 2**24 + 1, -2**24 - 1, 2**30, -2**30]
RULE_SETS = [("float_rne", "float_rne", "float_rne", "lut_f32"), ("ruy", "double", "double", "lut_f32"),
             ("ruy", "ruy", "ruy", "lut_f32"), ("float64", "double", "double", "fixed"),
             ("double", "double", "double", "fixed"), ("float_rne", "float_rne", "double", "lut_u16")]
MULTIPLIERS = (0.0003, 0.5, 0.25, 0.999999, 1.0, 2.0**-10, 1.5 * 2.0**-8, 0.0078125)


def accumulators(m):
    """Sums that a rule scales by m: ends, anything, and both sides of every tie; int32, a multiple of 16 of them."""
    values = EDGES + [int(v) for v in np.random.default_rng(9).integers(-2**22, 2**22, 100)]
    values += [s * (int((n + 0.5) / m) + d) for n in range(8) for d in (-1, 0, 1) for s in (1, -1)]
    values = [v for v in values if abs(v * m) < 2**30 and abs(v) < 2**31]
    return np.array(values + [0] * (-len(values) % 16), np.int32)


def scaled(name, values, m):
    """The rule of that name on accumulators."""
    out = np.empty_like(values)
    apply_rule(requantize.NUMBERS[name], values, encode(name, [m] * LANES).ravel(), out)
    return out


@njit(error_model="numpy")
def apply_softmax(rule, table, codes, groups, masks, scratch):
    """codes (groups, WIDTH) of four keys to a lane, in place, to bytes of probabilities; masks likewise, or empty."""
    softmax_int8.softmax(address_of(table), rule, Part(codes, 0), groups, Part(masks, 0), masks.size != 0, Part(scratch, 0),
            Part(scratch, 4 * min(groups, KEPT_GROUPS) * WIDTH))


def probabilities(table, fixed, codes, keep=None):
    """Probabilities 0..255 of int8 scores (queries, keys): multiples of WIDTH and of 4; keep likewise, bool."""
    def in_lanes(x):  # (queries, keys) bytes to (blocks, groups, WIDTH) of four bytes
        return np.ascontiguousarray(x.view(np.int32).reshape(-1, WIDTH, x.shape[1] // 4).transpose(0, 2, 1))

    rule = softmax_int8.NUMBERS["lut_f32" if table.dtype == np.float32 else "fixed" if fixed else "lut_u16"]
    words, out = in_lanes(codes), np.empty(codes.shape, np.int8)
    masks = np.zeros((len(words), 0), np.int32) if keep is None else in_lanes(-keep.astype(np.int8))
    groups = words.shape[1]
    if keep is not None:
        words = words & masks | ~masks & np.int32(-2139062144)  # four codes -128
    scratch = np.zeros((4 * groups + 2) * WIDTH, np.int32)
    for block, (word, mask) in enumerate(zip(words, masks, strict=True)):
        flat = word.ravel()
        apply_softmax(rule, table, flat, groups, mask.ravel(), scratch)
        rows = np.ascontiguousarray((flat ^ FLIP).reshape(groups, WIDTH).T)
        out[block * WIDTH:(block + 1) * WIDTH] = rows.view(np.int8)
    return out.astype(np.int64) + 128


@inline
def _keep_tile(tile, t, f, out, features):
    tile_store(tile, out, t * features + f, features, LANES)


@njit(error_model="numpy")
def apply_linear(x, x_row, tokens, panels, bias, features, depth4, out, tiles):
    """out (tokens, features) = x w^T + bias by the tiled product of bytes."""
    matrix_configure(tiles, 0)
    linear(_keep_tile, (out, features), Groups(x, 0, x_row, 1), tokens, BytePanels(panels, 0, bias, 0, features, depth4),
           Part(tiles, 0))
    matrix_release()


@njit(error_model="numpy")
def apply_linear_ahead(x, x_row, tokens, panels, bias, features, depth4, out, tiles):
    """The same of weights, which are brought near."""
    matrix_configure(tiles, 0)
    linear_of_tokens(_keep_tile, (out, features), Groups(x, 0, x_row, 1), tokens,
                     BytePanels(panels, 0, bias, 0, features, depth4), Part(tiles, 0))
    matrix_release()


def static_kernel(heads, linears, tensors, project_rule, score_rule, context_rule, table, softmax, tables=None):
    """StaticLayer from scales: linears name -> (weight, scale, bias), tensors name -> (scale, zero point)."""
    source = {"query": "query_input", "key": "key_input", "value": "value_input", "output": "context"}
    multiplied = {
        name: (weight, fully_connected_multiplier(project_rule, tensors[source[name]][0], scale, tensors[name][0]), bias)
        for name, (weight, scale, bias) in linears.items()}

    def product(rule, *names):
        return batch_matmul_multiplier(rule, np.float32, *(tensors[name][0] for name in names))[0]

    return StaticLayer(heads, multiplied, product(score_rule, "query", "key", "scores"),
                       product(context_rule, "probabilities", "value", "context"),
                       {name: zero_point for name, (_, zero_point) in tensors.items()},
                       project_rule, score_rule, context_rule, table, softmax, tables)


def random_tables(rng, zero_points):
    """Tables of queries and keys as StaticLayer takes them, that know zero as those of MUL do."""
    tables = {}
    for name in ("query", "key"):
        table, zero = rng.integers(-128, 128, 256).astype(np.int8), int(rng.integers(-30, 31))
        table[zero + 128] = zero_points[name]
        tables[name] = (table, zero)
    return tables


SYMMETRIC = dict(query_input=3, key_input=-7, value_input=0, query=-4, key=0, value=0, scores=21, context=5, output=-9)
ASYMMETRIC = dict(SYMMETRIC, key=11, value=-23)


def softmax_table(rule, scale):
    if rule == "lut_f32":
        return lut_f32_table(scale)
    step = np.exp(-np.float64(scale) * np.arange(256))
    if rule == "lut_u16":
        return np.minimum(step * 65535 + 0.5, 65535).astype(np.int32)
    return np.minimum(np.rint(step * 2.0**31), 2**31 - 1).astype(np.int32)


def make_layer(rng, heads, E, D, Dv, Eo, zero_points, rules, softmax, tables=None):
    """A random layer whose codes use their whole range."""
    linears, tensors = {}, {"probabilities": (np.float32(1 / 256), -128)}
    for name, z in zero_points.items():
        tensors[name] = (np.float32(rng.uniform(0.01, 0.03)), z)
    for name, out, depth in (("query", heads * D, E), ("key", heads * D, E), ("value", heads * Dv, E),
                             ("output", Eo, heads * Dv)):
        ws = rng.uniform(0.5, 1.5, out).astype(np.float32) / np.float32(60 * np.sqrt(depth))
        linears[name] = (rng.integers(-127, 128, (out, depth)).astype(np.int8), ws,
                         rng.integers(-2000, 2000, out).astype(np.int32))
    q, k = tensors["query"][0], tensors["key"][0]
    tensors["scores"] = (np.float32(q * k * 50 * np.sqrt(D)), zero_points["scores"])
    table = softmax_table(softmax, rng.uniform(0.02, 0.15))
    layer = static_kernel(heads, linears, tensors, *rules, table, softmax, tables)
    return layer, linears, tensors, table


def run_cached(layer, xq, xk, xv, out, **masks):
    """The call of a StaticLayer, with keys and values that come in two halves by way of a cache, from slot 2 on."""
    p = layer.parameters
    H, D, Dv = p.heads, p.head_size, p.value_size
    (B, S), half = xk.shape[:2], xk.shape[1] // 2
    keys, values = (np.full((B, H, S + 3, size), 99, np.int8) for size in (D, Dv))
    first, second = ([np.ascontiguousarray(x[:, part]) for x in (xk, xv)] for part in (slice(half), slice(half, S)))
    if half:
        layer(xq[:, :0], *first, out[:, :0], cached=(keys, values, 2, half))
    layer(xq, *second, out, **masks, cached=(keys, values, 2, S))
    for array in (keys, values):
        assert (array[:, :, :2] == 99).all() and (array[:, :, S + 2:] == 99).all()
