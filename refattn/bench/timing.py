"""Time of all subjects on one shape: turn by turn, so that all of them meet the same machine."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from refattn.bench.machine import settle
from refattn.bench.problem import Call, Problem, Unable, errors
from refattn.bench.subjects import OURS, SUBJECTS, prepare
from refattn.errors import RefattnError

SLICE = 0.05
"""Seconds of repeated calls that make one sample."""

LONG = 0.5
"""Seconds of a peer's call that stand for those of the next one."""

ALL_TURNS, LEAST_TURNS = 3, 6
"""Turns, even if the time is over: of every subject, and of those that are about as fast as any."""

CONTENDER = 2.0
"""Times the shortest time that is still about as fast."""


class Row(NamedTuple):
    """One subject on one shape; NaN where it was not run, and the note says why."""

    subject: str
    seconds: float = math.nan
    """Median of the samples."""
    ratio: float = math.nan
    """Its time over ours, the median over the turns."""
    spread: tuple[float, float] = (math.nan, math.nan)
    """Quartiles of that ratio over the turns."""
    turns: int = 0
    rms_error: float = math.nan
    max_error: float = math.nan
    note: str = ""


class Ready(NamedTuple):
    """A subject that has been called once."""

    call: Call
    first: float
    """Seconds of the first call."""
    errors: tuple[float, float]


def sample(call: Call, repeats: int) -> float:
    """Return the seconds a call, over several calls, after some that warm the caches again."""
    settle()
    for _ in range(repeats // 4):
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def turns(calls: Mapping[str, Ready], seconds: float) -> dict[str, list[float]]:
    """Return samples of every subject, taken in turn; the slow ones have the first turns alone."""
    repeats = {}
    for name, ready in calls.items():
        # a first call is slower than those that follow, the more so where it compiles a kernel
        long = ready.first > LONG and name != OURS
        once = ready.first if long else sample(ready.call, 1)
        repeats[name] = max(1, math.ceil(SLICE / max(once, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    end, names = time.perf_counter() + seconds, list(calls)
    for turn in itertools.count():
        if time.perf_counter() >= end and turn >= ALL_TURNS:
            names = contenders(found)
        if not names or (time.perf_counter() >= end and turn >= LEAST_TURNS):
            return found
        for name in names:
            found[name].append(sample(calls[name].call, repeats[name]))
    return found


def contenders(found: Mapping[str, list[float]]) -> list[str]:
    """Return ours and the subjects whose time is near the shortest."""
    middle = {name: statistics.median(times) for name, times in found.items()}
    limit = CONTENDER * min(middle.values(), default=0.0)
    return [name for name in found if name == OURS or middle[name] <= limit]


def call_first(name: str, problem: Problem, limit: float) -> Ready:
    """Prepare a subject, call it once, and compare what it returns with float64.

    Raises:
        Unable: it does not take the problem, it fails, or the call takes longer than the limit.
    """
    try:
        call = prepare(name, problem)
        settle()
        start = time.perf_counter()
        result = call()
        first = time.perf_counter() - start
        off = errors(problem, SUBJECTS[name].array(result))
    except (Unable, MemoryError, KeyboardInterrupt):
        raise
    except Exception as fault:  # a peer may raise anything, and the others are still to be timed
        if name == OURS and not isinstance(fault, RefattnError):
            raise
        lines = str(fault).strip().splitlines() or [""]
        raise Unable(f"it fails: {type(fault).__name__}: {lines[0]}") from fault
    if first > limit and name != OURS:
        raise Unable(f"its first call took {first:.1f} s, but the limit is {limit:g} s")
    return Ready(call, first, off)


def time_problem(
    problem: Problem, names: Sequence[str], *, seconds: float, limit: float
) -> list[Row]:
    """Return a row a subject, in the order of the names; one that cannot take part says why."""
    calls: dict[str, Ready] = {}
    rows = {}
    for name in names:
        try:
            calls[name] = call_first(name, problem, limit)
        except Unable as reason:
            rows[name] = Row(name, note=str(reason))
        except MemoryError:
            rows[name] = Row(name, note="it needs more memory than there is")
    found = turns(calls, seconds)
    for name, ready in calls.items():
        rows[name] = Row(
            name, statistics.median(found[name]), *_beside(found[name], found.get(OURS)),
            len(found[name]), *ready.errors,
        )  # fmt: skip
    return [rows[name] for name in names]


def _beside(times: list[float], ours: list[float] | None) -> tuple[float, tuple[float, float]]:
    """Return the median and the quartiles of the ratio to our times of the same turns."""
    if ours is None:
        return math.nan, (math.nan, math.nan)
    ratios = np.array(times) / np.array(ours[: len(times)])
    low, middle, high = (float(x) for x in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return middle, (low, high)
