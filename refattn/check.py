"""Every backend that loads here, on every core vector, in every dtype, against proven values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from refattn.arrays import FLOATS
from refattn.backends import BACKENDS, CLAIMS, Backend, BackendAbsent, Unsupported, load
from refattn.bounds import profile_of
from refattn.checks import check_option
from refattn.errors import RefattnError
from refattn.judge import judge
from refattn.vectors.pack import Case

REQUIRE = "REFATTN_REQUIRE"
"""Environment variable with names, comma-separated, whose absence is a failure."""


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
    ok: bool
    ratio: float
    reason: str


class Declined(NamedTuple):
    """A job that its backend does not claim; it was not run."""

    case_id: str
    backend: str
    dtype: str
    reason: str


class Cell(NamedTuple):
    """The jobs of one clause for one backend in one dtype."""

    passed: int
    failed: int
    ratio: float


def present(names: Sequence[str] = ()) -> tuple[list[Backend], dict[str, str]]:
    """Return the backends that load here, and why each other one does not.

    Args:
        names: the backends asked for; every one if empty.

    Raises:
        BackendAbsent: one that was asked for does not load.
    """
    found, absent = [], {}
    for name in names or BACKENDS:
        try:
            found.append(load(name))
        except BackendAbsent as error:
            if names:
                raise
            absent[name] = str(error)
    return found, absent


def required(absent: Iterable[str]) -> list[str]:
    """Return the absent backends whose presence the environment requires."""
    names = {name.strip() for name in os.environ.get(REQUIRE, "").split(",")}
    return [name for name in absent if name in names]


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
        for dtype in FLOATS
        if case.op in CLAIMS[backend.name]
        and dtype in case.dtypes
        and dtype in backend.dtypes
        and (not dtypes or dtype in dtypes)
    ]
    if not found:
        asked = ", ".join([*clauses, *dtypes]) or "the pack"
        raise RefattnError(f"nothing was selected: no vector has {asked}")
    return found


def run(job: Job) -> Result | Declined:
    """Run one job and judge it; a backend may decline an option, and then nothing was shown."""
    case, name, dtype = job
    about = (case.id, case.clauses, name, dtype)
    try:
        outputs = load(name).run(case.op, case.inputs, case.parameters, case.conventions, dtype)
        verdict = judge(case, outputs, profile_of(dtype))
    except Unsupported as error:
        return Declined(case.id, name, dtype, str(error))
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        return Result(*about, False, float("inf"), f"{type(error).__name__}: {message}")
    bad = next((output for output in verdict.outputs if not output.ok), None)
    return Result(*about, verdict.ok, float(verdict.ratio), bad.reason if bad else "")


def table(results: Iterable[Result]) -> dict[str, dict[tuple[str, str], Cell]]:
    """Return a cell a clause and (backend, dtype)."""
    found: dict[str, dict[tuple[str, str], Cell]] = {}
    for result in results:
        for id_ in result.clauses:
            row = found.setdefault(id_, {})
            place = (result.backend, result.dtype)
            passed, failed, ratio = row.get(place, (0, 0, 0.0))
            row[place] = Cell(
                passed + result.ok, failed + (not result.ok), max(ratio, result.ratio)
            )
    return found


def summary(
    outcomes: Sequence[Result | Declined], absent: dict[str, str], root_hash: str, version: str
) -> dict[str, Any]:
    """Return the whole check as plain data."""
    declined = [outcome for outcome in outcomes if isinstance(outcome, Declined)]
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    lacking = required(absent)
    cells = table(results)
    return {
        "refattn": version,
        "pack": root_hash,
        "ok": bool(results) and all(result.ok for result in results) and not lacking,
        "runs": len(results),
        "failed": sum(not result.ok for result in results),
        "not_claimed": [job._asdict() for job in declined],
        "absent": absent,
        "required_but_absent": lacking,
        "clauses": {
            id_: {f"{b} {dtype}": cell._asdict() for (b, dtype), cell in row.items()}
            for id_, row in cells.items()
        },
        "findings": [result._asdict() for result in results if not result.ok],
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
