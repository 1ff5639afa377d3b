"""Bugs planted in the kernels of the CPU, each with the test that must find it: python tests/planted_bugs.py [WORD ...]

Each is one replacement in a copy of the package, whose kernels are then compiled for the plainest instruction set and
run by one test.  Every such test passes on a copy that is not changed, or nothing is said.  Prints a table; exit 1 if a
bug was not found.  WORDS choose the bugs whose file, text or test holds one of them.
"""
import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from places import ROOT, TESTS

# What an exception looks like that says nothing about results: the changed text does not compile.
BROKEN = ("SyntaxError", "NameError", "TypingError", "LoweringError", "ImportError", "UnsupportedError")


class Bug(NamedTuple):
    """`new` in place of `old`, once in a file of edgeattn/kernels/cpu; `test`: of pytest, or "fence KERNEL"."""

    what: str
    file: str
    old: str
    new: str
    test: str


GIVEN = "kernels/cpu/test_kernels_float32.py::test_attention_on_given_arrays"
FLOAT = "kernels/cpu/test_kernels_float32.py::test_float_layer"
FEW = "kernels/cpu/test_kernels_float32.py::test_every_small_number_of_tokens[FloatLayer-1e-05-any heads]"
GROUPS = "kernels/cpu/test_kernels_float32.py::test_layers_in_groups_of_heads[256-8-77]"
STATIC = "kernels/cpu/test_kernels_int8.py::test_every_rule_set_equals_integer_arithmetic[float_rne-float_rne-float_rne-lut_f32-"
SYMMETRIC, ASYMMETRIC = STATIC + "symmetric]", STATIC + "asymmetric]"
DROPPED = "kernels/cpu/test_kernels_int8.py::test_a_dropped_key_is_not_there[lut_f32]"
DECODE = "kernels/cpu/test_decode.py::test_is_accurate"
DYNAMIC = "kernels/cpu/test_kernels_float32.py::test_dynamic_layer"
SMALL = "kernels/cpu/test_kernels_float32.py::test_every_small_number_of_tokens[DynamicLayer-0.03-any heads]"
FORMULA = "test_functional_dynamic.py::test_equals_its_formula_and_is_close_to_float64"
TOKEN = "kernels/cpu/test_dynamic_kernels.py::test_every_token_is_quantized_by_its_own_largest_number"
PROJECTION = "quantized/test_dynamic.py::test_the_projection_alone_is_exact_integers_and_the_same_for_a_token_alone"
ENCODER = "kernels/cpu/test_encoder_float32.py::test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads[2-"
ENCODER_INT8 = "kernels/cpu/test_encoder_dynamic.py::test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads[2-"
ENCODER_STATIC = ("kernels/cpu/test_feed_forward_int8.py::"
                  "test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads[2-")
APART = "quantized/test_dynamic_outliers.py::test_large_features_cost_the_others_no_digits[45-4-2-33]"
PLACES = "models/test_positions.py::"
ALIGNED = PLACES + "test_cross_attention_counts_queries_from_the_key_they_are_aligned_to[False-2-masks2]"
FUNCTIONS = "kernels/cpu/test_simd.py::test_exponential_and_tanh"

BUGS = [
    # float32, given queries, keys and values
    Bug("a last tile of keys runs past the end where the keys fill none", "attend_lanes.py",
        "t = max(min(s, keys - ROWS), -s0)", "t = min(s, keys - ROWS) if s0 + keys >= ROWS else s",
        "fence float32-few-keys"),
    Bug("a last tile of keys steps back one row too far", "attend_lanes.py",
        "t = max(min(s, keys - ROWS), -s0)", "t = max(min(s, keys - ROWS - 1), -s0)", GIVEN),
    Bug("a window's left edge hides its first key", "score_masks.py",
        "distance < splat(np.int32(seen.low))", "distance < splat(np.int32(seen.low + 1))", GIVEN),
    Bug("a window's right edge shows a key more", "score_masks.py",
        "distance > splat(np.int32(seen.high))", "distance > splat(np.int32(seen.high + 1))", GIVEN),
    Bug("keys that some queries see count as seen by all", "score_masks.py",
        "full_from = q0 + WIDTH - 1 + low_edge", "full_from = q0 + low_edge", GIVEN),
    Bug("the last key of a window is left out", "score_masks.py",
        "last = max(min(q0 + queries + high_edge, S), first)", "last = max(min(q0 + queries + high_edge - 1, S), first)",
        GIVEN),
    Bug("the sum of earlier blocks is not rescaled", "attend_lanes.py",
        "load(scratch, AT_SUM + c * LANES) * factor)", "load(scratch, AT_SUM + c * LANES))", GIVEN),
    Bug("the context of earlier blocks is not rescaled", "attend_lanes.py",
        "for d in range(top):", "for d in range(0):", GIVEN),
    Bug("the sum leaves out the keys after the last four", "attend_lanes.py",
        "        total = total + p0\n    return total", "    return total", GIVEN),
    Bug("softcap bounds the scores and does not scale them back", "attend_lanes.py",
        "splat(softcap * LOG2_E)", "splat(LOG2_E)", GIVEN),
    Bug("a query head reads another group's keys", "functional_float32.py", "kv = h // group", "kv = h % p.kv_heads", GIVEN),
    Bug("a float mask is in other units than the scores", "score_masks.py",
        "v, added * splat(LOG2_E))", "v, added)", GIVEN),
    Bug("a padded copy of keys takes rows behind the last", "functional_float32.py",
        "k.data[k.at + s * k.step + d] if s < keys else _ZERO", "k.data[k.at + s * k.step + d]", "fence float32-few-keys"),
    Bug("the last features of a key are measured past its end", "attend_lanes.py",
        "d = min(start, D - LANES)", "d = start", "fence float32-function"),
    Bug("the padded copy of another batch entry's values is used", "functional_float32.py",
        "copied != head:", "copied != kv:", "fence float32-function"),
    Bug("no scratch for masks", "functional_float32.py", "S * WIDTH * (-(-L // WIDTH) if is_shared else 1)", "0",
        "fence float32-function"),
    # float32 layers, and the tiled product
    Bug("lanes without a query keep what an earlier call left", "fused.py",
        "for l in range(queries, WIDTH):", "for l in range(0):", "fence float32-layer"),
    Bug("a layer's query head reads another group's keys", "fused.py",
        "from_kv + h // repeats", "from_kv + h % (heads // repeats)", FLOAT),
    Bug("of two panels both have the first one's bias", "row_products.py",
        "finish_chain(p1, begun, k, 0, w, f + WIDTH, place_of(f + WIDTH, out))\n\n", "finish_chain(p1, begun, k, 0, w, f, place_of(f + WIDTH, out))\n\n", FEW),
    Bug("few queries all have the mask of the first", "attend_rows.py",
        "mask.at + i * mask_step + s0", "mask.at + s0", GIVEN),
    Bug("the powers that few queries have of the keys before are not rescaled", "attend_rows.py",
        "scratch[AT_TOTAL + q] * first_lane(factor)", "scratch[AT_TOTAL + q]", GIVEN),
    Bug("lanes past the last key count for few queries", "attend_rows.py",
        "splat(np.int32(keys - up + LANES))", "splat(np.int32(LANES))", FEW),
    Bug("the output's bias is added with every group of heads", "fused.py",
        "at_bias = p.bo + e_from if last", "at_bias = p.bo + e_from if last or not first", GROUPS),
    Bug("a sum of chains loses all but its last two", "matmul.py",
        "        if begun or k > 0:\n", "        if begun:\n", GIVEN),
    Bug("a bias is added for every chain of the depth", "row_products.py",
        "k + w.chain >= w.depth", "k >= 0", FLOAT + "[(1, 130, 130, 96, 4, 4, 24, 40, 70)]"),
    # positions of a layer's heads
    Bug("queries stand at the first key wherever they stand", "positions.py",
        "p.query_position + token + c", "token + c", ALIGNED),
    Bug("a norm of heads leaves their mean", "positions.py", "if has_mean != 0:", "if has_mean > 1:",
        PLACES + "test_it_is_its_formula[False-layer norms]"),
    Bug("rotated keys keep a mean that those of the first block lost", "dynamic_heads.py",
        "            if not smoothing:\n", "            if smoothing and not smoothing:\n",
        PLACES + "test_sizes_batches_threads_and_masks[True-64-2-1-45]"),
    Bug("every batch entry has the first one's kept keys", "fused_dynamic.py",
        "a.kept + 4 * p.kept_size * batch if", "a.kept if",
        "layers/test_projected_kv.py::test_it_gives_the_bytes_of_a_call_without[more0-True]"),
    # one query against a cache
    Bug("a block's sum is not weighed when blocks are joined", "decode_blocks.py",
        "weight = results[total + here] * first_lane(exp2(splat(results[maximum + here] - best)))",
        "weight = results[total + here]", DECODE),
    Bug("scores behind a block's last key are left as they were", "decode_blocks.py",
        "for s in range(count, count_up):", "for s in range(0):", "fence float32-cache"),
    Bug("the last key of a part vector has no score", "decode_float32.py",
        "for s in range(whole, count):", "for s in range(whole, count - 1):", DECODE),
    Bug("a last part vector of a key is read whole", "decode_float32.py",
        "tile_add_part_dots(tile, keys, at_k + whole, k_row, q, at_q + whole, q_row, D - whole)",
        "tile_add_dots(tile, keys, at_k + whole, k_row, q, at_q + whole, q_row)", "fence float32-cache"),
    Bug("rows of a cache count as there that only a longer entry has", "decode_int8.py",
        "left = keys_of(p, a, batch) - s0", "left = p.keys - s0", "fence int8-cache-left-windows"),
    Bug("the last row of a cache is read to the end of a vector", "cache_panels.py",
        "(left - LANES) * row >= size_up - size", "left >= LANES", "fence int8-cache"),
    Bug("the middle digit lacks its correction", "digits.py",
        "    middle = less_digit_sum(middle, corrections.data, corrections.at + 1)\n", "", DECODE),
    Bug("a key's score is scaled as its value", "decode_int8.py",
        "unit * load(own_scales, _OF_KEYS + s)", "unit * load(own_scales, _OF_VALUES + s)", DECODE),
    Bug("keys that only fill up a vector are seen", "decode_int8.py",
        "own_scales[_ABSENT + s] = _MINUS_INFINITY", "own_scales[_ABSENT + s] = _ZERO", DECODE),
    Bug("the last numbers of a row have no part in its scale", "cache_int8.py",
        "largest = max(largest, abs(numbers[d]))", "largest = max(largest, _ZERO)",
        "test_kv_cache.py::test_int8_codes_are_the_nearest_to_each_row_over_its_scale"),
    # static int8
    Bug("keys that only fill up a tile are seen", "fused_int8.py",
        "masked = band or has_keep or last_up > last", "masked = band or has_keep", SYMMETRIC),
    Bug("the keys' zero point is corrected without that of the queries", "fused_int8.py",
        "(OFFSET + zq) * Dp", "OFFSET * Dp", ASYMMETRIC),
    Bug("a head's scores are corrected by the sums of the first head's keys", "fused_int8.py",
        "at_krow + h * layout.keys + first", "at_krow + first", SYMMETRIC),
    Bug("every head has the first head's mask", "fused_int8.py",
        "if h == 0 or (has_keep and p.keep_h != 0):", "if h == 0:", DROPPED),
    Bug("a last tile of queries is written whole", "finish_int8.py",
        "if l + rows <= queries and e + WIDTH <= Eo:", "if e + WIDTH <= Eo:", "fence static-layer"),
    Bug("probabilities are twice as large where keys are masked", "softmax_int8.py",
        "inverse = _zero_where(empty, inverse)", "inverse = inverse + _zero_where(empty, inverse)", DROPPED),
    Bug("a row's maximum is that of every other key", "softmax_int8.py",
        "return larger_bytes(m, shift_right_logical(m, splat(np.int32(8))) | (m << splat(np.int32(24))))", "return m",
        SYMMETRIC),
    Bug("a negative tie is rounded up", "requantize.py",
        "threshold = (mask >> one) + select(v < splat(np.int32(0)), one, splat(np.int32(0)))", "threshold = mask >> one",
        "kernels/cpu/test_kernels_int8.py::test_vector_rule_equals_the_rule_on_python_integers[double]"),
    Bug("a token's probabilities are not corrected for the values' zero point", "step_int8.py",
        "total * (LANE_SHIFT + zv)", "total * LANE_SHIFT", ASYMMETRIC),
    Bug("a group of four takes values behind the last", "cached_int8.py",
        "min(at0 + 3 * Dv, last)", "at0 + 3 * Dv", "fence static-layer"),
    Bug("the last keys that fill no vector are not looked up", "fused_int8.py",
        "round_up(tokens, LANES) * k_row, weights, p.tk", "tokens // LANES * LANES * k_row, weights, p.tk",
        "quantized/test_scaled_projections.py::test_masks_lengths_batches_and_threads[litert-3-5]"),
    Bug("codes of a cache's keys are not looked up", "cached_int8.py",
        "p.yk, p.tk)", "p.yk, 0)", "quantized/test_scaled_projections.py::test_a_cache_holds_what_the_product_reads[0-litert]"),
    Bug("a projection's sums are not corrected for its input's zero point", "layer_int8.py",
        "(OFFSET + zero_point) * weight", "OFFSET * weight", SYMMETRIC),
    # dynamic int8
    Bug("a product with keys lacks what its shift adds", "int8_operands.py",
        "total * splat(np.int32(-LANE_SHIFT))", "total * splat(np.int32(0))", FORMULA),
    Bug("a row's tail takes in the next row", "dynamic.py",
        "x[at + whole + i] if whole + i < E else _ZERO", "x[at + whole + i]", TOKEN),
    Bug("queries behind the first vector of a block are not copied", "fused_dynamic.py",
        "for c in range(0, min(WIDTH, p.queries - q0), LANES):", "for c in range(0, 1, LANES):", DYNAMIC),
    Bug("a lone query's context forgets the blocks of keys before the last", "attend_dynamic.py",
        "context = fma(load(own.float32, at_out + d), broadcast(own.float32, stats.new_top), context)", "pass",
        "quantized/test_dynamic.py::test_one_query_and_many_keys"),
    Bug("a function's query head reads another group's keys", "functional_dynamic.py",
        "round_up(Dv, LANES), h // (H // p.kv_heads)", "round_up(Dv, LANES), h % p.kv_heads", FORMULA),
    Bug("the last features of a function's row are not cleared", "functional_dynamic.py",
        "own.float32[at_row_major + t * padded + d] = _ZERO", "pass", "fence dynamic-function"),
    Bug("a weight's sum is not corrected for the shift", "word_products.py",
        "-OFFSET * codes.sum(1, dtype=np.int32)", "0 * codes.sum(1, dtype=np.int32)", DYNAMIC),
    # a lone token
    Bug("every panel of a lone row is the first", "one_row.py",
        "panels.at + f * panels.depth4, panels.depth4)", "panels.at, panels.depth4)", SYMMETRIC),
    Bug("the values' zero point is forgotten for a lone query", "fused_int8.py",
        "splat(from_zero)", "splat(np.int32(0))", ASYMMETRIC),
    Bug("a lone query's context is read as if it had others beside it", "fused_int8.py",
        "group = 1 if alone else WIDTH", "group = WIDTH",
        "kernels/cpu/test_kernels_int8.py::test_a_lone_query_without_an_output_projection"),
    Bug("a lone token's key lies where the first one does", "dynamic_heads.py",
        "shared.int8, 4 * t * K4 + h * size", "shared.int8, h * size", SMALL),
    Bug("a lone token's value is one number", "one_token.py",
        "own.int8[4 * at_bytes + d]", "own.int8[4 * at_bytes]", SMALL),
    Bug("no scratch for a layer's masks", "layer_dynamic.py",
        "place(p.at_masks, (S + 4) * WIDTH if masked else 0)", "place(p.at_masks, 0)",
        "fence dynamic-layer"),
    Bug("a last tile of three rows begins a row too early", "byte_products_tiles.py",
        "step(tile_zero(3, COLUMNS, like), 3, t, f, at_next", "step(tile_zero(3, COLUMNS, like), 3, t - 1, f, at_next", SMALL),
    Bug("keys have the queries' weights of features that are apart", "dynamic_heads.py",
        "project_block_rows(projection, p.vk, Hkv", "project_block_rows(projection, p.vq, Hkv", APART),
    Bug("what is apart is among the bytes too", "projection_dynamic.py",
        "own.float32[here + column] = np.float32(0)", "pass", APART),
    Bug("a head's lanes are turned from the tokens before", "dynamic_heads.py",
        "p.at_rows + t * row + h * size + d", "p.at_rows + t // WIDTH * WIDTH * row + h * size + d", SMALL),
    Bug("later tokens of a projection have the scales of the first", "projection_dynamic.py",
        "tile_dequantize(tile, scales.data, scales.at + t,", "tile_dequantize(tile, scales.data, scales.at,", PROJECTION),
    # projections and functions
    Bug("a projection loses all chains but the last", "row_products.py",
        "out.step, begun or k > 0, w.at_bias", "out.step, begun, w.at_bias",
        "fence projections"),
    Bug("powers below the smallest are taken as they are", "softmax.py",
        "return exp2_within(maximum(splat(_LOWEST), t))", "return exp2_within(t)", FUNCTIONS),
    # what an encoder block has beside attention
    Bug("a last hidden feature is left out", "feed_forward_float32.py", "depth = min(p.at_once, p.hidden - g)",
        "depth = min(p.at_once, p.hidden - g - 1)", "kernels/cpu/test_encoder_float32.py::test_is_accurate[feed-forward gelu]"),
    Bug("threads that share hidden features leave out the last", "feed_forward_float32.py",
        "begin, end = share_of(p.hidden_up, WIDTH, parts, part)",
        "begin, end = share_of(p.hidden_up - 32, WIDTH, parts, part)", ENCODER + "feed-forward gelu]"),
    Bug("a norm counts what pads a row", "norm.py", "d = wide_first(wide_load(y, at + e) - middle, width - e)",
        "d = wide_load(y, at + e) - middle", "kernels/cpu/test_encoder_float32.py::test_norms_are_accurate[33-layer]"),
    Bug("a zero point is one too high", "dynamic_rows.py",
        "zero = round_to_int(below * inverse)", "zero = round_to_int(below * inverse) + splat(np.int32(1))",
        ENCODER_INT8 + "feed-forward, apart]"),
    Bug("columns apart of a group are taken from its first", "dynamic_rows.py",
        "column = np.int64(m.weights[j + k]) - first", "column = np.int64(m.weights[j + k])",
        ENCODER_INT8 + "feed-forward, apart]"),
    Bug("a second channel counts twice", "dynamic_products.py",
        "m.f[at + channel] = m.f[at + channel] + m.f[at + out_up + k]",
        "m.f[at + channel] = m.f[at + channel] + m.f[at + out_up + k] + m.f[at + out_up + k]",
        ENCODER_INT8 + "feed-forward, apart]"),
    # static int8
    Bug("a further column holds what its feature is, not what is left of it", "row_codes.py",
        "value - min(max(np.rint(value * inverse), low), high) * scale", "value", ENCODER_STATIC + "both]"),
    Bug("what a row's last bytes add is counted twice", "word_products.py",
        "own + select(lane_index() < splat(np.int32(whole - i)), none, more)", "own + more", ENCODER_STATIC + "both]"),
    Bug("a further output is counted from the zero point", "row_codes.py",
        "none = y + np.int64(w.int32[p.more_outputs + 2 * k]), w.int32[p.more_outputs + 2 * k + 1]",
        "none = y + np.int64(w.int32[p.more_outputs + 2 * k]), np.int32(p.z2)", ENCODER_STATIC + "both]"),
    Bug("a gate's zero point is that of the hidden features", "feed_forward_int8.py",
        "splat(np.int32(p.active_z)), splat(np.int32(p.zh))", "splat(np.int32(p.zh)), splat(np.int32(p.zh))",
        ENCODER_STATIC + "gated, tflm]"),
]
# One each of the tests that compile little: what `make test` plants.
SHORT = [next(bug for bug in BUGS if bug.test.startswith(test)) for test in (
    "fence int8-cache-left-windows", TOKEN, "kernels/cpu/test_kernels_int8.py::test_vector_rule")]


def copy_package(folder):
    """The packages as they are, in `folder`."""
    for name in ("edgeattn", "quant"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def plant(bug, folder):
    """Change the copy in `folder`; AssertionError where the place is not there once."""
    path = folder / "edgeattn" / "kernels" / "cpu" / bug.file
    text = path.read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"the place of {bug.what!r} is {text.count(bug.old)} times in {bug.file}"
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def run(test, folder):
    """(exit status, output) of a test on the package in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.update(EDGEATTN_ISA="generic", PYTHONPATH=os.pathsep.join([str(folder), str(TESTS)]),
                       NUMBA_CACHE_DIR=str(folder / "kernels"))
    kind, _, kernel = test.partition(" ")
    command = [TESTS / "fence.py", kernel] if kind == "fence" else [
        "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", TESTS / test]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def found(bug):
    """How the bug's test finds it: the case, or the assertion; AssertionError if it does not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        plant(bug, folder)
        status, output = run(bug.test, folder)
    for word in BROKEN:
        assert word not in output, f"{bug.what!r} does not compile: {output[-2000:]}"
    assert status == 1 or status < 0, f"{bug.test} did not find {bug.what!r}: exit {status}\n{output[-2000:]}"
    if status < 0:
        cases = [line for line in output.splitlines() if line.startswith("case ")]
        return f"signal {-status} at {cases[-1] if cases else '?'}"
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "AssertionError")) or " on 1 threads" in line
             or " on 2 threads" in line]
    return lines[-1] if lines else output.splitlines()[-1]


def passes(tests):
    """Those of the tests that fail on a copy without a bug, with what they print."""
    failing = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for test, (status, output) in zip(tests, pool.map(lambda test: run(test, folder), tests), strict=True):
                if status:
                    failing[test] = output[-2000:]
    return failing


def main(words):
    bugs = [bug for bug in BUGS if not words or any(word in " ".join(bug) for word in words)]
    failing = passes(sorted({bug.test for bug in bugs}))
    for test, output in failing.items():
        print(f"{test} fails without a bug:\n{output}")
    if failing:
        return 1

    def look(bug):
        try:
            return True, found(bug)
        except AssertionError as error:
            return False, str(error)

    missed = 0
    print("| file | bug | found by | how |\n|---|---|---|---|")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, (ok, how) in zip(bugs, pool.map(look, bugs), strict=True):
            missed += not ok
            print(f"| {bug.file} | {bug.what} | {bug.test if ok else '**nothing**'} | {how[:150] if ok else how} |",
                  flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs found")
    return int(missed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    sys.exit(main(parser.parse_args().words))
