"""What the int8 layers have in common."""

INPUTS = ("query", "key", "value")


class QuantizedMultiHeadAttention:
    """Multi-head attention in int8, as ``quant.quantize`` makes it: a static or a dynamic layer, see ``scheme``."""

    scheme: str
    _query_name = "query"  # what the caller calls it
