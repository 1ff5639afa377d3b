"""Parameters of kernels by name: what Python packs is what a kernel reads, and where it writes."""
import numba
import numpy as np
import pytest
from numba.core.itanium_mangler import mangle_args

from edgeattn.kernels.cpu import records
from edgeattn.runtime.jit import jit

RECORD = records.record("heads queries", records.BAND)


@jit
def _exchange(parameters):
    p = records.named(parameters, RECORD)
    p.queries, p.high = p.heads + 10 * p.low, p.queries
    return p.band


def test_a_kernel_reads_and_writes_the_fields_where_they_are():
    array = records.packed(records.blank(RECORD, heads=2, queries=3, band=4, low=5), RECORD)
    assert array.dtype == np.int64 and array.tolist() == [2, 3, 4, 5, 0]
    assert _exchange(array) == 4
    assert array.tolist() == [2, 52, 4, 5, 3]
    assert array[records.slot(RECORD, "high")] == 3


def test_machine_code_tells_records_by_their_fields_in_every_process():
    first, second = (numba.from_dtype(records.record(names)) for names in ("heads queries", "heads keys"))
    names = [mangle_args([records.told_by_fields(each)]) for each in (first, second)]
    assert len(set(names)) == 2
    assert names[0] == "22Recorddc679ace3c8b8f62"  # Numba's own has a number that it draws in each process


def test_a_field_the_record_does_not_have_is_refused():
    p = records.blank(RECORD)
    p.head = 2
    with pytest.raises(ValueError, match="6"):
        records.packed(p, RECORD)


@pytest.mark.parametrize(("shape", "wanted"), [
    ((2, 3, 4, 5), [60, 20, 5, 1]), ((2, 1, 1, 5), [5, 0, 0, 1]), ((4, 1), [0, 0, 1, 0]),
    ((5,), [0, 0, 0, 1]), ((), [0] * 4)])
def test_strides_repeat_along_axes_of_one(shape, wanted):
    assert records.strides(shape) == wanted
    expected = [0 if n == 1 else step // 8 for n, step in zip(shape, np.zeros(shape).strides, strict=True)]
    assert wanted == [0] * (4 - len(shape)) + expected


def test_fields_of_masks_are_of_the_names_that_records_share():
    p = records.blank(records.record())
    assert records.set_masks(p, ((2, 1, 1, 5), (2, 1, 1, 5), (3, 4, 5), (-3, 2), (2, 3, 2)))
    assert vars(p) == {"band": 1, "low": -3, "high": 2, "keep_b": 5, "keep_h": 0, "keep_l": 0, "keep_s": 1,
                       "padding_b": 5, "bias_b": 0, "bias_h": 20, "bias_l": 5, "bias_s": 1, "alibi_b": 6}
    assert set(vars(p)) == set(records.MASKS.split())


def test_what_repeats_over_the_batch_takes_no_step_there():
    p = records.blank(records.record())
    assert records.set_masks(p, (None, (1, 1, 1, 5), None, None, (1, 3, 2)))
    assert not records.set_masks(p, records.NO_MASKS)
    assert vars(p) == {}
