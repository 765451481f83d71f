"""Attention by tiles of queries and keys that keeps two numbers a row instead of a matrix.

FlashAttention adds a forward pass that never holds the (n_q, n_k) matrices S and P: it walks over
blocks of keys, and carries each row's maximum m, its sum l of shifted exponentials and the output
O of the keys seen so far. The backward pass stands in `refattn.flash_backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import ShapeError, check_counts, check_finite, check_floats, check_shapes
from refattn.checks import describe as describe
from refattn.tiles import Cells, cells, divide, product_over_allowed, read_rows, spans


class BlockSizes(NamedTuple):
    """Sizes of the tiles of queries (B_r) and of keys (B_c)."""

    block_rows: int
    block_cols: int


class FlashResult(NamedTuple):
    """Output of a forward pass by tiles and the statistics that its backward pass reads."""

    output: Array
    row_max: Array
    row_sum: Array
    logsumexp: Array


class TileStates(NamedTuple):
    """Statistics m, l and output O after each outer step, stacked along a new first axis."""

    row_max: Array
    row_sum: Array
    states: Array


State = tuple[list[Array], list[Array], list[Array]]
"""Blocks 1 ... T_r of m, l and O: what an outer step of a forward pass leaves in HBM."""


def block_sizes(*, sram: int, d: int) -> BlockSizes:
    """Return the tile sizes that the paper sets for an on-chip memory.

    Spec: FA1-ALG1 line 1.

        B_c = ⌈M / 4d⌉,  B_r = min(⌈M / 4d⌉, d)

    Args:
        sram: M, size of the on-chip memory in elements.
        d: d, number of features of a head.

    Returns:
        `(block_rows, block_cols)`, that is (B_r, B_c).

    Raises:
        OptionError: a number is not an integer of at least 1.
    """
    check_counts("block_sizes", sram=sram, d=d)
    B_c = -(-sram // (4 * d))
    return BlockSizes(block_rows=min(B_c, d), block_cols=B_c)
