"""HBM traffic of attention, counted by executing the loads and stores of the listings.

Nothing is computed: arrays hold no numbers, only their elements' places. Each `Load` and `Write`
line of a listing touches the rows it names, and every element touched is counted as one read or
one write. Work on chip is free.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refattn.certify.errors import CertifyError
from refattn.certify.exact import Array
from refattn.certify.setting import expect


class Memory:
    """High-bandwidth memory: matrices of a given shape, and counts of elements moved."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Allocate matrices; allocation moves nothing."""
        self.shapes = shapes
        self.reads = 0
        self.writes = 0

    def _elements(self, name: str, rows: range | None) -> int:
        count, width = self.shapes[name]
        return sum(1 for row in (range(count) if rows is None else rows) for _ in range(width))

    def load(self, *names: str, rows: range | None = None) -> None:
        """Read rows of matrices, all rows by default."""
        self.reads += sum(self._elements(name, rows) for name in names)

    def write(self, *names: str, rows: range | None = None) -> None:
        """Write rows of matrices, all rows by default."""
        self.writes += sum(self._elements(name, rows) for name in names)


def _tiles(length: int, block: int) -> list[range]:
    """Divide rows into blocks; the last one may be ragged."""
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def _blocks(sram: int, d: int) -> tuple[int, int]:
    """B_c = ⌈M/4d⌉, B_r = min(⌈M/4d⌉, d)."""
    B_c = -(-sram // (4 * d))
    return B_c, min(B_c, d)


def standard(memory: Memory, sram: int) -> None:
    """Execute Algorithm 0."""
    memory.load("Q", "K")  # line 1
    memory.write("S")
    memory.load("S")  # line 2
    memory.write("P")
    memory.load("P", "V")  # line 3
    memory.write("O")


def standard_backward(memory: Memory, sram: int) -> None:
    """Execute Algorithm 3."""
    memory.load("P", "dO")  # line 1
    memory.write("dV")
    memory.load("dO", "V")  # line 2
    memory.write("dP")
    memory.load("P", "dP")  # line 3
    memory.write("dS")
    memory.load("dS", "K")  # line 4
    memory.write("dQ")
    memory.load("dS", "Q")  # line 5
    memory.write("dK")


def tiled(memory: Memory, sram: int) -> None:
    """Execute Algorithm 1."""
    B_c, B_r = _blocks(sram, memory.shapes["Q"][1])  # line 1
    memory.write("O", "l", "m")  # line 2
    for j in _tiles(memory.shapes["K"][0], B_c):  # line 5
        memory.load("K", "V", rows=j)  # line 6
        for i in _tiles(memory.shapes["Q"][0], B_r):  # line 7
            memory.load("Q", "O", "l", "m", rows=i)  # line 8
            memory.write("O", rows=i)  # line 12
            memory.write("l", "m", rows=i)  # line 13


def tiled_backward(memory: Memory, sram: int) -> None:
    """Execute Algorithm 4."""
    B_c, B_r = _blocks(sram, memory.shapes["Q"][1])  # line 2
    memory.write("dQ", "dK", "dV")  # line 5
    for j in _tiles(memory.shapes["K"][0], B_c):  # line 6
        memory.load("K", "V", rows=j)  # line 7
        for i in _tiles(memory.shapes["Q"][0], B_r):  # line 9
            memory.load("Q", "O", "dO", "dQ", "l", "m", rows=i)  # line 10
            memory.write("dQ", rows=i)  # line 21
        memory.write("dK", "dV", rows=j)  # line 24


LISTINGS: dict[str, Callable[[Memory, int], None]] = {
    "standard": standard,
    "standard_backward": standard_backward,
    "tiled": tiled,
    "tiled_backward": tiled_backward,
}
"""The listings by the name of their algorithm."""


def traffic(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> dict[str, Array]:
    """Count the elements that an algorithm reads from and writes to HBM."""
    expect(inputs, frozenset(), "input")
    expect(parameters, frozenset({"n_q", "n_k", "d", "sram", "algorithm"}), "parameter")
    expect(conventions, frozenset(), "convention")
    n_q, n_k, d = (int(parameters[name]) for name in ("n_q", "n_k", "d"))
    algorithm = parameters["algorithm"]
    if algorithm not in LISTINGS:
        raise CertifyError(f"algorithm is {algorithm!r}, but there are {sorted(LISTINGS)}")
    by_query = dict.fromkeys(("Q", "O", "dQ", "dO"), (n_q, d))
    by_key = dict.fromkeys(("K", "V", "dK", "dV"), (n_k, d))
    scores = dict.fromkeys(("S", "P", "dS", "dP"), (n_q, n_k))
    statistics = dict.fromkeys(("l", "m"), (n_q, 1))
    memory = Memory(by_query | by_key | scores | statistics)
    LISTINGS[algorithm](memory, int(parameters.get("sram", 0)))
    return {
        "reads": np.array(memory.reads, dtype=np.int64),
        "writes": np.array(memory.writes, dtype=np.int64),
    }
