"""Every certified vector that is small enough, on the Numba-CUDA kernels."""

from __future__ import annotations

import pytest

from optional import require

require("numba")
require("refattn_gpu.device")
from refattn.backends import CLAIMS, Unsupported, load  # noqa: E402
from refattn.bounds import profile_of  # noqa: E402
from refattn.judge import judge  # noqa: E402
from refattn.vectors import core_pack  # noqa: E402
from refattn_gpu import device  # noqa: E402
from refattn_gpu.numba_cuda import backend  # noqa: E402
from refattn_gpu.numba_cuda.problem import CLAIMED  # noqa: E402

if device.STATE.kind == "absent":
    pytest.skip(device.STATE.reason, allow_module_level=True)

CASES = {case.id: case for case in core_pack().cases if case.op in CLAIMS["numba-cuda"]}

LEAST = 367
"""Vectors that run in the simulator: 231 of attention, 55 of RoPE, 76 of ALiBi, 5 of merging."""


def failures(case, run, dtype):
    outputs = run(case.op, case.inputs, case.parameters, case.conventions, dtype)
    verdict = judge(case, outputs, profile_of(dtype))
    return [f"{dtype}: {v.reason}" for v in verdict.outputs if not v.ok]


@pytest.mark.parametrize("name", CASES)
def test_the_tiled_kernels_agree_with_the_certified_values(name):
    case, run = CASES[name], load("numba-cuda").run
    try:
        found = [line for dtype in case.dtypes for line in failures(case, run, dtype)]
    except Unsupported as why:
        pytest.skip(str(why))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op == "attention"])
def test_the_kernels_with_a_thread_a_row_agree_with_the_certified_values(name):
    case = CASES[name]

    def run(op, inputs, parameters, conventions, dtype):
        return backend.run(op, inputs, {**parameters, "form": "rows"}, conventions, dtype)

    dtype = case.dtypes[len(name) % len(case.dtypes)]  # each dtype in turn
    try:
        assert not failures(case, run, dtype)
    except Unsupported as why:
        pytest.skip(str(why))


def test_enough_vectors_are_small_enough():
    reasons = {name: declined(case) for name, case in CASES.items()}
    assert sum(not why for why in reasons.values()) >= LEAST


def declined(case):
    """Return why a vector is declined, found without running a kernel; "" if it is not."""
    given = {**case.parameters, **case.conventions}
    other = [name for name, value in CLAIMED.items() if given.get(name, value) != value]
    try:
        backend.refuse_large(case.inputs, given)
    except Unsupported as why:
        return str(why)
    return f"{other[0]} is {given[other[0]]}" if other else ""
