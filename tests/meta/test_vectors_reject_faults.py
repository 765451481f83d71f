"""The core pack must reject every planted fault and every answer that computes nothing."""

import importlib.util
import pathlib

import numpy as np
import pytest

from refattn.judge import judge, proves_nothing, vacuous
from refattn.vectors import core_pack

_spec = importlib.util.spec_from_file_location(
    "faulty", pathlib.Path(__file__).parent / "faulty.py"
)
faulty = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faulty)

CASES = core_pack().cases
ATTENTION = [case for case in CASES if case.op == "attention" and "float32" in case.dtypes]


def _rejected(case, fault):
    outputs = faulty.run(case, fault)
    outputs = {name: outputs.get(name, np.zeros(0)) for name in case.outputs}
    return not judge(case, outputs, "fp32").ok


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.id)
def test_without_a_fault_a_text_apart_from_the_reference_agrees(case):
    outputs = faulty.run(case)
    verdict = judge(case, {name: outputs[name] for name in case.outputs}, "fp32")
    assert verdict.ok, "\n".join(v.reason for v in verdict.outputs if not v.ok)


@pytest.mark.parametrize("fault", faulty.FORWARD_FAULTS + faulty.BACKWARD_FAULTS)
def test_at_least_two_vectors_reject_each_fault(fault):
    killers = [case.id for case in ATTENTION if _rejected(case, fault)]
    assert len(killers) >= 2, f"only {killers} reject {fault}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_output_accepts_an_answer_that_computes_nothing(case):
    assert not vacuous(case, "fp64")
    assert not [profile for profile in case.bounds if proves_nothing(case, profile)]


def test_in_float32_a_null_output_passes_only_below_its_range_or_far_beyond_its_precision():
    accepting = {case.id for case in CASES if "fp32" in case.bounds and vacuous(case, "fp32")}
    subnormal = {"attention-family-subnormal", "attention-family-subnormal-backward"}
    deep = {"attention-family-deep-backward", "attention-family-high-backward"}  # logits of 84000
    assert accepting == subnormal | deep
