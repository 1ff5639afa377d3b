"""scaled_dot_product_attention against its formula, and at its edges."""

import re

import cases
import numpy as np
import pytest
import reference
from compiling import looks_at_compiling

from edgeattn import scaled_dot_product_attention as attend
from edgeattn.checks import to_float32
from edgeattn.kernels.cpu import functional_float32, reference_float32

CASES = [case for case in cases.CASES if not case.padding]  # padding masks belong to layers


def arguments(case):
    """What `attend` takes beside q, k and v for a case."""
    masks = case.masks()
    return {
        "attn_mask": masks["bias"] if masks["keep"] is None else masks["keep"],
        "is_causal": case.is_causal,
        "causal_alignment": case.causal_alignment,
        "scale": case.scale,
        "softcap": case.softcap,
        "enable_gqa": case.kv_heads != case.H,
        "window_size": case.window_size,
        "kv_lengths": masks["lengths"],
    }


def expected(case, dtype):
    masks = case.masks()
    permitted = reference.visible(
        case.B,
        case.H,
        case.L,
        case.S,
        keep=masks["keep"],
        causal=case.is_causal,
        alignment=case.causal_alignment,
        window=case.window_size,
        lengths=masks["lengths"],
    )
    return reference.attention(
        *case.qkv(), permitted, masks["bias"], scale=case.scale, softcap=case.softcap, dtype=dtype
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_accurate_as_plain_float32(case):
    result, weights = attend(*case.qkv(), **arguments(case), return_weights=True)
    oracle, oracle_weights = expected(case, np.float64)
    plain, plain_weights = expected(case, np.float32)
    assert result.dtype == weights.dtype == np.float32
    reference.assert_as_accurate(result, oracle, plain)
    reference.assert_as_accurate(weights, oracle_weights, plain_weights)
    assert (weights[oracle_weights == 0] == 0).all()
    reference.assert_as_accurate(attend(*case.qkv(), **arguments(case)), oracle, plain)


def qkv(*shape, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for _ in range(3)]


def test_masking_equals_slicing():
    q, k, v = qkv(1, 2, 6, 4)
    keep = np.array([True, False, True, True, False, False])
    sliced = attend(q, k[:, :, keep], v[:, :, keep])  # its sums pair other keys: equal but for their roundings
    np.testing.assert_allclose(attend(q, k, v, keep), sliced, rtol=0, atol=4 * np.spacing(np.abs(sliced).max()))
    np.testing.assert_array_equal(attend(q, k, v, kv_lengths=[4]), attend(q, k[:, :, :4], v[:, :, :4]))


def test_grouped_heads_equal_repeated_heads():
    q, _, _ = qkv(2, 6, 5, 4)
    _, k, v = qkv(2, 3, 5, 4)
    np.testing.assert_array_equal(
        attend(q, k, v, enable_gqa=True), attend(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
    )


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 2, 3, 5, 4), (1, 2, 2, 3, 5, 4)])
def test_leading_axes(shape):
    q, k, v = qkv(*shape)
    whole = attend(q, k, v, is_causal=True)
    assert whole.shape == shape
    for index in np.ndindex(shape[:-2]):
        np.testing.assert_array_equal(whole[index], attend(q[index], k[index], v[index], is_causal=True))


@pytest.mark.parametrize("mask_shape", [(5, 5), (3, 1, 5), (2, 1, 5, 5), (4, 1, 1, 5, 5), (4, 2, 3, 5, 5)])
def test_masks_over_several_leading_axes(mask_shape):
    q, k, v = qkv(4, 2, 3, 5, 4)
    mask = np.random.default_rng(1).random(mask_shape) < 0.5
    full = np.broadcast_to(mask, (4, 2, 3, 5, 5))
    whole = attend(q, k, v, mask)
    for index in np.ndindex(4, 2, 3):
        np.testing.assert_array_equal(whole[index], attend(q[index], k[index], v[index], full[index]))


def test_kv_lengths_over_several_leading_axes():
    q, k, v = qkv(2, 3, 2, 4, 4)
    lengths = np.array([[0, 1, 2], [3, 4, 2]], np.uint8)
    whole = attend(q, k, v, kv_lengths=lengths)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(
            whole[index], attend(q[index], k[index], v[index], kv_lengths=lengths[index])
        )


@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
def test_nan_in_a_permitted_place_propagates(where):
    q, k, v = qkv(1, 1, 4, 4)
    mask = np.zeros((4, 4), np.float32)
    {"query": q[0, 0], "key": k[0, 0], "value": v[0, 0], "mask": mask}[where][1, 2] = np.nan
    result, weights = attend(q, k, v, mask, return_weights=True)
    oracle, oracle_weights = reference.attention(q, k, v, bias=mask)
    assert np.isnan(result).any()
    np.testing.assert_array_equal(np.isnan(result), np.isnan(oracle))
    np.testing.assert_array_equal(np.isnan(weights), np.isnan(oracle_weights))


def test_a_value_of_negligible_weight_still_propagates_nan():
    q, k, v = qkv(1, 1, 2, 4)
    v[0, 0, 1] = np.nan
    mask = np.array([0, -1e30])
    assert np.isnan(attend(q, k, v, mask)).all()


def test_scores_of_any_size_give_finite_probabilities():
    q, k, v = qkv(1, 1, 4, 4)
    _, weights = attend(q * 1e6, k * 1e6, v, return_weights=True)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_a_float64_mask_below_float32_means_not_permitted():
    q, k, v = qkv(1, 1, 3, 4)
    np.testing.assert_array_equal(
        attend(q, k, v, np.array([0, -1e300, 0])), attend(q, k, v, np.array([True, False, True]))
    )


@pytest.mark.parametrize("keys", [5, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_infinity_hides_a_key(keys, dtype):
    """Rows whose keys all have the lowest finite number, as transformers masks them, are the mean of the values."""
    q, k, v = qkv(1, 2, keys, 16)
    lowest, mean = np.full((1, keys), np.finfo(dtype).min), v.mean(axis=2, keepdims=True).repeat(keys, axis=2)
    for result in (attend(q, k, v, lowest), attend(q, k, v, lowest, return_weights=True)[0]):
        np.testing.assert_allclose(result, mean, atol=1e-6)
    half = np.where(np.arange(keys) < 3, 0, lowest)
    np.testing.assert_allclose(attend(q, k, v, half), attend(q, k[:, :, :3], v[:, :, :3]), atol=1e-6)


def test_window_bounds_of_any_size_are_unbounded():
    q, k, v = qkv(1, 1, 5, 4)
    np.testing.assert_array_equal(attend(q, k, v, window_size=(2**80, 2**63 - 1)), attend(q, k, v))


def test_causal_wins_over_the_right_bound_of_the_window():
    q, k, v = qkv(1, 1, 5, 4)
    np.testing.assert_array_equal(
        attend(q, k, v, is_causal=True, window_size=(2, 3)), attend(q, k, v, window_size=(2, 0))
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_result_has_the_inputs_dtype_and_is_computed_in_float32(dtype):
    q, k, v = qkv(1, 2, 5, 4, dtype=dtype)
    result, (_, weights) = attend(q, k, v), attend(q, k, v, return_weights=True)
    assert result.dtype == weights.dtype == dtype
    single = attend(*(array.astype(np.float32) for array in (q, k, v)))
    np.testing.assert_array_equal(result, single.astype(dtype))


def test_mixed_dtypes_give_the_widest():
    q, k, v = qkv(1, 2, 5, 4)
    assert attend(q.astype(np.float16), k, v).dtype == np.float32
    assert attend(q, k, v.astype(np.float64)).dtype == np.float64


def layouts(array, tmp_path):
    """The same values, laid out in memory in every way NumPy has."""
    spread = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)
    spread[..., ::2] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    mapped = np.memmap(tmp_path / "array", array.dtype, "w+", shape=array.shape)
    mapped[...] = array
    unaligned = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    return {
        "strided": spread[..., ::2],
        "negative strides": array[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1],
        "Fortran": np.asfortranarray(array),
        "transposed": np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2),
        "read-only": read_only,
        "memory-mapped": mapped,
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "unaligned": unaligned,
        "list": array.tolist(),
    }


def test_every_memory_layout(tmp_path):
    q, k, v = qkv(2, 3, 5, 4)
    wanted = attend(q, k, v)
    for which in range(3):
        for name, array in layouts((q, k, v)[which], tmp_path).items():
            mixed = [q, k, v]
            mixed[which] = array
            before = np.array(array)
            result = attend(*mixed)
            np.testing.assert_array_equal(result, wanted, err_msg=name)
            assert result.dtype.isnative
            np.testing.assert_array_equal(np.asarray(array), before, err_msg=name)


def test_kernels_get_aligned_arrays(tmp_path):
    # Processors that forgive an unaligned load would hide this one from the test above.
    unaligned = layouts(qkv(2, 3, 5, 4)[0], tmp_path)["unaligned"]
    assert not unaligned.flags.aligned
    assert to_float32(unaligned).flags.aligned


@looks_at_compiling
def test_one_compiled_kernel_serves_every_call(tmp_path):
    q, k, v = qkv(2, 3, 5, 4)
    keep = np.tri(5, dtype=bool)
    for mask in (None, keep, np.where(keep, 0, -np.inf), keep[:, :1]):
        for array in layouts(q, tmp_path).values():
            for wanted in (False, True):
                attend(array, k, v, mask, return_weights=wanted)
                attend(array, k, v, mask, is_causal=True, kv_lengths=[4, 5], causal_alignment="lower_right",
                       return_weights=wanted)
    assert len(reference_float32.attention_by_rows.signatures) == len(functional_float32.attention_float32.signatures) == 1


def test_big_endian_inputs_give_native_results():
    arrays = [array.astype(">f8") for array in qkv(1, 1, 2, 2)]
    assert attend(*arrays).dtype == np.dtype(np.float64)
    assert attend(*arrays).dtype.isnative


def test_every_mask_layout():
    q, k, v = qkv(2, 3, 5, 4)
    keep = np.random.default_rng(0).random((2, 3, 5, 5)) < 0.5
    bias = np.where(keep, 0.5, -np.inf)
    wanted = attend(q, k, v, keep)
    for mask in (np.asfortranarray(keep), keep[..., ::-1].copy()[..., ::-1], keep.tolist()):
        np.testing.assert_array_equal(attend(q, k, v, mask), wanted)
    for mask in (bias.astype(np.float16), bias.astype(">f4"), np.asfortranarray(bias)):
        np.testing.assert_array_equal(attend(q, k, v, mask), attend(q, k, v, bias))


def test_inputs_are_not_changed_and_stay_writeable():
    q, k, v = qkv(2, 2, 5, 4)
    mask = np.random.default_rng(0).random((2, 2, 5, 5)) < 0.5
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    lengths = np.array([2, 5])
    for given in ([q, k, v, mask], [q, k, v, bias]):
        copies = [array.copy() for array in given]
        attend(*given, kv_lengths=lengths)
        for array, copy in zip(given, copies, strict=False):
            np.testing.assert_array_equal(array, copy)
            assert array.flags.writeable
    np.testing.assert_array_equal(lengths, [2, 5])
    assert lengths.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F", "sliced"])
def test_out_takes_the_result_and_nothing_beside_it(dtype, order):
    q, k, v = qkv(2, 2, 5, 4, dtype=dtype)
    guarded = np.full((4, 2, 5, 4), 123, dtype) if order != "sliced" else np.full((4, 2, 5, 8), 123, dtype)
    if order == "F":
        guarded = np.asfortranarray(guarded)
    out = guarded[1:3] if order != "sliced" else guarded[1:3, :, :, 2:6]
    assert attend(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, attend(q, k, v))
    out[...] = 123
    assert (guarded == 123).all()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("empty-keys", "length-17", "everything")],
    ids=lambda case: case.name,
)
def test_out_is_written_whole_inside_its_sentinels(case):
    shape = (case.B, case.H, case.L, case.value_dim)
    size = int(np.prod(shape))
    guarded = np.full(size + 32, np.nan, np.float32)
    out = guarded[16 : 16 + size].reshape(shape)
    attend(*case.qkv(), **arguments(case), out=out)
    assert np.isfinite(out).all()
    assert np.isnan(guarded[:16]).all()
    assert np.isnan(guarded[16 + size :]).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_usual_call_and_the_checked_one_give_the_same_bits(is_causal, scale):
    random = np.random.default_rng(11)
    q, k, v = (random.standard_normal((2, 3, 41, 24), np.float32) for _ in range(3))
    usual = attend(q, k, v, is_causal=is_causal, scale=scale)
    for array in (q, k, v):
        array.flags.writeable = False
    checked = attend(q, k, v, is_causal=is_causal, scale=scale)
    np.testing.assert_array_equal(usual, checked)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_out_may_be_an_input(which):
    q, k, v = qkv(2, 2, 4, 4)
    mask = np.random.default_rng(0).standard_normal((2, 2, 4, 4)).astype(np.float32)
    wanted = attend(q, k, v, mask)
    given = [q, k, v, mask]
    np.testing.assert_array_equal(attend(*given, out=given[which]), wanted)


def test_return_weights_with_out():
    q, k, v = qkv(2, 2, 4, 4)
    out = np.empty_like(q)
    result, weights = attend(q, k, v, return_weights=True, out=out)
    assert result is out
    np.testing.assert_allclose(weights @ v, out, rtol=1e-5, atol=1e-6)


Q, K, V = (
    np.zeros((2, 4, 5, 8), np.float32),
    np.zeros((2, 4, 7, 8), np.float32),
    np.zeros((2, 4, 7, 6), np.float32),
)
BAD = {
    "integer": (
        {"query": Q.astype(int)},
        TypeError,
        r"query must be a float16, float32 or float64 array, got dtype int64; pass numpy.asarray\(query, numpy.float32\)",
    ),
    "complex": ({"key": K.astype(complex)}, TypeError, "key must be .* got dtype complex128"),
    "bool": ({"value": V.astype(bool)}, TypeError, "value must be .* got dtype bool"),
    "object": ({"key": K.astype(object)}, TypeError, "key must be .* got dtype object"),
    "longdouble": ({"query": Q.astype(np.longdouble)}, TypeError, "query must be .* got dtype"),
    "rank": ({"query": Q[0, 0, 0]}, ValueError, r"query must have at least 2 axes .* got shape \(8,\)"),
    "ranks": (
        {"key": K[0]},
        ValueError,
        r"key must have as many axes as query, 4, got query \(2, 4, 5, 8\), key \(4,",
    ),
    "batch": (
        {"value": V[:1]},
        ValueError,
        r"value must have query's leading axes \(2,\), got .*numpy.broadcast_to",
    ),
    "size": (
        {"key": K[..., :3]},
        ValueError,
        r"key must have query's last axis D = 8, got .* key \(2, 4, 7, 3\)",
    ),
    "rows": ({"value": V[:, :, :3]}, ValueError, "value must have as many rows as key, S = 7, got"),
    "value heads": ({"value": V[:, :3]}, ValueError, "value must have as many heads as key, 4, got"),
    "heads": (
        {"key": K[:, :2], "value": V[:, :2]},
        ValueError,
        "must have query's 4 heads, got .*enable_gqa=True",
    ),
    "groups": (
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        ValueError,
        "query heads must be a multiple of key/value heads, got 4 and 3",
    ),
    "no kv heads": ({"key": K[:, :0], "value": V[:, :0], "enable_gqa": True}, ValueError, "got 4 and 0"),
    "enable_gqa": ({"enable_gqa": 1}, TypeError, "enable_gqa must be True or False, got 1"),
    "return_weights": ({"return_weights": "no"}, TypeError, "return_weights must be True or False, got 'no'"),
    "softcap": ({"softcap": -1}, ValueError, "softcap must be 0 .off., or positive and at least 1e-30, got -1"),
    "softcap too small": ({"softcap": 1e-40}, ValueError, "softcap must be 0 .off., or positive and at least 1e-30"),
    "scale too large": ({"scale": 1e39}, ValueError, "scale must lie within float32, got 1e.39"),
    "softcap type": ({"softcap": "1"}, TypeError, "softcap must be a real number, got '1'"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale type": ({"scale": True}, TypeError, "scale must be a real number, got True"),
    "out type": ({"out": []}, TypeError, "out must be a numpy.ndarray, got list"),
    "out dtype": ({"out": np.zeros((2, 4, 5, 6))}, TypeError, "out must have dtype float32, .* got float64"),
    "out shape": (
        {"out": np.zeros((2, 4, 5, 8), np.float32)},
        ValueError,
        r"out must have shape \(2, 4, 5, 6\), .* got \(2, 4, 5, 8\)",
    ),
    "out read-only": (
        {"out": np.broadcast_to(np.float32(0), (2, 4, 5, 6))},
        ValueError,
        "out must be writeable, got a read-only array",
    ),
    "mask": (
        {"attn_mask": np.ones((5, 5), bool)},
        ValueError,
        r"attn_mask must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(5, 5\)",
    ),
    "causal": (
        {"is_causal": True},
        ValueError,
        "causal_alignment is needed .*L = 5 .*S = 7 .*upper_left.*lower_right",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    changes, error, message = BAD[name]
    arguments = {"query": Q, "key": K, "value": V, **changes}
    with pytest.raises(error, match=message):
        attend(**arguments)


def test_an_out_that_is_refused_is_not_written():
    out = np.full((2, 4, 5, 6), 7, np.float32)
    with pytest.raises(ValueError, match=re.escape("kv_lengths must lie between 0 and S = 7")):
        attend(Q, K, V, kv_lengths=np.array([1, 8]), out=out)
    assert (out == 7).all()


def test_heads_share_a_mask_and_give_what_each_gives_alone():
    """Of several blocks of queries, and several entries of a batch, each with its own."""
    rng = np.random.default_rng(17)
    q, k, v = (rng.standard_normal((2, 3, length, 8), np.float32) for length in (37, 41, 41))
    bias = rng.standard_normal((37, 41), np.float32)
    lengths = {"kv_lengths": np.array([11, 40])}
    for mask, options in ((bias, {}), (bias > 0, {}), (rng.random((2, 1, 37, 41)) > 0.3, {}),
                          (rng.random((2, 1, 1, 41)) > 0.3, {}), (bias[:1], {}), (None, lengths)):
        together = attend(q, k, v, mask, **options)
        for head in range(3):
            alone = attend(*(x[:, head:head + 1].copy() for x in (q, k, v)), mask, **options)
            np.testing.assert_array_equal(together[:, head:head + 1], alone)
