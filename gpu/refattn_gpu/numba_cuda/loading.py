"""Copies from the device's memory into tiles of shared memory, each thread its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from refattn_gpu.device import leaf

WARP = 32
"""Neighbouring threads that read neighbouring numbers."""


def tile_loads(real: Any, threads: int, features: int) -> SimpleNamespace:
    """Return the copies for kernels of a format.

    Args:
        real: NumPy's type of the format.
        threads: of a block.
        features: columns of a tile.

    Returns:
        load_rows, load_columns: device functions.
    """
    lanes = min(WARP, threads)
    groups = threads // lanes
    zero = real(0)

    @leaf
    def load_rows(tile, source, b, h, first, rows, most, thread):
        """Copy rows of one head into tile[row, feature], zeros where there are none.

        Returns:
            1 if this thread met a number that is not finite, else 0.
        """
        d, odd = source.shape[3], 0
        for row in range(thread // lanes, most, groups):
            for x in range(thread % lanes, features, lanes):
                number = zero
                if row < rows and x < d:
                    number = source[b, h, first + row, x]
                    if number - number != zero:
                        odd = 1
                tile[row, x] = number
        return odd

    @leaf
    def load_columns(tile, source, b, h, first, rows, most, thread):
        """Copy rows of one head into tile[feature, row], zeros where there are none.

        Neighbouring rows then lie side by side, as a thread reads them.

        Returns:
            As `load_rows`.
        """
        d, odd = source.shape[3], 0
        for row in range(thread // lanes, most, groups):
            for x in range(thread % lanes, features, lanes):
                number = zero
                if row < rows and x < d:
                    number = source[b, h, first + row, x]
                    if number - number != zero:
                        odd = 1
                tile[x, row] = number
        return odd

    return SimpleNamespace(load_rows=load_rows, load_columns=load_columns)
