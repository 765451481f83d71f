"""`refattn vectors`: list, generate, export and verify certified vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refattn.cli.out import print_json, print_table
from refattn.errors import RefattnError

if TYPE_CHECKING:
    from refattn.vectors.pack import Case, Pack

app = typer.Typer(rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Clauses = Annotated[list[str] | None, typer.Option("--clause", help="Only of this clause.")]
Flags = Annotated[list[str] | None, typer.Option("--flag", help="Only with this flag.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Only of this operation.")]
PackAt = Annotated[Path | None, typer.Option("--pack", help="Folder of a pack; the core pack.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Processes at work.")]


class SelectionError(RefattnError):
    """A selection of cases that names something unknown, or selects nothing."""


def _pack(path: Path | None) -> Pack:
    from refattn.vectors.pack import core_pack, read_pack

    return core_pack() if path is None else read_pack(path)


def select(
    pack: Pack, clauses: list[str] | None, flags: list[str] | None, ops: list[str] | None
) -> list[Case]:
    """Return the cases with any of the clauses, any of the flags and any of the ops.

    Raises:
        SelectionError: a name that no case of the pack has, or no case is left.
    """
    wanted = {"clause": clauses or [], "flag": flags or [], "op": ops or []}
    chosen = list(pack.cases)
    for what, names in wanted.items():
        has: Callable[[Case], set[str]] = {
            "clause": lambda case: set(case.clauses),
            "flag": lambda case: set(case.flags),
            "op": lambda case: {case.op},
        }[what]
        known = {name for case in pack.cases for name in has(case)}
        for name in names:
            if name not in known:
                raise SelectionError(f"no vector of this pack has the {what} {name}")
        if names:
            chosen = [case for case in chosen if has(case) & set(names)]
    if not chosen:
        raise SelectionError("no vector of this pack fits all that was asked for")
    return chosen


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Give a progress callback that draws a bar in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[case]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, case="")
        yield lambda done, total, id_: bar.update(task, completed=done, total=total, case=id_)


@app.command("list")
def list_vectors(
    clause: Clauses = None,
    flag: Flags = None,
    op: Ops = None,
    pack: PackAt = None,
    as_json: AsJson = False,
) -> None:
    """List vectors by clause, flag and operation."""
    read = _pack(pack)
    cases = select(read, clause, flag, op)
    if as_json:
        print_json(
            {
                "pack": str(read.path),
                "root_sha256": read.root_hash,
                "vectors": [
                    {
                        "id": case.id,
                        "summary": case.summary,
                        "op": case.op,
                        "clauses": case.clauses,
                        "flags": case.flags,
                        "requires": case.requires,
                        "dtypes": case.dtypes,
                    }
                    for case in cases
                ],
            }
        )
        return
    rows = [(case.id, case.op, " ".join(case.flags), case.summary) for case in cases]
    print_table(("vector", "op", "flags", "summary"), rows)
    print(f"{len(cases)} of {len(read.cases)} vectors, root hash {read.root_hash[:16]}")


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(help="Folder that the pack comes to lie in.")],
    size: Annotated[str, typer.Option(help="core or full.")] = "core",
    jobs: Jobs = 2,
    fresh: Annotated[bool, typer.Option(help="Make every case again; keep none.")] = False,
) -> None:
    """Generate a pack, or finish one that was broken off; the same bytes on any machine."""
    from refattn.vectors.generate import generate as run

    with _bar("certifying") as progress:
        root = run(target, size, jobs, fresh=fresh, progress=progress)
    print(f"{target / 'pack.json'}: root hash {root}")


@app.command()
def verify(
    pack: Annotated[Path | None, typer.Argument(help="Folder of a pack; the core pack.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Prove every case twice.")] = False,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Make every case again, compare all bytes, and prove a sample by a second engine."""
    from refattn.spec_text import spec_root
    from refattn.vectors.verify import SAMPLE
    from refattn.vectors.verify import verify as run

    path = spec_root() / "vectors" if pack is None else pack
    with _bar("verifying") as progress:
        found = run(path, every=1 if everything else SAMPLE, jobs=jobs, progress=progress)
    if as_json:
        print_json({"pack": str(path), **found._asdict()})
        return
    print(
        f"{found.remade} vectors made again, byte by byte the same; {found.proven_twice} of them "
        f"proven by a second engine; root hash {found.root_hash}"
    )


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="Folder to write into.")],
    to: Annotated[str, typer.Option("--to", help="npz or onnx.")] = "npz",
    clause: Clauses = None,
    flag: Flags = None,
    op: Ops = None,
    pack: PackAt = None,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write vectors as NumPy archives or as ONNX node tests."""
    from refattn.vectors.export import export as run

    found = run(select(_pack(pack), clause, flag, op), target, to, overwrite=overwrite)
    if as_json:
        print_json({"written": found.written, "left_out": dict(found.left_out)})
        return
    if found.left_out:
        print_table(("left out", "reason"), list(found.left_out.items()))
    print(f"{len(found.written)} vectors written to {target}, {len(found.left_out)} left out")


@app.command()
def capture(
    target: Annotated[Path, typer.Argument(help="Existing folder for the captured tensors.")],
) -> None:
    """Capture Q, K and V of the MiniLM encoder again (by hand; generation reads stored bits)."""
    from refattn.vectors.capture import capture as run

    print(run(target))
