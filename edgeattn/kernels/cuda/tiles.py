"""How a block multiplies tiles: what lies where in shared memory, and which thread holds which scores.

attention.py has the one loop nest over keys; it is made with a `Form`, the functions for one kind of product, of
multiply_adds.py, tensor_cores.py or int8_products.py. A tile has 64 keys and `rows` queries. A thread holds s (own
queries, own keys) of the scores and, of the same queries, o (own queries, own values) of the context; own number r is
row `down(r)`, and k column `across(k)`, from its `place`.

    multiply-add    thread (x, y) of 16 columns: queries 8 y + r, keys 4 x + k, values chunk / 16 x + k
    tensor cores    lane l of a warp, g = l // 4, t = l % 4: queries 16 warp + g + 8 r, keys and values
                    8 (k // 2) + 2 t + k % 2: what mma's result has and, two at a time, what its left operand wants
"""
import dataclasses

from edgeattn.kernels.cuda.language import Device

KEYS = 64  # of a tile
GONE = -2147483648  # the bits of -0.0, which marks the probability of a key that is not to be seen


@dataclasses.dataclass(frozen=True)
class Form:
    """One kind of product, for blocks of so many queries and pieces of so many numbers.

    Parameters
    ----------
    queries, keys, values : int
        How many of each a thread holds.
    lanes : int
        A query's scores lie with 2**lanes neighbouring threads.
    at_keys, at_probabilities, bytes : int
        Where keys, then values, and probabilities begin in shared memory, and its end.
    late : bool
        Scores are scaled, not queries: those would be rounded twice.
    place, down, across : Device
        (t, values of a thread) -> row, column of scores, column of the context; r -> row; k -> column.
    put_query, put_key, put_value : Device
        (tile, t's row, t's column of four, four numbers) to shared memory; put_value gives 0 where all are finite.
    scores : Device
        (queries, keys, t, s, left, right): s += the product of two tiles.
    share : Device
        (probabilities, t, s): what other threads need of the probabilities.
    context : Device
        (probabilities, values, t, careful, s, o, left, right): o += the product; s is lost unless `put_left`.
    put_left : Device or None
        As put_value, what that left out, for `left_context` (values, t, s, o), which adds it; None where nothing is.
    """

    queries: int
    keys: int
    values: int
    lanes: int
    at_keys: int
    at_probabilities: int
    bytes: int
    late: bool
    place: Device
    down: Device
    across: Device
    put_query: Device
    put_key: Device
    put_value: Device
    scores: Device
    share: Device
    context: Device
    put_left: Device | None = None
    left_context: Device | None = None
