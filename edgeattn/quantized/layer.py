"""What the int8 layers have in common."""

INPUTS = ("query", "key", "value")
# All projections, and what the weights of a float layer call them.
SHORT = {"query": "q", "key": "k", "value": "v", "output": "out", "gate": "gate"}


class QuantizedMultiHeadAttention:
    """Multi-head attention in int8, as ``quant.quantize`` makes it: a static or a dynamic layer, see ``scheme``."""

    scheme: str
    _query_name = "query"  # what the caller calls it

    def __reduce__(self):
        """Copies and pickles hold what a file holds: kernels belong to the process."""
        return type(self)._from_state, self._to_state()
