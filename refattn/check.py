"""Every backend that loads here, on every core vector, in every dtype, against proven values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from refattn.arrays import FLOATS
from refattn.backends import BACKENDS, CLAIMS, Backend, BackendAbsent, Unsupported, load, stated
from refattn.bounds import profile_of
from refattn.checks import check_option
from refattn.errors import RefattnError
from refattn.judge import judge
from refattn.vectors.pack import Case, unbounded

REQUIRE = "REFATTN_REQUIRE"
"""Environment variable with names, comma-separated, whose absence is a failure."""


DEVICE, ON_DEVICE = "cuda", ("numba-cuda", "cuda-cpp")
"""The name of a CUDA device, which a simulator is not, and the backends that run on one."""


class Job(NamedTuple):
    """One case for one backend in one dtype."""

    case: Case
    backend: str
    dtype: str


class Result(NamedTuple):
    """What became of one job; ratio is the worst error over its bound."""

    case_id: str
    clauses: tuple[str, ...]
    backend: str
    dtype: str
    verdict: str
    """"ok", "failed" or "not run"."""
    ratio: float
    reason: str


class Cell(NamedTuple):
    """The jobs of one clause for one backend in one dtype."""

    passed: int
    failed: int
    not_run: int
    ratio: float


def present(names: Sequence[str] = ()) -> tuple[list[Backend], dict[str, str]]:
    """Return the backends to run here, and why each other one is not.

    Args:
        names: the backends asked for; every one if empty.

    Raises:
        BackendAbsent: one that was asked for does not load.
    """
    found, absent = [], {}
    for name in names or BACKENDS:
        try:
            backend = load(name)
        except BackendAbsent as error:
            if names:
                raise
            absent[name] = str(error)
            continue
        if backend.simulator and DEVICE in required_names():
            absent[name] = f"backend {name} runs by {backend.simulator}, but {REQUIRE} has {DEVICE}"
        elif backend.simulator and not names and name not in required_names():
            absent[name] = (
                f"backend {name} is left out: no device is here, and {backend.simulator} takes "
                f"minutes; to run it: refattn check --backend {name}"
            )
        else:
            found.append(backend)
    return found, absent


def required_names() -> set[str]:
    """Return the names in the environment variable `REFATTN_REQUIRE`."""
    return {name.strip() for name in os.environ.get(REQUIRE, "").split(",")}


def required(absent: Iterable[str]) -> list[str]:
    """Return the absent backends whose presence the environment requires."""
    names = required_names()
    return [name for name in absent if name in names or (DEVICE in names and name in ON_DEVICE)]


def jobs(
    cases: Iterable[Case],
    backends: Sequence[Backend],
    *,
    clauses: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Job]:
    """Return every job of a selection.

    Raises:
        RefattnError: the selection is empty.
    """
    found = [
        Job(case, backend.name, dtype)
        for case in cases
        if not clauses or set(clauses) & set(case.clauses)
        for backend in backends
        if case.op in CLAIMS[backend.name]
        for dtype in FLOATS
        if dtype in case.dtypes and dtype in backend.dtypes and (not dtypes or dtype in dtypes)
    ]
    if not found:
        asked = ", ".join([*clauses, *dtypes]) or "the pack"
        raise RefattnError(f"nothing was selected: no vector has {asked}")
    return found


def run(job: Job) -> Result:
    """Run one job and judge it."""
    case, name, dtype = job
    about = (case.id, stated(name, case.op, case.clauses), name, dtype)
    if why := unbounded(case, profile_of(dtype)):
        return Result(*about, "not run", 0.0, why)
    try:
        outputs = load(name).run(case.op, case.inputs, case.parameters, case.conventions, dtype)
        verdict = judge(case, outputs, profile_of(dtype))
    except Unsupported as error:
        return Result(*about, "not run", 0.0, str(error))
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        return Result(*about, "failed", float("inf"), f"{type(error).__name__}: {message}")
    bad = next((output for output in verdict.outputs if not output.ok), None)
    ended = "ok" if verdict.ok else "failed"
    return Result(*about, ended, float(verdict.ratio), bad.reason if bad else "")


def table(results: Iterable[Result]) -> dict[str, dict[tuple[str, str], Cell]]:
    """Return a cell a clause and (backend, dtype)."""
    found: dict[str, dict[tuple[str, str], Cell]] = {}
    for result in results:
        for id_ in result.clauses:
            row = found.setdefault(id_, {})
            place = (result.backend, result.dtype)
            passed, failed, not_run, ratio = row.get(place, Cell(0, 0, 0, 0.0))
            row[place] = Cell(
                passed + (result.verdict == "ok"),
                failed + (result.verdict == "failed"),
                not_run + (result.verdict == "not run"),
                max(ratio, result.ratio),
            )
    return found


def summary(
    results: Sequence[Result], absent: dict[str, str], root_hash: str, version: str
) -> dict[str, Any]:
    """Return the whole check as plain data."""
    lacking = required(absent)
    cells = table(results)
    ended = Counter(result.verdict for result in results)
    left_out = Counter(f"{r.backend}: {r.reason}" for r in results if r.verdict == "not run")
    return {
        "refattn": version,
        "pack": root_hash,
        "ok": ended["ok"] > 0 and not ended["failed"] and not lacking,
        "passed": ended["ok"],
        "failed": ended["failed"],
        "not_run": ended["not run"],
        "not_run_reasons": dict(left_out.most_common()),
        "absent": absent,
        "simulators": {
            name: simulator
            for name in dict.fromkeys(result.backend for result in results)
            if (simulator := load(name).simulator)
        },
        "required_but_absent": lacking,
        "clauses": {
            id_: {f"{b} {dtype}": cell._asdict() for (b, dtype), cell in row.items()}
            for id_, row in cells.items()
        },
        "findings": [result._asdict() for result in results if result.verdict == "failed"],
    }


def check(
    *,
    backends: Sequence[str] = (),
    clauses: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    watch: Callable[[Any, int, str], Any] = lambda items, total, what: items,
) -> dict[str, Any]:
    """Run the core pack and return the whole check as plain data.

    Args:
        backends: only these; all that load here if empty.
        clauses: only vectors that exercise one of them; all if empty.
        dtypes: only these; all if empty.
        watch: wraps the results as they come: `watch(items, total, what)`.

    Raises:
        RefattnError: a word is unknown, a backend asked for is absent, or nothing was selected.
    """
    from importlib.metadata import version

    from refattn.spec_text import find, load_clauses
    from refattn.vectors.pack import core_pack

    for dtype in dtypes:
        check_option("check", "dtype", dtype, FLOATS)
    found, absent = present(backends)
    known = load_clauses()
    wanted = [find(id_, known).id for id_ in clauses]
    pack = core_pack()
    todo = jobs(pack.cases, found, clauses=wanted, dtypes=dtypes)
    results = list(watch(map(run, todo), len(todo), "checking"))
    return summary(results, absent, pack.root_hash, version("refattn"))
