"""Planted bugs: each line of MUTATIONS breaks a kernel in one place, and the named check must fail for it.

The short form plants one bug for each check, and looks for the places of all.
"""
import contextlib
import functools
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import reference
import test_cuda_encoders
import test_cuda_float32
import test_cuda_int8
import test_cuda_int8_functional
import test_cuda_layers
import test_cuda_precision
import test_cuda_probabilities
from cases import Case
from cuda_emulated import emulated_only, long_form
from kernels_under_test import ASYMMETRIC, make_layer

from edgeattn.executors.cuda import functional as on_cuda
from edgeattn.kernels.cuda import attend, encoder, host, layers, static_layer
from edgeattn.kernels.cuda import driver as driver_module
from edgeattn.kernels.cuda.language import Kernel, int32
from edgeattn.kernels.cuda.ptx import load_b32, store_b32, thread

pytestmark = [pytest.mark.usefixtures("device"), emulated_only]
ORDER = ("tiles", "multiply_adds", "fragments", "tensor_cores", "int8_products", "attention_parameters", "fetch", "softmax",
         "block", "score_masks", "stage", "probabilities", "finish", "attention", "merge", "activation", "linear", "quantize", "key_mean", "masks",
         "elements", "norm", "rules", "byte_tiles", "linear_int8", "static_parameters", "static_scores", "static_softmax", "static_attention", "linear_dynamic")
IN_HOST = {"attention": "fa", "merge": "fm", "linear": "fl", "quantize": "qz", "key_mean": "key_mean", "masks": "mk",
           "elements": "el", "norm": "nm", "linear_int8": "li", "static_attention": "sa",
           "linear_dynamic": "ld"}


@functools.cache
def source(path):
    """The text of a module, and what it is compiled to."""
    text = Path(path).read_text(encoding="utf-8")
    return text, compile(text, path, "exec")


@contextlib.contextmanager
def planted(name, old, new):
    """The kernels, built anew with one place of one file changed, in place of those that are launched."""
    kept = {module: sys.modules[f"edgeattn.kernels.cuda.{module}"] for module in ORDER}
    used = [(where, module, attribute, getattr(where, attribute)) for where in (attend, host, layers, static_layer, encoder)
            for module, attribute in IN_HOST.items() if hasattr(where, attribute)]
    try:
        for module in ORDER:
            text, code = source(kept[module].__file__)
            if module == name:
                assert text.count(old) == 1, f"the place to break is {text.count(old)} times in {name}.py"
                code = compile(text.replace(old, new), kept[module].__file__, "exec")
            made = types.ModuleType(f"edgeattn.kernels.cuda.{module}")
            made.__package__ = "edgeattn.kernels.cuda"
            exec(code, made.__dict__)
            sys.modules[made.__name__] = made
            for where, of, attribute, _ in used:
                if of == module:
                    setattr(where, attribute, made)
        on_cuda._CALLS.clear()
        yield
    finally:
        for module in ORDER:
            sys.modules[f"edgeattn.kernels.cuda.{module}"] = kept[module]
        for where, _, attribute, before in used:
            setattr(where, attribute, before)


def check_case(**options):
    case = Case("planted", **{**dict(B=1, H=1, D=8), **options})
    arrays, masks = case.qkv(), case.masks()
    got = test_cuda_float32.attend(case, arrays, masks).numpy()
    want = [test_cuda_float32.oracle(case, arrays, masks, dtype) for dtype in (np.float64, np.float32)]
    reference.assert_as_accurate(got, *want)


def check_float():
    check_case(L=33, S=70)


def check_band():
    check_case(L=70, S=70, is_causal=True)


def check_groups():
    check_case(H=4, Hkv=2, L=2, S=5)


def check_masks():
    check_case(L=5, S=9, bool_mask=(5, 9))
    check_case(L=5, S=9, float_mask=(5, 9))


def check_finite_mask():
    test_cuda_float32.test_a_finite_mask_hides_no_key_by_itself()


def check_pieces():
    check_case(L=3, S=5, D=72, Dv=70)


def check_split():
    check_case(L=1, S=700)


def check_precision(name, **options):
    case = Case("planted", **{**dict(B=1, H=1, D=8), **options})
    arrays, masks = case.qkv(), case.masks()
    test_cuda_precision.check(test_cuda_float32.attend(case, arrays, masks, precision=name).numpy(), case, arrays, masks, name)


def check_half():
    check_precision("float16", L=33, S=70, Dv=20)


def check_tf32():
    check_precision("tf32", L=33, S=70, Dv=20)


def check_half_masks():
    check_precision("float16", L=40, S=70, window_size=(9, 2), causal_alignment="upper_left", softcap=2.0, float_mask=(40, 70))


def check_not_finite():
    for name in test_cuda_precision.PRECISIONS:
        test_cuda_precision.test_what_is_not_finite_goes_where_it_is_seen(name)


def check_dynamic():
    test_cuda_int8_functional.test_everything_without_a_softcap()


def check_dynamic_window():
    test_cuda_int8_functional.test_a_window_may_begin_at_any_key()


def check_dynamic_masks():
    for bad in (np.nan, 1e38):
        test_cuda_int8_functional.test_what_is_behind_a_mask_stays_there(bad)


def check_dynamic_mean():
    test_cuda_int8_functional.test_a_row_of_one_huge_finite_mask_is_the_mean_of_the_values(-1e9)


def check_strong_key():
    test_cuda_int8_functional.test_a_strong_key_takes_no_weight_from_the_others(0.3)


def check_not_a_number():
    test_cuda_float32.test_a_query_that_is_not_a_number_shows("float32")


def check_offset():
    test_cuda_int8_functional.test_an_offset_that_all_keys_share_changes_little()


def check_codes():
    test_cuda_int8_functional.test_codes_and_scales_are_the_cpus(driver_module.driver())


def check_padding():
    test_cuda_layers.test_a_mask_and_padding_together((2, 2, 5, 9))


def check_weights():
    test_cuda_probabilities.test_probabilities("band-tiles")


def check_split_weights():
    test_cuda_probabilities.test_probabilities("decode-split")


def check_nothing():
    test_cuda_probabilities.test_keys_and_weights_of_nothing()


def check_extras():
    test_cuda_probabilities.test_layers(("keys", "gate"))


def check_cache():
    test_cuda_probabilities.test_what_a_cache_with_a_window_holds()


def check_static_cache():
    test_cuda_layers.test_static_decoding_gives_the_bits_of_the_whole("litert", 7)


def check_static_weights():
    test_cuda_layers.test_probabilities_of_a_static_layer("litert")


def check_nan():
    case = Case("planted-nan", B=1, H=1, L=5, S=9, D=8)
    q, k, v = case.qkv()
    v[:, :, 4] = np.nan
    keep = np.arange(9) != 4
    put = driver_module.driver().array
    for mask in (keep, np.where(keep, np.float32(0), np.float32(-np.inf))):
        got = host_attention(put(q), put(k), put(v), put(mask))
        assert np.isfinite(got).all()
    k[:, :, 4] = np.nan
    assert np.isfinite(host_attention(put(q), put(k), put(v), put(mask))).all()


def host_attention(*arrays):
    return importlib.import_module("edgeattn").scaled_dot_product_attention(*arrays).numpy()


def check_static(rules=("float_rne", "float_rne", "float_rne", "lut_f32"), shape=(1, 17, 70, 20, 8, 1, 12, 10)):
    rng = np.random.default_rng(11)
    B, L, S, E, D, heads, Dv, Eo = shape
    _, *parts = make_layer(rng, heads, E, D, Dv, Eo, ASYMMETRIC, rules[:3], rules[3])
    x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
    test_cuda_int8.run(parts, heads, rules, x, band=(-S, 40))


def check_fixed():
    check_static(("double", "double", "double", "fixed"))


def check_u16():
    check_static(("float_rne", "float_rne", "double", "lut_u16"))


def check_deep():
    check_static(shape=(1, 3, 5, 70, 72, 1, 70, 66))


def check_wide():
    check_static(shape=(1, 3, 5, 80, 8, 1, 8, 8))


def check_static_band():
    rng = np.random.default_rng(12)
    rules = ("double", "double", "double", "fixed")
    _, *parts = make_layer(rng, 1, 7, 8, 5, 6, ASYMMETRIC, rules[:3], rules[3])
    test_cuda_int8.run(parts, 1, rules, [rng.integers(-128, 128, (1, 67, 7)).astype(np.int8)] * 3, band=(-5, 0))


def check_rules():
    import oracle_kernels as oracle

    device, rules = driver_module.driver(), sys.modules["edgeattn.kernels.cuda.rules"]
    values = np.array([-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 100, -100] * 2, np.int32)
    for name in ("double", "ruy", "float_rne", "float64"):
        rule = rules.RULES[name]

        def kernel(rule):
            def apply(a, p):
                at = thread() * 4
                store_b32(at >= 0, a[1] + at, int32(rule(load_b32(at >= 0, a[0] + at), p[0], p[1])))
            return Kernel(apply, 2, 2, 32, 0)

        m = np.float32(0.125) if name == "float_rne" else np.float64(0.125)
        first, second = (int(x) for x in rules.planes(name, [m])[:, 0])
        acc, got = device.array(values), device.empty((32,), np.int32)
        device.launch(kernel(rule), (1, 1, 1), [acc.pointer, got.pointer], [first, second], 0)
        given = (m,) if name in ("float_rne", "float64") else oracle.quantize_multiplier(m)
        np.testing.assert_array_equal(got.numpy(), [getattr(oracle, "rule_" + name)(int(v), *given) for v in values])


def check_norm():
    test_cuda_encoders.test_a_norm_has_the_bits_of_the_rule(False, 70)


def check_feed_forward():
    for kind in ("gelu", "gelu_tanh", "silu"):
        test_cuda_encoders.test_a_feed_forward_equals_the_formula(kind, kind == "silu")


def check_dynamic_feed_forward():
    test_cuda_encoders.test_a_dynamic_feed_forward_has_the_bytes_of_the_cpu("feed-forward, apart")
    test_cuda_encoders.test_a_dynamic_feed_forward_has_the_bytes_of_the_cpu("gated silu")


def check_encoder():
    test_cuda_encoders.test_an_encoder_equals_the_formula(False)


def check_ragged():
    test_cuda_encoders.test_sequences_of_several_lengths_equal_each_alone()


def check_text():
    test_cuda_encoders.test_a_text_encoder_goes_whole()


OF_THIS_FILE = [check_float, check_band, check_groups, check_masks, check_pieces, check_split, check_half, check_tf32, check_half_masks,
                check_nan, check_static, check_fixed, check_u16, check_deep, check_wide, check_static_band, check_rules]
# These are tests of other files, which run them with nothing planted.
OF_OTHERS = [check_norm, check_feed_forward, check_dynamic_feed_forward, check_encoder, check_ragged, check_text, check_finite_mask,
             check_not_finite, check_dynamic, check_dynamic_window, check_dynamic_masks, check_dynamic_mean, check_strong_key,
             check_not_a_number, check_offset, check_codes, check_padding, check_weights, check_split_weights, check_nothing, check_extras,
             check_cache, check_static_cache, check_static_weights]

MUTATIONS = [
    # float32 attention
    ("attention", "cuda.syncthreads()\n                scores(", "scores(", check_float),
    ("attention", "            cuda.syncthreads()\n            # 5. values", "            # 5. values", check_float),
    ("softmax", "shrink = exp2(m[r] - above)", "shrink = float32(1.0)", check_float),
    ("softmax", "                o[r, k] = o[r, k] * shrink", "                o[r, k] = o[r, k]", check_float),
    ("score_masks", "edge = (int32(k0 + KEYS) > last) |", "edge = ", check_float),
    ("score_masks", "int32(q0 + high) < int32(k0 + KEYS - 1))", "int32(q0 + high) < k0)", check_band),
    ("score_masks", "(across(k) < to_key)", "(across(k) <= to_key)", check_band),
    ("softmax", "float32(-0.0)", "float32(0.0)", check_nan),
    ("multiply_adds", "swap = int32((x & 7) << 2)", "swap = int32(0)", check_float),
    ("finish", "good = row < p[P_L]\n            to = out", "good = row >= 0\n            to = out", check_float),
    ("attention", "kv = quotient(head, p[P_GROUP])", "kv = head", check_groups),
    ("score_masks", "seen = load_u8((row < p[P_L]) & (there < last), keep + at) != 0", "seen = there >= 0", check_masks),
    ("score_masks", "select_f(b == float32(MINUS_INFINITY), b, fma(", "select_f(b == float32(1.0), b, fma(", check_nan),
    ("score_masks", "fma(bounded,", "fma(b,", check_finite_mask),
    ("attention", "if p[P_CHUNKS] > 1 or k0 == first:", "if k0 == first and piece == 0:", check_pieces),
    ("finish", "row_sum = row_sum + shuffle_f(row_sum, int32(1 << step))", "row_sum = row_sum + float32(0.0)", check_float),
    ("softmax", "float32(-126.0)", "float32(-1.0)", check_float),
    ("merge", "weight = exp2(found - base) *", "weight =", check_split),
    ("merge", "stored = good & (d < p[P_DV])", "stored = good", check_nothing),
    # probabilities, added keys, gates
    ("block", "first, end = int32(0), p[P_S]", "end = p[P_S]", check_weights),
    ("finish", "if p[P_SUMS] != 0:", "if p[P_SUMS] < 0:", check_weights),
    ("probabilities", "exp2(s[r, k] - m[r]) * total[r])", "exp2(s[r, k] - m[r]))", check_weights),
    ("probabilities", "(int32(key0 + across(k)) < p[P_S])", "(int32(key0) < p[P_S])", check_weights),
    ("probabilities", "fma(exp2(load_f32(row < p[P_L], found) - m[r]), size, total[r])", "total[r] + size", check_split_weights),
    ("elements", "divide(total, float_of_bits(p[M_HEADS]))", "total", check_extras),
    ("elements", "float32(1.0) + exp2(power)", "float32(1.5) + exp2(power)", check_extras),
    ("quantize", "divisor = factor", "divisor = float32(1.0)", check_cache),
    # float16 and tf32
    ("tensor_cores", "half_pair(b, a), half_pair(d, c)", "half_pair(a, b), half_pair(d, c)", check_half),
    ("tensor_cores", "half_pair(s[0, 4 * k + 1], s[0, 4 * k])", "half_pair(s[0, 4 * k], s[0, 4 * k + 1])", check_half),
    ("tensor_cores", "b0, b1, b2, b3 = read_turned(", "b0, b2, b1, b3 = read_turned(", check_half),
    ("tensor_cores", "at + k * 16 * pitch + n * 32", "at + k * 8 * pitch + n * 32", check_half),
    ("fragments", "c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3] = mma(\n                    a0, a1, a2, a3, b2, b3",
     "c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3] = mma(\n                    a0, a1, a2, a3, b1, b3",
     check_half),
    ("fragments", "return 8 * (k >> 1) + (k & 1)", "return 8 * (k & 1) + (k >> 1)", check_half),
    ("tensor_cores", "(k * 8 + 1) * pitch", "(k * 8 + 4) * pitch", check_tf32),
    ("tensor_cores", "a2, a3 = to_tf32(s[0, 2 * k + 1]), to_tf32(s[1, 2 * k + 1])", "a2, a3 = to_tf32(s[1, 2 * k + 1]), to_tf32(s[0, 2 * k + 1])",
     check_tf32),
    ("tensor_cores", "PITCH = chunk * SIZE + 16", "PITCH = chunk * SIZE + 8", check_half),
    ("fragments", "return int32((t >> 5) * 16 + (lane >> 2)), pair, pair", "return int32((t >> 5) * 16 + (lane >> 2)), lane, pair", check_half),
    ("score_masks", "s[r, k] = s[r, k] * factor", "s[r, k] = s[r, k]", check_half),
    ("score_masks", "s[r, k] = tanh(s[r, k]) * softcap", "s[r, k] = tanh(s[r, k])", check_half_masks),
    ("tensor_cores", "return select_f(finite(e), e, float32(0.0))", "return e", check_not_finite),
    ("tensor_cores", "both = (above > 0) & (below > 0)", "both = (above > 0) & (below < 0)", check_not_finite),
    ("tensor_cores", "s[r, k] = select_f(bits_of(s[r, k]) == GONE, float32(0.0), float32(1.0))", "s[r, k] = float32(1.0)", check_not_finite),
    ("attention", "if careful:\n                    cuda.syncthreads()\n", "if careful:\n", check_not_finite),
    # dynamic int8
    ("block", "first = int32(first & -4)", "first = int32(first)", check_dynamic_window),
    ("softmax", "s[r, k] - here + value_log", "s[r, k] - here - value_log", check_dynamic),
    ("softmax", "s[r, k] - here + value_log", "s[r, k] + value_log", check_dynamic_mean),
    ("softmax", "- float32(_LOG2_255)\n", "- float32(9.0)\n", check_dynamic),
    ("softmax", "exp2(here - above + top))", "exp2(top))", check_strong_key),
    ("softmax", "exp2(here - above + top))", "exp2(here - above))", check_strong_key),
    ("softmax", "select_f(empty, float32(0.0), exp2(here", "select_f(gone, float32(0.0), exp2(here", check_dynamic),
    ("softmax", "top = maximum(top, shuffle_f(top, int32(1 << step)))", "top = maximum(top, top)", check_dynamic),
    ("softmax", "s[r, k] = to_float(byte)", "s[r, k] = exp2(s[r, k] - top)", check_strong_key),
    ("softmax", "return row_sum * left[r]", "return row_sum * exp2(top)", check_strong_key),
    ("int8_products", "fma(to_float(found[r, k]), left[r], o[r, k])", "fma(to_float(found[r, k]), left[0], o[r, k])", check_dynamic),
    ("softmax", "return y * float_of_bits(int32(bits_of(shifted) << 23))",
     "return float_of_bits(int32(bits_of(y) + (bits_of(shifted - float32(127.0)) << 23)))", check_not_a_number),
    ("softmax", "row_sum = fma(s[r, k], read_f32(at), row_sum)", "row_sum = row_sum + s[r, k]", check_dynamic),
    ("stage", "write_f32(int32(lists + t * 4), select_f(t < KEYS, w, value_log))",
     "write_f32(int32(lists + t * 4), select_f(t < KEYS, w, w))", check_dynamic),
    ("stage", "select_f(size == size, divide(float32(1.0), size), float32(0.0))", "divide(float32(1.0), size)", check_dynamic_masks),
    ("int8_products", "at = int32(to + times(int32(row + 8 * r), PITCH)", "at = int32(to + times(int32(row + r), PITCH)", check_dynamic),
    ("key_mean", "-mean)", "mean)", check_offset),
    ("key_mean", "divide(float32(1.0), select_f(good, size, float32(1.0)))", "float32(1.0)", check_dynamic),
    ("key_mean", "for n0 in range(0, queries, 4):", "for n0 in range(0, 1, 4):", check_dynamic),
    ("key_mean", "seen = select_f(good & kept, float32(1.0), seen)", "seen = float32(1.0)", check_dynamic_masks),
    ("quantize", "divide(float32(127.0), largest)", "divide(float32(128.0), largest)", check_codes),
    ("quantize", "code = nearest(v * inverse)", "code = nearest(v * inverse - float32(0.5))", check_codes),
    ("quantize", "select_i(finite, code, int32(0))", "code", check_codes),
    ("masks", "select_i(seen & real,", "select_i(seen,", check_padding),
    ("masks", "times_wide(b, p[P_PADDING_B]) + ", "", check_padding),
    # encoders
    ("norm", "squares = fma(v, v, squares)", "squares = fma(v, v, float32(0.0))", check_norm),
    ("norm", "variance + float_of_bits(p[P_EPS])", "variance", check_norm),
    ("norm", "return x + shuffle_f(x, 1)", "return x", check_norm),
    ("norm", "select_f(there, load_f32(there, x + d * 4) - mean, float32(0.0))", "load_f32(there, x + d * 4) - mean", check_norm),
    ("activation", "fma(float32(0.33), a,", "fma(float32(0.3), a,", check_feed_forward),
    ("activation", "divide(x, float32(1.0) + power_of_two(t))", "divide(x, float32(1.0) + power_of_two(-t))", check_feed_forward),
    ("activation", "at_most(maximum(x, -x), 4.5)", "at_most(maximum(x, -x), 9.5)", check_dynamic_feed_forward),
    ("linear", "y = y + load_f32(good, a[A_RESIDUAL] + at)", "y = y + float32(0.0)", check_encoder),
    ("linear", "y = y * load_f32(good, a[A_FACTOR] + at)", "y = y * float32(1.0)", check_feed_forward),
    ("linear_dynamic", "int32(nearest(low * inverse) - 128)", "int32(nearest(low * inverse) - 127)", check_dynamic_feed_forward),
    ("linear_dynamic", "select_i(finite, int32(-shift), int32(0))", "int32(0)", check_dynamic_feed_forward),
    ("linear_dynamic", "if group == 0:", "if group >= 0:", check_dynamic_feed_forward),
    ("linear_dynamic", "(e0 & (GROUP - TILE)) == GROUP - TILE", "(e0 & GROUP) == GROUP", check_dynamic_feed_forward),
    ("linear_dynamic", "w + times(w_row, 3)", "w + times(w_row, 2)", check_dynamic_feed_forward),
    ("linear_dynamic", "add(y, load_f32(more, a[A_SECOND] + at))", "y", check_dynamic_feed_forward),
    ("linear_dynamic", "y = multiply(y, load_f32(good, a[A_FACTOR] + at))", "y = y", check_dynamic_feed_forward),
    ("elements", "load_f32(good & (taken >= 0), x + d)", "load_f32(good, x + d)", check_ragged),
    ("elements", "load_f32(good, a[S_X] + at) + load_f32(good, a[S_Y] + at)", "load_f32(good, a[S_X] + at)", check_text),
    # int8
    ("static_scores", "v = int32(v - times(zk,", "v = int32(v + times(zk,", check_static),
    ("static_scores", "v = int32(v - times(zq,", "v = int32(v + times(zq,", check_static),
    ("static_attention", "v = int32(o[n, j] - times(p[P_ZV],", "v = int32(o[n, j] + times(p[P_ZV],", check_static),
    ("static_softmax", "int32(g + 8 * i))", "int32(g))", check_static),
    ("static_softmax", "ordered = add(ordered, read_f32(int32(from_row + j * 4)))",
     "ordered = read_f32(int32(from_row + j * 4))", check_static),
    ("linear_int8", "select_i(d < size, code, int32(0))", "code", check_static),
    ("byte_tiles", "total = int32(total + shuffle_i(total, 1))", "total = int32(total)", check_static),
    ("static_softmax", "return int32(x + shuffle_i(x, 2))", "return x", check_fixed),
    ("static_attention", "                cuda.syncthreads()\n                multiply_u8s8", "                multiply_u8s8", check_static),
    ("static_scores", "if D_up > TILE:\n            stage_rows", "if D_up < 0:\n            stage_rows", check_deep),
    ("byte_tiles", "(row < rows) & (part * 16 < left)", "row < rows", check_wide),
    ("static_attention", "(larger(0, int32(q0 + p[P_LOW])) & -16)", "(larger(0, int32(q0 + p[P_LOW])))", check_static_band),
    ("byte_tiles", "(n & 3) + ((n >> 5) << 2) & 63", "(n & 3) + ((n >> 5) << 2) & 31", check_static_cache),
    ("byte_tiles", "write_s8(int32(at + j * PITCH)", "write_s8(int32(at + j)", check_static_cache),
    ("static_softmax", "p[P_WEIGHTS_FIRST] + s", "s", check_static_cache),
    ("static_softmax", "int32(byte - 128)", "byte", check_static_weights),
    ("static_attention", "range(0, p[P_WEIGHTS_ROW], TILE)", "range(0, 0, TILE)", check_static_cache),
    ("rules", "threshold = int32((mask >> 1) + select_i(v < 0, int32(1), int32(0)))", "threshold = int32(mask >> 1)", check_rules),
    ("rules", "(int64(1) << right) >> int64(1)", "(int64(1) << right) >> int64(2)", check_rules),
    ("rules", "rest <= float64(-0.5)", "rest < float64(-0.5)", check_rules),
    ("rules", "int32(35 - zeros)", "int32(34 - zeros)", check_fixed),
    ("rules", "int32(126 - (bits >> 23))", "int32(127 - (bits >> 23))", check_u16),
    ("rules", "float32(0.00390625)))\n    return bits_of", "float32(0.0078125)))\n    return bits_of", check_static),
]


@pytest.mark.parametrize("check", [*OF_THIS_FILE, *(pytest.param(check, marks=long_form) for check in OF_OTHERS)],
                         ids=lambda check: check.__name__)
def test_nothing_planted_nothing_found(check):
    with planted("block", "offset = p[P_OFFSET]", "offset = p[P_OFFSET]"):
        check()


def test_the_place_of_every_bug_is_there_once():
    for name, old, new, check in MUTATIONS:
        assert source(sys.modules[f"edgeattn.kernels.cuda.{name}"].__file__)[0].count(old) == 1, (name, old)
        assert old != new and check in (*OF_THIS_FILE, *OF_OTHERS)


def cases():
    """MUTATIONS, and which of them the short form plants: the first for each check."""
    seen = set()
    for i, mutation in enumerate(MUTATIONS):
        check = mutation[-1]
        yield pytest.param(*mutation, id=f"{mutation[0]}-{i}", marks=[long_form] if check in seen else [])
        seen.add(check)


@pytest.mark.parametrize(("name", "old", "new", "check"), list(cases()))
def test_a_planted_bug_is_found(name, old, new, check):
    with planted(name, old, new), pytest.raises((AssertionError, ValueError)):
        check()
