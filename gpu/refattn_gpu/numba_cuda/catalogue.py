"""Every kernel of this folder as a device gets it, for those who compile or measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refattn_gpu.numba_cuda import records, rows, shapes, tiles

DTYPES = ("float32", "float64")
"""Formats that kernels compute in."""


class Entry(NamedTuple):
    """One kernel of one format and one size."""

    name: str
    """Of the kernel, without format and size."""
    dtype: str
    features: int
    """Most features of a head."""
    function: Callable[..., None]
    """The Python function that is compiled."""
    signature: tuple[Any, ...]
    """Numba's types of its arguments."""
    threads: int
    """A block."""


def kernels() -> tuple[Entry, ...]:
    """Return every kernel, in the shapes for a device."""
    return tuple(_all())


def _all() -> Iterator[Entry]:
    for dtype in DTYPES:
        real = np.dtype(dtype).type
        reads = _signature(dtype, records.Operands, records.Band, records.Terms)
        writes = _signature(dtype, records.Results)
        for features in shapes.FEATURES:
            row = shapes.row_shape(features, np.dtype(dtype).itemsize)
            text = rows.attention_rows(real, row)
            yield Entry("forward_rows", dtype, features, text, writes + reads, row.rows)
            tile = shapes.tile_shape(features, dtype)
            if tile is not None:
                text = tiles.attention_tiles(real, tile)
                yield Entry("forward_tiles", dtype, features, text, writes + reads, tile.threads)


def _signature(dtype: str, *kinds: type[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return Numba's types of records whose real numbers are of a format."""
    from numba import types

    real = getattr(types, dtype)
    arrays = {
        **dict.fromkeys(("mask", "keep"), types.boolean[:, :, :, ::1]),
        "logsumexp": real[:, :, ::1],
        "slopes": real[::1],
        "sinks": real[::1],
        **dict.fromkeys(("offsets", "query_lengths", "key_lengths"), types.int64[::1]),
        **dict.fromkeys(("left", "right", "tiled_heads"), types.int64),
        **dict.fromkeys(("distance", "softcap_order"), types.int64),
        **dict.fromkeys(("softcap", "scale", "kept"), real),
    }
    four = real[:, :, :, ::1]
    return tuple(
        types.NamedTuple([arrays.get(name, four) for name in kind._fields], kind) for kind in kinds
    )
