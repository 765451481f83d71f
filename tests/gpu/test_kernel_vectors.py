"""Every certified vector that is small enough, on the Numba-CUDA kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

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

WORDS = {"attention": "attention", "rope": "RoPE", "alibi": "ALiBi", "merge": "merging"}
"""What gpu/README.md calls an operation."""


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


def test_as_many_vectors_are_small_enough_as_the_readme_says():
    readme = (Path(__file__).parents[2] / "gpu" / "README.md").read_text("utf-8")
    ran = Counter(case.op for case in CASES.values() if not declined(case))
    words = [f"{count} of {WORDS[op]}" for op, count in ran.items()]
    assert all(some in " ".join(readme.split()) for some in words), words


def declined(case):
    """Return why a vector is declined, found without running a kernel; "" if it is not."""
    given = {**case.parameters, **case.conventions}
    other = [name for name, value in CLAIMED.items() if given.get(name, value) != value]
    try:
        backend.refuse_large(case.inputs, given)
    except Unsupported as why:
        return str(why)
    return f"{other[0]} is {given[other[0]]}" if other else ""
