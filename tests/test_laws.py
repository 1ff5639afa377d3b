"""Every law of laws.py for everything of executors.py that runs on the CPU; and that no law is kept by what breaks it."""
import executors
import laws
import numpy as np
import pytest
import reference

from edgeattn import threads


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("executor", executors.CPU, ids=lambda executor: executor.name)
def test_law(executor, law):
    law(executor)


class Plain(executors.Function):
    """The oracle, and what a fault makes of its result."""

    @staticmethod
    def fault(result, value, keep, seen):
        return result

    def attend(self, query, key, value, keep, *, is_causal, kv_lengths, window_size=(-1, -1), out=None):
        (B, H, L, _), S = query.shape, key.shape[2]
        bias = None if keep is None or keep.dtype == bool else keep
        seen = reference.visible(B, H, L, S, keep=keep if bias is None else None, causal=is_causal, lengths=kv_lengths,
                                 window=window_size)
        query, key, given = map(np.ascontiguousarray, (query, key, value))  # NumPy sums by what lies side by side
        result, _ = reference.attention(query, key, given, seen, bias, dtype=np.float32)
        result = self.fault(result, value, keep, seen)
        if out is None:
            return result
        out[...] = result
        return out


def beside_out(query, key, value, keep, *, out=None, **options):
    return Plain("").attend(query, key, value, keep, **options)


FAULTS = {
    laws.nothing_leaks_from_behind_a_mask: {"fault": lambda result, value, keep, seen: result + 0 * value.sum(2, keepdims=True)},
    laws.a_masked_key_is_not_there: {"fault": lambda result, value, keep, seen: result + 1e-3 * (not seen.all())},
    laws.a_row_without_keys_is_that_of_no_context: {
        "fault": lambda result, value, keep, seen: np.where(seen.any(-1, keepdims=True), result, value.mean(2, keepdims=True))},
    laws.axes_may_be_empty: {"fault": lambda result, value, keep, seen: result if result.size else np.ones((1, 2, 3, 16))},
    laws.entries_do_not_see_each_other: {"fault": lambda result, value, keep, seen: result + len(result) * np.float32(1e-6)},
    laws.threads_change_no_bit: {
        "fault": lambda result, value, keep, seen: result + threads.get_num_threads() * np.float32(1e-6)},
    laws.nan_shows_where_it_is_seen_and_nowhere_else: {"fault": lambda result, value, keep, seen: np.nan_to_num(result)},
    laws.inputs_are_taken_in_any_layout_and_left_as_they_are: {
        "fault": lambda result, value, keep, seen: result + value.flags.c_contiguous},
    laws.out_takes_the_result_and_nothing_beside_it: {"attend": beside_out},
}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_the_oracle_keeps_every_law_and_a_fault_breaks_it(law):
    law(Plain("oracle"))
    with pytest.raises(AssertionError):
        law(Plain("fault", **FAULTS[law]))
