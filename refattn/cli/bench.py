"""`refattn bench`: how fast, beside the libraries installed here, in one run?"""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode=None)

Words = list[str] | None
"""An option that may be given several times."""


@app.command()
def bench(
    shape: Annotated[Words, typer.Option(help="batch,heads,length,features.")] = None,
    peer: Annotated[Words, typer.Option(help="Only beside this library.")] = None,
    mask: Annotated[Words, typer.Option(help="full or causal; both if not given.")] = None,
    backward: Annotated[bool, typer.Option(help="Forward and backward together.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of every library.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds a shape and mask.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Time attention turn by turn with every library that is installed here."""
    from refattn.bench import bench as run
    from refattn.checks import check_option
    from refattn.cli.out import announce, print_json, progress

    announce()
    masks = tuple(mask or ("full", "causal"))
    for word in masks:
        check_option("bench", "mask", word, ("full", "causal"))
    check_option("bench", "dtype", dtype, ("float32", "float64"))
    data = run(
        shapes=shape or (),
        peers=peer or (),
        masks=masks,
        backward=backward,
        dtype=dtype,
        threads=threads,
        seconds=seconds,
        watch=progress,
    )
    if as_json:
        print_json(data)
    else:
        _print(data)


def _print(data: dict[str, Any]) -> None:
    """Print the machine, the table and the libraries that could not take a shape."""
    from refattn.cli.out import print_table

    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    print(f"{data['processor']}, {data['threads']} threads, {data['dtype']}")
    print(f"peak of multiply-adds {data['peak_gflops']:.0f} GFLOP/s; {versions}")
    head = ("shape", "mask", "subject", "ms", "GFLOP/s", "of peak", "time/ours", "spread",
            "rms error", "max error")  # fmt: skip
    rows = [_cells(row) for row in data["rows"] if not math.isnan(row["seconds"])]
    print_table(head, rows)
    for row in data["rows"]:
        if row["note"]:
            print(f"not run: {row['subject']} on {row['shape']} {row['mask']}: {row['note']}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the words of one row."""
    low, high = row["spread"]
    return (
        row["shape"],
        row["mask"],
        row["subject"],
        f"{row['seconds'] * 1e3:.3g}",
        f"{row['gflops']:.0f}",
        f"{row['peak_share']:.0%}",
        f"{row['ratio']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{row['rms_error']:.1e}",
        f"{row['max_error']:.1e}",
    )
