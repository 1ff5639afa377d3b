"""What belongs together in the arguments of kernels: arrays with where things lie in them, and what goes by at a time.

Letters: S keys, W = WIDTH queries per block.
"""
from edgeattn.runtime.compiler import NamedTuple


class Rows(NamedTuple):
    """Rows in a flat array: row r begins at data[at + r * step]."""

    data: object
    at: int
    step: int


class Grid(NamedTuple):
    """Numbers in a flat array: row i, column k is data[at + i * row + k * column]."""

    data: object
    at: int
    row: int
    column: int


class Blocks(NamedTuple):
    """(features / block, tokens, block) in a flat array from data[at] on; `step` from block to block."""

    data: object
    at: int
    block: int
    step: int


class Visible(NamedTuple):
    """Of the keys, those in [first, last) that any query of a block may see, and [full_from, full_to) that all may.

    band: whether query q0 + l sees key s only where low <= s - q0 - l <= high.
    """

    first: int
    last: int
    full_from: int
    full_to: int
    q0: int
    band: bool
    low: int
    high: int


class ScoreMask(NamedTuple):
    """Numbers to be added to the scores, (keys, W) from key `first` on; given: whether there are any."""

    data: object
    at: int
    first: int
    given: bool


class Heads(NamedTuple):
    """Some heads: `count` from `first` on."""

    first: int
    count: int


class Group(NamedTuple):
    """Key/value heads of a batch entry that are projected and attended to at a time: `count` from `first` on.

    A part of the work takes `at_once` of them: there are `splits` such parts.  at_keys: the address of their keys.
    """

    batch: int
    first: int
    count: int
    at_once: int
    splits: int
    at_keys: int
