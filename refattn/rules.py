"""Scalar rules of attention, each a plain Python leaf that compilers bind.

What a kernel decides for one row or one cell stands here once. The CPU kernels bind these functions
by `njit`, the GPU kernels by `cuda.jit(device=True)`; neither calls into a third. A rule calls no
other rule and holds no number with a fraction, so that it keeps the format of its arguments.
"""

from __future__ import annotations

import math
from typing import Any

UNBOUNDED = 2**63 - 1
"""A side of a window without an end, tokens."""

NO_DISTANCE, ABSOLUTE, SIGNED, COLUMN = 0, 1, 2, 3
"""Forms of ALiBi's distance; `NO_DISTANCE` where there are no slopes."""

DISTANCE_CODES = {"absolute": ABSOLUTE, "signed": SIGNED, "column": COLUMN}
"""The code of each `distance` option."""

NO_SOFTCAP, BEFORE_BIAS, AFTER_BIAS = 0, 1, 2
"""Where the softcap acts."""

SOFTCAP_CODES = {"before_bias": BEFORE_BIAS, "after_bias": AFTER_BIAS}
"""The code of each `softcap_order` option."""


def sees(left: int, right: int, position: int, j: int) -> bool:
    """Return whether a query at a position sees key j; causal is right = 0.

    Spec: OWN-CAUSAL1, OWN-WINDOW1.

        p - left ≤ j ≤ p + right
    """
    return -left <= j - position <= right


def keys_seen(left: int, right: int, first: int, rows: int, n_k: int) -> tuple[int, int, int, int]:
    """Return the keys that some row of a tile sees, and the keys that every row sees.

    Spec: OWN-CAUSAL1, OWN-WINDOW1, OWN-LENGTH1.

    Args:
        left: keys behind its position that a row sees.
        right: keys ahead. No sum leaves int64, `UNBOUNDED` or not.
        first: position of the tile's first row, tokens.
        rows: of the tile.
        n_k: valid keys.

    Returns:
        low, high: keys that some row sees lie in [low, high).
        all_low, all_high: keys in [all_low, all_high) are seen by every row.
    """
    last = first + rows - 1
    low = 0 if left >= first else first - left
    all_low = 0 if left >= last else last - left
    high = n_k if right >= n_k - 1 - last else last + right + 1
    all_high = n_k if right >= n_k - 1 - first else first + right + 1
    return low, max(low, high), all_low, all_high


def rows_seeing(left: int, right: int, first: int, rows: int, j: int, keys: int) -> tuple[int, int]:
    """Return the rows of a tile that see some of the keys j, ..., j + keys - 1: [low, high).

    Spec: OWN-CAUSAL1, OWN-WINDOW1.

    Args:
        left: keys behind its position that a row sees.
        right: keys ahead.
        first: position of the tile's first row, tokens.
        rows: of the tile.
        j: the first of the keys.
        keys: how many.
    """
    ahead, behind = j - first, j + keys - 1 - first
    low = 0 if right >= ahead else ahead - right
    high = rows if left >= rows - 1 - behind else behind + left + 1
    return low, high


def key_head(h: int, heads: int, key_heads: int, tiled: int) -> int:
    """Return the key-value head that query head h reads.

    Spec: OWN-GQA1.

        interleave: ⌊h / g⌋;  tile: h mod h_k;  g = heads / h_k
    """
    return h % key_heads if tiled else h // (heads // key_heads)


def query_head(member: int, head: int, heads: int, key_heads: int, tiled: int) -> int:
    """Return one of the g query heads that read a key-value head: the inverse of `key_head`.

    Spec: OWN-GQA1.
    """
    return member * key_heads + head if tiled else head * (heads // key_heads) + member


def steps(form: int, position: int, j: int) -> int:
    """Return what ALiBi's slope multiplies, tokens.

    Spec: ALIBI-S3a, OWN-ALIBI1.

        absolute: -|p - j|;  signed: j - p;  column: j
    """
    if form == 3:  # COLUMN
        return j
    ahead = j - position
    return -ahead if form == 1 and ahead > 0 else ahead  # ABSOLUTE


def soften(x: Any, c: Any) -> Any:
    """Return c·tanh(x/c).

    Spec: OWN-SOFTCAP1.
    """
    return c * math.tanh(x / c)


def softcap_slope(x: Any, c: Any, one: Any) -> Any:
    """Return the softcap's derivative, 1 - tanh²(x/c).

    Spec: OWN-SOFTCAP1, OWN-BACKWARD1.
    """
    t = math.tanh(x / c)
    return one - t * t


def rescale(m: Any, m_new: Any, zero: Any) -> Any:
    """Return e^(m - m_new), what turns sums shifted by m into sums shifted by m_new.

    Spec: FA1-ALG1 line 11, FA1-S31, OWN-EMPTY1.

    Where no key was seen yet m_new is -∞ and nothing is there to turn: -∞ - (-∞) is no number.
    """
    shift = zero if m_new < zero and m_new - m_new != zero else m_new
    return math.exp(m - shift)
