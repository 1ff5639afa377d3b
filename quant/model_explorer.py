"""Figures of a comparison as node data of Google's Model Explorer, for the nodes of an exported .tflite.

Its format: for each graph results by the name of a tensor that a node gives, and up to which value a node has which
colour (https://github.com/google-ai-edge/model-explorer/wiki/2.-User-Guide, "Custom node data").
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

from edgeattn.files.tflite_file import parse, read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeattn.types import Path
    from quant.report import TensorReport

GRAPH = "main"  # what `quant.export` calls the one graph of a file
# Signal over noise in dB, up to which a node has the colour; above the last it has none.
COLOURS = ((15, "#f28b82"), (25, "#fbbc04"), (35, "#fdd663"), (45, "#ceead6"))
_HALVES = {"attention": "attention", "norm1": "attention", "sum1": "attention",
           "feed_forward": "feed_forward", "norm2": "feed_forward", "sum2": "feed_forward"}


def node_data(figures: Mapping[str, TensorReport], tflite: Path) -> str:
    """JSON with the signal over noise, in dB, of each node of a file.

    Parameters
    ----------
    figures : mapping
        By tensor of a layer, or by half of an encoder's layers, whose nodes all have its figure. Those that are equal
        to the float model, or have no signal, are left out.
    tflite : str or path-like
        What ``quant.export`` wrote of the int8 one.

    Raises
    ------
    OSError, ValueError
        When the file cannot be read, or is of something else.
    """
    data, name = read_bytes(tflite)
    graph = parse(data, name)
    nodes = [graph.tensors[number].name for operator in graph.operators for number in operator.outputs]
    found = {node: figures.get(_subject(node)) for node in nodes}
    if "output" in found and "output" not in figures and len(nodes) > 1:  # an encoder's: of the half that ends in it
        found["output"] = found[nodes[-2]]
    if not any(found.values()):
        raise ValueError(f"{name}: must be what quant.export wrote of the model compared: it has no node of "
                         f"{', '.join(list(figures)[:4])}")
    results = {node: {"value": round(report.sqnr_db, 2)} for node, report in found.items()
               if report is not None and math.isfinite(report.sqnr_db)}
    thresholds = [{"value": value, "bgColor": colour} for value, colour in COLOURS]
    return json.dumps({GRAPH: {"results": results, "thresholds": thresholds}}, indent=2)


def _subject(node: str) -> str:
    """What a node belongs to: half a layer of an encoder, else the tensor that it computes or moves."""
    of_layer = re.match(r"layers\.(\d+)\.(\w+)", node)
    if of_layer is None:
        return node.partition("/")[0]
    return f"layers.{of_layer[1]}.{_HALVES.get(of_layer[2], of_layer[2])}"
