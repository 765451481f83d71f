"""HBM traffic of attention, counted by executing the loads and stores of the listings.

Nothing is computed: arrays hold no numbers, only their elements' places. Each `Load` and `Write`
line of a listing touches the rows it names, and every element touched is counted as one read or
one write. Work on chip is free.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from refattn.certify.errors import CertifyError
from refattn.certify.exact import Array
from refattn.certify.setting import expect


class Move(NamedTuple):
    """One line of a listing: matrices of which rows (None: all) are loaded or written."""

    kind: str
    names: tuple[str, ...]
    rows: range | None = None


Shapes = dict[str, tuple[int, int]]
"""Rows and columns of every matrix in HBM."""


def load(*names: str, rows: range | None = None) -> Move:
    """Read rows of matrices from HBM."""
    return Move("reads", names, rows)


def write(*names: str, rows: range | None = None) -> Move:
    """Write rows of matrices to HBM."""
    return Move("writes", names, rows)


def elements(move: Move, shapes: Shapes) -> int:
    """Count the elements that a line touches, one by one."""
    count = 0
    for name in move.names:
        height, width = shapes[name]
        for _ in range(height) if move.rows is None else move.rows:
            for _ in range(width):
                count += 1
    return count


def _tiles(length: int, block: int) -> list[range]:
    """Divide rows into blocks; the last one may be ragged."""
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def _blocks(sram: int, d: int) -> tuple[int, int]:
    """B_c = ⌈M/4d⌉, B_r = min(⌈M/4d⌉, d)."""
    B_c = -(-sram // (4 * d))
    return B_c, min(B_c, d)


def standard(shapes: Shapes, sram: int) -> Iterator[Move]:
    """Execute Algorithm 0."""
    yield load("Q", "K")  # line 1
    yield write("S")
    yield load("S")  # line 2
    yield write("P")
    yield load("P", "V")  # line 3
    yield write("O")


def standard_backward(shapes: Shapes, sram: int) -> Iterator[Move]:
    """Execute Algorithm 3."""
    yield load("P", "dO")  # line 1
    yield write("dV")
    yield load("dO", "V")  # line 2
    yield write("dP")
    yield load("P", "dP")  # line 3
    yield write("dS")
    yield load("dS", "K")  # line 4
    yield write("dQ")
    yield load("dS", "Q")  # line 5
    yield write("dK")


def tiled(shapes: Shapes, sram: int) -> Iterator[Move]:
    """Execute Algorithm 1."""
    B_c, B_r = _blocks(sram, shapes["Q"][1])  # line 1
    yield write("O", "l", "m")  # line 2
    for j in _tiles(shapes["K"][0], B_c):  # line 5
        yield load("K", "V", rows=j)  # line 6
        for i in _tiles(shapes["Q"][0], B_r):  # line 7
            yield load("Q", "O", "l", "m", rows=i)  # line 8
            yield write("O", rows=i)  # line 12
            yield write("l", "m", rows=i)  # line 13


def tiled_backward(shapes: Shapes, sram: int) -> Iterator[Move]:
    """Execute Algorithm 4."""
    B_c, B_r = _blocks(sram, shapes["Q"][1])  # line 2
    yield write("dQ", "dK", "dV")  # line 5
    for j in _tiles(shapes["K"][0], B_c):  # line 6
        yield load("K", "V", rows=j)  # line 7
        for i in _tiles(shapes["Q"][0], B_r):  # line 9
            yield load("Q", "O", "dO", "dQ", "l", "m", rows=i)  # line 10
            yield write("dQ", rows=i)  # line 21
        yield write("dK", "dV", rows=j)  # line 24


LISTINGS: dict[str, Callable[[Shapes, int], Iterator[Move]]] = {
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
    shapes = by_query | by_key | scores | statistics
    counts = {"reads": 0, "writes": 0}
    for move in LISTINGS[algorithm](shapes, int(parameters.get("sram", 0))):
        counts[move.kind] += elements(move, shapes)
    return {name: np.array(count, dtype=np.int64) for name, count in counts.items()}
