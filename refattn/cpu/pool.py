"""Threads: a fixed list of work that several threads take from, one piece after another.

Which thread takes which piece changes nothing in the result.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from refattn.checks import check_counts
from refattn.cpu.compiling import prepare
from refattn.cpu.helpers import MAIL, NEXT, close_job, offer_job, serve
from refattn.cpu.plan import TABLE

SPIN = 1e-4
"""Seconds that a helper looks for the next job before it sleeps: waking it costs half as much."""


class Helper(NamedTuple):
    """A thread that helps, and how it is reached."""

    mail: np.ndarray[Any, Any]
    address: int
    """Of its mailbox; see `helpers`."""
    bell: Any
    """A lock that it waits for while it sleeps."""
    thread: threading.Thread


class Block(NamedTuple):
    """Scratch memory of one call."""

    size: int
    """Bytes from the address on."""
    address: int
    """A multiple of 64."""
    memory: np.ndarray[Any, Any]


_idle: list[Helper] = []
"""Helpers that no call has taken; taking one and giving it back are one step each."""

_blocks: list[Block] = []
"""Scratch memory, likewise."""

_ended = 0.0
"""When the last job of several threads did, in seconds."""


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
        kernel: as `compiling.kernel` returns.
        room: numbers of scratch a thread.
        dtype: the computing format.
        about: arrays that the kernel is told of, by their addresses, in order.
        threads: how many, this one among them.
    """
    job = np.zeros(TABLE + len(about), np.int64)
    job[TABLE:] = [array.ctypes.data for array in about]
    run(kernel, room, dtype, job.ctypes.data, threads, threads)


def run(kernel: Any, room: int, dtype: np.dtype[Any], job: int, threads: int, wakes: int) -> None:
    """Run a kernel on a job, as `share` does.

    Args:
        kernel: as `compiling.kernel` returns.
        room: numbers of scratch a thread.
        dtype: the computing format.
        job: address of a job, as `plan` describes it; no piece of it is claimed yet.
        threads: how many, this one among them.
        wakes: helpers that the job is worth waking. One that is awake is always asked; and all are
            woken for a job that follows another at once, as more are likely to follow.
    """
    global _ended
    zero = dtype.type(0)
    function = prepare(kernel, zero, 0, 0)
    size = -(-room * dtype.itemsize // 64) * 64
    helpers = take(threads - 1) if threads > 1 else []
    block = scratch(size * (1 + len(helpers)))
    if not helpers:
        kernel(zero, block.address, job)
    else:
        first, double = chain(helpers), dtype.itemsize == 8
        if time.perf_counter() - _ended < SPIN:
            wakes = threads
        try:
            for i, helper in enumerate(helpers, 1):
                room_at = block.address + i * size
                if offer_job(helper.address, i <= wakes, function, double, room_at, job):
                    helper.bell.release()
            kernel(zero, block.address, job)
        finally:
            close_job(first)
            _idle.extend(reversed(helpers))
        _ended = time.perf_counter()
    _blocks.append(block)


def chain(helpers: list[Helper]) -> int:
    """Write into each mailbox where the next is, and return the address of the first, or 0."""
    following = 0
    for helper in helpers:
        helper.mail[NEXT], following = following, helper.address
    return following


def take(count: int) -> list[Helper]:
    """Return so many helpers that no other caller has, or fewer where no thread can be started."""
    helpers: list[Helper] = []
    with suppress(IndexError):
        while len(helpers) < count:
            helpers.append(_idle.pop())
    with suppress(RuntimeError):  # too many threads, or the interpreter is about to end
        while len(helpers) < count:
            helpers.append(start())
    return helpers


def start() -> Helper:
    """Start a helper.

    Raises:
        RuntimeError: no thread can be started.
    """
    prepare(offer_job, 0, False, 0, False, 0, 0)
    prepare(close_job, 0)
    memory, bell = np.zeros(MAIL + 8, np.int64), threading.Lock()
    address = aligned(memory)
    mail = memory[(address - memory.ctypes.data) // memory.itemsize :]
    bell.acquire()
    about = (mail, address, bell, patience())
    thread = threading.Thread(target=_help, args=about, name="refattn", daemon=True)
    thread.start()
    return Helper(mail, address, bell, thread)


def _help(mail: np.ndarray[Any, Any], address: int, bell: Any, turns: int) -> None:
    """Serve, and sleep where nothing is to be done; the mailbox lives as long as its owner."""
    while not serve(address, turns):
        bell.acquire()


@cache
def patience() -> int:
    """Return how many turns of `serve` take as long as a helper waits, by looking."""
    prepare(serve, 0, 0)
    turns, seconds = 10_000, 0.0
    for _ in range(2):  # the first call is slow
        mail = np.zeros(MAIL, np.int64)
        begin = time.perf_counter()
        serve(mail.ctypes.data, turns)
        seconds = time.perf_counter() - begin
    return max(1, int(SPIN * turns / seconds))


def scratch(size: int) -> Block:
    """Return scratch memory that no other call has, of at least so many bytes."""
    block = None
    with suppress(IndexError):
        block = _blocks.pop()
    if block is None or block.size < size:
        memory = np.zeros(size + 64, np.uint8)
        block = Block(size, aligned(memory), memory)
    return block


def aligned(array: np.ndarray[Any, Any]) -> int:
    """Return the first address in an array that is a multiple of 64."""
    return -(-int(array.ctypes.data) // 64) * 64


def _forget() -> None:
    """Drop the helpers in a forked child, where their threads are not."""
    _idle.clear()


@atexit.register
def _dismiss() -> None:
    """Send the helpers home: none may be on its way out of machine code when Python ends."""
    while _idle:
        helper = _idle.pop()
        offer_job(helper.address, True, 0, False, 0, 0)
        with suppress(RuntimeError):  # it rings already
            helper.bell.release()
        helper.thread.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
