"""What int8 kernels are given in one piece: arrays with where to begin, and what turns sums into codes.

A group is four bytes in an element of 32 bits.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline

from .matmul import feature_position
from .simd import LANES, pointer_to


class Part(NamedTuple):
    """What begins at data[at] of a flat array."""

    data: object
    at: int


class Groups(NamedTuple):
    """Rows of groups: group k of row r is data[at + r * row + k * step]."""

    data: object
    at: int
    row: int
    step: int


class BytePanels(NamedTuple):
    """Groups (features / WIDTH, depth4, WIDTH) from data[at] on, and from bias[at_bias] on what each feature adds."""

    data: object
    at: int
    bias: object
    at_bias: int
    features: int
    depth4: int


class Scaling(NamedTuple):
    """How the sums of `features` become codes: requantize(sums, rule, data, at + feature, features) + zero_point."""

    data: object
    rule: int
    at: int
    features: int
    zero_point: object


class Mask(NamedTuple):
    """What is said of query l and key s of head h: data[at + h * head + l * row + s * key], if given."""

    given: bool
    data: object
    at: int
    head: int
    row: int
    key: int


class Scratch(NamedTuple):
    """Memory in elements of four bytes, as pointers to numbers of each type."""

    int32: object
    uint32: object
    float32: object
    int8: object


class Projection(NamedTuple):
    """Weights as bytes, packed, from weights[at] on, and what is added to the sums of each row from at_terms on.

    own_step: how far behind that minus a row's own products are, where ADDS_FIRST.
    factors, bias: float32, of each row from at_factors and at_bias on; depth4: of a row.
    """

    weights: object
    at: int
    at_terms: int
    own_step: int
    factors: object
    at_factors: int
    bias: object
    at_bias: int
    depth4: int


@inline
def scratch_at(address):
    """What lies at an address, as numbers of each type."""
    return Scratch(pointer_to(address, np.int32), pointer_to(address, np.uint32), pointer_to(address, np.float32),
                   pointer_to(address, np.int8))


@inline
def parts_of(scratch, p, worker):
    """Of scratch at an address what all threads share and what a worker has to itself, as the parameters say."""
    return scratch_at(scratch), scratch_at(scratch + 4 * (p.shared_size + worker * p.private_size))


@inline
def block_position(blocks, t, f):
    """Where LANES features from f on of token t of Blocks are, and how far the next LANES are from there."""
    at = blocks.at + feature_position(f, blocks.block, blocks.step)
    return at + t * blocks.block, blocks.at + feature_position(f + LANES, blocks.block, blocks.step) - at
