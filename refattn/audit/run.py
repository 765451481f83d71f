"""Puts cases to a subject, and turns what comes back into a verdict a clause.

Three outcomes only: pass, fail, not run. What is not run never counts as passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refattn.arrays import FLOATS, numpy_dtype
from refattn.audit.calls import call, takes_gradients
from refattn.audit.capabilities import missing, refusal
from refattn.audit.expected import Expected, expect
from refattn.audit.subject import Arrays, Subject
from refattn.bounds import PROFILES, profile_of
from refattn.errors import RefattnError
from refattn.judge import STATISTICS, OutputVerdict, judge
from refattn.vectors.pack import Case, unbounded

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
"""The outcomes."""

TIGHTEST_FIRST = {
    "float64": ("fp64", "fp32", "tf32", "fp16", "bf16", "fp16_accumulate"),
    "float32": ("fp32", "tf32", "fp16", "bf16", "fp16_accumulate"),
    "float16": ("fp16", "fp16_accumulate", "bf16"),
    "bfloat16": ("bf16",),
}
"""Profiles that a result in each dtype can show, in the order in which they are looked for."""

LOGSUMEXP_CLAUSES = frozenset({"OWN-LSE1", "NUM-LSE1"})
"""Clauses that only the logsumexp can prove."""

BACKWARD_CLAUSES = frozenset({"FA1-ALG3", "FA1-ALG4", "OWN-BACKWARD1", "NUM-BACKWARD1"})
"""Clauses that only gradients can prove."""

ROUNDING_CLAUSE = "OWN-ROUND1"
"""The clause that fixes the dtype of results."""

DTYPE = " dtype"
"""Ending of the name under which an output's dtype is judged, for the clause above alone."""


@dataclass(frozen=True)
class Result:
    """What became of one case in one dtype."""

    case_id: str
    clauses: tuple[str, ...]
    dtype: str
    profile: str
    status: str
    reason: str
    outputs: tuple[OutputVerdict, ...] = ()
    met: frozenset[str] = frozenset()
    """Profiles whose bounds every output of this run met."""
    bounded: frozenset[str] = frozenset()
    """Profiles of which the case has bounds; any other tells nothing."""
    departure: str = ""
    """How the dialect that was expected departs from the default, where this run agrees with it."""

    @property
    def ratio(self) -> float:
        """The worst error over its bound, 0 where nothing was judged."""
        return max((verdict.ratio for verdict in self.outputs), default=0.0)


@dataclass(frozen=True)
class ClauseVerdict:
    """What the cases of one clause came to."""

    id: str
    passed: int
    failed: int
    not_run: int
    ratio: float
    finding: str

    @property
    def status(self) -> str:
        """The outcome of the clause: one failure fails it, and nothing run proves nothing."""
        return FAIL if self.failed else PASS if self.passed else NOT_RUN


def select(
    cases: Iterable[Case], *, clauses: Sequence[str] = (), flags: Sequence[str] = ()
) -> list[Case]:
    """Return the cases that exercise any of the clauses and carry any of the flags.

    Raises:
        RefattnError: there is none.
    """
    found = [
        case
        for case in cases
        if (not clauses or set(clauses) & set(case.clauses))
        and (not flags or set(flags) & set(case.flags))
    ]
    if not found:
        asked = ", ".join([*clauses, *flags]) or "this pack"
        raise RefattnError(f"no case was selected: no vector has {asked}")
    return found


def run(
    subject: Subject,
    cases: Sequence[Case],
    *,
    dtypes: Sequence[str] = (),
    profile: str = "",
    dialect: Subject | None = None,
) -> Iterator[Result]:
    """Yield the result of every case in every dtype that it is exact in.

    Args:
        subject: the implementation.
        cases: the selection.
        dtypes: only these; all if empty.
        profile: the precision that the subject declares; that of each dtype if empty.
        dialect: the text that says what is expected, from `expected.load_text`; None = the case.

    Raises:
        RefattnError: the profile is unknown.
    """
    if profile and profile not in PROFILES:
        raise RefattnError(f"profile is {profile}, but it must be one of {', '.join(PROFILES)}")
    if dialect is not None:  # the subject makes the dialect's choices, unasked
        subject = subject._replace(capabilities=replace(subject.capabilities, conventions={}))
    for case in cases:
        asked = [dtype for dtype in dtypes or FLOATS if dtype in case.dtypes]
        told = None if dialect is None or not asked else expect(case, dialect)
        for dtype in asked:
            yield run_case(subject, case, dtype, profile or profile_of(dtype), told)


def run_case(
    subject: Subject, case: Case, dtype: str, profile: str, told: Expected | None = None
) -> Result:
    """Return the result of one case in one dtype, against its own values or a dialect's."""
    about = (case.id, case.clauses, dtype, profile)
    offered = subject.capabilities
    why = refusal(case, dtype, offered) if told is None else missing(case, dtype, offered)
    why = why or (told.reason if told else "")
    expected = case if told is None or told.case is None else told.case
    why = why or unbounded(expected, profile)
    bounded = frozenset(expected.bounds)
    if why:
        return Result(*about, NOT_RUN, why)
    try:
        outputs = call(subject, case, dtype)
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())[:300]
        return Result(*about, FAIL, f"{type(error).__name__}: {message}", bounded=bounded)
    if not outputs:
        return Result(*about, FAIL, "it returned nothing", bounded=bounded)
    judged = _judged(subject, expected, outputs)
    met = frozenset(name for name in expected.bounds if judge(judged, outputs, name).ok)
    verdicts = judge(judged, outputs, profile).outputs + _wrong_dtypes(judged, outputs, dtype)
    departure = told.departures(judged) if told else ""
    if departure and _default_holds(subject, case, outputs, profile):
        verdicts = tuple(_told_apart(verdict, departure) for verdict in verdicts)
    first = next((v for v in verdicts if not v.ok), None)
    status, reason = (FAIL, first.reason) if first else (PASS, "")
    return Result(*about, status, reason, verdicts, met, bounded, "" if first else departure)


def _default_holds(subject: Subject, case: Case, outputs: Arrays, profile: str) -> bool:
    """Return whether a run that a dialect is expected of gives the certified values instead."""
    if unbounded(case, profile):
        return False
    return judge(_judged(subject, case, outputs), outputs, profile).ok


def _told_apart(verdict: OutputVerdict, departure: str) -> OutputVerdict:
    """Return a failing verdict that says that the default is met, and the dialect is not."""
    if verdict.ok:
        return verdict
    why = f"it agrees with refattn's default, but the dialect has {departure}: {verdict.reason}"
    return verdict._replace(reason=why)


def by_clause(results: Sequence[Result]) -> list[ClauseVerdict]:
    """Return one verdict a clause, in the order in which the results name them.

    A case counts for a clause only by the outputs that can prove it: a clause of the backward
    pass by gradients, one of the logsumexp by the logsumexp, any other by the forward pass.
    """
    ids = dict.fromkeys(id_ for result in results for id_ in result.clauses)
    return [_clause_verdict(id_, results) for id_ in ids]


def measured(results: Sequence[Result]) -> dict[str, dict[str, tuple[int, int]]]:
    """Return, a dtype that was run, in how many runs the bounds of each profile were met.

    A subject that computes in less than it declares fails in its own profile, but meets a wider
    one in every run. Formats whose bounds it meets alike cannot be told apart.

    Returns:
        found: dtype -> profile, tightest first -> (runs that met its bounds, runs that count).
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for dtype in FLOATS:
        judged = [r for r in results if r.dtype == dtype and r.status != NOT_RUN]
        for profile in TIGHTEST_FIRST[dtype] if judged else ():
            runs = [r for r in judged if profile in r.bounded or not r.met]
            met = sum(profile in r.met for r in runs)
            found.setdefault(dtype, {})[profile] = (met, len(runs))
    return found


def _wrong_dtypes(case: Case, outputs: Arrays, dtype: str) -> tuple[OutputVerdict, ...]:
    """Return a failure for each result that is not in the dtype of the inputs (OWN-ROUND1).

    Statistics stay in the computing format, and a wider one is right; a run that does not prove
    the clause is not looked at.
    """
    if ROUNDING_CLAUSE not in case.clauses:
        return ()
    return tuple(
        OutputVerdict(
            name + DTYPE, False, np.inf, None, None, None, None,
            f"{name} has dtype {outputs[name].dtype}, but its inputs have {dtype}",
        )
        for name in case.outputs
        if name in outputs
        and name not in STATISTICS
        and outputs[name].dtype.kind in "fV"
        and outputs[name].dtype != numpy_dtype(dtype)
    )  # fmt: skip


def _judged(subject: Subject, case: Case, outputs: Arrays) -> Case:
    """Return the case with those of its expected outputs that the subject owes or returned."""
    owed = {"output"} if case.op == "attention" else set(case.outputs)
    if (
        case.op == "attention"
        and takes_gradients(subject, dict(case.inputs))
        and "d_output" in case.inputs
    ):
        owed |= {"d_query", "d_key", "d_value"}
    if "logsumexp" in subject.capabilities.features:
        owed.add("logsumexp")
    kept = {n: a for n, a in case.outputs.items() if n in owed or n in outputs}
    return replace(case, outputs=kept)


def _clause_verdict(id_: str, results: Sequence[Result]) -> ClauseVerdict:
    """Count the results of one clause."""
    counts = dict.fromkeys((PASS, FAIL, NOT_RUN), 0)
    ratio, finding = 0.0, ""
    for result in results:
        if id_ not in result.clauses:
            continue
        status, proof = _evidence(id_, result)
        counts[status] += 1
        ratio = max([ratio, *(verdict.ratio for verdict in proof)])
        if status == FAIL and not finding:
            bad = next((v.reason for v in proof if not v.ok), result.reason)
            finding = f"{bad} [{result.case_id}, {result.dtype}, {result.profile}]"
    return ClauseVerdict(id_, counts[PASS], counts[FAIL], counts[NOT_RUN], ratio, finding)


def _evidence(id_: str, result: Result) -> tuple[str, list[OutputVerdict]]:
    """Return what a result says about a clause, and the outputs that say it."""
    if result.status == NOT_RUN or not result.outputs:
        return result.status, []
    proof = [verdict for verdict in result.outputs if _proves(id_, verdict.name)]
    bad = [verdict.name for verdict in result.outputs if not verdict.ok]
    if bad and not any(_proves(clause, name) for clause in result.clauses for name in bad):
        return FAIL, list(result.outputs)  # a failure that no clause of the case owns is all's
    if not proof:
        return NOT_RUN, []
    return (PASS if all(verdict.ok for verdict in proof) else FAIL), proof


def _proves(id_: str, output: str) -> bool:
    """Return whether an output can prove a clause."""
    if output.endswith(DTYPE):
        return id_ == ROUNDING_CLAUSE
    if id_ in LOGSUMEXP_CLAUSES:
        return output == "logsumexp"
    return output.startswith("d_") == (id_ in BACKWARD_CLAUSES)
