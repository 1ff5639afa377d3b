"""resolve_mask: every restriction alone and together, and what it refuses."""

import pickle

import cases
import numpy as np
import pytest
import reference

import edgeattn
from edgeattn.masks import resolve_mask


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.float64])
def test_masks_whose_dtype_is_an_object_of_its_own(dtype):
    # what pickle and np.load return need not have NumPy's one object for the dtype
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 8)).astype(np.float32)
    mask = (rng.random((2, 1, 5, 5)) < 0.6).astype(dtype)
    other = pickle.loads(pickle.dumps(mask))
    assert other.dtype == mask.dtype and other.dtype is not mask.dtype
    np.testing.assert_array_equal(edgeattn.scaled_dot_product_attention(x, x, x, attn_mask=other),
                                  edgeattn.scaled_dot_product_attention(x, x, x, attn_mask=mask))
    given = resolve_mask((2, 3, 5, 5), other).for_kernels()
    assert (given.keep is None) == (dtype is not np.bool_) and (given.bias is None) == (dtype is np.bool_)
    assert given.band is None


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_permitted_is_what_the_rules_say(case):
    given = case.masks()
    shape = (case.B, case.H, case.L, case.S)
    mask = resolve_mask(
        shape,
        given["bias"] if given["keep"] is None else given["keep"],
        given["padding"],
        is_causal=case.is_causal,
        causal_alignment=case.causal_alignment,
        window_size=case.window_size,
        kv_lengths=given["lengths"],
    )
    wanted = reference.visible(
        *shape,
        keep=given["keep"],
        padding=given["padding"],
        causal=case.is_causal,
        alignment=case.causal_alignment,
        window=case.window_size,
        lengths=given["lengths"],
    )
    if given["bias"] is not None:
        wanted = wanted & (given["bias"] != -np.inf)
    permitted = mask.permitted()
    np.testing.assert_array_equal(np.broadcast_to(True if permitted is None else permitted, shape), wanted)
    assert mask.shape == shape


def test_no_restriction_is_no_array():
    mask = resolve_mask((2, 3, 4, 5))
    assert mask.keep is None
    assert mask.bias is None
    assert mask.permitted() is None


def test_masks_keep_their_broadcast_axes():
    mask = resolve_mask((2, 3, 4, 5), np.ones((4, 1), bool))
    assert mask.keep.shape == (1, 1, 4, 5)
    mask = resolve_mask((6, 2, 3, 4, 5), np.zeros((2, 1, 1, 1)))
    assert mask.bias.shape == (12, 1, 1, 5)
    assert mask.bias.dtype == np.float32


def test_masks_are_read_only_and_the_callers_array_is_not():
    given = np.ones((4, 5), bool)
    mask = resolve_mask((2, 3, 4, 5), given)
    assert not mask.keep.flags.writeable
    assert given.flags.writeable


def test_alignment_is_asked_for_only_when_it_matters():
    resolve_mask((1, 1, 4, 4), is_causal=True)
    resolve_mask((1, 1, 4, 4), is_causal=True, kv_lengths=[4])
    resolve_mask((1, 1, 4, 5), window_size=(-1, -1))


BAD = {
    "flag": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "alignment": (
        {"causal_alignment": "left"},
        ValueError,
        "causal_alignment must be 'upper_left' or 'lower_right', got 'left'",
    ),
    "ambiguous": (
        {"is_causal": True},
        ValueError,
        "causal_alignment is needed because L = 3 queries and S = 4 keys differ: 'upper_left'.*'lower_right'",
    ),
    "ambiguous window": ({"window_size": (1, -1)}, ValueError, "causal_alignment is needed"),
    "ambiguous lengths": (
        {"shape": (2, 1, 4, 4), "is_causal": True, "kv_lengths": [4, 2]},
        ValueError,
        r"L = 4 queries and S = 4 keys, kv_lengths = \[4, 2\] differ",
    ),
    "mask dtype": (
        {"attn_mask": np.ones((3, 4), int)},
        TypeError,
        r"attn_mask must be a bool array \(True = attend\) or a float array .*got dtype int64; "
        r"pass numpy.asarray\(attn_mask\) != 0 if 1 means attend, == 0 if 1 means blocked",
    ),
    "mask longdouble": ({"attn_mask": np.ones((3, 4), np.longdouble)}, TypeError, "attn_mask must be"),
    "mask shape": (
        {"attn_mask": np.ones((2, 3), bool)},
        ValueError,
        r"attn_mask must broadcast to \(..., H, L, S\) = \(2, 1, 3, 4\), got shape \(2, 3\)",
    ),
    "mask per batch entry": (
        {"shape": (2, 3, 4, 5), "attn_mask": np.ones((2, 4, 5), bool)},
        ValueError,
        r"attn_mask must broadcast .*, got shape \(2, 4, 5\); one mask per batch entry is attn_mask\[:, None\]",
    ),
    "mask of torch's layer": (
        {"shape": (2, 3, 4, 5), "attn_mask": np.ones((6, 4, 5), bool)},
        ValueError,
        r"got shape \(6, 4, 5\); torch.nn.MultiheadAttention's \(B \* H, L, S\) is "
        r"attn_mask.reshape\(2, 3, 4, 5\), inverted if bool: call_with_torch_masks takes it",
    ),
    "mask of tokens": (
        {"shape": (2, 3, 4, 5), "attn_mask": np.ones((2, 5), bool)},
        ValueError,
        r"got shape \(2, 5\); a mask of tokens, \(..., S\), is attn_mask\[:, None, None\], or key_padding_mask",
    ),
    "mask per entry or head": (
        {"shape": (3, 3, 4, 5), "attn_mask": np.ones((3, 1, 5), bool)},
        ValueError,
        r"attn_mask of shape \(3, 1, 5\) must say whether its first axis is the batch or the heads, for both are 3: pass "
        r"attn_mask\[:, None\] for one mask per batch entry, as in Keras, attn_mask\[None\] for one per head",
    ),
    "mask rank": ({"attn_mask": np.ones((1, 2, 1, 3, 4), bool)}, ValueError, "attn_mask must broadcast"),
    "padding dtype": (
        {"key_padding_mask": np.zeros((2, 4))},
        TypeError,
        r"key_padding_mask must be a bool array \(True = a real token\), got dtype float64; pass "
        r"numpy.asarray\(key_padding_mask\) != 0 if 1 means a real token, as in Hugging Face's attention_mask, == 0 if 1 "
        "means padding, as in torch.nn.MultiheadAttention",
    ),
    "padding shape": (
        {"key_padding_mask": np.ones((2, 3), bool)},
        ValueError,
        r"key_padding_mask must have shape \(..., S\) = \(2, 4\), got \(2, 3\)",
    ),
    "window": ({"window_size": 3}, TypeError, r"window_size must be two integers \(left, right\).*got 3"),
    "window length": ({"window_size": (1, 2, 3)}, TypeError, "window_size must be two integers"),
    "window float": ({"window_size": (1.0, 2)}, TypeError, "window_size must be two integers"),
    "window negative": ({"window_size": (-2, 0)}, ValueError, r"window_size must be .*got \(-2, 0\)"),
    "lengths dtype": (
        {"kv_lengths": [1.0, 2.0]},
        TypeError,
        "kv_lengths must be an integer array, got dtype float64",
    ),
    "lengths shape": ({"kv_lengths": [1]}, ValueError, r"kv_lengths must have shape \(2,\), .* got \(1,\)"),
    "lengths long": (
        {"kv_lengths": [1, 5]},
        ValueError,
        r"kv_lengths must lie between 0 and S = 4, got \[1, 5\]",
    ),
    "lengths negative": ({"kv_lengths": [1, -1]}, ValueError, "kv_lengths must lie between 0 and S = 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        resolve_mask(**{"shape": (2, 1, 3, 4), **changes})


def test_what_the_errors_advise_is_right():
    """0/1 masks of every polarity, and masks per batch entry and per head where both are as many."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 3, 5, 8)).astype(np.float32)
    attend = edgeattn.scaled_dot_product_attention
    sees = rng.random((5, 5)) < 0.6
    for numbers in (sees.astype(int), sees.astype(int).tolist()):
        np.testing.assert_array_equal(attend(x, x, x, np.asarray(numbers) != 0), attend(x, x, x, sees))
    np.testing.assert_array_equal(attend(x, x, x, np.asarray((~sees).astype(int)) == 0), attend(x, x, x, sees))
    masks = rng.random((3, 5, 5)) < 0.6
    per_entry = attend(x, x, x, masks[:, None])
    per_head = attend(x, x, x, masks[None])
    for i in range(3):
        np.testing.assert_array_equal(per_entry[i], attend(x, x, x, masks[i])[i])
        np.testing.assert_array_equal(per_head[:, i], attend(x, x, x, masks[i])[:, i])


def test_three_axes_are_heads_wherever_that_is_the_one_reading():
    """float masks, which no library has per batch entry; one batch entry, or as many axes elsewhere."""
    mask = np.random.default_rng(0).random((3, 4, 5)) < 0.6
    for shape, given in (((3, 3, 4, 5), mask.astype(np.float32)), ((2, 3, 4, 5), mask), ((1, 3, 4, 5), mask),
                         ((3, 4, 5), mask), ((3, 2, 3, 4, 5), mask)):
        found = resolve_mask(shape, given)
        array = found.keep if given.dtype == bool else found.bias
        np.testing.assert_array_equal(array, given.reshape(1, *given.shape))
