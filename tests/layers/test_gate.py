"""Layers whose heads are multiplied by a gate, sigmoid(query gate_weight^T + gate_bias), before the output projection."""

import numpy as np
import pytest
import reference
from arrays import numbers

import edgeattn
import quant
from edgeattn import KVCache, MultiHeadAttention, SelfAttention

B, H, HKV, L, E, D, DV, EO = 2, 4, 2, 9, 12, 8, 3, 7


WEIGHTS = {
    "q_weight": numbers(H * D, E, seed=1) / 3, "k_weight": numbers(HKV * D, E, seed=2) / 3,
    "v_weight": numbers(HKV * DV, E, seed=3) / 3, "out_weight": numbers(EO, H * DV, seed=4) / 3,
    "q_bias": numbers(H * D, seed=5), "v_bias": numbers(HKV * DV, seed=6), "out_bias": numbers(EO, seed=7),
    "gate_weight": numbers(H * DV, E, seed=8) / 3, "gate_bias": numbers(H * DV, seed=9)}
X, Y = numbers(B, L, E), numbers(B, 5, E, seed=10)


def layer(**changes):
    return MultiHeadAttention(H, **{**WEIGHTS, **changes}, num_kv_heads=HKV)


def formula(made, x, y, dtype, visible=None):
    """The heads by reference.py, the gate and the output projection as they are written."""
    heads = {name: getattr(made, name) for name in ("q_weight", "k_weight", "v_weight", "q_bias", "v_bias")}
    context, _ = reference.multi_head_attention(heads, H, x, y, y, visible, num_kv_heads=HKV, dtype=dtype)
    gate = x.astype(dtype) @ made.gate_weight.T.astype(dtype)
    if made.gate_bias is not None:
        gate = gate + made.gate_bias.astype(dtype)
    gated = context / (1 + np.exp(-gate))
    if made.out_weight is None:
        return gated
    return gated @ made.out_weight.T.astype(dtype) + made.out_bias.astype(dtype)


@pytest.mark.parametrize("changes", [{}, {"gate_bias": None}, {"out_weight": None, "out_bias": None}])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_are_multiplied_by_the_gate(changes, causal):
    made = layer(**changes)
    y = X if causal else Y
    visible = reference.visible(B, H, L, y.shape[1], causal=causal)
    exact, plain = (formula(made, X, y, dtype, visible) for dtype in (np.float64, np.float32))
    arguments = {"is_causal": True} if causal else {"key": y}
    result = made(X, **arguments)
    reference.assert_as_accurate(result, exact, plain)
    reference.assert_as_accurate(made(X, **arguments, need_weights=True)[0], exact, plain)
    np.testing.assert_allclose(made(X[1], **{n: a if a is True else a[1] for n, a in arguments.items()}), exact[1], atol=1e-5)
    out = np.empty_like(result)
    assert made(X, **arguments, out=out) is out
    np.testing.assert_array_equal(out, result)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_gated_layer_streams_what_it_computes_at_once(dtype):
    made = layer()
    results = []
    for cut in ([L], [1] * L, [4, 5]):
        cache = KVCache.for_layer(made, B, L, dtype=dtype)
        results.append(np.concatenate(
            [made(part, is_causal=True, kv_cache=cache) for part in np.split(X, np.cumsum(cut)[:-1], axis=1)], axis=1))
    np.testing.assert_allclose(results[0], made(X, is_causal=True), atol=1e-5 if dtype == "float32" else 0.05)
    for result in results[1:]:
        if dtype == "int8":
            np.testing.assert_array_equal(result, results[0])
        np.testing.assert_allclose(result, results[0], atol=1e-5)


def test_gates_far_from_zero_open_and_close():
    shut, wide = layer(gate_bias=np.full(H * DV, -1e30)), layer(gate_bias=np.full(H * DV, 1e30))
    np.testing.assert_array_equal(shut(X), np.broadcast_to(WEIGHTS["out_bias"], (B, L, EO)))
    np.testing.assert_allclose(wide(X), layer(gate_weight=None, gate_bias=None)(X), atol=1e-5)


def test_gates_are_kept_in_files(tmp_path):
    for made in (layer(), layer(gate_bias=None), quant.quantize(layer(), scheme="dynamic")):
        edgeattn.save(made, tmp_path / "layer.safetensors")
        again = edgeattn.load(tmp_path / "layer.safetensors")
        assert again.gated
        np.testing.assert_array_equal(again(X), made(X))
    one = SelfAttention(*(numbers(4, E, seed=i) for i in range(3)), gate_weight=numbers(4, E, seed=3), gate_bias=numbers(4))
    edgeattn.save(one, tmp_path / "one.safetensors")
    again = edgeattn.load(tmp_path / "one.safetensors")
    assert (type(again), again.gated) == (SelfAttention, True)
    np.testing.assert_array_equal(again(X), one(X))


def test_dynamic_layers_have_gates():
    made = layer()
    dynamic = quant.quantize(made, scheme="dynamic")
    assert dynamic.gated and dynamic.weights["gate"].weight.dtype == np.int8
    exact = formula(made, X, X, np.float64)
    assert np.linalg.norm(dynamic(X) - exact) < 0.02 * np.linalg.norm(exact)
    assert quant.compare(made, dynamic, [X]).tensors["output"].cosine > 0.999
    for name, other in (("gate", layer(gate_weight=None, gate_bias=None)),
                        ("output", layer(out_weight=None, out_bias=None))):
        match = f"one of them has no {name} projection|output_dim is"
        with pytest.raises(ValueError, match=match):
            quant.compare(other, dynamic, [X])
    results = []
    for cut in ([L], [2, 3, 4]):
        cache = KVCache.for_layer(dynamic, B, L, dtype="int8")
        results.append(np.concatenate(
            [dynamic(part, is_causal=True, kv_cache=cache) for part in np.split(X, np.cumsum(cut)[:-1], axis=1)], axis=1))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("changes", "message"), [
    ({"gate_weight": None}, "gate_bias needs gate_weight, got gate_weight=None"),
    ({"gate_weight": numbers(H * DV, E + 1)}, r"gate_weight must have shape \(H \* Dv, E\) = \(12, 12\), got \(12, 13\)"),
    ({"gate_bias": numbers(5)}, r"gate_bias must have shape \(12,\), one per row of gate_weight \(12, 12\), got \(5,\)")])
def test_bad_gates_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)


def test_what_has_no_gates_refuses_them(tmp_path):
    made = layer()
    for call in (lambda: quant.calibrate(made, [X]), lambda: quant.quantize(made)):
        with pytest.raises(ValueError, match="layer must have no gate_weight: no TFLite kernel set has a gate"):
            call()
    with pytest.raises(ValueError, match="layer must have no gate_weight: the graph has no place for a gate"):
        quant.export(made, tmp_path / "layer.tflite", sequence_length=L)
    assert not list(tmp_path.iterdir())
