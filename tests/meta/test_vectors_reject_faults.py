"""The core pack must reject every planted fault and every answer that computes nothing."""

import importlib.util
import pathlib

import numpy as np
import pytest

from refattn.judge import judge, proves_nothing, vacuous
from refattn.vectors import core_pack


def _load(name):
    path = pathlib.Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faulty, faulty_modules = _load("faulty"), _load("faulty_modules")

CASES = core_pack().cases
MODULES = [case for case in CASES if case.op in ("causal_module", "gated_cross_attention")]
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


def _output_verdict(case, fault=""):
    """Return the verdict on the output of a module, the only one that the text computes."""
    given = {**case.outputs, "output": faulty_modules.run(case, fault).astype(np.float32)}
    (verdict,) = (v for v in judge(case, given, "fp32").outputs if v.name == "output")
    return verdict


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case.id)
def test_without_a_fault_a_text_of_the_modules_apart_from_the_reference_agrees(case):
    verdict = _output_verdict(case)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("fault", faulty_modules.CAUSAL_FAULTS + faulty_modules.GATED_FAULTS)
def test_at_least_two_vectors_of_the_modules_reject_each_fault(fault):
    op = "causal_module" if fault in faulty_modules.CAUSAL_FAULTS else "gated_cross_attention"
    killers = [c.id for c in MODULES if c.op == op and not _output_verdict(c, fault).ok]
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
