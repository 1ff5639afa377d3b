"""What the int8 layers have in common."""

INPUTS = ("query", "key", "value")
# All projections, and what the weights of a float layer call them.
SHORT = {"query": "q", "key": "k", "value": "v", "output": "out", "gate": "gate"}


class QuantizedMultiHeadAttention:
    """Multi-head attention in int8, as ``quant.quantize`` makes it: a static or a dynamic layer, see ``scheme``."""

    scheme: str
    _query_name = "query"  # what the caller calls it
