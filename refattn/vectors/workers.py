"""Work spread over processes, none of which outlives the one that asked."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from refattn.vectors.canonical import PackError

T = TypeVar("T")


def results(
    function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[T]:
    """Yield the results of calls as they come; with one job, in this process and in order.

    Args:
        function: called with each tuple of arguments; found by its module and name.
        arguments: one tuple a call.
        jobs: how many processes work at once.

    Raises:
        PackError: a process was ended from outside.
    """
    if jobs == 1:
        yield from (function(*words) for words in arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_follow_parent) as pool:
        futures = [pool.submit(function, *words) for words in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenExecutor as error:
            raise PackError(
                "a process of the work was ended from outside, as for want of memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
