"""What holds for everything that computes attention: each law takes one of executors.py, and fails by AssertionError."""
import numpy as np

from edgeattn import threads


def equal(one, other, near=0.0, why=""):
    if near:
        np.testing.assert_allclose(one, other, rtol=0, atol=near, err_msg=why)
    else:
        np.testing.assert_array_equal(one, other, err_msg=why)


def spoiled(array, at, bad):
    array = array.copy()
    array[..., at, :] = bad
    return array


def nothing_leaks_from_behind_a_mask(call):
    """Whatever stands where nobody looks: keys, values, both."""
    T = call.tokens
    n, keep = T // 2, np.arange(T) % 7 != 3
    q, k, v = call.inputs(2, T, T)
    ways = {"mask": ({"keep": keep}, ~keep, T), "mask per query": ({"keep": np.tile(keep, (T, 1))}, ~keep, T),
            "float mask": ({"keep": np.where(keep, np.float32(0.5), np.float32(-np.inf))}, ~keep, T),
            "lengths": ({"lengths": [n, n]}, np.arange(T) >= n, T), "causal": ({"causal": True}, np.arange(T) >= n, n),
            "window": ({"window_size": (-1, 0)}, np.arange(T) >= n, n)}
    for way, (masks, hidden, rows) in ways.items():
        if way in ("float mask", "lengths") and way not in call.takes:
            continue
        clean = call(q, k, v, **masks)[..., :rows, :]
        near = call.near if rows == T else call.sliced  # where other rows see the keys, these may share something
        assert np.isfinite(clean).all()
        for bad in call.bad if rows == T else call.bad_for_others:
            bad_k, bad_v = spoiled(k, hidden, bad), spoiled(v, hidden, bad)
            for place, given in {"key": (bad_k, v), "value": (k, bad_v), "both": (bad_k, bad_v)}.items():
                equal(call(q, *given, **masks)[..., :rows, :], clean, near, f"{way}, {place} of {bad}")


def a_masked_key_is_not_there(call):
    """Masking equals slicing, but for the order of sums, and for what keys share in bytes."""
    T = call.tokens
    q, k, v = call.inputs(2, 5, T)
    keep = np.arange(T) % 3 != 1
    only = call(q, k[..., keep, :], v[..., keep, :])[..., :call.features]
    equal(call(q, k, v, keep=keep)[..., :call.features], only, call.sliced)
    if "lengths" in call.takes:
        first = call(q, k[..., :T // 2, :], v[..., :T // 2, :])[..., :call.features]
        equal(call(q, k, v, lengths=[T // 2] * 2)[..., :call.features], first, call.sliced)


def a_row_without_keys_is_that_of_no_context(call):
    """Zeros, or the bias of the output; other rows do not change."""
    T = call.tokens
    q, k, v = call.inputs(2, T, T)
    keep = np.ones((T, T), bool)
    keep[3] = False
    some, others = call(q, k, v, keep=keep), np.arange(T) != 3
    nothing = np.broadcast_to(call.nothing(), some.shape)
    equal(some[..., 3, :], nothing[..., 3, :])
    equal(some[..., others, :], call(q, k, v, keep=np.ones((T, T), bool))[..., others, :], call.near)
    equal(call(q, k, v, keep=np.zeros((T, T), bool)), nothing)
    if "float mask" in call.takes:
        equal(call(q, k, v, keep=np.full((T, T), -np.inf, np.float32)), nothing)
        equal(call(q, k, v, keep=np.where(keep, np.float32(0), np.float32(-np.inf)))[..., 3, :], nothing[..., 3, :])
    if "lengths" in call.takes:
        equal(call(q, k, v, lengths=[0, T])[0], nothing[0])


def axes_may_be_empty(call):
    """No entries, no queries, no keys."""
    for B, L, S in call.empty:
        result = call(*call.inputs(B, L, S))
        assert result.shape[0] == B and result.shape[-2] == L
        if S == 0:
            equal(result, np.broadcast_to(call.nothing(), result.shape))


def entries_do_not_see_each_other(call):
    """Every batch entry alone gives the bits it gives among others."""
    T = call.tokens
    inputs = call.inputs(3, T, T)
    inputs[1][1] *= 50  # of another size than its neighbours
    for masks in ({}, {"causal": True}, {"keep": np.arange(T) % 5 != 2}, {"lengths": np.array([T, 4, T - 3])}):
        if "lengths" in masks and "lengths" not in call.takes:
            continue
        whole = call(*inputs, **masks)
        for b in range(3):
            own = {name: mask[b:b + 1] if name == "lengths" else mask for name, mask in masks.items()}
            equal(call(*(x[b:b + 1] for x in inputs), **own)[0], whole[b], why=f"entry {b} with {list(masks)}")


def threads_change_no_bit(call):
    """Any number of them, however little there is to do."""
    kept, least = threads.get_num_threads(), threads.SMALLEST_SHARED_WORK
    inputs = call.inputs(2, 3 * call.tokens, 3 * call.tokens)
    try:
        threads.SMALLEST_SHARED_WORK = 0
        for masks in ({}, {"causal": True}, {"keep": np.arange(3 * call.tokens) % 5 != 2}):
            results = []
            for count in (1, 2, 3):
                threads.set_num_threads(count)
                results.append(call(*inputs, **masks))
            for result in results[1:]:
                equal(result, results[0])
    finally:
        threads.SMALLEST_SHARED_WORK = least
        threads.set_num_threads(kept)


def nan_shows_where_it_is_seen_and_nowhere_else(call):
    """In a key or a value for the queries that may see it, in a query for itself."""
    T, at = call.tokens, 5
    inputs = call.inputs(2, T, T)
    for causal in (True, False):
        clean, sees = call(*inputs, causal=causal), np.arange(T) >= (at if causal else 0)
        for place, rows in (("query", np.arange(T) == at), ("key", sees), ("value", sees)):
            given = [x.copy() for x in inputs]
            given[("query", "key", "value").index(place)][1, ..., at, 1] = np.nan
            result = call(*given, causal=causal)
            broken = np.isnan(result).any(-1)
            assert not broken[0].any() and (broken[1] == rows).all(), place
            equal(result[1][..., ~rows, :], clean[1][..., ~rows, :], call.sliced, place)
            equal(result[0], clean[0], call.near, place)


def inputs_are_taken_in_any_layout_and_left_as_they_are(call):
    """Of any order and step in memory, writable or not."""
    inputs = call.inputs(2, 9, 9)
    wanted = call(*inputs, causal=True)
    for turn in (np.asfortranarray, lambda x: x[..., ::-1].copy()[..., ::-1], lambda x: np.repeat(x, 2, -1)[..., ::2],
                 lambda x: x[:, ::-1].copy()[:, ::-1]):
        given = [turn(x) for x in inputs]
        for x in given:
            x.flags.writeable = False
        equal(call(*given, causal=True), wanted)
        for x, before in zip(given, inputs, strict=True):
            equal(x, before)


def out_takes_the_result_and_nothing_beside_it(call):
    """Also where it is no block of memory, and where it is the query's own."""
    if "out" not in call.takes:
        return
    inputs = call.inputs(2, 9, 9)
    wanted = call(*inputs)
    around = np.full((*wanted.shape[:-2], wanted.shape[-2] + 2, wanted.shape[-1] + 3), 77, wanted.dtype)
    out = around[..., 1:-1, 1:-2]
    assert call(*inputs, out=out) is out
    equal(out, wanted)
    out[...] = 77
    assert (around == 77).all()
    if wanted.shape == inputs[0].shape:
        query = inputs[0].copy()
        equal(call(query, *inputs[1:], out=query), wanted)


LAWS = (nothing_leaks_from_behind_a_mask, a_masked_key_is_not_there, a_row_without_keys_is_that_of_no_context,
        axes_may_be_empty, entries_do_not_see_each_other, threads_change_no_bit, nan_shows_where_it_is_seen_and_nowhere_else,
        inputs_are_taken_in_any_layout_and_left_as_they_are, out_takes_the_result_and_nothing_beside_it)
