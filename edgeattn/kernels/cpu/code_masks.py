"""What masks, and tables of scores, make of codes of scores, (keys / 4, W) with four keys to a lane, in static int8."""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline

from .simd import LANES, WIDTH, load, splat, store
from .softmax_int8 import LOWEST_CODES

_ALL = np.int32(-1)


class Seen(NamedTuple):
    """Of a block of queries from q0 on, the keys [first, last) that any may see, in `groups` of four.

    band: whether query q0 + l sees key s only where low <= s - q0 - l <= high.
    """

    q0: int
    queries: int
    first: int
    last: int
    groups: int
    band: bool
    low: int
    high: int


@inline
def fill_drop_mask(masks, keep, padding, h, seen):
    """masks (groups, W) bytes: 255 where the query may see the key, else 0; keys past `last` are never seen.

    Lanes without a query keep any.
    """
    at_keep = keep.at + h * keep.head + seen.q0 * keep.row
    for g in range(seen.groups):
        for q in range(seen.queries):
            word = np.uint32(0)
            for j in range(4):
                s = seen.first + 4 * g + j
                is_seen = s < seen.last
                if seen.band and not (seen.low <= s - seen.q0 - q <= seen.high):
                    is_seen = False
                at = at_keep + q * keep.row + s * keep.key
                if is_seen and keep.given and keep.data[at] == 0:
                    is_seen = False
                if is_seen and padding.given and padding.data[padding.at + s] == 0:
                    is_seen = False
                if is_seen:
                    word |= np.uint32(255) << np.uint32(8 * j)
            masks.data[masks.at + g * WIDTH + q] = np.int32(word)


@inline
def map_codes(codes, score_luts, index, h, seen):
    """codes = score_luts[index, code + 128]; the first table where there is no index."""
    at_index = index.at + h * index.head + seen.q0 * index.row
    for g in range(seen.groups):
        for q in range(WIDTH):
            word = codes.data[codes.at + g * WIDTH + q]
            result = np.uint32(0)
            for j in range(4):
                s = min(seen.first + 4 * g + j, seen.last - 1)
                row = 0
                if index.given:
                    row = np.int64(index.data[at_index + min(q, seen.queries - 1) * index.row + s * index.key])
                code = score_luts[row * 256 + ((word >> (8 * j)) & 255 ^ 128)]
                result |= (np.uint32(code) & np.uint32(255)) << np.uint32(8 * j)
            codes.data[codes.at + g * WIDTH + q] = np.int32(result)


@inline
def drop_codes(codes, masks, groups):
    """The lowest code for what masks (groups, W) say may not be seen."""
    for i in range(0, groups * WIDTH, LANES):
        m = load(masks.data, masks.at + i)
        dropped = splat(LOWEST_CODES) & (m ^ splat(_ALL))
        store(codes.data, codes.at + i, (load(codes.data, codes.at + i) & m) | dropped)
