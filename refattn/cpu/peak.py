"""The machine's peak: multiply-adds in registers, nothing else, on several threads at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import types

from refattn.cpu import pool
from refattn.cpu.compiling import kernel
from refattn.cpu.host import lanes
from refattn.cpu.plan import entry
from refattn.cpu.simd import claim, fma, pointer, splat, store

CHAINS = 12
"""Sums that are in the air at once: more than any unit's latency times its number."""


ROUNDS = 100_000
"""Products added into each sum, in one piece of work."""


@kernel
def spin(zero, scratch, job):
    """Add products into `CHAINS` sums, as often as the job has pieces."""
    a, out = splat(zero), pointer(scratch, zero)
    pieces, claimed = entry(job, 0, types.int64(0))[0], pointer(job, types.int64(0))
    while claim(claimed) < pieces:
        c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = c10 = c11 = a
        for _ in range(ROUNDS):
            c0, c1, c2 = fma(a, c0, c0), fma(a, c1, c1), fma(a, c2, c2)
            c3, c4, c5 = fma(a, c3, c3), fma(a, c4, c4), fma(a, c5, c5)
            c6, c7, c8 = fma(a, c6, c6), fma(a, c7, c7), fma(a, c8, c8)
            c9, c10, c11 = fma(a, c9, c9), fma(a, c10, c10), fma(a, c11, c11)
        for i, c in enumerate((c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11)):
            store(out, i * 16, c)


def peak_flops(threads: int, dtype: Any = np.float32, seconds: float = 0.3) -> float:
    """Return the most floating-point operations a second that were seen, a multiply-add as two.

    Args:
        threads: at once.
        dtype: float32 or float64.
        seconds: how long to look.
    """
    kind = np.dtype(dtype)
    pieces = (np.array([threads]),)
    operations = 2 * CHAINS * lanes(kind.itemsize) * ROUNDS * threads
    pool.share(spin, 16 * CHAINS, kind, pieces, threads)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        pool.share(spin, 16 * CHAINS, kind, pieces, threads)
        best = max(best, operations / (time.perf_counter() - start))
    return best
