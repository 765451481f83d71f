"""Sizes of tiles: as large as 48 KB of shared memory allow, and small ones for the simulator."""

from __future__ import annotations

from typing import NamedTuple

SHARED_BYTES = 48 * 1024
"""Shared memory that every device grants a block."""

FEATURES = (32, 64, 128, 256)
"""Most features of a head, by kernel: sizes of arrays must be known when it is compiled."""


class RowShape(NamedTuple):
    """Tiles of the form with one thread a query row."""

    rows: int
    """B_r, query rows and threads of a block."""
    cols: int
    """B_c, keys of a tile."""
    features: int
    """Most features of a key and of a value."""


def features_for(d: int) -> int:
    """Return the smallest of `FEATURES` that holds d features."""
    return next(most for most in FEATURES if d <= most)


def row_shape(d: int, itemsize: int, simulated: bool) -> RowShape:
    """Return the tiles for heads of at most d features.

    Spec: FA1-ALG1 line 1.

    The simulator's are smaller: a thread of a block costs it as much as a row of work.
    """
    if simulated:
        return RowShape(8, 8, features_for(d))
    features = features_for(d)
    keys = 32
    while 2 * keys * features * itemsize > 2 * SHARED_BYTES // 3:
        keys //= 2
    return RowShape(64, keys, features)
