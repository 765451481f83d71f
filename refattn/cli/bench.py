"""`refattn bench`: how fast, beside the libraries installed here, in one run?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from refattn.bench import LIMIT, MASKS
from refattn.bench import bench as run
from refattn.bench.figure import check_figure, draw_figure
from refattn.cli.gpu_results import show_gpu_results
from refattn.cli.out import announce, print_json, print_line, print_table, progress

app = typer.Typer(rich_markup_mode=None)

Words = list[str] | None
"""An option that may be given several times."""

INTERRUPTED = 130
"""Exit code where the user ended the run."""

COLUMNS = ("ms", "GFLOP/s", "of peak", "time/ours", "spread", "rms error", "max error", "extra MiB")
"""Columns of numbers; the last one where memory was asked for."""

FASTEST = ("shape", "mask", "fastest peer", "time/ours", "spread", "turns")
"""Columns of the table at the end."""

SPREAD = "10.00-10.00"
"""The widest word of a column of numbers."""


@app.command()
def bench(
    file: Annotated[
        Path | None, typer.Argument(help="With --gpu-results: one file of results.")
    ] = None,
    gpu_results: Annotated[
        bool, typer.Option("--gpu-results", help="Print what was measured on GPUs; time nothing.")
    ] = False,
    shape: Annotated[
        Words, typer.Option(metavar="B,H,N,D", help="Sizes; N may be N_Q:N_K.")
    ] = None,
    peer: Annotated[
        Words, typer.Option(help="Only beside this library; numba is ours alone.")
    ] = None,
    mask: Annotated[Words, typer.Option(help="full or causal; both if not given.")] = None,
    backward: Annotated[bool, typer.Option(help="Forward and backward together.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of every library.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of turns, a shape and mask; by their number if absent.")
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds; a peer whose first call takes more is left out.")
    ] = LIMIT,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the memory of a call: a process a row.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result into a .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Time attention turn by turn with every library that is installed here.

    Rows are printed when they are known. All shapes take about four minutes on two cores.
    """
    if gpu_results:
        show_gpu_results(file, as_json=as_json)
        return
    if file is not None:
        raise typer.BadParameter(f"{file} is given, but only --gpu-results takes a file")
    announce()
    if plot is not None:
        check_figure(plot)
    ways: dict[str, Any] = {"watch": progress} if as_json else {"show": _printer()}
    data = run(
        shapes=shape or (),
        peers=peer or (),
        masks=mask or MASKS,
        backward=backward,
        dtype=dtype,
        threads=threads,
        seconds=seconds,
        limit=limit,
        memory=memory,
        **ways,
    )
    if as_json:
        print_json(data)
    else:
        _print_end(data)
    if plot is not None and data["rows"]:
        draw_figure(data, plot)
    raise typer.Exit(0 if data["complete"] else INTERRUPTED)


def _printer() -> Callable[[dict[str, Any]], None]:
    """Return what prints the head of a run, and then the rows that are new, each time at once."""
    printed = 0

    def show(data: dict[str, Any]) -> None:
        nonlocal printed
        names = COLUMNS if data["memory"] else COLUMNS[:-1]
        wide = [
            max(map(len, words)) for words in zip(("shape", "mask"), *data["todo"], strict=True)
        ]
        wide += [max(map(len, ("subject", *data["subjects"])))]
        wide += [len(SPREAD) if name == "spread" else max(7, len(name)) for name in names]
        if not data["rows"]:
            _print_head(data)
            print_line(("shape", "mask", "subject", *names), wide)
        for row in data["rows"][printed:]:
            print_line(_cells(row)[: len(wide)], wide)
        printed = len(data["rows"])

    return show


def _print_head(data: dict[str, Any]) -> None:
    """Print the machine and the libraries."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    work = "forward and backward" if data["backward"] else "forward"
    print(f"{data['processor']}, {data['threads']} threads, {data['dtype']}, {work}")
    print(versions)
    print(_speeds(data))


def _speeds(data: dict[str, Any]) -> str:
    """Return how fast the machine is, as far as it has been seen."""
    product = data["product_gflops"]
    words = f"multiply-adds peak at {data['peak_gflops']:.0f} GFLOP/s"
    return words if product is None else f"{words}, NumPy's matrix product at {product:.0f}"


def _print_end(data: dict[str, Any]) -> None:
    """Print the fastest peer of each shape, and what the machine reached in the whole run."""
    if data["fastest"]:
        print()
        print_table(FASTEST, [_summary(row) for row in data["fastest"]])
    where = f"{data['processor']}, {data['threads']} threads"
    print(f"in the whole run, {data['elapsed']:.0f} s on {where}: {_speeds(data)}")
    if data["memory"]:
        print("extra MiB: growth of a fresh process at the peak of a first call, less its result")
    if not data["complete"]:
        done = len({(row["shape"], row["mask"]) for row in data["rows"]})
        print(f"interrupted: {done} of {len(data['todo'])} shapes were timed")


def _summary(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the words of the fastest peer on one shape."""
    low, high = row["spread"]
    about = (row["shape"], row["mask"], row["subject"])
    return (*about, f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", str(row["turns"]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the words of one row."""
    about = (row["shape"], row["mask"], row["subject"])
    if row["seconds"] is None:
        return (*about, f"not run: {row['note']}")
    low, high = row["spread"] or (float("nan"),) * 2
    ms = row["seconds"] * 1e3
    return (
        *about,
        f"{ms:.0f}" if ms > 100 else f"{ms:.3g}",
        f"{row['gflops']:.0f}",
        f"{row['peak_share']:.0%}",
        "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "–" if row["spread"] is None else f"{low:.2f}-{high:.2f}",
        f"{row['rms_error']:.1e}",
        f"{row['max_error']:.1e}",
        "–" if row["memory_mib"] is None else f"{row['memory_mib'] - row['result_mib']:.1f}",
    )
