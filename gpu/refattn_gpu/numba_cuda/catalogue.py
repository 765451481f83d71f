"""Every kernel of this folder as a device gets it, for those who compile or measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refattn_gpu import device
from refattn_gpu.numba_cuda import (
    backward_rows,
    backward_tiles,
    elements,
    records,
    rows,
    shapes,
    tiles,
)

DTYPES = ("float32", "float64")
"""Formats that kernels compute in."""

INPUTS = (records.Operands, records.Band, records.Terms)
"""What all kernels of attention read."""

RECORDS: dict[str, tuple[Any, ...]] = {
    "forward_rows": (records.Results, *INPUTS),
    "forward_tiles": (records.Results, *INPUTS),
    "backward_dots": (records.Dots, records.Rows),
    "backward_query_rows": (records.QueryGradients, records.Saved, *INPUTS),
    "backward_query_tiles": (records.QueryGradients, records.Saved, *INPUTS),
    "backward_key_rows": (records.KeyGradients, records.Saved, *INPUTS),
    "backward_key_tiles": (records.KeyGradients, records.Saved, *INPUTS),
    "rotate_pairs": (elements.Rotated, elements.Rotation),
    "linear_bias": (elements.Biased, elements.LinearBias),
    "merge_parts": (elements.Merged, elements.Parts),
}
"""The records that each kernel takes."""


class Entry(NamedTuple):
    """One kernel of one format and one size."""

    name: str
    """Of the kernel, without format and size."""
    dtype: str
    features: int
    """Most features of a head; 0 where a kernel takes any."""
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
        for features in shapes.FEATURES:
            yield from _by_rows(dtype, features)
            yield from _by_tiles(dtype, features)
        yield from _by_elements(dtype)


def _by_rows(dtype: str, features: int) -> Iterator[Entry]:
    real = np.dtype(dtype).type
    shape = shapes.row_shape(features, real(0).itemsize)
    texts = {
        "forward_rows": rows.attention_rows(real, shape),
        "backward_dots": backward_rows.backward_dots(real, shape.rows),
        "backward_query_rows": backward_rows.backward_query_rows(real, shape),
        "backward_key_rows": backward_rows.backward_key_rows(real, shape),
    }
    for name, text in texts.items():
        yield Entry(name, dtype, features, text, _signature(dtype, *RECORDS[name]), shape.rows)


def _by_tiles(dtype: str, features: int) -> Iterator[Entry]:
    real = np.dtype(dtype).type
    makers = {
        "forward_tiles": (tiles.attention_tiles, shapes.tile_shape),
        "backward_query_tiles": (backward_tiles.backward_query_tiles, shapes.backward_shape),
        "backward_key_tiles": (backward_tiles.backward_key_tiles, shapes.backward_shape),
    }
    for name, (make, shape_for) in makers.items():
        shape = shape_for(features, dtype)
        if shape is not None:
            signature = _signature(dtype, *RECORDS[name])
            yield Entry(name, dtype, features, make(real, shape), signature, shape.threads)


def _by_elements(dtype: str) -> Iterator[Entry]:
    real = np.dtype(dtype).type
    texts = {
        "rotate_pairs": elements.rotate_pairs,
        "linear_bias": elements.linear_bias(real),
        "merge_parts": elements.merge_parts(real),
    }
    for name, text in texts.items():
        yield Entry(name, dtype, 0, text, _signature(dtype, *RECORDS[name]), elements.THREADS)


def _signature(dtype: str, *kinds: Any) -> tuple[Any, ...]:
    """Return Numba's types of records whose real numbers are of a format."""
    types = device.types()
    real = getattr(types, dtype)
    axes = {
        **dict.fromkeys(("logsumexp", "dots", "d_logsumexp", "d_slopes"), real[:, :, ::1]),
        **dict.fromkeys(("slopes", "sinks"), real[::1]),
        **dict.fromkeys(("mask", "keep"), types.boolean[:, :, :, ::1]),
        **dict.fromkeys(("offsets", "query_lengths", "key_lengths"), types.int64[::1]),
        **dict.fromkeys(("left", "right", "tiled_heads"), types.int64),
        **dict.fromkeys(("distance", "softcap_order", "split"), types.int64),
        **dict.fromkeys(("softcap", "scale", "kept"), real),
        **dict.fromkeys(("rotated", "x", "cosine", "sine", "outputs"), real[:, :, ::1]),
        **dict.fromkeys(("merged", "logsumexps"), real[:, ::1]),
        "merged_logsumexp": real[::1],
    }
    four = real[:, :, :, ::1]
    return tuple(
        types.NamedTuple([axes.get(name, four) for name in kind._fields], kind) for kind in kinds
    )
