"""How fast, beside the libraries installed here: one process, turn by turn, error beside time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from refattn.bench import machine, shapes
from refattn.bench.memory import UNKNOWN, Growth, measure
from refattn.bench.problem import draw
from refattn.bench.shapes import Shape
from refattn.bench.subjects import OURS, SUBJECTS, installed
from refattn.bench.timing import Row, time_problem
from refattn.checks import OptionError, check_option, check_positive
from refattn.errors import RefattnError

MASKS = ("full", "causal")
"""Masks that are timed."""

SECONDS, LEAST_SECONDS, BUDGET = 4.0, 1.0, 75.0
"""Seconds a shape and mask, unless they are given: the first, or less where many shapes would take
more than the budget together. First calls, and turns of seconds each, come on top."""

LIMIT = 3.0
"""Seconds of a first call after which a peer is left out."""

MIB = 2.0**20


class Conditions(NamedTuple):
    """What holds for a whole run."""

    names: tuple[str, ...]
    backward: bool
    dtype: str
    threads: int
    seconds: float
    limit: float
    memory: bool


def bench(
    *,
    shapes: Sequence[str] = (),
    peers: Sequence[str] = (),
    masks: Sequence[str] = MASKS,
    backward: bool = False,
    dtype: str = "float32",
    threads: int | None = None,
    seconds: float | None = None,
    limit: float = LIMIT,
    memory: bool = False,
    show: Callable[[dict[str, Any]], Any] = lambda data: None,
    watch: Callable[[Any, int, str], Any] = lambda items, total, what: items,
) -> dict[str, Any]:
    """Time attention side by side and return everything as plain data.

    Where the user interrupts it, what was measured until then is returned.

    Args:
        shapes: `batch,heads,length,features`; the default ones if empty.
        peers: subjects beside ours; every installed one if empty.
        masks: "full", "causal" or both.
        backward: time forward and backward together; the error is that of the queries' gradient.
        dtype: float32 or float64.
        threads: of every subject; NUMBA_NUM_THREADS if None.
        seconds: of turns a shape and mask; chosen by their number if None.
        limit: of a peer's first call, seconds.
        memory: measure the memory of one call, too.
        show: is given the data when the run begins and after each shape.
        watch: wraps the shapes as they come: `watch(items, total, what)`.

    Raises:
        OptionError: a word is unknown, a number is not possible, or a peer is not installed.
    """
    todo = read_todo(shapes, masks, backward)
    check_option("bench", "dtype", dtype, ("float32", "float64"))
    if seconds is None:
        seconds = min(SECONDS, max(LEAST_SECONDS, BUDGET / len(todo)))
    check_positive("bench", seconds=seconds, limit=limit)
    names, count = chosen(peers), thread_count(threads)
    run = Conditions(names, backward, dtype, count, seconds, limit, memory)
    machine.limit_threads(run.threads)
    start = time.perf_counter()
    data: dict[str, Any] = {
        "processor": machine.processor(),
        "threads": run.threads,
        "dtype": dtype,
        "backward": backward,
        "versions": machine.versions(run.names),
        "subjects": list(run.names),
        "seconds": run.seconds,
        "limit": limit,
        "memory": memory,
        "todo": [(str(shape), mask) for shape, mask in todo],
        "complete": False,
        "elapsed": 0.0,
        "rows": [],
        "fastest": [],
    }
    _look_at_machine(data, 0.5)
    show(data)
    try:
        for shape, mask in watch(todo, len(todo), "timing"):
            rows = _time(shape, mask, run)
            data["rows"] += rows
            data["fastest"] += fastest_peer(rows)
            _look_at_machine(data, 0.1)
            data["elapsed"] = time.perf_counter() - start
            show(data)
        data["complete"] = True
    except KeyboardInterrupt:
        pass
    return data


def read_todo(
    given: Sequence[str], masks: Sequence[str], backward: bool
) -> list[tuple[Shape, str]]:
    """Return each shape with each mask.

    Raises:
        OptionError: a shape or a mask is not one.
    """
    for mask in masks:
        check_option("bench", "mask", mask, MASKS)
    default = shapes.BACKWARD if backward else shapes.FORWARD
    return shapes.read_todo(tuple(given) or default, tuple(dict.fromkeys(masks)))


def chosen(peers: Sequence[str]) -> tuple[str, ...]:
    """Return ours and the peers that are asked for, all that are installed if none is.

    Raises:
        OptionError: one is not installed.
    """
    here = [name for name in SUBJECTS if installed(name)]
    unknown = [name for name in peers if name not in here]
    if unknown:
        raise OptionError(
            f"peer is {unknown[0]!r}, but it must be one of those installed here: "
            f"{', '.join(here)} [bench]"
        )
    return tuple(dict.fromkeys((OURS, *(peers or here))))


def thread_count(threads: int | None) -> int:
    """Return how many threads every subject has.

    Raises:
        OptionError: they are none, or more than this process has cores.
    """
    from refattn.cpu import pool

    count = pool.thread_count("bench", threads)
    if count > machine.cores():
        raise OptionError(
            f"threads is {count}, but this process may use {machine.cores()} cores [bench]"
        )
    return count


def _look_at_machine(data: dict[str, Any], seconds: float) -> None:
    """Raise the peaks that were seen to those seen now, and the rows' shares with them."""
    from refattn.cpu.peak import peak_flops

    threads, dtype = data["threads"], data["dtype"]
    machine.settle()
    peak = peak_flops(threads, dtype, seconds) / 1e9
    product = machine.product_flops(threads, dtype, seconds) / 1e9
    data["peak_gflops"] = max(peak, data.get("peak_gflops", 0.0))
    data["product_gflops"] = known(max(product, data.get("product_gflops") or product))
    for row in data["rows"]:
        row["peak_share"] = row["gflops"] and row["gflops"] / data["peak_gflops"]


def _time(shape: Shape, mask: str, run: Conditions) -> list[dict[str, Any]]:
    """Return the rows of one shape and mask, as plain data."""
    causal = mask == "causal"
    try:
        problem = draw(shape, run.dtype, causal, run.backward, run.threads)
    except RefattnError as refusal:
        rows = [Row(name, note=str(refusal)) for name in run.names]
    else:
        rows = time_problem(problem, run.names, seconds=run.seconds, limit=run.limit)
    work = shapes.operations(shape, causal, run.backward)
    result = shapes.result_bytes(shape, np.dtype(run.dtype).itemsize, run.backward)
    found = []
    for row in rows:
        fields = {name: known(value) for name, value in row._asdict().items()}
        grown = _grown(row, shape, mask, run)
        found.append(
            {"shape": str(shape), "mask": mask}
            | fields
            | {
                "gflops": known(work / row.seconds / 1e9),
                "memory_mib": known(grown.call / MIB),
                "prepared_mib": known(grown.prepared / MIB),
                "result_mib": result / MIB,
            }
        )
    return found


def _grown(row: Row, shape: Shape, mask: str, run: Conditions) -> Growth:
    """Return the memory of a row's call, if it was asked for and the subject ran."""
    if row.note or not run.memory:
        return UNKNOWN
    return measure(
        row.subject, shape, causal=mask == "causal", backward=run.backward, dtype=run.dtype,
        threads=run.threads,
    )  # fmt: skip


def known(value: Any) -> Any:
    """Return a value, or None for a number or a pair of them that was not measured."""
    first = value[0] if isinstance(value, tuple) else value
    return None if isinstance(first, float) and math.isnan(first) else value


def fastest_peer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fastest peer of one shape and mask beside ours, in a list; none if none ran."""
    peers = [row for row in rows if row["subject"] != OURS and row["ratio"] is not None]
    if not peers:
        return []
    best = min(peers, key=lambda row: float(row["seconds"]))
    names = ("shape", "mask", "subject", "ratio", "spread", "turns")
    return [{name: best[name] for name in names}]
