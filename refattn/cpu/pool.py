"""Threads: a fixed list of work that several Python threads take from, one piece after another.

Which thread takes which piece changes nothing in the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from refattn.checks import check_counts
from refattn.cpu.compiling import prepare

_local = threading.local()
_executors: dict[int, ThreadPoolExecutor] = {}
_guard = threading.Lock()


def default_threads() -> int:
    """Return NUMBA_NUM_THREADS, which is the number of usable cores unless it is set."""
    return int(numba.config.NUMBA_NUM_THREADS)


def thread_count(function: str, threads: int | None) -> int:
    """Return how many threads to use.

    Raises:
        OptionError: threads is not an integer of at least 1.
    """
    if threads is None:
        return default_threads()
    check_counts(function, threads=threads)
    return int(threads)


def share(
    kernel: Any, room: int, dtype: np.dtype[Any], about: tuple[Any, ...], threads: int
) -> None:
    """Run a kernel over its list of work in several threads.

    Args:
        kernel: called as (zero, address of scratch, address of the shared counter, *about).
        room: numbers of scratch a thread.
        dtype: the computing format.
        about: what else the kernel is told.
        threads: how many.
    """
    zero, counter = dtype.type(0), np.zeros(1, np.int64)
    claimed = counter.ctypes.data
    prepare(kernel, zero, 0, claimed, *about)
    run(lambda: kernel(zero, scratch(room, dtype), claimed, *about), threads)


def run(work: Callable[[], Any], threads: int) -> None:
    """Call a function in several threads at once, this one among them, and wait for all."""
    if threads <= 1:
        work()
        return
    others = [_executor(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.cancel()  # one that has not begun finds nothing left to do
        errors = [e for o in others if not o.cancelled() and (e := o.exception())]
    if errors:
        raise errors[0]


def _executor(workers: int) -> ThreadPoolExecutor:
    """Return the pool of a size, started when it is first asked for."""
    with _guard:
        if workers not in _executors:
            _executors[workers] = ThreadPoolExecutor(workers, thread_name_prefix="refattn")
        return _executors[workers]


def scratch(count: int, dtype: np.dtype[Any]) -> int:
    """Return the address of this thread's scratch memory, 64-byte aligned, kept between calls."""
    needed = count * dtype.itemsize + 64
    block = getattr(_local, "block", None)
    if block is None or block.size < needed:
        block = _local.block = np.zeros(needed, np.uint8)
    return int(block.ctypes.data) + -int(block.ctypes.data) % 64


def _forget() -> None:
    """Drop the pools in a forked child, where their threads are not."""
    global _guard
    _guard = threading.Lock()
    _executors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
