"""The machine: its processor, its cores, the library versions and how fast it multiplies."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""What matrix libraries read, once, when they are loaded."""

PAUSE, PATIENCE = 0.025, 20
"""Seconds of a rest between two subjects, and how many there are at most. A kernel counts the time
of a thread that runs on another core by ticks of up to 10 ms: a shorter rest sees none."""

PRODUCT = 2048
"""Rows and columns of the matrices whose product measures the machine."""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _blas_threads() -> int:
    """Return the threads of NumPy's matrix products, as the environment says."""
    given = (os.environ.get(variable, "") for variable in THREAD_VARIABLES)
    asked = [int(word) for word in given if word.isdecimal() and int(word) > 0]
    return min([*asked[:1], cores()])


BLAS_THREADS = _blas_threads()
"""Threads of NumPy's products, which were fixed when it was imported."""


def limit_threads(threads: int) -> None:
    """Set the thread counts that libraries read when they are imported, here and in children."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, str(threads))


def settle() -> None:
    """Wait until the last subject's threads sleep: some go on spinning for a while after a call.

    Those of NumPy's matrix product were seen to take half of the next subject's time.
    """
    for _ in range(PATIENCE):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def product_flops(threads: int, dtype: str, seconds: float) -> float:
    """Return the most operations a second of NumPy's matrix product, NaN on other threads."""
    if threads != BLAS_THREADS:
        return math.nan
    a = np.ones((PRODUCT, PRODUCT), dtype)
    out = np.empty_like(a)
    settle()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = max(best, 2.0 * PRODUCT**3 / (time.perf_counter() - start))
    return best


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the subjects, of Python and of refattn."""
    found = {"python": platform.python_version()}
    for name in ("refattn", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
