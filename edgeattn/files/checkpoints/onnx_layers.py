"""The attention layer around a node: its projections, scores and context put together."""

import dataclasses
import math
from typing import Any

import numpy as np

from edgeattn.files.checkpoints.onnx_elements import BLOCKED
from edgeattn.files.checkpoints.onnx_nodes import title
from edgeattn.files.checkpoints.onnx_operators import from_operator
from edgeattn.files.checkpoints.onnx_outputs import beyond, output_map
from edgeattn.files.checkpoints.onnx_scores import from_softmax
from edgeattn.files.checkpoints.onnx_values import NotRead

ADDED, CAPS = "adds a mask or bias", "caps its scores"  # in what is told
UPPER_LEFT = ", causal_alignment='upper_left'"  # an encoder's calls have no other


@dataclasses.dataclass
class Apart:
    """The projections and products of attention."""

    projections: tuple  # of queries, keys and values, the groups of the first as the others
    groups: list  # of each head
    scale: Any  # of the scores of each group
    products: Any  # their nodes, or None
    output: Any  # the value of the map behind, or None


@dataclasses.dataclass
class Attention:
    """The attention around one node."""

    node: Any
    heads: int
    kv_heads: int
    arguments: dict  # of edgeattn.MultiHeadAttention
    told: list  # warnings
    source: str  # the value that queries are projected from
    sources: tuple
    end: str  # the value that the layer gives
    order: Any  # of each row of `end`, the row of `source` that it is of; None without a map behind
    causal: bool = False
    window: tuple = (-1, -1)  # (left, right) that a mask of all pairs leaves
    apart: Any = None  # what it is made of, for its codes
    added: Any = None  # (heads, L, S): what scores have added that is no mask, in a graph of any length
    beyond: str | None = None  # the node that computes with what attention gives, where that is no map


def attention_at(graph, node):
    """The `Attention` around an attention node.

    Raises
    ------
    NotRead
        Naming the node and what stands where something else was needed.
    """
    name = title(node)
    found = (
        from_softmax(graph, node, name)
        if node.op_type in ("Softmax", "QLinearSoftmax")
        else (from_operator(graph, node, name))
    )
    return _assembled(graph, node, name, found)


def _assembled(graph, node, name, parts):
    """The `Attention` of projections, scores and context."""
    groups, v = parts.value_groups, parts.v
    q, k = (dataclasses.replace(each, rows=each.rows[groups], features=each.features[groups],
                                factor=each.factor[groups], offset=each.offset[groups]) for each in (parts.q, parts.k))
    heads = _heads(name, q, k, v)
    arguments = _arguments(name, parts, (_scaled(name, parts, q), k, v), heads)
    found = {"told": list(parts.told), "causal": parts.causal, "window": parts.window}
    if parts.bias is not None and parts.bias.any():
        found |= _added(graph, name, parts, heads)
    if (position_bias := found.pop("position_bias", None)) is not None:
        arguments["position_bias"] = position_bias
    end, output, tokens, behind = output_map(
        graph, parts.context, np.asarray(parts.codes, np.int32), heads.place, heads.row_of, q.rows.shape[1],
        v.features.shape[1], heads.count)
    if output is not None:
        arguments["out_weight"], bias = output
        if bias is not None:
            arguments["out_bias"] = bias
    if tokens is not None:
        tokens = np.stack([q.rows[np.flatnonzero(heads.row_of == b)[0]] for b in range(heads.batch)]
                          ).reshape(-1)[tokens]
    return Attention(
        node, heads.count, len(heads.kv), arguments, source=q.maps.source,
        sources=(q.maps.source, k.maps.source, v.maps.source), end=end, order=tokens,
        apart=Apart((q, k, v), heads.first, parts.scale, parts.products, behind),
        beyond=beyond(graph, parts.context) if output is None else None, **found)


@dataclasses.dataclass
class _Heads:
    """Which head and sequence each group of queries is of."""

    count: int
    batch: int
    of: Any  # the head of each group
    row_of: Any  # its sequence
    order: list  # the heads side by side, those beside each other that share keys
    first: list  # of each of these a group
    kv: list  # of each that has keys and values of its own

    @property
    def place(self):
        """Of each group, where its head is among the heads side by side."""
        position = {h: i for i, h in enumerate(self.order)}
        return np.array([position[h] for h in self.of])


def _heads(name, q, k, v):
    """The `_Heads` of projections: each once for each sequence, with keys and values of the same tokens."""
    head_of, row_of = _numbered(q.features), _numbered(q.rows)
    key_of, value_of, key_row = _numbered(k.features), _numbered(v.features), _numbered(k.rows)
    heads, batch = int(head_of.max() + 1), int(row_of.max() + 1)
    if len({(h, b) for h, b in zip(head_of, row_of, strict=True)}) != len(head_of) or heads * batch != len(head_of):
        raise NotRead(
            f"{name} must have each head once for each sequence, got {len(head_of)} pairs of {heads} heads and "
            f"{batch} sequences"
        )
    if not len(head_of) == len(key_of) == len(value_of) == len(key_row):
        raise NotRead(f"{name} must have keys and values for each head of each sequence, got {len(key_of)} and "
                      f"{len(value_of)} for {len(head_of)}")
    for each in (key_of, value_of):
        if any(len(set(each[head_of == h].tolist())) != 1 for h in range(heads)):
            raise NotRead(f"{name} must have the same keys and values of a head in each sequence")
    if any(len(set(key_row[row_of == b].tolist())) != 1 for b in range(batch)) or (k.rows != v.rows).any():
        raise NotRead(f"{name} must have keys and values of the same tokens for each head")
    if q.maps.source == k.maps.source and q.rows.shape == k.rows.shape and (q.rows != k.rows).any():
        raise NotRead(f"{name} must have queries and keys of the same tokens")
    first = [int(np.flatnonzero(head_of == h)[0]) for h in range(heads)]
    shared = [(key_of[group], value_of[group]) for group in first]
    order = sorted(range(heads), key=lambda h: (*shared[h], h))
    first, shared = [first[h] for h in order], [shared[h] for h in order]
    own = [i for i in range(heads) if i == 0 or shared[i] != shared[i - 1]]
    if heads % len(own) or any(shared[i] != shared[own[i * len(own) // heads]] for i in range(heads)):
        own = range(heads)
    return _Heads(heads, batch, head_of, row_of, order, first, [first[i] for i in own])


def _scaled(name, parts, q):
    """The queries with what scores are multiplied by beyond 1 / sqrt(D)."""
    size, groups = q.features.shape[1], parts.value_groups
    correction = parts.scale[groups] * np.float32(math.sqrt(size)) if len(parts.scale) == len(groups) else parts.scale
    correction = np.where(np.isclose(correction, 1, rtol=2e-6, atol=0), np.float32(1), correction)
    if (correction == 1).all():
        return q
    if not q.norm:
        return dataclasses.replace(q, factor=q.factor * correction[:, None], offset=q.offset * correction[:, None])
    if (correction != correction[:1]).any():
        raise NotRead(f"{name} must scale the scores of all heads by one number behind a norm of queries")
    kind, weight, bias, eps = q.norm
    weight, bias = (None if each is None else each * correction[0] for each in (weight, bias))
    return dataclasses.replace(q, norm=(kind, weight, bias, eps))


def _arguments(name, parts, projections, heads):
    """Those of the layer that projections say, and positions."""
    q, k, v = projections
    arguments = {}
    for short, each, which in (("q", q, heads.first), ("k", k, heads.kv), ("v", v, heads.kv)):
        arguments[f"{short}_weight"], bias = each.weights(which)
        if bias is not None:
            arguments[f"{short}_bias"] = bias
    rotary = parts.rotary or q.rotary
    if (q.rotary != k.rotary) and not parts.rotary:
        raise NotRead(f"{name} must turn queries and keys by the same rotary embedding, got {q.rotary} and {k.rotary}")
    if v.norm:
        raise NotRead(f"{name} must have values that no norm changes")
    arguments |= {f"{short}_norm": each.norm for short, each in (("q", q), ("k", k)) if each.norm}
    if v.rotary:
        raise NotRead(f"{name} must have values that no rotary embedding turns")
    if rotary:
        arguments["rotary"] = rotary
    return arguments


def _added(graph, name, parts, heads):
    """What is added to the scores as fields of `Attention`: a mask's; or `position_bias`, the layer's own."""
    bias, told = parts.bias, list(parts.told)
    by_head = np.stack([bias[g] for g in heads.first])
    per_batch = all((bias[g] == by_head[place]).all() for g, place in enumerate(heads.place))
    causal_mask = np.triu(np.ones(bias.shape[1:], bool), 1)
    if (bias[:, ~causal_mask] == 0).all() and (bias[:, causal_mask] <= BLOCKED).all() and causal_mask.any():
        text = f"{name} is causal; pass is_causal=True, causal_alignment='upper_left' in each call"
        return {"causal": True, "told": [*told, text]}
    if (window := _window(bias)) is not None:
        return {"window": window, "told": [*told, f"{name} has a window; pass window_size={window} in each call"]}
    alike = per_batch and np.isfinite(by_head).all()
    if alike and not graph.open_axes:
        return {"position_bias": by_head}
    text = (f"{name} {ADDED} of {bias.shape[1:]} to its scores, which may differ with the length; "
            "pass it as attn_mask in each call")
    return {"added": by_head if alike else None, "told": [*told, text]}


def _window(bias):
    """(left, right) where a bias leaves the keys of a band alone and blocks all others; else None."""
    free = bias[0] == 0
    place = np.arange(bias.shape[2]) - np.arange(bias.shape[1])[:, None]
    if free.all() or not free.diagonal().all():
        return None
    left, right = int(-place[free].min()), int(place[free].max())
    band = (place >= -left) & (place <= right)
    if (bias[:, band] != 0).any() or (bias[:, ~band] > BLOCKED).any():
        return None
    return (-1 if -place.min() == left else left), (-1 if place.max() == right else right)


def _numbered(rows):
    """The number of each row among the different ones, in the order of their first elements."""
    distinct = sorted({tuple(row) for row in rows.tolist()})
    number = {row: i for i, row in enumerate(distinct)}
    return np.array([number[tuple(row)] for row in rows.tolist()])
