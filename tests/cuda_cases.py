"""Certified vectors of attention, put to the emulated kernels in CUDA C++."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.backends import cast_floats
from refattn.bounds import profile_of
from refattn.judge import judge
from refattn.vectors import core_pack
from refattn.vectors.pack import Case, unbounded
from refattn_gpu.cuda.attention import emulated, result_of
from refattn_gpu.cuda.attention_backward import emulated as emulated_kernel
from refattn_gpu.cuda.attention_backward import gradients_of, prepare
from refattn_gpu.cuda.catalogue import FORMATS, Tile, backward_variants, most_features, variant_of
from refattn_gpu.cuda.problem import problem_of
from refattn_gpu.numba_cuda.problem import CLAIMED

CASES = {
    case.id: case
    for case in core_pack().cases
    if case.op == "attention" and set(FORMATS) & set(case.dtypes)
}


def declined(case: Case) -> bool:
    given = {**case.parameters, **case.conventions}
    return any(given.get(name, value) != value for name, value in CLAIMED.items())


RUN = [name for name, case in CASES.items() if not declined(case)]


def fits(case: Case, dtype: str) -> bool:
    """Return whether a format of a vector is claimed, and bounded."""
    if dtype not in case.dtypes or unbounded(case, profile_of(dtype)):
        return False
    d = max(case.inputs[name].shape[-1] for name in ("query", "value"))
    return d <= most_features(dtype)


JUDGED = [(name, dtype) for name in RUN for dtype in FORMATS if fits(CASES[name], dtype)]
"""Vectors and formats in which a bound is claimed."""


GRADED = [(name, dtype) for name, dtype in JUDGED if "d_output" in CASES[name].inputs]
"""Those that ask for gradients."""


class Fault(NamedTuple):
    """One line of a source, what stands in its place, and what is said of it."""

    source: str
    line: str
    instead: str
    found: str = "output|logsumexp|d_"
    """By default: the bounds reject a result."""


def forward(
    case: Case, dtype: str, tile: Tile | None = None, *, kernel: str = "forward", **more: Any
) -> dict[str, Any]:
    """Return the results of a vector's forward pass; the device's own tile if none is given."""
    with np.errstate(over="ignore"):  # poison beyond the range of float16 is ∞
        inputs = {n: cast_floats(np.asarray(x), dtype) for n, x in case.inputs.items()}
    query, key, value = (inputs.pop(name) for name in ("query", "key", "value"))
    given: Any = {n: x for n, x in inputs.items() if not n.startswith("d_")}
    problem = problem_of("test", query, key, value, given | case.parameters | case.conventions)
    variant = variant_of(problem.dtype, problem.features, problem.terms, kernel)
    emulated(problem, tile or variant.tile, kernel=kernel, **more)
    return result_of(problem, query, value)._asdict()


def backward(case: Case, dtype: str, tile: Tile | None = None, **more: Any) -> dict[str, Any]:
    """Return the gradients of a vector; the device's own tiles if none is given."""
    with np.errstate(over="ignore"):
        inputs = {n: cast_floats(np.asarray(x), dtype) for n, x in case.inputs.items()}
    d_output, d_logsumexp = inputs.pop("d_output"), inputs.pop("d_logsumexp", None)
    operands = [inputs.pop(name) for name in ("query", "key", "value")]
    given: Any = {**inputs, **case.parameters, **case.conventions}
    with np.errstate(all="ignore"):
        found = differentiated(operands, d_output, d_logsumexp, given, tile, **more)
    return {name: array for name, array in found._asdict().items() if array is not None}


def differentiated(
    operands: list[np.ndarray],
    d_output: np.ndarray,
    d_logsumexp: np.ndarray | None,
    given: Any,
    tile: Tile | None = None,
    **more: Any,
) -> Any:
    """Return the gradients of attention by the emulation."""
    problem = problem_of("test", *operands, given)
    about = problem.dtype, problem.features, problem.terms
    ways = {name: way for name, way in more.items() if name != "texts"}  # faults are planted below
    emulated(problem, tile or variant_of(*about).tile, **ways)
    gradients = prepare(problem, d_output, d_logsumexp, None, given)
    for variant in backward_variants(*about):
        emulated_kernel(variant, problem, gradients, tile=tile, **more)
    return gradients_of(problem, gradients, tuple(operands), given)


def complaints(case: Case, outputs: dict[str, Any], dtype: str) -> list[str]:
    """Return what is wrong with some of a vector's results."""
    known = {n: x for n, x in case.outputs.items() if n not in outputs}  # not asked here
    verdict = judge(case, {**outputs, **known}, profile_of(dtype))
    return [f"{v.name}: {v.reason}" for v in verdict.outputs if not v.ok and v.name not in known]
