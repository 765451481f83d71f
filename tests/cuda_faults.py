"""Faults planted in the sources of the kernels in CUDA C++, and what small vectors say of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from cuda_cases import CASES, Fault, complaints
from refattn_gpu.cuda import store
from refattn_gpu.cuda.catalogue import Tile
from refattn_gpu.cuda.emulate import EmulationError

Try = tuple[str, str, Tile]
"""A vector by name, a format and a tile."""


def first_complaint(
    run: Callable[..., dict[str, Any]], tries: Iterable[Try], texts: dict[str, str]
) -> str:
    """Return what is said of a kernel with other sources, "" if nothing is.

    Args:
        run: `forward` or `backward` of `cuda_cases`, of a kernel.
        tries: in their order.
        texts: other contents of some sources, by name.
    """
    for name, dtype, tile in tries:
        try:
            outputs = run(CASES[name], dtype, tile, texts=texts)
        except EmulationError as error:
            return str(error)
        if found := complaints(CASES[name], outputs, dtype):
            return found[0]
    return ""


def assert_found(fault: Fault, complaint: Callable[[dict[str, str]], str]) -> None:
    """Plant a fault and assert that it is found, by what is said of it."""
    text = (store.SOURCES / fault.source).read_text("utf-8")
    assert text.count(fault.line) == 1, text.count(fault.line)
    said = complaint({fault.source: text.replace(fault.line, fault.instead)})
    assert re.search(fault.found, said), said
