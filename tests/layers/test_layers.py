"""MultiHeadAttention and SelfAttention against their formula, and at their edges."""

import numpy as np
import pytest
import reference
from cases import Case
from layer_cases import CASES, inputs, parameters

from edgeattn import MultiHeadAttention, SelfAttention, scaled_dot_product_attention
from edgeattn.layers.weights import TENSORS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_accurate_as_plain_float32(case):
    tensors, given, masks = parameters(case), inputs(case), case.masks()
    layer = MultiHeadAttention(case.H, **tensors, num_kv_heads=case.kv_heads)
    arguments = {
        "attn_mask": masks["bias"] if masks["keep"] is None else masks["keep"],
        "key_padding_mask": masks["padding"],
        "is_causal": case.is_causal,
        "causal_alignment": case.causal_alignment,
    }
    result, weights = layer(*given, **arguments, need_weights=True)  # in steps; without weights by the whole kernel
    permitted = reference.visible(
        case.B,
        case.H,
        case.L,
        case.S,
        keep=masks["keep"],
        padding=masks["padding"],
        causal=case.is_causal,
        alignment=case.causal_alignment,
    )
    oracle, plain = (
        reference.multi_head_attention(
            tensors, case.H, *given, permitted, masks["bias"], num_kv_heads=case.kv_heads, dtype=dtype
        )
        for dtype in (np.float64, np.float32)
    )
    for ours, exact, simple in zip((result, weights), oracle, plain, strict=False):
        assert ours.dtype == np.float32
        reference.assert_as_accurate(ours, exact, simple)
    reference.assert_as_accurate(layer(*given, **arguments), oracle[0], plain[0])


@pytest.mark.parametrize(
    ("E", "H", "L"), [(64, 4, 32), (64, 8, 65), (128, 4, 128), (128, 8, 33), (256, 8, 100), (384, 4, 64), (384, 12, 200)]
)
def test_whole_layers_are_as_accurate_as_plain_float32(E, H, L):
    """Long sums: projections over E, attention over L; sums in one chain have several times NumPy's error."""
    random = np.random.default_rng((E, H, L))
    tensors = {}
    for name in ("q", "k", "v", "out"):
        tensors[f"{name}_weight"] = random.standard_normal((E, E), np.float32) / np.float32(E**0.5)
        tensors[f"{name}_bias"] = random.standard_normal(E, np.float32)
    x = random.standard_normal((2, L, E), np.float32)
    oracle, plain = (
        reference.multi_head_attention(tensors, H, x, x, x, dtype=dtype)[0] for dtype in (np.float64, np.float32)
    )
    result = MultiHeadAttention(H, **tensors)(x)
    reference.assert_as_accurate(result, oracle, plain)
    ours, theirs = (np.sqrt(np.square(array - oracle).mean()) for array in (result, plain))
    assert ours <= 1.5 * theirs  # the root of the mean square, which luck in single elements does not move


@pytest.mark.parametrize("shape", [(0, 4, 12), (2, 0, 12), (0, 0, 12)])
def test_nothing_in_gives_nothing_out(shape):
    made, x = self_layer(E=12), np.zeros(shape, np.float32)
    assert made(x).shape == shape
    assert made(x, attn_mask=np.ones((shape[1], shape[1]), bool), softcap=2.0).shape == shape


CASE = Case("layer", B=2, H=3, L=4, S=6, D=8, Dv=5)


def layer(**changes):
    return MultiHeadAttention(CASE.H, **{**parameters(CASE), **changes})


def self_layer(E=6, heads=2):
    random = np.random.default_rng(0)
    return MultiHeadAttention(heads, *(random.standard_normal((E, E)) for _ in range(4)))


def test_attributes():
    made = layer()
    assert (made.num_heads, made.num_kv_heads, made.head_dim, made.value_dim) == (3, 3, 8, 5)
    assert (made.embed_dim, made.kdim, made.vdim, made.output_dim) == (12, 10, 9, 11)
    assert made.scale == 1 / np.sqrt(8)
    assert repr(made) == (
        "MultiHeadAttention(num_heads=3, num_kv_heads=3, embed_dim=12, kdim=10, vdim=9, "
        "head_dim=8, value_dim=5, output_dim=11)"
    )
    assert layer(out_weight=None, out_bias=None).output_dim == 15


@pytest.mark.parametrize(("dtype", "order"), [(np.float64, "F"), (np.float32, "C")])
def test_parameters_are_owned_read_only_float32(dtype, order):
    given = {name: tensor.astype(dtype, order=order) for name, tensor in parameters(CASE).items()}
    made = MultiHeadAttention(CASE.H, **given)
    for name, tensor in given.items():
        kept = getattr(made, name)
        assert kept.dtype == np.float32
        assert kept.flags.c_contiguous
        assert not kept.flags.writeable
        assert not np.shares_memory(kept, tensor)
        assert tensor.flags.writeable


@pytest.mark.parametrize("missing", ["q_bias", "k_bias", "v_bias", "out_bias"])
def test_each_bias_is_optional_and_zero_when_missing(missing):
    zeros = np.zeros_like(parameters(CASE)[missing])
    np.testing.assert_array_equal(
        layer(**{missing: None})(*inputs(CASE)), layer(**{missing: zeros})(*inputs(CASE))
    )


def test_without_out_weight_the_heads_stand_side_by_side():
    bare = layer(out_weight=None, out_bias=None)
    context = bare(*inputs(CASE))
    whole = layer()
    np.testing.assert_allclose(
        context @ whole.out_weight.T + whole.out_bias, whole(*inputs(CASE)), rtol=1e-5, atol=1e-5
    )


def test_key_and_value_default_to_what_stands_before_them():
    random = np.random.default_rng(1)
    x, y = random.standard_normal((2, 2, 5, 6), np.float32)
    made = self_layer()
    np.testing.assert_array_equal(made(x), made(x, x, x))
    np.testing.assert_array_equal(made(x, y), made(x, y, y))


def test_unbatched_equals_a_batch_of_one():
    made, given = layer(), [array[0] for array in inputs(CASE)]
    padding = np.array([True, True, False, True, True, False])
    result, weights = made(*given, key_padding_mask=padding, need_weights=True)
    batched, batched_weights = made(
        *(array[None] for array in given), key_padding_mask=padding[None], need_weights=True
    )
    np.testing.assert_array_equal(result, batched[0])
    np.testing.assert_array_equal(weights, batched_weights[0])
    assert weights.shape == (3, 4, 6)


def test_padding_equals_slicing():
    made, (query, key, value) = layer(), inputs(CASE)
    keep = np.array([True, False, True, True, False, True])
    np.testing.assert_allclose(
        made(query, key, value, key_padding_mask=np.stack([keep, keep])),
        made(query, key[:, keep], value[:, keep]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_query_without_permitted_key_gives_the_output_bias():
    made = layer()
    result, weights = made(*inputs(CASE), attn_mask=np.zeros((4, 6), bool), need_weights=True)
    np.testing.assert_array_equal(result, np.broadcast_to(made.out_bias, result.shape))
    assert (weights == 0).all()


def test_causal_equals_an_explicit_mask():
    made, given = layer(), inputs(CASE)
    for alignment, diagonal in (("upper_left", 0), ("lower_right", 2)):
        np.testing.assert_array_equal(
            made(*given, is_causal=True, causal_alignment=alignment),
            made(*given, attn_mask=np.tri(4, 6, diagonal, bool)),
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_dtypes_are_computed_in_float32(dtype):
    given = [array.astype(dtype) for array in inputs(CASE)]
    result, (_, weights) = layer()(*given), layer()(*given, need_weights=True)
    single = layer()(*(array.astype(np.float32) for array in given))
    assert result.dtype == weights.dtype == np.dtype(np.dtype(dtype).type)
    np.testing.assert_array_equal(result, single.astype(result.dtype))


def test_inputs_are_not_changed():
    given = inputs(CASE)
    copies = [array.copy() for array in given]
    layer()(*given)
    for array, copy in zip(given, copies, strict=False):
        np.testing.assert_array_equal(array, copy)
        assert array.flags.writeable


def test_out_takes_the_result_and_nothing_beside_it():
    for dtype in (np.float32, np.float64):
        given = [array.astype(dtype) for array in inputs(CASE)]
        guarded = np.full((4, 6, 13), 5, dtype)
        out = guarded[1:3, 1:5, 1:12]
        assert layer()(*given, out=out) is out
        np.testing.assert_array_equal(out, layer()(*given))
        out[...] = 5
        assert (guarded == 5).all()


@pytest.mark.parametrize("output_projection", [True, False])
def test_out_may_be_the_input(output_projection):
    random = np.random.default_rng(0)
    made = self_layer() if output_projection else MultiHeadAttention(2, *random.standard_normal((3, 6, 6)))
    x = random.standard_normal((2, 5, 6), np.float32)
    wanted = made(x)
    np.testing.assert_array_equal(made(x, out=x), wanted)


def test_self_attention_is_one_head():
    random = np.random.default_rng(0)
    q, k, v, out = (random.standard_normal(shape) for shape in ((4, 6), (4, 6), (5, 6), (3, 5)))
    biases = {"q_bias": random.standard_normal(4), "v_bias": random.standard_normal(5)}
    x = random.standard_normal((2, 7, 6), np.float32)
    one = SelfAttention(q, k, v, out, **biases)
    many = MultiHeadAttention(1, q, k, v, out, **biases)
    padding = np.arange(7) < np.array([[7], [4]])
    for ours, theirs in zip(
        one(x, key_padding_mask=padding, is_causal=True, need_weights=True),
        many(x, key_padding_mask=padding, is_causal=True, need_weights=True), strict=False,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert one.output_dim == 3


def test_self_attention_without_output_projection_is_the_function():
    random = np.random.default_rng(0)
    q, k, v = random.standard_normal((3, 4, 6), np.float32)
    x = random.standard_normal((7, 6), np.float32)
    np.testing.assert_allclose(
        SelfAttention(q, k, v)(x),
        scaled_dot_product_attention(x @ q.T, x @ k.T, x @ v.T),
        rtol=1e-6,
        atol=1e-6,
    )


BAD_LAYERS = {
    "heads type": ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got 2.0"),
    "heads bool": ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
    "heads": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "kv heads": (
        {"num_kv_heads": 2},
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 3 and 2",
    ),
    "dtype": (
        {"q_weight": np.ones((24, 12), int)},
        TypeError,
        "q_weight must be a float16, .* got dtype int64",
    ),
    "none": ({"v_weight": None}, TypeError, "v_weight must be given: MultiHeadAttention"),
    "rank": ({"k_weight": np.ones(4)}, ValueError, r"k_weight must be \(outputs, inputs\), got shape \(4,\)"),
    "bias rank": (
        {"k_bias": np.ones((4, 1))},
        ValueError,
        r"k_bias must be \(outputs,\), got shape \(4, 1\)",
    ),
    "split": (
        {"q_weight": np.ones((25, 12))},
        ValueError,
        r"q_weight must have rows for num_heads = 3 heads of equal size, got shape \(25, 12\)",
    ),
    "value split": (
        {"v_weight": np.ones((16, 9))},
        ValueError,
        "v_weight must have rows for num_kv_heads = 3 heads",
    ),
    "keys": (
        {"k_weight": np.ones((8, 10))},
        ValueError,
        r"k_weight must have Hkv \* D = 3 \* 8 rows, .* got \(8, 10\); pass num_kv_heads",
    ),
    "out": (
        {"out_weight": np.ones((11, 14))},
        ValueError,
        r"out_weight must have H \* Dv = 15 columns, got .*\(11, 14\)",
    ),
    "out bias": ({"out_weight": None}, ValueError, "out_bias needs out_weight, got out_weight=None"),
    "bias": ({"v_bias": np.ones(3)}, ValueError, r"v_bias must have shape \(15,\), .* got \(3,\)"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_parameters_are_refused_by_name(name):
    changes, error, message = BAD_LAYERS[name]
    with pytest.raises(error, match=message):
        MultiHeadAttention(**{"num_heads": 3, **parameters(CASE), **changes})


X, Y, Z = inputs(CASE)
BAD_CALLS = {
    "dtype": ({"query": X.astype(int)}, TypeError, "query must be a float16, .* got dtype int64"),
    "rank": (
        {"query": X[None]},
        ValueError,
        r"query must be \(B, L, E\) or \(L, E\), got shape \(1, 2, 4, 12\)",
    ),
    "width": (
        {"key": X},
        ValueError,
        r"key must have a last axis of 10, the columns of its weight, got .*\(2, 4, 12\)",
    ),
    "self": ({"key": None, "value": None}, ValueError, "key must have a last axis of 10"),
    "batch": (
        {"value": Z[:1]},
        ValueError,
        r"value must have query's batch axes \(2,\), got .* value \(1, 6, 9\)",
    ),
    "unbatched": ({"key": Y[0]}, ValueError, r"key must have query's batch axes \(2,\), got"),
    "rows": ({"value": Z[:, :3]}, ValueError, "value must have as many rows as key, S = 6, got"),
    "value alone": ({"key": None}, ValueError, "value needs key, got key=None; pass key=query"),
    "weights": ({"need_weights": None}, TypeError, "need_weights must be True or False, got None"),
    "mask": (
        {"attn_mask": np.ones((2, 4, 6), bool)},
        ValueError,
        r"attn_mask must broadcast to \(..., H, L, S\) = \(2, 3, 4, 6\), got shape \(2, 4, 6\)",
    ),
    "padding": (
        {"key_padding_mask": np.ones((2, 4), bool)},
        ValueError,
        r"key_padding_mask must have shape \(..., S\) = \(2, 6\), got \(2, 4\)",
    ),
    "causal": (
        {"is_causal": True},
        ValueError,
        "causal_alignment is needed because L = 4 queries and S = 6 keys",
    ),
    "out": (
        {"out": np.zeros((2, 4, 12), np.float32)},
        ValueError,
        r"out must have shape \(2, 4, 11\), .*\(2, 4, 12\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_by_name(name):
    changes, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        layer()(**{"query": X, "key": Y, "value": Z, **changes})


def test_self_attention_refuses_other_widths_and_heads():
    weight = np.ones((4, 6))
    with pytest.raises(ValueError, match=r"k_weight must have the columns of q_weight, E = 6, got \(4, 5\)"):
        SelfAttention(weight, np.ones((4, 5)), weight)
    with pytest.raises(ValueError, match=r"x must be \(B, L, E\) or \(L, E\), got shape \(6,\)"):
        SelfAttention(weight, weight, weight)(np.ones(6))
    with pytest.raises(ValueError, match="x must have a last axis of 6"):
        SelfAttention(weight, weight, weight)(np.ones((2, 5)))
    state = {"in_proj_weight": np.ones((12, 4)), "out_proj.weight": np.ones((4, 4))}
    with pytest.raises(
        ValueError, match="num_heads must be 1 for SelfAttention, got 2; use MultiHeadAttention"
    ):
        SelfAttention.from_torch(state, 2)
    assert type(SelfAttention.from_torch(state, 1)) is SelfAttention


def test_the_tensor_names_are_all_parameters():
    assert set(TENSORS) == {*parameters(CASE), "gate_weight", "gate_bias"}


@pytest.mark.parametrize("make, message", [
    (lambda: MultiHeadAttention(64, 4), r"^k_weight and v_weight must be given: MultiHeadAttention\(num_heads, "
     r"q_weight, k_weight, v_weight, .* from_torch, .* read them"),
    (lambda: MultiHeadAttention(4), "^q_weight and k_weight and v_weight must be given"),
    (lambda: SelfAttention(64), r"^k_weight and v_weight must be given: SelfAttention\(q_weight, k_weight"),
    (lambda: MultiHeadAttention(embed_dim=64, num_heads=4), r"^MultiHeadAttention.__init__\(\) got an unexpected"),
    (lambda: MultiHeadAttention(), r"^MultiHeadAttention.__init__\(\) missing 1 required .* 'num_heads'"),
])
def test_a_layer_made_as_layers_that_learn_are_says_how_it_is_made(make, message):
    with pytest.raises(TypeError, match=message):
        make()
