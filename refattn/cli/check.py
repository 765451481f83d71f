"""`refattn check`: do the backends of this machine agree with the proven values?"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode=None)

Words = list[str] | None
"""An option that may be given several times."""

SHOWN = 20
"""Findings that are printed one by one; the JSON has them all."""


@app.command()
def check(
    backend: Annotated[Words, typer.Option(help="Only this backend.")] = None,
    clause: Annotated[Words, typer.Option(help="Only vectors of this clause.")] = None,
    dtype: Annotated[Words, typer.Option(help="Only this dtype.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Run every backend that loads here on every core vector, in every dtype."""
    from refattn.check import check as run
    from refattn.cli.out import announce, print_json, progress

    announce()
    data = run(
        backends=backend or (),
        clauses=clause or (),
        dtypes=dtype or (),
        watch=progress,
    )
    if as_json:
        print_json(data)
    else:
        _print(data)
    raise typer.Exit(0 if data["ok"] else 1)


def _print(data: dict[str, Any]) -> None:
    """Print the table of clauses, the absent backends, the findings and the conclusion."""
    from refattn.cli.out import print_table
    from refattn.spec_text import load_clauses

    columns = list(dict.fromkeys(name for row in data["clauses"].values() for name in row))
    rows = [
        (id_, *(_cell(data["clauses"][id_].get(column)) for column in columns))
        for id_ in load_clauses()
        if id_ in data["clauses"]
    ]
    print_table(("clause", *columns), rows, title="worst error / bound (vectors)")
    for name, why in data["absent"].items():
        needed = " (required)" if name in data["required_but_absent"] else ""
        print(f"{why}{needed}")
    for name, count in Counter(job["backend"] for job in data["not_claimed"]).items():
        print(f"backend {name} does not claim {count} runs, which were left out (--json has them)")
    for finding in data["findings"][:SHOWN]:
        print(f"finding: {finding['case_id']}, {finding['backend']} {finding['dtype']}: "
              f"{finding['reason']}")  # fmt: skip
    if len(data["findings"]) > SHOWN:
        print(f"and {len(data['findings']) - SHOWN} more findings (--json has them all)")
    passed = data["runs"] - data["failed"]
    print(
        f"{passed} of {data['runs']} runs agree with the certified values "
        f"(pack {data['pack'][:12]}): {'ok' if data['ok'] else 'FINDINGS'}"
    )


def _cell(cell: dict[str, Any] | None) -> str:
    """Return the words of one cell."""
    if cell is None:
        return "–"
    total = cell["passed"] + cell["failed"]
    if cell["failed"]:
        return f"FAIL {cell['ratio']:.3g} ({cell['failed']} of {total})"
    return f"ok {cell['ratio']:.2f} ({total})"
