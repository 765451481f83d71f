"""`refattn audit`: the verdict on somebody's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode=None)

Words = list[str] | None
"""An option that may be given several times."""


@app.command()
def audit(
    subject: Annotated[
        str,
        typer.Argument(help="module:function, or torch-sdpa, onnxruntime, jax, keras."),
    ],
    clause: Annotated[Words, typer.Option(help="Only vectors of this clause.")] = None,
    flag: Annotated[Words, typer.Option(help="Only vectors with this flag.")] = None,
    dtype: Annotated[Words, typer.Option(help="Only this dtype.")] = None,
    profile: Annotated[
        str, typer.Option(help="Declared precision, such as tf32; that of the dtype if absent.")
    ] = "",
    capability: Annotated[Words, typer.Option(help="A further feature it has.")] = None,
    convention: Annotated[
        Words, typer.Option(metavar="AXIS=CHOICE", help="Its choice where papers leave one.")
    ] = None,
    dialect: Annotated[
        str, typer.Option(help="The dialect whose behaviour is expected, such as torch_sdpa.")
    ] = "",
    layout: Annotated[str, typer.Option(help="Order of its axes: bhnd or bnhd.")] = "",
    pack: Annotated[Path | None, typer.Option(help="A pack; the core pack if absent.")] = None,
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write JSON to a file; - is stdout.")
    ] = "",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a .md or .html report.")
    ] = None,
) -> None:
    """Judge an implementation of attention against certified values, clause by clause."""
    from refattn.audit import judge_subject
    from refattn.audit.subject import load_subject
    from refattn.cli.out import progress

    write = _writer(report)
    loaded = load_subject(
        subject,
        capabilities=tuple(capability or ()),
        conventions=dict(_pair(text) for text in convention or ()),
        layout=layout or None,
        dtypes=tuple(dtype or ()),
    )
    data = judge_subject(
        loaded,
        pack=pack,
        clauses=clause or (),
        flags=flag or (),
        dtypes=dtype or (),
        profile=profile,
        dialect=dialect,
        watch=progress,
    )
    if report is not None and write is not None:
        _save(report, write(data))
    _print(data, json_file)
    raise typer.Exit(0 if data["ok"] else 1)


def _print(data: dict[str, Any], json_file: str) -> None:
    """Print the report, or the JSON if it goes to stdout."""
    import json

    from refattn.audit.report import HEAD, clause_rows, departures, findings, headline, precision
    from refattn.cli.out import plain, print_json, print_table

    if json_file == "-":
        print_json(data)
        return
    if json_file:
        _save(Path(json_file), json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
    print_table(HEAD, clause_rows(data))
    for finding in findings(data):
        print(f"finding: {finding}")
    for why, n in data["not_run_reasons"].items():
        print(f"not run: {n} runs: {why}")
    for departure in departures(data):
        print(departure)
    print(precision(data))
    print(headline(data))


def _pair(text: str) -> tuple[str, str]:
    """Return the axis and the choice of `axis=choice`."""
    from refattn.errors import RefattnError

    axis, equals, choice = text.partition("=")
    if not equals:
        raise RefattnError(f"convention is {text}, but it must be of the form axis=choice")
    return axis, choice


def _writer(report: Path | None) -> Any:
    """Return the function that makes the text of a report file, before anything is run."""
    from refattn.errors import RefattnError

    if report is None:
        return None
    from refattn.audit.report import as_html, as_markdown

    writers = {".md": as_markdown, ".html": as_html}
    if report.suffix not in writers:
        raise RefattnError(f"report is {report.name}, but its name must end in .md or .html")
    return writers[report.suffix]


def _save(path: Path, text: str) -> None:
    """Write a file."""
    from refattn.errors import RefattnError

    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise RefattnError(f"{path} cannot be written: {error.strerror}") from error
