"""Every certified vector of the core pack on the reference, in every dtype it is exact in."""

import pytest

from refattn.backends import CLAIMS, BackendAbsent, Unsupported, load
from refattn.bounds import profile_of
from refattn.judge import judge
from refattn.vectors import core_pack

CASES = {case.id: case for case in core_pack().cases}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_agrees_with_the_certified_values(name):
    case, backend = CASES[name], load("numpy")
    failures = []
    for dtype in case.dtypes:
        outputs = backend.run(case.op, case.inputs, case.parameters, case.conventions, dtype)
        verdict = judge(case, outputs, profile_of(dtype))
        failures += [f"{dtype}: {v.reason}" for v in verdict.outputs if not v.ok]
    assert not failures, "\n".join(failures)


CLAIMED = [name for name, case in CASES.items() if case.op in CLAIMS["numba"]]


@pytest.mark.parametrize("name", CLAIMED)
def test_the_cpu_kernels_agree_with_the_certified_values(name):
    try:
        backend = load("numba")
    except BackendAbsent as absent:
        pytest.skip(str(absent))
    case, failures = CASES[name], []
    for dtype in case.dtypes:
        try:
            outputs = backend.run(case.op, case.inputs, case.parameters, case.conventions, dtype)
        except Unsupported as declined:
            pytest.skip(str(declined))
        verdict = judge(case, outputs, profile_of(dtype))
        failures += [f"{dtype}: {v.reason}" for v in verdict.outputs if not v.ok]
    assert not failures, "\n".join(failures)
