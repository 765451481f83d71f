"""The ground that stages stand on: a GPU with CuPy's arrays, or NumPy and the CUDA simulator.

The second one tries the control flow where there is no GPU. What it times is the simulator, and
every file that it writes says so.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array

Put = Callable[[str, Any], None]
"""Reports a result under a name; the last one of a name holds."""


class Ground(NamedTuple):
    """Arrays, and how time and memory are taken, on a GPU or in the simulation."""

    simulated: bool
    xp: Any
    """CuPy, or NumPy."""
    asnumpy: Callable[[Array], np.ndarray[Any, Any]]
    seconds: Callable[[Callable[[], Any], int], float]
    """Of one call, from so many calls in a row."""
    extra_bytes: Callable[[Callable[[], Any]], int]
    """Largest memory taken during a call, what it returns included."""


def ground(simulated: bool) -> Ground:
    """Return the ground of this process."""
    return _simulation() if simulated else _device()


def _device() -> Ground:
    import cupy

    def seconds(call: Callable[[], Any], calls: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()  # Numba, CuPy and torch all launch on the default stream
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / calls

    def extra_bytes(call: Callable[[], Any]) -> int:
        pool = cupy.get_default_memory_pool()
        cupy.cuda.runtime.deviceSynchronize()
        pool.free_all_blocks()
        before = cupy.cuda.runtime.memGetInfo()[0]
        result = call()
        cupy.cuda.runtime.deviceSynchronize()
        # the pool gives nothing back by itself: what is gone now is the peak
        after = cupy.cuda.runtime.memGetInfo()[0]
        del result
        return int(before - after)

    return Ground(False, cupy, cupy.asnumpy, seconds, extra_bytes)


def _simulation() -> Ground:
    def seconds(call: Callable[[], Any], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    def extra_bytes(call: Callable[[], Any]) -> int:
        tracemalloc.start()
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del result
        return peak

    return Ground(True, np, np.asarray, seconds, extra_bytes)


def attempt(put: Put, name: str, find: Callable[[], dict[str, Any]]) -> None:
    """Report what a function finds, or the error that it ends in: the next ones still run."""
    try:
        put(name, find())
    except Exception as error:  # whatever the device, a compiler or a library says
        put(name, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def drawn(on: Ground, dtype: str, *shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    """Return arrays of normal numbers, the same in every process, on the ground's memory."""
    rng = np.random.default_rng(seed)
    return [on.xp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def journal(path: Path) -> Put:
    """Return a `Put` that writes each result to a file at once, a line each."""

    def put(name: str, value: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, value]) + "\n")

    return put


def read_journal(path: Path) -> dict[str, Any]:
    """Return the results of a journal; a last line that was cut short is left out."""
    results: dict[str, Any] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            name, value = json.loads(line)
        except ValueError:
            break
        results[name] = value
    return results
