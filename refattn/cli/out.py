"""What the commands print: tables for eyes and for pipes, JSON for machines, bars for patience."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

STYLES = {"ok": "green", "pass": "green", "FAIL": "bold red", "not run": "yellow"}
"""Colours of the words that decide, in a terminal."""


def announce() -> None:
    """Let long work, as the compilation of a kernel, say so on stderr."""
    import logging

    logging.basicConfig(format="refattn: %(message)s")
    logging.getLogger("refattn").setLevel(logging.INFO)


def print_json(data: Any) -> None:
    """Print one JSON document to stdout; numbers without a JSON form become strings."""
    print(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False))


def plain(data: Any) -> Any:
    """Return data that JSON can hold: tuples as lists, inf and NaN as strings."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, float) and not -float("inf") < data < float("inf"):
        return repr(data)
    return data


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: framed and coloured in a terminal, aligned words in a pipe.

    Where a terminal is too narrow for the frame, it is aligned words there, too: no id is cut.
    """
    if not sys.stdout.isatty():
        print(aligned(head, rows, title))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(*head, title=title or None, title_justify="left")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    if table.__rich_measure__(console, console.options).minimum > console.width:
        print(aligned(head, rows, title))
    else:
        console.print(table)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Return a table as lines of aligned words."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [title] if title else []
    return "\n".join([*text, *(spaced(line, widths) for line in lines)])


def spaced(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table; the last cell may be wider than its column."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()  # noqa: B905


def print_line(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print one line of a table whose other lines are not known yet, at once."""
    print(spaced(cells, widths), flush=True)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items behind a bar on stderr; without a terminal, silently."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, total=total, description=what, console=Console(stderr=True))


def _style(cell: str) -> str:
    """Return the colour of a cell by the word it starts with."""
    return next((style for word, style in STYLES.items() if cell.startswith(word)), "")
