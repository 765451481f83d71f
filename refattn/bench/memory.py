"""Memory of one call: how far a process grows at its peak, in a fresh process a measurement.

The libraries are loaded, and the code of the call is warm, before the measurement; what a library
keeps for its threads is not, since the warm call runs in a thread that has ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from refattn.bench.problem import Call, Problem
from refattn.bench.shapes import Shape
from refattn.bench.subjects import prepare

SMALL = 256
"""Rows of the warm call: enough that it takes the same code as many."""

PATIENCE = 120
"""Seconds that a child may take."""

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Growth(NamedTuple):
    """Bytes by which a process grew; NaN where the system does not tell."""

    prepared: float
    """While the subject was prepared: compiled models, copies of the inputs."""
    call: float
    """At the peak of the first call, its result included."""


UNKNOWN = Growth(math.nan, math.nan)
"""Where nothing can be measured."""


def measurable() -> bool:
    """Return whether the system can forget a peak: Linux can."""
    try:
        _forget_peak()
        return _peak() > 0
    except (OSError, StopIteration, ValueError):
        return False


def peak_growth(call: Call) -> int:
    """Return the bytes by which this process grows at the peak of a call."""
    gc.collect()
    _trim()
    _forget_peak()
    before = _peak()
    result = call()
    after = _peak()
    del result
    return after - before


def measure(
    name: str, shape: Shape, *, causal: bool, backward: bool, dtype: str, threads: int
) -> Growth:
    """Return how a fresh process grows in one call of a subject."""
    if not measurable():
        return UNKNOWN
    words = json.dumps([name, list(shape), causal, backward, dtype, threads])
    command = [sys.executable, "-m", "refattn.bench.memory_child", words]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return Growth(*json.loads(child.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return UNKNOWN  # it was killed for its memory, or took too long


def grow(name: str, problem: Problem) -> Growth:
    """Return how this process grows when a subject is prepared and called, after a warm call."""
    small = problem._replace(
        **{
            field: getattr(problem, field)[..., :SMALL, :].copy()
            for field in ("query", "key", "value", "d_output")
            if getattr(problem, field) is not None
        }
    )
    warm = threading.Thread(target=lambda: prepare(name, small)())
    warm.start()
    warm.join()
    calls: list[Call] = []
    prepared = peak_growth(lambda: calls.append(prepare(name, problem)))
    return Growth(prepared, peak_growth(calls[0]))


def _forget_peak() -> None:
    _CLEAR.write_text("5")  # the code of "set the peak to what is resident now"


def _peak() -> int:
    """Return the peak of the resident bytes since it was forgotten."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _trim() -> None:
    """Give freed memory back to the system, so that a call that takes it again is seen to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
