"""`refattn check`: do the backends of this machine agree with the proven values?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode=None)

Words = list[str] | None
"""An option that may be given several times."""

SHOWN = 20
"""Findings that are printed one by one; the JSON has them all."""

REASONS = 3
"""Reasons for leaving out runs that are printed; the JSON has them all."""


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
    for line in _not_run(data["not_run_reasons"]):
        print(line)
    for name, simulator in data["simulators"].items():
        print(f"backend {name} ran by {simulator}")
    for name, why in data["absent"].items():
        needed = " (required)" if name in data["required_but_absent"] else ""
        print(f"{why}{needed}")
    for finding in data["findings"][:SHOWN]:
        print(f"finding: {finding['case_id']}, {finding['backend']} {finding['dtype']}: "
              f"{finding['reason']}")  # fmt: skip
    if len(data["findings"]) > SHOWN:
        print(f"and {len(data['findings']) - SHOWN} more findings (--json has them all)")
    not_run = f", {data['not_run']} were not run" if data["not_run"] else ""
    print(
        f"{data['passed']} runs agree with the certified values, {data['failed']} do not{not_run} "
        f"(pack {data['pack'][:12]}): {'ok' if data['ok'] else 'FINDINGS'}"
    )


def _not_run(reasons: dict[str, int]) -> list[str]:
    """Return the commonest reasons for which runs were left out, one a line."""
    shown = [f"not run: {n} runs: {why}" for why, n in list(reasons.items())[:REASONS]]
    rest = list(reasons.values())[REASONS:]
    if rest:
        shown.append(f"not run: {sum(rest)} runs for {len(rest)} more reasons (--json has them)")
    return shown


def _cell(cell: dict[str, Any] | None) -> str:
    """Return the words of one cell: verdict, worst ratio, vectors run (of those there are)."""
    if cell is None:
        return "–"
    ran = cell["passed"] + cell["failed"]
    total = f"{ran} of {ran + cell['not_run']}" if cell["not_run"] else str(ran)
    if cell["failed"]:
        return f"FAIL {cell['ratio']:.3g} ({cell['failed']} of {ran})"
    return f"ok {cell['ratio']:.2f} ({total})" if ran else f"not run ({cell['not_run']})"
