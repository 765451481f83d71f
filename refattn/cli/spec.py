"""`refattn spec`: the clauses, one clause side by side, and what covers each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from refattn.cli.out import print_json, print_table

if TYPE_CHECKING:
    from refattn.coverage import Row

app = typer.Typer(rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


@app.command("list")
def list_clauses(
    chapter: Annotated[str, typer.Option(help="One chapter only: rope, or rope.md.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the clauses: id, place in the paper, title."""
    from refattn.errors import RefattnError
    from refattn.spec_text import load_clauses

    clauses = load_clauses()
    chapters = dict.fromkeys(clause.chapter.removesuffix(".md") for clause in clauses.values())
    wanted = chapter.removesuffix(".md")
    if wanted and wanted not in chapters:
        raise RefattnError(f"there is no chapter {chapter}; there are {', '.join(chapters)}")
    found = [c for c in clauses.values() if wanted in ("", c.chapter.removesuffix(".md"))]
    if as_json:
        print_json([{k: v for k, v in c._asdict().items() if v} for c in found])
        return
    print_table(("clause", "place", "title"), [(c.id, c.where, c.title) for c in found])


@app.command()
def show(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A clause, such as ROPE-EQ15.")],
    as_json: AsJson = False,
) -> None:
    """Show a clause: source, statement, code, tests, vectors."""
    from refattn import coverage
    from refattn.spec_text import fields, find, load_clauses, section

    clause = find(id_, load_clauses())
    text = section(clause.id)
    row = next(row for row in coverage.rows() if row.clause == clause)
    if as_json:
        about = {k: v for k, v in clause._asdict().items() if v}
        print_json({**about, **coverage.as_json([row])[0], "text": text, **fields(text)})
        return
    source = " ".join(part for part in (clause.paper, clause.version) if part)
    print(f"{text}\nPaper: {source}, {clause.where} (spec/{clause.chapter})\n")
    print_table(("kind", "name", "place"), _places(row))


def _places(row: Row) -> list[tuple[str, str, str]]:
    """Return the lines of a clause's places."""
    lines = [("code", p.name, f"{p.file}:{p.line}") for p in row.references]
    lines += [("test", p.name, f"{p.file}:{p.line}") for p in row.tests or ()]
    if row.tests is None:
        lines.append(("test", "unknown", "the tests come with the source, not with the wheel"))
    lines += [("vector", name, f"spec/vectors/core/{name}") for name in row.vectors]
    return lines + [("none", f"no {what}", why or "a hole") for what, why in row.holes().items()]


@app.command()
def coverage(
    write: Annotated[bool, typer.Option("--write", help="Write spec/coverage.md.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if it is stale.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show, for each clause, its reference, tests, vectors and backends."""
    from refattn import coverage as room
    from refattn.errors import RefattnError
    from refattn.spec_text import spec_root

    root = spec_root()
    if (write or check) and room.tests_root(root) is None:
        raise RefattnError(
            "the table of coverage counts the tests, but they come with the source, not the wheel"
        )
    table, path = room.rows(root), root / "coverage.md"
    if write:
        path.write_text(room.as_markdown(table), "utf-8")
        print(f"wrote {path}")
    elif check:
        fresh = path.is_file() and path.read_text("utf-8") == room.as_markdown(table)
        print(f"coverage.md is {'fresh' if fresh else 'stale: refattn spec coverage --write'}")
        raise typer.Exit(0 if fresh else 1)
    elif as_json:
        print_json(room.as_json(table))
    else:
        head = ("clause", "title", "reference", "tests", "vectors", "backends", "holes")
        print_table(head, [_coverage_line(row) for row in table])


def _coverage_line(row: Row) -> tuple[str, ...]:
    """Return one line of the coverage table."""
    holes = [f"no {what}: {why}" if why else f"no {what}" for what, why in row.holes().items()]
    names = list(dict.fromkeys(place.name for place in row.references))
    return (
        row.clause.id,
        row.clause.title,
        ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else ""),
        "unknown" if row.tests is None else str(len(row.tests)),
        str(len(row.vectors)),
        ", ".join(row.backends),
        "; ".join(holes),
    )
