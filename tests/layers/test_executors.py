"""One `forward`, several meanings: what executors of a layer compute, keep, and refuse."""
import numpy as np
import pytest
import reference
from layer_cases import CASES, inputs, parameters
from workbench import random_call, random_layer

import edgeattn
import quant
from edgeattn.executors import numpy_int8
from edgeattn.executors.compiled import CompiledOps
from edgeattn.executors.numpy import NumpyOps
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.layers.attention import forward
from edgeattn.masks import resolve_mask
from edgeattn.ops import Sequences
from quant.export.c_attention import COps
from quant.export.tflite_ops import Int8TfliteOps, check_lengths

PARTS = ["query", "key", "value", "scores", "masked_scores", "probabilities", "context"]


def float_layer(seed=0, **options):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    shapes = {"q": (32, 24), "k": (16, 24), "v": (12, 24), "out": (20, 24), "gate": (24, 24)}
    made = {f"{name}_{part}": array(*shape[: 2 if part == "weight" else 1])
            for name, shape in shapes.items() for part in ("weight", "bias")}
    if options.pop("gate", False) is False:
        del made["gate_weight"], made["gate_bias"]
    if options.pop("added", False):
        options |= {"bias_k": array(16), "bias_v": array(12), "add_zero_attn": True}
    return edgeattn.MultiHeadAttention(4, **made, num_kv_heads=2, **options), rng.standard_normal((3, 7, 24), np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numpy_is_as_accurate_as_plain_float32(case):
    tensors, given, masks = parameters(case), inputs(case), case.masks()
    layer = edgeattn.MultiHeadAttention(case.H, **tensors, num_kv_heads=case.kv_heads)
    mask = resolve_mask((case.B, case.H, case.L, case.S), masks["bias"] if masks["keep"] is None else masks["keep"],
                        masks["padding"], is_causal=case.is_causal, causal_alignment=case.causal_alignment)
    permitted = reference.visible(case.B, case.H, case.L, case.S, keep=masks["keep"], padding=masks["padding"],
                                  causal=case.is_causal, alignment=case.causal_alignment)
    record = {}
    result = forward(NumpyOps(record), layer, *given, Sequences([mask]))
    exact, plain = (reference.multi_head_attention(tensors, case.H, *given, permitted, masks["bias"],
                                                   num_kv_heads=case.kv_heads, dtype=dtype)
                    for dtype in (np.float64, np.float32))
    for ours, oracle, simple in zip((result, record["probabilities"]), exact, plain, strict=True):
        reference.assert_as_accurate(ours, oracle, simple)
    assert list(record) == [*PARTS, "output"]


@pytest.mark.parametrize("options", [{"gate": True}, {"added": True}, {"gate": True, "added": True}])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("masks", [{}, {"is_causal": True, "alibi_slopes": np.float32([0.1, 0.5, 1, 2])}])
def test_executors_of_a_float_layer_mean_the_same(options, softcap, masks):
    layer, x = float_layer(**options)
    sequences = Sequences([resolve_mask((3, 4, 7, 7), **masks)], softcap)
    records = {}, {}
    results = [forward(each(record), layer, x.reshape(-1, 24), x.reshape(-1, 24), x.reshape(-1, 24), sequences)
               for each, record in zip((NumpyOps, CompiledOps), records, strict=True)]
    np.testing.assert_allclose(*results, atol=3e-6)
    shared = records[0].keys() & records[1].keys() - {"query", "key", "value"}
    assert shared >= {"probabilities", "output"}
    for name in shared:
        np.testing.assert_allclose(records[0][name], records[1][name], atol=3e-6)
    want, weights = layer(x, softcap=softcap, **masks, need_weights=True)
    np.testing.assert_array_equal(results[1].reshape(want.shape), want)
    np.testing.assert_array_equal(records[1]["probabilities"], weights)


@pytest.mark.parametrize("ops", [NumpyOps, CompiledOps])
def test_sequences_of_several_lengths_are_rows_of_one_call(ops):
    layer, x = float_layer()
    lengths, rows = (7, 3, 5), np.concatenate([x[0], x[1, :3], x[2, :5]])
    masks = [resolve_mask((1, 4, length, length), is_causal=True) for length in lengths]
    record = {}
    together = forward(ops(record), layer, rows, rows, rows, Sequences(masks))
    assert [record[f"{i}.probabilities"].shape for i in range(3)] == [(1, 4, length, length) for length in lengths]
    for i, (length, end) in enumerate(zip(lengths, np.cumsum(lengths), strict=True)):
        alone = x[i, :length]
        np.testing.assert_allclose(together[end - length : end],
                                   forward(ops(), layer, alone, alone, alone, Sequences(masks[i : i + 1])), atol=3e-6)


def static_layer():
    layer = random_layer(3, Dv=5)
    x = random_call(layer, (0, 0, 0))[0]
    q = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "is_causal": True}]))
    return q, q.quantize_input(x)


def test_every_intermediate_of_a_static_layer_by_its_name(monkeypatch):
    q, codes = static_layer()
    keep = np.random.default_rng(0).random((2, 1, 12, 12)) < 0.6
    keep[0, 0, 4] = False
    sequences = Sequences([resolve_mask((2, 4, 12, 12), keep)])
    record, in_parts = {}, {}
    result = forward(Int8Ops(q, record), q, codes, codes, codes, sequences)
    np.testing.assert_array_equal(result, q.run_int8(codes, attn_mask=keep))
    assert set(record) == {*PARTS, "output"}
    there = np.broadcast_to(keep, record["scores"].shape)
    np.testing.assert_array_equal(record["masked_scores"], np.where(there, record["scores"].astype(np.int16), -129))
    assert (record["probabilities"][~there] == -128).all() and (record["probabilities"] > -128).any()
    monkeypatch.setattr(numpy_int8, "_SCORES_AT_ONCE", 5 * 2 * 4 * 12)  # five queries at a time, then the last two
    forward(Int8Ops(q, in_parts), q, codes, codes, codes, sequences)
    for name, array in record.items():
        np.testing.assert_array_equal(in_parts[name], array)


def test_only_what_is_asked_for_is_kept():
    q, codes = static_layer()
    record = {}
    forward(Int8Ops(q, record, {"probabilities"}), q, codes, codes, codes, Sequences([resolve_mask((2, 4, 12, 12))]))
    assert list(record) == ["probabilities"]


def test_an_executor_refuses_what_it_does_not_have():
    q, codes = static_layer()
    gated = random_layer(3)
    gated = edgeattn.MultiHeadAttention(4, gated.q_weight, gated.k_weight, gated.v_weight, gate_weight=np.eye(32))
    cache = edgeattn.KVCache(2, 4, 20, 8)
    x = np.zeros((2, 12, 32), np.float32)
    for ops in (Int8Ops(q), Int8TfliteOps(check_lengths(q, q.sources, 1, 12, None), q.tensors), COps(q)):
        with pytest.raises(ValueError, match=f"do without the operation layer_norm, which {type(ops).__name__} does not"):
            ops.layer_norm(codes, None, "norm")
    with pytest.raises(ValueError, match="sequences must have no cache for NumpyOps"):
        forward(NumpyOps(), gated, x, x, x, Sequences([resolve_mask((2, 4, 12, 12))], cache=cache))


