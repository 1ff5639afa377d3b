"""Multi-head attention, written once: what its operations mean is for an executor to say."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgeattn.executors.compiled import CompiledOps
from edgeattn.layers.call import check_call
from edgeattn.layers.fast_path import attend_again, attend_first, attend_fused
from edgeattn.layers.projected_kv import ProjectedKV
from edgeattn.ops import Sequences

if TYPE_CHECKING:
    from typing import Any

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Call
    from edgeattn.ops import Ops, T
    from edgeattn.types import Floats


# An attention layer's linear maps, and what the weights of a float layer call them.
SHORT = {"query": "q", "key": "k", "value": "v", "output": "out", "gate": "gate"}


def forward(ops: Ops[T], layer: Any, query: T, key: T, value: T, sequences: Sequences, name: str = "") -> T:
    """Rows of queries (tokens, E), keys and values -> (tokens, Eo).

    Parameters
    ----------
    layer : MultiHeadAttention, DynamicMultiHeadAttention or StaticMultiHeadAttention
        Of its `projections` "query", "key" and "value", and "gate" and "output" where it has them.
    """
    linears = layer.projections
    q = ops.linear(query, linears["query"], name + "query")
    k = ops.linear(key, linears["key"], name + "key")
    v = ops.linear(value, linears["value"], name + "value")
    context = ops.attention(q, k, v, layer, sequences, name)
    if "gate" in linears:
        gate = ops.activation(ops.linear(query, linears["gate"], name + "gate"), "sigmoid", name + "gate_sigmoid")
        context = ops.multiply(context, gate, name + "gated")
    return ops.linear(context, linears["output"], name + "output") if "output" in linears else context


def call(layer: Any, query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any, is_causal: Any,
         causal_alignment: Any, window_size: Any, softcap: Any, alibi_slopes: Any, kv_cache: KVCache | None,
         need_weights: Any, average_attn_weights: Any, out: Floats | None) -> Floats | tuple[Floats, Floats]:
    """What a float or dynamic `layer` gives for the arguments of `MultiHeadAttention`, in their order."""
    if type(key) is ProjectedKV:
        if key.layer is not layer:
            raise ValueError(f"key must be a ProjectedKV of this layer's project_kv, got one of {key.layer}")
        masks = attn_mask, key_padding_mask, is_causal, causal_alignment, window_size, alibi_slopes
        return key.attend(query, value, masks, softcap, kv_cache, need_weights, out)
    signature, fusible = None, layer.fusible
    if (fusible and need_weights is False and average_attn_weights is False and type(softcap) is float
            and not softcap):
        again, signature = attend_again(layer, query, key, value, out, kv_cache, attn_mask, key_padding_mask,
                                        is_causal, causal_alignment, window_size, alibi_slopes)
        if again is None and signature is not None and kv_cache is None:
            again = attend_first(layer, signature, query, key, value, out, attn_mask, key_padding_mask, is_causal,
                                 causal_alignment, window_size, alibi_slopes)
        if again is not None:
            return again
    checked = check_call(
        layer, query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
        causal_alignment=causal_alignment, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        kv_cache=kv_cache, need_weights=need_weights, average_attn_weights=average_attn_weights, out=out)
    fused = fusible and not (checked.need_weights or checked.softcap or kv_cache is not None)
    if not (fused and checked.query.size and checked.key.size and checked.value.size):
        result = run(layer, checked)
        if kv_cache is not None and layer.position_bias is None:
            layer.prepared_calls.learn_step(signature, result)
        return result
    return attend_fused(layer, checked)


def run(layer: Any, call: Call) -> Floats | tuple[Floats, Floats]:
    """The result of `call`, operation by operation: for what the fused kernel of a float or dynamic layer does not do.

    That is probabilities, softcap, added keys, gates, caches but for one token without masks
    (`fast_path.take_step`), and empty axes.
    """
    record: dict[str, Any] = {}
    ops = CompiledOps(record, {"probabilities"} if call.need_weights else ())
    query, key, value = (x.reshape(-1, x.shape[-1]) for x in (call.query, call.key, call.value))
    with contextlib.nullcontext() if call.cache is None else call.cache.transaction():  # the output's part too
        result = forward(ops, layer, query, key, value, Sequences([call.mask], call.softcap, call.cache, call.pieces))
    return call.write_result(result.reshape(*call.query.shape[:2], layer.output_dim), record.get("probabilities"))
