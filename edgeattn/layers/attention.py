"""Multi-head attention, written once: what its operations mean is for an executor to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.executors.compiled import CompiledOps
from edgeattn.ops import Sequences

if TYPE_CHECKING:
    from typing import Any

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


def run(layer: Any, call: Call) -> Floats | tuple[Floats, Floats]:
    """The result of `call`, operation by operation: for what the fused kernel of a float or dynamic layer does not do.

    That is probabilities, softcap, added keys, gates, positions, caches but for one token without masks
    (`fast_path.attend_next`), and empty axes.
    """
    record: dict[str, Any] = {}
    ops = CompiledOps(record, {"probabilities"} if call.need_weights else ())
    query, key, value = (x.reshape(-1, x.shape[-1]) for x in (call.query, call.key, call.value))
    result = forward(ops, layer, query, key, value, Sequences([call.mask], call.softcap, call.cache, call.pieces))
    return call.write_result(result.reshape(*call.query.shape[:2], layer.output_dim), record.get("probabilities"))
