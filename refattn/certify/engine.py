"""The certifying loop: raise the precision until every element of every output is decided."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import flint
import numpy as np
from flint import fmpq

from refattn.certify.errors import Ambiguous, CertifyError, Midpoint, Undecided
from refattn.certify.exact import Array, Cells
from refattn.certify.rounding import settle_ball, settle_exact

START_BITS = 128
"""Precision of the first attempt."""

LIMIT_BITS = 4096
"""Precision of the last attempt."""

RADIUS_STEP = 8
"""The recorded radius is a power of 2^8, rounded up: machines may differ in its last bits."""


class Certificate(NamedTuple):
    """Proven outputs, their error units and magnitudes, and how they were proven."""

    outputs: dict[str, Array]
    units: dict[str, Array]
    magnitudes: dict[str, float]
    record: dict[str, Any]


class _Progress(NamedTuple):
    """What is decided of one output so far; None is undecided. Midpoints by flat index."""

    shape: tuple[int, ...]
    values: list[float | None]
    midpoints: dict[int, str]


def _settle(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    return settle_exact(value) if isinstance(value, fmpq) else settle_ball(value)


def _advance(name: str, cells: Cells, before: _Progress | None, refuse: bool) -> _Progress:
    """Decide what the present precision can decide of one output."""
    if len(cells.values) != int(np.prod(cells.shape, dtype=np.int64)):
        raise CertifyError(f"{name}: {len(cells.values)} values for shape {cells.shape}")
    values: list[float | None] = [None] * len(cells.values)
    if before:
        values = list(before.values)
    midpoints = dict(before.midpoints) if before else {}
    for at, (known, value) in enumerate(zip(values, cells.values, strict=True)):
        if known is None:
            try:
                values[at] = _settle(value)
            except Midpoint as error:
                if refuse:
                    raise Ambiguous(f"{_place(name, cells.shape, at)}: {error}") from None
                values[at], midpoints[at] = error.value, error.narrow
    return _Progress(cells.shape, values, midpoints)


def _place(name: str, shape: tuple[int, ...], at: int) -> str:
    index = tuple(int(x) for x in np.unravel_index(at, shape)) if shape else ()
    return f"{name}{list(index)}"


def _split(result: Mapping[str, Any]) -> tuple[dict[str, Cells], dict[str, Array]]:
    """Separate outputs of values from arrays that are exact already."""
    cells = {name: x for name, x in result.items() if isinstance(x, Cells)}
    return cells, {name: x for name, x in result.items() if not isinstance(x, Cells)}


def _undecided(progress: Mapping[str, _Progress]) -> str | None:
    for name, state in progress.items():
        if None in state.values:
            return _place(name, state.shape, state.values.index(None))
    return None


def _largest_radius(outputs: Mapping[str, Cells]) -> float:
    """Return the largest radius of all balls, rounded up to a power of 2^8; 0 without balls."""
    largest: int | None = None
    for cells in outputs.values():
        for value in cells.values:
            if isinstance(value, float | fmpq):
                continue
            n, e = (int(part) for part in value.rad().man_exp())
            if n:
                top = n.bit_length() + e
                largest = top if largest is None else max(largest, top)
    if largest is None:
        return 0.0
    return float(2.0 ** max(-1072, RADIUS_STEP * -(-largest // RADIUS_STEP)))


def solve(
    evaluate: Callable[[], Mapping[str, Any]], midpoints: str = "refuse"
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Decide every element of what `evaluate` encloses; return the outputs and the record.

    Raises:
        Ambiguous: an element is undecided at 4096 bits, or a midpoint is refused.
    """
    refuse = midpoints != "record"
    before, bits = flint.ctx.prec, START_BITS
    progress: dict[str, _Progress] = {}
    try:
        while True:
            flint.ctx.prec = bits
            try:
                cells, arrays = _split(evaluate())
            except Undecided:
                place: str | None = "a comparison"
            else:
                progress = {
                    name: _advance(name, x, progress.get(name), refuse) for name, x in cells.items()
                }
                place = _undecided(progress)
            if place is None:
                break
            if bits >= LIMIT_BITS:
                raise Ambiguous(f"{place} is undecided at {bits} bits")
            bits *= 2
    finally:
        flint.ctx.prec = before
    outputs = {
        name: np.array(state.values, dtype=np.float64).reshape(state.shape)
        for name, state in progress.items()
    }
    integers = sum(int(x.size) for x in arrays.values())
    everything = [x for cell in cells.values() for x in cell.values]
    record = {
        "engine": "python-flint",
        "version": version("python-flint"),
        "precision_bits": bits,
        "largest_radius": _largest_radius(cells),
        "elements": len(everything) + integers,
        "exact_elements": sum(isinstance(x, float | fmpq) for x in everything) + integers,
        "ambiguous": 0,
    }
    if not refuse:
        record["midpoints"] = [
            [_place(name, state.shape, at), narrow]
            for name, state in progress.items()
            for at, narrow in sorted(state.midpoints.items())
        ]
    return arrays | outputs, record
