"""Subjects under audit, their adapters, verdicts and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refattn.audit.subject import Subject


def judge_subject(
    subject: Subject,
    *,
    pack: Path | None = None,
    clauses: Sequence[str] = (),
    flags: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    profile: str = "",
    dialect: str = "",
    watch: Callable[[Any, int, str], Any] = lambda items, total, what: items,
) -> dict[str, Any]:
    """Return the report of an audit as plain data.

    Args:
        subject: the implementation, from `refattn.audit.subject.load_subject`.
        pack: folder of a pack; the core pack if None.
        clauses: only vectors that exercise one of them; all if empty.
        flags: only vectors with one of them; all if empty.
        dtypes: only these; all if empty.
        profile: the precision that the subject declares; that of each dtype if empty.
        dialect: name of the dialect whose behaviour is expected; refattn's defaults if empty.
        watch: wraps the results as they come: `watch(items, total, what)`.

    Returns:
        report: see `refattn.audit.report.summary`.

    Raises:
        RefattnError: a word is unknown, nothing was selected, or nothing could be run.
    """
    from refattn.arrays import FLOATS
    from refattn.audit import report, run
    from refattn.audit.capabilities import check_words
    from refattn.audit.expected import load_text
    from refattn.errors import RefattnError
    from refattn.spec_text import find, load_clauses
    from refattn.vectors.pack import core_pack, read_pack

    text = load_text(dialect) if dialect else None
    known = load_clauses()
    wanted = [find(id_, known).id for id_ in clauses]
    loaded = core_pack() if pack is None else read_pack(pack)
    check_words("flag", flags, loaded.flags)
    cases = run.select(loaded.cases, clauses=wanted, flags=flags)
    total = sum(dtype in case.dtypes for case in cases for dtype in dtypes or FLOATS)
    found = run.run(subject, cases, dtypes=dtypes, profile=profile, dialect=text)
    results = list(watch(found, total, subject.name))
    if not results:
        raise RefattnError(f"nothing was run: no vector of the selection is exact in {dtypes[0]}")
    if all(result.status == run.NOT_RUN for result in results):
        raise RefattnError(f"nothing was run: {results[0].reason} (and so on, {total} runs in all)")
    return report.summary(subject, loaded, results, dialect=text.name if text else "")
