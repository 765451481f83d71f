"""`refattn dialects`: other systems' attention by name, and how two of them differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from refattn.cli.out import print_json, print_table

app = typer.Typer(rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]

Name = Annotated[str, typer.Argument(help="A dialect, such as torch_sdpa.")]


@app.command("list")
def list_dialects(as_json: AsJson = False) -> None:
    """List the dialects: name, alias, system, what it states."""
    from refattn.dialects import DIALECTS

    if as_json:
        print_json([_about(dialect) for dialect in DIALECTS.values()])
        return
    head = ("dialect", "alias", "system", "states")
    print_table(
        head, [(d.name, d.alias, f"{d.system} {d.version}", d.sentence) for d in DIALECTS.values()]
    )


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a dialect: its functions, its choice on every axis, what it leaves out."""
    from refattn.dialects import find
    from refattn.dialects.conventions import CONVENTIONS, in_words

    dialect = find(name)
    if as_json:
        conventions = {
            axis: {"choice": dialect.conventions[axis], "clause": convention.clause}
            for axis, convention in CONVENTIONS.items()
        }
        print_json(_about(dialect) | {"conventions": conventions})
        return
    print(f"{dialect.name}: {dialect.system} {dialect.version}, {dialect.sentence}")
    for function in dialect.functions:
        print(f"function: {function}")
    rows = [
        (axis, in_words(dialect.conventions[axis]), convention.clause)
        for axis, convention in CONVENTIONS.items()
    ]
    print_table(("convention", "choice", "clause"), rows)
    for exception in dialect.exceptions:
        print(f"exception: {exception}")


@app.command()
def diff(one: Name, other: Name, as_json: AsJson = False) -> None:
    """Show on which axes two dialects differ, and how."""
    from refattn.dialects import find
    from refattn.dialects.conventions import CONVENTIONS, differences, in_words

    first, second = find(one), find(other)
    found = differences(first, second)
    if as_json:
        print_json({axis: {first.name: a, second.name: b} for axis, (a, b) in found.items()})
        return
    rows = [
        (axis, in_words(a), in_words(b), CONVENTIONS[axis].clause) for axis, (a, b) in found.items()
    ]
    print_table(("convention", first.name, second.name, "clause"), rows)
    print(
        f"{first.name} and {second.name} differ in {len(found)} of {len(CONVENTIONS)} conventions"
    )


def _about(dialect: Any) -> dict[str, Any]:
    """Return a dialect as JSON holds it."""
    from dataclasses import asdict

    return asdict(dialect)
