"""Every certified vector, on every backend of a GPU, in every dtype that they claim."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

from refattn.backends import Backend, BackendAbsent, load
from refattn.check import Job, Result, jobs
from refattn.check import run as run_job
from refattn.vectors.pack import Case, core_pack
from refattn_gpu.cuda.catalogue import FORMATS, FORWARD, most_features
from refattn_gpu.stages.ground import Ground, Put

BACKENDS = ("cupy", "cuda-cpp", "numba-cuda")
"""What is asked, the quicker one first."""

OFTEN = 20
"""Runs between two reports."""

TINY = 600
"""Numbers in the inputs of a vector that the simulation runs."""

FEW = 6
"""Vectors of the simulation."""


def run(on: Ground, put: Put) -> None:
    """Report passed, failed and not run, by backend and dtype, and each disagreement."""
    pack = core_pack()
    put("pack", pack.root_hash)
    cases = _few(pack.cases) if on.simulated else list(pack.cases)
    for name in BACKENDS:
        try:
            backend = load(name)
        except BackendAbsent as absent:
            put(name, {"absent": str(absent)})
            continue
        _run_backend(backend, name, cases, put)
        if name == "numba-cuda":
            _run_backend(backend, f"{name} rows", _by_rows(cases), put)
        if name == "cuda-cpp":
            for kernel in FORWARD:  # the default is of the device
                _run_backend(backend, f"{name} {kernel}", _by_kernel(cases, kernel), put)


def _few(cases: tuple[Case, ...]) -> list[Case]:
    """Return some vectors of attention that the simulator runs in a moment."""
    small = (c for c in cases if c.op == "attention" and _size(c) <= TINY)
    return [case for case, _ in zip(small, range(FEW), strict=False)]


def _by_rows(cases: list[Case]) -> list[Case]:
    """Return the cases of attention, for the other form of the kernels."""
    return [
        replace(case, conventions={**case.conventions, "form": "rows"})
        for case in cases
        if case.op == "attention"
    ]


def _by_kernel(cases: list[Case], kernel: str) -> list[Case]:
    """Return the forward passes of the cases of attention, in the formats of a kernel."""
    results = ("output", "logsumexp")
    formats = [dtype for dtype in FORMATS if most_features(dtype, (kernel,))]
    return [
        replace(
            case,
            conventions={**case.conventions, "kernel": kernel},
            dtypes=tuple(dtype for dtype in case.dtypes if dtype in formats),
            inputs={n: x for n, x in case.inputs.items() if not n.startswith("d_")},
            outputs={n: x for n, x in case.outputs.items() if n in results},
        )
        for case in cases
        if case.op == "attention"
    ]


def _size(case: Case) -> int:
    return sum(array.size for array in case.inputs.values())


def _run_backend(backend: Backend, name: str, cases: list[Case], put: Put) -> None:
    begin = time.perf_counter()
    tallies: dict[str, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    todo = jobs(cases, [backend])
    todo.sort(key=lambda job: (job.dtype, job.case.id))  # a kernel is compiled once a dtype
    for count, job in enumerate(todo, 1):
        result = run_job(job)
        tally = tallies.setdefault(job.dtype, dict(passed=0, failed=0, not_run=0, ratio=0.0))
        _count(tally, result, job)
        if result.verdict == "failed":
            put(f"finding {name} {job.dtype} {job.case.id}", result.reason)
        elif result.verdict == "not run":
            reasons[result.reason] += 1
        if count % OFTEN == 0 or count == len(todo):
            seconds = round(time.perf_counter() - begin, 3)
            done = {"runs": count, "of": len(todo), "seconds": seconds}
            put(name, done | {"by_dtype": tallies, "not_run": dict(reasons)})


def _count(tally: dict[str, Any], result: Result, job: Job) -> None:
    """Add a result; the worst ratio of error to bound is kept with its vector."""
    word = {"ok": "passed", "failed": "failed", "not run": "not_run"}[result.verdict]
    tally[word] += 1
    if result.verdict == "ok" and result.ratio >= tally["ratio"]:
        tally.update(ratio=result.ratio, worst=job.case.id)
