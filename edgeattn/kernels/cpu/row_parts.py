"""How the rows of linear layers and feed-forwards are cut: into blocks that pass together and parts for threads."""
from edgeattn.runtime.compiler import inline

from .matmul import round_up

BLOCK = 64  # rows that pass together
FEW_ROWS = 24  # up to so many rows, threads share the features; then the rows


@inline
def share_of(total, unit, parts, part):
    """(begin, end) of a part's share of range(total), in multiples of unit."""
    size = round_up((total + parts - 1) // parts, unit)
    return min(part * size, total), min((part + 1) * size, total)


@inline
def parts_of_rows(rows, block, count):
    """(rows in a part, parts) for `count` threads: at most a block, alike, and as many for each thread."""
    parts = round_up((rows + block - 1) // block, count)
    size = max((rows + parts - 1) // max(parts, 1), 1)
    return size, max((rows + size - 1) // size, 1)
