"""Relative positions in an ONNX graph, T5's and others: found by what they add to the scores of a long text."""

import numpy as np

from edgeattn.files.checkpoints import onnx_functions as functions
from edgeattn.kinds import class_of

_DISTANCES = (128, 64, 256, 32, 512, 1024, 16)  # from which on all share a bucket: T5's and MPNet's first
_MOST_BUCKETS = 1024
_NEAR = 1e-6
_FEW_HALF = 0.08  # of pairs: at the ends of buckets logarithms in half precision take the next one
_ALIKE = 16  # distances that show that all further ones are alike


def relative_bias(graph, added):
    """The RelativePositionBias that adds (heads, L, S) to scores, of a table that a graph gathers rows of; or None."""
    _, queries, keys = added.shape
    tables = list(_tables(graph, len(added)))
    for table in tables:
        if not 4 <= len(table) <= _MOST_BUCKETS:
            continue
        for max_distance in _DISTANCES:
            for bidirectional in (True, False):
                if max_distance <= len(table) // (4 if bidirectional else 2):
                    continue
                bias = class_of("RelativePositionBias")(table, bidirectional=bidirectional, max_distance=max_distance)
                apart = np.abs(bias.rows(0, queries, keys) - added) > _NEAR * max(1.0, float(np.abs(table).max()))
                if apart.mean() <= (_FEW_HALF if graph.half else 0):
                    return bias
    return None if any(_goes_on(table, added) for table in tables) else _of_distances(added)


def _tables(graph, heads):
    """Constants (numbers, heads) that a graph gathers rows of, or columns of their transposes."""
    for node in graph.nodes:
        axis = graph.attributes(node).get("axis", 0) if node.op_type == "Gather" and len(node.input) == 2 else None
        shape = graph.shapes.get(node.input[0]) if axis in (0, 1) else None
        if shape is not None and len(shape) == 2 and shape[1 - axis] == heads:
            table = real_table(graph, node, graph.constant(node.input[0]))
            if table is not None and table.dtype.kind == "f" and np.isfinite(table).all():
                yield table if axis == 0 else table.T


def real_table(graph, node, table):
    """The numbers of a table; of one of codes, those that a DequantizeLinear behind its Gather makes, or None."""
    if table is None or table.dtype.kind not in "iu":
        return table
    behind = graph.reader(graph.output(node))
    while behind is not None and behind.op_type in functions.LAYOUT and behind.op_type != "Split":
        behind = graph.reader(graph.output(behind))
    constants = [] if behind is None or behind.op_type != "DequantizeLinear" else [
        graph.constant(name) if name else None for name in list(behind.input)[1:]]
    if not constants or constants[0] is None or np.size(constants[0]) != 1:
        return None
    return functions.dequantized({}, table, *constants)


def _goes_on(table, added):
    """Whether some numbers of a table are added, and others not yet: those are of distances beyond."""
    table = np.unique(np.asarray(table, np.float32), axis=0)
    seen = np.unique(np.concatenate([added[:, 0], added[:, -1]], 1).T, axis=0)
    known = (np.abs(table[:, None] - seen) <= _NEAR * max(1.0, float(np.abs(table).max()))).all(-1).any(1)
    return bool(known.any() and not known.all())


def _of_distances(added):
    """The bias of numbers that say nothing but how far a key is, and are the same from some distance on; or None."""
    _, queries, keys = added.shape
    if queries != keys or not np.isfinite(added).all() or (added[:, 1:, 1:] != added[:, :-1, :-1]).any():
        return None
    sides = np.stack([added[:, -1, ::-1], added[:, 0]])  # of keys before the query, and after it, by their distance
    differ = np.flatnonzero((sides != sides[..., -1:]).any((0, 1)))
    furthest = 1 if not len(differ) else int(differ[-1]) + 1
    if keys - furthest < _ALIKE:
        return None
    buckets = sides[..., np.minimum(np.arange(2 * furthest), furthest)]  # the first half of a distance each
    table = np.concatenate(list(buckets), axis=1).T
    return class_of("RelativePositionBias")(table, max_distance=furthest + 1)
