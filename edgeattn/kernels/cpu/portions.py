"""How the work of attention is cut into parts, which threads take one by one, and the memory that is their own."""
from edgeattn.runtime.compiler import inline

MOST_ENTRIES = 1 << 16  # parts that entries which threads do alone become at most


@inline
def portions(total, unit, count):
    """(size, number) of the portions of range(total) that `count` threads take one by one; size a multiple of unit."""
    if count == 1:
        return max(total, 1), 1
    size = max((total + 2 * count - 1) // (2 * count), 1)
    size = (size + unit - 1) // unit * unit
    return size, max((total + size - 1) // size, 1)


@inline
def heads_at_once(heads, unit, count):
    """How many heads, whole units, a part takes so that `count` threads are done soonest.

    The most where it is alike. Some heads of all tokens have a part of the weights to themselves, which is read once;
    in int8 each part makes its bytes of the tokens.
    """
    best = least = heads
    if count > 1:
        for at_once in range((heads - 1) // unit * unit, 0, -unit):
            parts = (heads + at_once - 1) // at_once
            longest = (parts + count - 1) // count * at_once
            if longest < least:
                best, least = at_once, longest
    return best


@inline
def entries_alone(p, count):
    """(number, of a part, parts) of the first batch entries: threads do these alone, each as many."""
    alone = p.batch // count * count if count > 1 and p.at_entry > 0 else 0
    portion = max((alone + MOST_ENTRIES - 1) // MOST_ENTRIES, 1)
    return alone, portion, (alone + portion - 1) // portion


@inline
def own_memory(p, scratch, worker):
    """Where a thread that does a batch entry alone has what else all threads share: an address."""
    return scratch + 4 * (p.shared_size + worker * p.private_size + p.at_entry)
