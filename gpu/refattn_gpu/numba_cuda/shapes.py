"""Sizes of tiles: as large as 48 KB of shared memory allow, and small ones for the simulator."""

from __future__ import annotations

from typing import NamedTuple

SHARED_BYTES = 48 * 1024
"""Shared memory that every device grants a block."""

FEATURES = (32, 64, 128, 256)
"""Most features of a head, by kernel: sizes of arrays must be known when it is compiled."""


class RowShape(NamedTuple):
    """Tiles of the form with one thread a row."""

    rows: int
    """Rows of a block's own tile, and its threads."""
    cols: int
    """Rows of the tiles that it walks over."""
    features: int
    """Most features of a key and of a value."""


class TileShape(NamedTuple):
    """Tiles of the form in which each thread has a small block of cells."""

    rows: int
    """B_r."""
    cols: int
    """B_c."""
    features: int
    """As in `RowShape`."""
    rows_each: int
    """Rows of S_ij, and of O_i, that one thread has."""
    cols_each: int
    """Columns of S_ij that it has."""
    features_each: int
    """Columns of O_i that it has."""
    pad: int
    """Numbers between the lines of a transposed tile, so that writes meet in few banks."""

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return self.cols // self.cols_each

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.lanes * (self.rows // self.rows_each)


FORWARD = {
    ("float32", 32): (64, 64, 8, 8),
    ("float32", 64): (64, 32, 8, 4),
    ("float32", 128): (32, 16, 4, 2),
    ("float32", 256): (16, 8, 4, 1),
    ("float64", 32): (32, 32, 4, 4),
    ("float64", 64): (32, 16, 4, 2),
    ("float64", 128): (16, 8, 4, 1),
}
"""B_r, B_c, rows and columns a thread; what is not here does not fit, and takes rows."""

BACKWARD = {
    ("float32", 32): (32, 32, 4, 4, 4),
    ("float32", 64): (32, 32, 4, 4, 4),
    ("float32", 128): (16, 16, 2, 2, 4),
    ("float32", 256): (8, 8, 2, 1, 1),
    ("float64", 32): (32, 16, 4, 2, 4),
    ("float64", 64): (16, 16, 2, 2, 4),
    ("float64", 128): (8, 8, 2, 1, 1),
}
"""Rows of a block's own tile and of those it walks over, rows and columns a thread, and the pad."""


def features_for(d: int) -> int:
    """Return the smallest of `FEATURES` that holds d features."""
    return next(most for most in FEATURES if d <= most)


def row_shape(d: int, itemsize: int, simulated: bool = False) -> RowShape:
    """Return the tiles with one thread a row, for heads of at most d features.

    Spec: FA1-ALG1 line 1.

    The simulator's are smaller: a thread of a block costs it as much as a row of work.
    """
    if simulated:
        return RowShape(8, 8, d)
    features = features_for(d)
    keys = 32
    while 2 * keys * features * itemsize > 2 * SHARED_BYTES // 3:
        keys //= 2
    return RowShape(64, keys, features)


def tile_shape(d: int, dtype: str, simulated: bool = False) -> TileShape | None:
    """Return the register tiles of the forward pass, or None where they do not fit.

    Spec: FA1-ALG1 line 1.
    """
    if simulated:
        lanes = 4
        each = -(-d // lanes)
        return TileShape(8, 8, lanes * each, 4, 2, each, 1)
    features = features_for(d)
    if (dtype, features) not in FORWARD:
        return None
    rows, cols, rows_each, cols_each = FORWARD[dtype, features]
    return TileShape(rows, cols, features, rows_each, cols_each, features * cols_each // cols, 4)


def backward_shape(d: int, dtype: str, simulated: bool = False) -> TileShape | None:
    """Return the register tiles of the backward pass, or None where they do not fit.

    Spec: FA1-ALG4 line 2.
    """
    if simulated:
        lanes = 4
        each = -(-d // lanes)
        return TileShape(8, 8, lanes * each, 4, 2, each, 1)
    features = features_for(d)
    if (dtype, features) not in BACKWARD:
        return None
    rows, cols, rows_each, cols_each, pad = BACKWARD[dtype, features]
    return TileShape(rows, cols, features, rows_each, cols_each, features * cols_each // cols, pad)
