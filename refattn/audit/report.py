"""The report of an audit: data first, then Markdown and HTML of the same data."""

from __future__ import annotations

import html
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from refattn.audit.run import FAIL, NOT_RUN, PASS, Result, by_clause, measured
from refattn.audit.subject import Subject
from refattn.spec_text import load_clauses
from refattn.vectors.pack import Pack

HEAD = ("clause", "title", "verdict", "pass", "fail", "not run", "worst error / bound")
"""Columns of the table of clauses."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ccc; padding: .2rem .6rem;
text-align: left; vertical-align: top } .pass { color: #17692c } .fail { color: #b00020 }
.not-run { color: #8a5a00 } code { font-size: 13px }
"""
"""Look of the HTML report."""


def summary(
    subject: Subject, pack: Pack, results: Sequence[Result], *, dialect: str = ""
) -> dict[str, Any]:
    """Return the whole report as plain data, which is the form of the JSON report."""
    titles = {id_: clause.title for id_, clause in load_clauses().items()}
    offered = subject.capabilities
    counts = Counter(result.status for result in results)
    return {
        "refattn": version("refattn"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "pack": {"size": pack.size, "root_sha256": pack.root_hash},
        "subject": {
            "name": subject.name,
            "version": subject.version,
            "features": sorted(offered.features),
            "dtypes": list(offered.dtypes),
            "conventions": dict(offered.conventions),
            "layout": offered.layout,
        },
        "counts": {status: counts[status] for status in (PASS, FAIL, NOT_RUN)},
        "ok": not counts[FAIL],
        "declared_precision": sorted({r.profile for r in results if r.status != NOT_RUN}),
        "measured_precision": {
            dtype: {profile: list(runs) for profile, runs in found.items()}
            for dtype, found in measured(results).items()
        },
        "clauses": [
            {
                "id": v.id,
                "title": titles.get(v.id, ""),
                "verdict": v.status,
                "pass": v.passed,
                "fail": v.failed,
                "not_run": v.not_run,
                "worst_ratio": v.ratio,
                "first_finding": v.finding,
            }
            for v in sorted(by_clause(results), key=lambda v: _place(v.id, titles))
        ],
        "dialect": dialect,
        "departures": dict(Counter(r.departure for r in results if r.departure).most_common()),
        "not_run_reasons": dict(
            Counter(r.reason for r in results if r.status == NOT_RUN).most_common()
        ),
        "results": [_result(result) for result in results],
    }


def headline(data: dict[str, Any]) -> str:
    """Return the sentence that says how it ended."""
    counts, subject = data["counts"], data["subject"]
    name = " ".join(part for part in (subject["name"], subject["version"]) if part)
    return (
        f"{name}: {'no finding' if data['ok'] else 'FINDINGS'}: {counts[PASS]} runs passed, "
        f"{counts[FAIL]} failed, {counts[NOT_RUN]} not run (a run is a vector in one dtype)"
    )


def precision(data: dict[str, Any]) -> str:
    """Return the sentences about the precision that was declared and that was measured."""
    met, unmet = [], []
    for dtype, by_profile in data["measured_precision"].items():
        always = [name for name, (ok, runs) in by_profile.items() if 0 < ok == runs]
        if always:
            met.append(f"{always[0]} in {dtype}")
        else:
            nearest = max(by_profile, key=lambda name: by_profile[name][0])
            ok, runs = by_profile[nearest]
            unmet.append(
                f"no profile was met in every run in {dtype} ({nearest} in {ok} of {runs})"
            )
    shown = [f"at least as exact as the bounds of {', '.join(met)}"] if met else []
    declared = ", ".join(data["declared_precision"])
    return f"Declared precision: {declared}. Measured: {'; '.join(shown + unmet)}."


MEANING = (
    "A verdict says that the results of a clause's vectors were right or wrong, not how they "
    "were computed; what was not run proves nothing."
)
"""What a reader of the table must know."""


def clause_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of clauses as words."""
    return [
        (
            c["id"],
            c["title"],
            "FAIL" if c["verdict"] == FAIL else c["verdict"],
            str(c["pass"]),
            str(c["fail"]),
            str(c["not_run"]),
            f"{c['worst_ratio']:.3g}" if c["pass"] or c["fail"] else "–",
        )
        for c in data["clauses"]
    ]


def findings(data: dict[str, Any]) -> list[str]:
    """Return the first finding of each clause that failed."""
    return [f"{c['id']}: {c['first_finding']}" for c in data["clauses"] if c["first_finding"]]


def departures(data: dict[str, Any]) -> list[str]:
    """Return how the runs that a dialect alone expects differ from refattn's defaults."""
    return [
        f"{n} runs differ from refattn's default but agree with dialect {data['dialect']}: {how}"
        for how, n in data["departures"].items()
    ]


def as_markdown(data: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"# Audit of {data['subject']['name']}", "", headline(data) + ".", "", precision(data)]
    lines += ["", _provenance(data), "", "## Clauses", "", MEANING, ""]
    lines += [_bar(HEAD), _bar(["---"] * len(HEAD)), *map(_bar, clause_rows(data))]
    lines += ["", "## Findings", "", "The first failing element of each clause.", ""]
    lines += [f"- {finding}" for finding in findings(data)] or ["None."]
    lines += _departed(data)
    lines += ["", "## Not run", ""]
    lines += [f"- {n} runs: {why}" for why, n in data["not_run_reasons"].items()] or ["Nothing."]
    return "\n".join(lines) + "\n"


def as_html(data: dict[str, Any]) -> str:
    """Return the report as one HTML page without scripts or links."""
    rows = "".join(
        f'<tr class="{row[2].lower().replace(" ", "-")}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for row in clause_rows(data)
    )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
    found = "".join(f"<li>{html.escape(f)}</li>\n" for f in findings(data)) or "<li>None.</li>"
    skipped = "".join(
        f"<li>{n} runs: {html.escape(why)}</li>\n" for why, n in data["not_run_reasons"].items()
    )
    apart = "".join(f"<p>{html.escape(line)}</p>\n" for line in departures(data))
    title = html.escape(f"Audit of {data['subject']['name']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(headline(data))}.</p>\n<p>{html.escape(precision(data))}</p>\n"
        f"<p>{html.escape(_provenance(data))}</p>\n<h2>Clauses</h2>\n"
        f"<p>{html.escape(MEANING)}</p>\n"
        f"<table><tr>{head}</tr>\n{rows}</table>\n<h2>Findings</h2>\n<ul>{found}</ul>\n{apart}"
        f"<h2>Not run</h2>\n<ul>{skipped or '<li>Nothing.</li>'}</ul>\n</body></html>\n"
    )


def _departed(data: dict[str, Any]) -> list[str]:
    """Return the part on a dialect; nothing where none was expected."""
    if not data["dialect"]:
        return []
    said = [f"- {text}" for text in departures(data)] or ["No run differs from the default."]
    return ["", f"## Dialect {data['dialect']}", "", *said]


def _provenance(data: dict[str, Any]) -> str:
    """Return what the report was made with."""
    conventions = ", ".join(f"{k} {v}" for k, v in data["subject"]["conventions"].items())
    return (
        f"refattn {data['refattn']}, pack {data['pack']['size']} "
        f"{data['pack']['root_sha256'][:12]}, {data['machine']}. "
        f"Declared: {', '.join(data['subject']['features']) or 'no feature'}; "
        f"{', '.join(data['subject']['dtypes'])}; {conventions}."
    )


def _result(result: Result) -> dict[str, Any]:
    """Return one result as plain data."""
    return {
        "case": result.case_id,
        "clauses": list(result.clauses),
        "dtype": result.dtype,
        "profile": result.profile,
        "status": result.status,
        "reason": result.reason,
        "departure": result.departure,
        "ratios": {verdict.name: float(verdict.ratio) for verdict in result.outputs},
    }


def _place(id_: str, titles: dict[str, str]) -> tuple[int, str]:
    """Return the sort key of a clause: its place in the index, unknown ones last."""
    order = list(titles)
    return (order.index(id_) if id_ in titles else len(order), id_)


def _bar(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
