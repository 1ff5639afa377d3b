"""The bytes of int8 layers under every instruction set that this machine can execute: one process for each.

One set of rules stands for all in whole layers; the others: EDGEATTN_ISA=avx2 python -m pytest tests/kernels/cpu/test_kernels_int8.py
"""
import numpy as np
import oracle_kernels as oracle
import pytest
from each_instruction_set import RUNNABLE, answers_of
from int8_layers import DYNAMIC_CASES, rule_cases, softmax_cases, static_cases


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Instruction set -> what int8_layers.py computes under it."""
    return answers_of("int8_layers.py", tmp_path_factory.mktemp("answers"))


def test_the_processes_used_what_they_were_told_to_use(answers):
    assert [str(found["instruction_set"]) for found in answers.values()] == RUNNABLE
    assert RUNNABLE[-1] == "generic"


@pytest.mark.parametrize("name", RUNNABLE)
def test_static_layers_equal_integer_arithmetic(answers, name):
    for case, (_, x, masks, oracle_arguments) in static_cases().items():
        want = oracle.static_layer(*x, *oracle_arguments, **masks)
        for form in (case, f"{case} cached"):
            np.testing.assert_array_equal(answers[name][form], want, err_msg=f"{form} under {name}")


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_rule_equals_integer_arithmetic(answers, name):
    for case, (rule, values, m) in rule_cases().items():
        np.testing.assert_array_equal(answers[name][case], oracle.scaled(rule, values, m), err_msg=f"{case} under {name}")


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_softmax_equals_integer_arithmetic(answers, name):
    for case, (rule, table, codes, keep) in softmax_cases().items():
        want = np.zeros(codes.shape, np.int64)
        for row, seen in enumerate(np.ones(codes.shape, bool) if keep is None else keep):
            if seen.any():
                want[row, seen] = oracle.SOFTMAX[rule](codes[row, seen], table)
        np.testing.assert_array_equal(answers[name][case], want, err_msg=f"{case} under {name}")


@pytest.mark.parametrize("name", RUNNABLE)
def test_dynamic_layers_give_the_same_bits(answers, name):
    for case in DYNAMIC_CASES:
        np.testing.assert_array_equal(answers[name][case], answers["generic"][case], err_msg=f"{case} under {name}")
