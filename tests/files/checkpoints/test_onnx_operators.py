"""from_onnx of onnxruntime's operators that onnx does not evaluate, against what they compute, written out here.

`python tests/files/checkpoints/test_onnx_operators.py` compares what is written out with onnxruntime itself, where that is
installed and its processor's kernels do it (not packed MultiHeadAttention).
"""

import numpy as np
import pytest

from edgeattn import MultiHeadAttention
from edgeattn.executors.numpy import NumpyOps
from edgeattn.masks import NO_WINDOW, resolve_mask
from edgeattn.ops import Sequences

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
from test_checkpoints_onnx import Graph  # noqa: E402

B, L, E, H, KV, D = 2, 5, 6, 4, 2, 16


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


X = numbers(B, L, E)


def written_out(q, k, v, *, causal=False, window=None, softcap=0.0):
    """Attention of (B, L, H, D) queries, (B, L, KV, D) keys and values in float64 -> (B, L, H * D)."""
    q, k, v = (np.float64(each).swapaxes(1, 2) for each in (q, k, v))
    k, v = (np.repeat(each, q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    place = np.subtract.outer(np.arange(L), np.arange(L))
    seen = (place >= 0) if causal else np.ones((L, L), bool)
    seen = seen if window is None else seen & (place < window)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = weights / weights.sum(-1, keepdims=True) @ v
    return context.swapaxes(1, 2).reshape(B, L, -1)


def turned(x, base, interleaved):
    """(B, L, H, D), turned at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angles = np.arange(L)[:, None, None] * base ** (-np.arange(half) / half)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cosines, sines = np.cos(angles), np.sin(angles)
    parts = first * cosines - second * sines, second * cosines + first * sines
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)


def q_attention(dynamic, most=127):
    """(graph, output, what it computes) of int8 weights, a scale for each column, and codes of x."""
    codes = np.random.default_rng(1).integers(-most, most + 1, (E, 3 * H * D)).astype(np.int8)
    scale, bias = np.linspace(0.002, 0.004, 3 * H * D, dtype=np.float32), numbers(3 * H * D)
    graph = Graph(x=X)
    if dynamic:
        coded, step, zero = graph.add("DynamicQuantizeLinear", "x", outputs=3)
    else:
        step, zero = np.array(0.03, np.float32), np.array(128, np.uint8)
        coded = graph.add("QuantizeLinear", "x", step, zero)
    output = graph.add("QAttention", coded, codes, bias, step, scale, "", zero, np.zeros(3 * H * D, np.int8),
                       domain="com.microsoft", num_heads=H)
    parts = np.split(X @ (codes * scale) + bias, 3, axis=-1)
    return graph, output, written_out(*(part.reshape(B, L, H, D) for part in parts)), {}


def group_query(packed=False, rotary=None, window=None, softcap=0.0):
    """(graph, output, what it computes, the arguments of a call) of GroupQueryAttention."""
    weights = [numbers(E, heads * D, seed=i) for i, heads in enumerate((H, KV, KV))]
    q, k, v = ((X @ weight).reshape(B, L, -1, D) for weight in weights)
    graph = Graph(x=X)
    names = [graph.linear("x", np.concatenate(weights, 1)), "", ""] if packed else [
        graph.linear("x", weight) for weight in weights]
    options = {"num_heads": H, "kv_num_heads": KV}
    tables = []
    if rotary is not None:
        angles = np.arange(16)[:, None] * 500.0 ** (-np.arange(D // 2) / (D // 2))
        tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        options |= {"do_rotary": 1, "rotary_interleaved": int(rotary)}
        q, k = (turned(each, 500.0, rotary) for each in (q, k))
    options |= {} if window is None else {"local_window_size": window}
    options |= {"softcap": softcap} if softcap else {}
    output, *_ = graph.add("GroupQueryAttention", *names, "", "", np.full(B, L - 1, np.int32), np.array(L, np.int32), *tables,
                           outputs=3, domain="com.microsoft", **options)
    call = {"is_causal": True} | ({} if window is None else {"window_size": (window - 1, -1)})
    return graph, output, written_out(q, k, v, causal=True, window=window, softcap=softcap), call


def packed_heads(kv_only):
    """MultiHeadAttention of (B, L, H, 3, D), or queries and (B, L, H, 2, D)."""
    weight = numbers(E, H * 3 * D)
    graph = Graph(x=X)
    heads = (X @ weight).reshape(B, L, H, 3, D)
    if kv_only:
        names = [graph.linear("x", weight.reshape(E, H, 3, D)[:, :, 0].reshape(E, -1)),
                 graph.add("Reshape", graph.linear("x", weight.reshape(E, H, 3, D)[:, :, 1:].reshape(E, -1)), np.array([B, L, H, 2, D]))]
    else:
        names = [graph.add("Reshape", graph.linear("x", weight), np.array([B, L, H, 3, D]))]
    output = graph.add("MultiHeadAttention", *names, domain="com.microsoft", num_heads=H)
    return graph, output, written_out(*(heads[:, :, :, i] for i in range(3))), {}


CASES = {
    "QAttention": lambda: q_attention(dynamic=False), "QAttention, dynamic": lambda: q_attention(dynamic=True),
    "GroupQueryAttention": group_query, "... packed": lambda: group_query(packed=True),
    "... rotary": lambda: group_query(rotary=False), "... rotary, interleaved": lambda: group_query(rotary=True),
    "... window": lambda: group_query(window=2),
    "MultiHeadAttention, packed": lambda: packed_heads(False), "MultiHeadAttention, keys and values packed": lambda: packed_heads(True)}


@pytest.mark.parametrize("name", CASES)
def test_operators(name):
    graph, output, wanted, call = CASES[name]()
    model = graph.model(output)
    if call:
        with pytest.warns(UserWarning) as told:
            layer = MultiHeadAttention.from_onnx(model)
        assert ["is causal" in str(each.message) for each in told].count(True) == 1
        assert any("window_size=(1, -1)" in str(each.message) for each in told) == ("window_size" in call)
    else:
        layer = MultiHeadAttention.from_onnx(model)
    assert (layer.num_heads, layer.num_kv_heads) == (H, KV if name.startswith(("Group", "...")) else H)
    mask = resolve_mask((B, H, L, L), **{"window_size": NO_WINDOW, "causal_alignment": "upper_left" if call else None, **call})
    rows = X.reshape(-1, E)
    found = layer.forward(NumpyOps(), rows, rows, rows, Sequences([mask])).reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_softcaps_of_groups_are_told():
    graph, output, _, _ = group_query(softcap=0.5)
    with pytest.warns(UserWarning, match=r"caps its scores; pass softcap=0.5 in each call|is causal"):
        MultiHeadAttention.from_onnx(graph.model(output))


def test_what_else_groups_may_have_is_refused_or_told():
    for name, message in (("smooth_softmax", "attention sink"), ("head_sink", "attention sink"), ("bias", "has a mask, 'bias'")):
        graph, output, _, _ = group_query()
        model = graph.model(output)
        (node,) = (each for each in model.graph.node if each.op_type == "GroupQueryAttention")
        if name == "smooth_softmax":
            node.attribute.append(onnx.helper.make_attribute(name, 1))
        else:
            node.input.extend([""] * ((10 if name == "bias" else 11) - len(node.input)) + [name])
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, L, L]))
        if name == "bias":
            with pytest.warns(UserWarning) as told:
                MultiHeadAttention.from_onnx(model)
            assert any(message in str(each.message) for each in told)
        else:
            with pytest.raises(ValueError, match=message):
                MultiHeadAttention.from_onnx(model)


if __name__ == "__main__":
    import onnxruntime

    more = {"... softcap": lambda: group_query(softcap=0.5),
            # without AVX-VNNI two products of uint8 and int8 are summed in 16 bits, which 127 * 255 overflows
            "QAttention of 7 bits": lambda: q_attention(False, 63), "... dynamic": lambda: q_attention(True, 63)}
    for title, case in {**CASES, **more}.items():
        made, end, expected, _ = case()
        written = made.model(end, 21)
        written.ir_version = 10
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            given = onnxruntime.InferenceSession(written.SerializeToString(), options).run([end], made.inputs)[0]
        except Exception as error:  # noqa: BLE001 (whatever a runtime has for what it does not do)
            print(f"{title}: {str(error)[:150]}")
            continue
        print(f"{title}: {np.abs(given - expected).max():.1e} of {np.abs(expected).max():.1f}")
