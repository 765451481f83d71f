"""Sizes of the tiles of the forward and backward kernels, from the shapes alone."""

from __future__ import annotations

from refattn.cpu.host import HOST, VECTORS

MOST_PANELS = 8
"""Panels of queries that share each tile of keys and values, at most."""

PANELS_BYTES = 2**19
"""Bytes of the panels of a block, if there are more than two: they stay in a second-level cache."""

BLOCKS = 16
"""Blocks that an attention is cut into, at least, where it is long enough: threads share them."""


def key_tile(d_k: int, d_v: int) -> int:
    """Return the keys of a tile."""
    return 128 if max(d_k, d_v) <= 64 else 64


def panels(pairs: int, n_q: int, d_k: int, d_v: int, lanes: int) -> int:
    """Return the panels of a block of queries; no result depends on it.

    Args:
        pairs: batch items times query heads.
        n_q: query rows.
        d_k: features of a key.
        d_v: features of a value.
        lanes: numbers in a vector.
    """
    width, count = VECTORS * lanes, MOST_PANELS
    size = width * (d_k + d_v) * HOST.vector_bytes // lanes
    while count > 2:
        blocks = pairs * -(-n_q // (count * width))
        if count * size <= PANELS_BYTES and blocks >= BLOCKS:
            break
        count //= 2
    return count
