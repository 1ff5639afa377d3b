"""T5's relative positions in an ONNX graph: found by what they add to the scores of a long text."""

import numpy as np

from edgeattn.kinds import class_of

_DISTANCES = (128, 64, 256, 32, 512, 1024, 16)  # from which on all share a bucket: T5's and MPNet's first
_MOST_BUCKETS = 1024
_NEAR = 1e-6


def relative_bias(graph, added):
    """The RelativePositionBias that adds (heads, L, S) to scores, of a table that a graph gathers rows of; or None."""
    heads, queries, keys = added.shape
    for node in graph.nodes:
        if node.op_type != "Gather" or len(node.input) != 2 or graph.attributes(node).get("axis", 0):
            continue
        shape = graph.shapes.get(node.input[0])
        if shape is None or len(shape) != 2 or shape[1] != heads or not 4 <= shape[0] <= _MOST_BUCKETS:
            continue
        table = graph.constant(node.input[0])
        if table is None or table.dtype.kind != "f" or not np.isfinite(table).all():
            continue
        for max_distance in _DISTANCES:
            for bidirectional in (True, False):
                if max_distance <= len(table) // (4 if bidirectional else 2):
                    continue
                bias = class_of("RelativePositionBias")(table, bidirectional=bidirectional, max_distance=max_distance)
                if np.abs(bias.rows(0, queries, keys) - added).max() <= _NEAR * max(1.0, float(np.abs(table).max())):
                    return bias
    return None
