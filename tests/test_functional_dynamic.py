"""scaled_dot_product_attention(precision="int8") against quantization written out in NumPy, and against float64."""
import cases
import numpy as np
import pytest
import reference
from test_functional import arguments, expected

from edgeattn import scaled_dot_product_attention as attend
from edgeattn import threads
from edgeattn.kernels.cpu import functional_dynamic
from edgeattn.kernels.cpu.records import blank

CASES = [case for case in cases.CASES if not (case.padding or case.softcap)]


def codes(x):
    """(codes, scales) of rows, each by its largest magnitude."""
    scale = np.abs(x).max(-1, keepdims=True, initial=0) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)), scale


def smooth_block(seen):
    """Of which 32 keys the mean is left out: the first with eight that are seen, or the most."""
    counts = np.add.reduceat(seen, np.arange(0, len(seen), 32)) if len(seen) else np.zeros(1)
    first = counts >= 8
    block = 32 * int(first.argmax() if first.any() else counts.argmax())
    return slice(block, block + 32)


def dither(keys):
    """What is added to small probabilities before they are rounded: fractions of multiples of the golden ratio."""
    steps = np.arange(keys) * 0x9E3779B9 % 2**32
    return np.where(steps >= 2**31, steps - 2**32, steps) / 2**32


def quantized(q, k, v, permitted, bias, scale):
    """The formula of edgeattn/kernels/cpu/dynamic.py in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    (B, H, L, D), Hkv, Dv = q.shape, k.shape[1], v.shape[3]
    out = np.zeros((B, H, L, Dv))
    if bias is not None:
        permitted = permitted & (bias != -np.inf)
    permitted = np.broadcast_to(permitted, (B, H, L, k.shape[2]))
    bias = np.broadcast_to(0.0 if bias is None else bias, permitted.shape)
    for b, h in np.ndindex(B, H):
        kv = h // (H // Hkv)
        seen = permitted[b].any((0, 1))
        some = smooth_block(seen)
        keys, seen = k[b, kv, some], seen[some, None]
        size = np.abs(keys).max(-1, keepdims=True, initial=0)
        part = np.where(seen & (size > 0), 1 / np.where(size > 0, size, 1), 0)
        mean = (part * np.where(seen, keys, 0)).sum(0) / max(part.sum(), 1e-30)
        (q_codes, q_scales), (k_codes, k_scales), (v_codes, v_scales) = map(codes, (q[b, h], k[b, kv] - mean, v[b, kv]))
        v_scales = np.maximum(v_scales[:, 0], 2.0**-60)
        scores = q_codes @ k_codes.T * q_scales * k_scales.T * (1 / np.sqrt(D) if scale is None else scale) + bias[b, h]
        for i in np.flatnonzero(permitted[b, h].any(-1)):
            w = np.where(permitted[b, h, i], scores[i] + np.log(v_scales), -np.inf)
            total = 0
            for block in (slice(s, s + 256) for s in range(0, len(w), 256) if np.isfinite(w[s : s + 256]).any()):
                p = 254 * np.exp(w[block] - w[block].max())
                weight = np.exp(w[block].max() - w.max())
                codes_of_p = np.rint(p + np.where((p > 0) & (p < 3.5), dither(len(p)), 0))
                out[b, h, i] += weight * (codes_of_p @ v_codes[block])
                total += weight * (p / v_scales[block]).sum()
            out[b, h, i] /= total
    return out


def distance(a, b):
    return np.sqrt(((a - b) ** 2).sum() / max((b**2).sum(), 1e-30)) if a.size else 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_its_formula_and_is_close_to_float64(case):
    result = attend(*case.qkv(), **arguments(case), precision="int8")
    exact, _ = expected(case, np.float64)
    assert result.shape == exact.shape and result.dtype == np.float32
    if case.name != "scale-large":  # there a step of a score is a large part of a probability
        assert distance(result, exact) < 0.03
    if case.S and case.D:
        masks = case.masks()
        permitted = reference.visible(
            case.B, case.H, case.L, case.S, keep=masks["keep"], causal=case.is_causal, alignment=case.causal_alignment,
            window=case.window_size, lengths=masks["lengths"])
        wanted = quantized(*case.qkv(), permitted, masks["bias"], case.scale)
        assert distance(result, wanted) < 0.006  # a code, here and there, whose rounding turns on the last bits
        assert not result[~np.broadcast_to(permitted, (case.B, case.H, case.L, case.S)).any(-1)].any()


def qkv(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]


def test_an_offset_that_all_keys_share_changes_nothing_much():
    q, k, v = qkv(1, 4, 70, 32, seed=1)
    offset = 30 * np.random.default_rng(2).standard_normal((1, 4, 1, 32)).astype(np.float32)
    plain, moved = (attend(q, keys, v, precision="int8") for keys in (k, k + offset))
    assert distance(moved, attend(q, k, v)) < 1.2 * distance(plain, attend(q, k, v))


def test_layouts_ranks_dtypes_out_and_threads():
    q, k, v = qkv(2, 4, 66, 24, seed=3)
    wanted = attend(q, k, v, precision="int8")
    np.testing.assert_array_equal(attend(q[0, 1], k[0, 1], v[0, 1], precision="int8"), wanted[0, 1])
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(*turned, precision="int8"), wanted)
    assert attend(q, k, v.astype(np.float64), precision="int8").dtype == np.float64
    out = q.copy()
    assert attend(out, k, v, precision="int8", out=out) is out
    np.testing.assert_array_equal(out, wanted)
    try:
        threads.set_num_threads(2)
        large = [np.tile(x, (1, 1, 8, 1)) for x in (q, k, v)]
        shared = attend(*large, precision="int8")
    finally:
        threads.set_num_threads(1)
    np.testing.assert_array_equal(attend(*large, precision="int8"), shared)


def test_scratch_grows_with_the_keys_alone():
    def sizes(S):
        p = blank(functional_dynamic.ATTENTION, kv_heads=12, keys=S, head_size=32, value_size=32)
        return functional_dynamic.plan(p, False)

    (shared, private), (longer, same) = sizes(512), sizes(4096)
    assert 4 * (shared + private) < 2**20 and longer < 8.1 * shared and same == private


@pytest.mark.parametrize(("options", "complaint"), [
    ({"precision": "int4"}, "precision must be 'float32', 'int8', 'float16' or 'tf32', got 'int4'"),
    ({"softcap": 2.0}, "softcap must be left out with precision='int8', got 2.0"),
    ({"return_weights": True}, "return_weights must be left out with precision='int8'"),
    ({"return_lse": True}, "return_lse must be left out with precision='int8'")])
def test_refusals(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        attend(*qkv(1, 1, 2, 4), **{"precision": "int8", **options})
