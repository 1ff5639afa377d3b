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
    q, k, v = parts.q, parts.k, parts.v
    groups = parts.value_groups
    q = dataclasses.replace(
        q, rows=q.rows[groups], features=q.features[groups], factor=q.factor[groups], offset=q.offset[groups]
    )
    k = dataclasses.replace(
        k, rows=k.rows[groups], features=k.features[groups], factor=k.factor[groups], offset=k.offset[groups]
    )
    head_of, row_of = _numbered(q.features), _numbered(q.rows)
    key_of, value_of, key_row = _numbered(k.features), _numbered(v.features), _numbered(k.rows)
    heads, batch = head_of.max() + 1, row_of.max() + 1
    if len({(h, b) for h, b in zip(head_of, row_of, strict=True)}) != len(head_of) or heads * batch != len(head_of):
        raise NotRead(
            f"{name} must have each head once for each sequence, got {len(head_of)} pairs of {heads} heads and "
            f"{batch} sequences"
        )
    if not len(head_of) == len(key_of) == len(value_of) == len(key_row):
        raise NotRead(f"{name} must have keys and values for each head of each sequence, got {len(key_of)} and "
                      f"{len(value_of)} for {len(head_of)}")
    first = [int(np.flatnonzero(head_of == h)[0]) for h in range(heads)]
    for each in (key_of, value_of):
        if any(len(set(each[head_of == h].tolist())) != 1 for h in range(heads)):
            raise NotRead(f"{name} must have the same keys and values of a head in each sequence")
    if any(len(set(key_row[row_of == b].tolist())) != 1 for b in range(batch)) or (k.rows != v.rows).any():
        raise NotRead(f"{name} must have keys and values of the same tokens for each head")
    if q.maps.source == k.maps.source and q.rows.shape == k.rows.shape and (q.rows != k.rows).any():
        raise NotRead(f"{name} must have queries and keys of the same tokens")
    # heads that share keys side by side
    order = sorted(range(heads), key=lambda h: (key_of[first[h]], value_of[first[h]], h))
    first = [first[h] for h in order]
    kv = [
        first[i]
        for i in range(heads)
        if i == 0 or (key_of[first[i]], value_of[first[i]]) != (key_of[first[i - 1]], value_of[first[i - 1]])
    ]
    kv_heads = len(kv)
    if heads % kv_heads or any(
        (key_of[first[i]], value_of[first[i]])
        != (key_of[kv[i * kv_heads // heads]], value_of[kv[i * kv_heads // heads]])
        for i in range(heads)
    ):
        kv, kv_heads = first, heads
    arguments, projections = {}, (q, k, v)
    size = q.features.shape[1]
    correction = parts.scale[groups] * np.float32(math.sqrt(size)) if len(parts.scale) == len(groups) else parts.scale
    correction = np.where(np.isclose(correction, 1, rtol=2e-6, atol=0), np.float32(1), correction)
    if q.norm and (correction != 1).any():
        if (correction != correction[:1]).any():
            raise NotRead(f"{name} must scale the scores of all heads by one number behind a norm of queries")
        kind, weight, bias, eps = q.norm
        weight, bias = (None if each is None else each * correction[0] for each in (weight, bias))
        q = dataclasses.replace(q, norm=(kind, weight, bias, eps))
    elif (correction != 1).any():
        q = dataclasses.replace(q, factor=q.factor * correction[:, None], offset=q.offset * correction[:, None])
    for short, each, which in (("q", q, first), ("k", k, kv), ("v", v, kv)):
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
    told, causal, window, added = list(parts.told), parts.causal, parts.window, None
    if parts.bias is not None and parts.bias.any():
        bias = parts.bias
        by_head = np.stack([bias[g] for g in first])
        per_batch = all((bias[g] == by_head[order.index(head_of[g])]).all() for g in range(len(groups)))
        causal_mask = np.triu(np.ones(bias.shape[1:], bool), 1)
        if (bias[:, ~causal_mask] == 0).all() and (bias[:, causal_mask] <= BLOCKED).all() and causal_mask.any():
            causal = True
            told.append(f"{name} is causal; pass is_causal=True, causal_alignment='upper_left' in each call")
        elif (found := _window(bias)) is not None:
            window = found
            told.append(f"{name} has a window; pass window_size={window} in each call")
        elif per_batch and not graph.open_axes and np.isfinite(by_head).all():
            arguments["position_bias"] = by_head
        else:
            added = by_head if per_batch and np.isfinite(by_head).all() else None
            told.append(
                f"{name} {ADDED} of {bias.shape[1:]} to its scores, which may differ with the length; "
                "pass it as attn_mask in each call"
            )
    codes = np.asarray(parts.codes, np.int32)
    value_dim = v.features.shape[1]
    position = {h: i for i, h in enumerate(order)}
    # of each group: where its head is among the heads side by side
    place = np.array([position[h] for h in head_of])
    end, output, tokens, behind = output_map(
        graph, parts.context, codes, place, row_of, q.rows.shape[1], value_dim, heads)
    if output is not None:
        arguments["out_weight"], bias = output
        if bias is not None:
            arguments["out_bias"] = bias
    source = q.maps.source
    if tokens is not None:
        tokens = np.stack([q.rows[np.flatnonzero(row_of == b)[0]] for b in range(batch)]).reshape(-1)[tokens]
    return Attention(
        node,
        int(heads),
        int(kv_heads),
        arguments,
        told,
        source,
        (q.maps.source, k.maps.source, v.maps.source),
        end,
        tokens,
        causal,
        window,
        Apart(projections, first, parts.scale, parts.products, behind),
        added,
        beyond(graph, parts.context) if output is None else None,
    )


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
