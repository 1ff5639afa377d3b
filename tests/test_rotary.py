"""Rotary position embedding: by hand, against complex numbers, and against ONNX's own implementation."""

import numpy as np
import pytest

import edgeattn
from edgeattn import apply_rotary_embedding, rotary_cache

B, H, L, D = 2, 3, 5, 8


def random(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def by_complex_numbers(x, angles, interleaved, turned):
    """(B, H, L, D) and (B, L, turned / 2) in float64: each pair is a complex number times e^(i angle)."""
    x = x.astype(np.float64)
    part = x[..., :turned]
    if interleaved:
        pairs = part[..., 0::2] + 1j * part[..., 1::2]
    else:
        pairs = part[..., : turned // 2] + 1j * part[..., turned // 2 :]
    pairs = pairs * np.exp(1j * angles)[:, None]
    if interleaved:
        part = np.stack([pairs.real, pairs.imag], axis=-1).reshape(part.shape)
    else:
        part = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return np.concatenate([part, x[..., turned:]], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [0, 2, 4, 8])
@pytest.mark.parametrize("by_position", [False, True])
def test_pairs_are_complex_numbers(interleaved, turned, by_position):
    x, pairs = random(B, H, L, D), (turned or D) // 2
    table = random(11, pairs)
    positions = np.random.default_rng(0).integers(0, 11, (B, L))
    angles = table[positions].astype(np.float64)
    tables = (np.cos(table), np.sin(table)) if by_position else (np.cos(table[positions]), np.sin(table[positions]))
    result = apply_rotary_embedding(
        x,
        *tables,
        position_ids=positions if by_position else None,
        interleaved=interleaved,
        rotary_embedding_dim=turned,
    )
    np.testing.assert_allclose(
        result, by_complex_numbers(x, angles, interleaved, turned or D), rtol=0, atol=2e-6
    )
    assert result.dtype == np.float32


def test_a_quarter_turn_by_hand():
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 1, 4)
    cos, sin = np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    assert apply_rotary_embedding(x, cos, sin).tolist() == [[[[-3, -4, 1, 2]]]]
    assert apply_rotary_embedding(x, cos, sin, interleaved=True).tolist() == [[[[-2, 1, -4, 3]]]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_axes_are_heads_side_by_side(interleaved):
    x = random(B, H, L, D)
    cos, sin = rotary_cache(L, 4)
    options = {
        "position_ids": np.tile(np.arange(L), (B, 1)),
        "interleaved": interleaved,
        "rotary_embedding_dim": 4,
    }
    flat = apply_rotary_embedding(x.swapaxes(1, 2).reshape(B, L, H * D), cos, sin, num_heads=H, **options)
    split = apply_rotary_embedding(x, cos, sin, **options)
    np.testing.assert_array_equal(flat.reshape(B, L, H, D).swapaxes(1, 2), split)


def test_one_table_for_every_batch_entry():
    x = random(B, H, L, D)
    cos, sin = rotary_cache(L, D)
    wanted = apply_rotary_embedding(x, cos, sin, position_ids=np.tile(np.arange(L), (B, 1)))
    np.testing.assert_array_equal(apply_rotary_embedding(x, cos[None], sin[None]), wanted)


def test_scores_depend_on_the_distance_alone():
    query, key = random(1, 1, 1, 16), random(1, 1, 1, 16) + 1
    cos, sin = rotary_cache(500, 16)

    def score(i, j):
        turned = [
            apply_rotary_embedding(x, cos, sin, position_ids=[[p]]).ravel() for x, p in ((query, i), (key, j))
        ]
        return float(turned[0] @ turned[1])

    assert score(7, 3) == pytest.approx(score(480, 476), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 0.1


def test_cache_holds_the_angles():
    cos, sin = rotary_cache(50, 6, base=100.0)
    assert cos.shape == sin.shape == (50, 3) and cos.dtype == sin.dtype == np.float32
    angle = 37 * 100.0 ** (-4 / 6)
    assert (cos[37, 2], sin[37, 2]) == (np.float32(np.cos(angle)), np.float32(np.sin(angle)))
    assert rotary_cache(3, 4)[1][2, 1] == np.float32(np.sin(2 / 100))


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_dtypes(dtype):
    x = random(B, H, L, D, dtype=np.float64).astype(dtype)
    cos, sin = rotary_cache(L, 4)
    positions = np.tile(np.arange(L, dtype=np.uint8), (B, 1))
    result = apply_rotary_embedding(x, cos, sin, position_ids=positions, rotary_embedding_dim=4)
    single = apply_rotary_embedding(
        x.astype(np.float32), cos, sin, position_ids=positions, rotary_embedding_dim=4
    )
    assert result.dtype == np.dtype(dtype).newbyteorder("=") and result.dtype.isnative
    np.testing.assert_array_equal(result[..., :4], single[..., :4].astype(result.dtype))
    np.testing.assert_array_equal(result[..., 4:], x[..., 4:])  # float64 stays float64 where nothing is turned


def test_layout_does_not_matter_and_inputs_stay():
    x = random(B, H, L, D)
    cos, sin = rotary_cache(L, D)
    positions = np.tile(np.arange(L), (B, 1))
    wanted = apply_rotary_embedding(x, cos, sin, position_ids=positions)
    strange = np.asfortranarray(x)[:, :, ::-1][:, :, ::-1]
    strange.flags.writeable = False
    before = strange.copy()
    result = apply_rotary_embedding(
        strange, np.asfortranarray(cos), sin[::-1][::-1], position_ids=positions
    )
    np.testing.assert_array_equal(result, wanted)
    np.testing.assert_array_equal(strange, before)
    assert result.flags.writeable and not np.shares_memory(result, strange)


def test_nan_and_infinity_stay_in_their_pair():
    x = random(1, 1, 2, 4)
    x[0, 0, 0] = [np.nan, 1, np.inf, 2]
    cos, sin = rotary_cache(2, 4)
    result = apply_rotary_embedding(x, cos, sin, position_ids=[[1, 0]])
    assert np.isnan(result[0, 0, 0, 0]) and np.isfinite(result[0, 0, 0, [1, 3]]).all()
    assert np.isfinite(result[0, 0, 1]).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_axes(shape):
    table = np.ones((shape[0], shape[2], shape[3] // 2), np.float32)
    assert apply_rotary_embedding(np.ones(shape, np.float32), table, table).shape == shape


X, TABLE, POSITIONS = random(B, H, L, D), random(7, D // 2), np.zeros((B, L), int)
OK = {"x": X, "cos": TABLE, "sin": TABLE, "position_ids": POSITIONS}
BAD = {
    "integers": ({"x": X.astype(int)}, TypeError, "x must be a float16, float32 or float64 array"),
    "axes": ({"x": X[0, 0]}, ValueError, r"x must be \(B, H, L, D\) or \(B, L, H \* D\), got shape \(5, 8\)"),
    "no heads": ({"x": X[0]}, ValueError, r"num_heads is needed for a \(B, L, H \* D\) x, .*x\[numpy.newaxis\]"),
    "heads": ({"x": X[0], "num_heads": 3}, ValueError, "num_heads must divide the last axis"),
    "heads type": ({"x": X[0], "num_heads": "2"}, TypeError, "num_heads must be an integer, got '2'"),
    "heads twice": ({"num_heads": 2}, ValueError, "num_heads must be left out for a"),
    "odd D": ({"x": X[..., :7]}, ValueError, "the head size D must be even, got 7; pass rotary_embedding_dim"),
    "odd R": ({"rotary_embedding_dim": 3}, ValueError, "rotary_embedding_dim must be even and at most D = 8, got 3"),
    "large R": ({"rotary_embedding_dim": 10}, ValueError, "must be even and at most D = 8, got 10"),
    "negative R": ({"rotary_embedding_dim": -2}, ValueError, "rotary_embedding_dim must be at least 1, got -2"),
    "R type": ({"rotary_embedding_dim": 4.0}, TypeError, "rotary_embedding_dim must be an integer"),
    "interleaved": ({"interleaved": 1}, TypeError, "interleaved must be True or False, got 1"),
    "pairs": (
        {"rotary_embedding_dim": 4},
        ValueError,
        r"cos must be \(positions, R / 2\) = \(any, 2\) with position_ids, got shape \(7, 4\)",
    ),
    "3-D table and positions": ({"cos": TABLE[None]}, ValueError, r"cos must be \(positions, R / 2\)"),
    "rows": ({"sin": TABLE[1:]}, ValueError, r"as many rows, got shapes \(7, 4\) and \(6, 4\)"),
    "no positions": (
        {"position_ids": None},
        ValueError,
        r"cos must be \(B, L, R / 2\) = \(2, 5, 4\) without position_ids, got shape \(7, 4\); .*pass position_ids",
    ),
    "positions shape": ({"position_ids": POSITIONS[0]}, ValueError, r"position_ids must be \(B, L\) = \(2, 5\)"),
    "positions type": ({"position_ids": POSITIONS * 1.0}, TypeError, "position_ids must be an integer array"),
    "positions large": ({"position_ids": POSITIONS + 7}, ValueError, "within 0 and 6, .* got 7 to 7"),
    "positions negative": ({"position_ids": POSITIONS - 1}, ValueError, "within 0 and 6, .* got -1 to -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        apply_rotary_embedding(**{**OK, **changes})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "positions must be at least 1"),
        ((4, 3), ValueError, "rotary_embedding_dim must be even, got 3"),
        ((4, 4.0), TypeError, "rotary_embedding_dim must be an integer"),
    ],
)
def test_bad_caches_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rotary_cache(*arguments)


@pytest.mark.parametrize("base", [0, -1.0])
def test_bases_are_positive(base):
    with pytest.raises(ValueError, match="base must be greater than 0"):
        rotary_cache(4, 4, base=base)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("turned", [0, 4])
def test_equals_onnx(axes, by_position, interleaved, turned):
    pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    x = random(B, H, L, D) if axes == 4 else random(B, L, H * D)
    pairs = (turned or D) // 2
    tables = [random(9, pairs), random(9, pairs) + 1] if by_position else [random(B, L, pairs), random(B, L, pairs) + 1]
    positions = np.random.default_rng(1).integers(0, 9, (B, L)) if by_position else None
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": turned, **({"num_heads": H} if axes == 3 else {})}
    feeds = {"x": x, "cos": tables[0], "sin": tables[1], **({"positions": positions} if by_position else {})}
    node = helper.make_node("RotaryEmbedding", list(feeds), ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    wanted = ReferenceEvaluator(model).run(None, feeds)[0]
    result = apply_rotary_embedding(
        x,
        *tables,
        position_ids=positions,
        interleaved=bool(interleaved),
        rotary_embedding_dim=turned,
        num_heads=H if axes == 3 else None,
    )
    np.testing.assert_array_equal(result, wanted)


def test_both_are_public():
    assert {"apply_rotary_embedding", "rotary_cache"} <= set(edgeattn.__all__)
