"""Which keys a panel of queries may see: the band of causal, window and length rules.

A panel's rows stand at positions p, p + 1, ...; the key of row i ranges from p + i - left to
p + i + right, and never reaches the key length.
"""

from __future__ import annotations

from numba import njit

from refattn import rules

keys_seen = njit(error_model="numpy")(rules.keys_seen)
rows_seeing = njit(error_model="numpy")(rules.rows_seeing)


@njit(error_model="numpy")
def reach(plan, first, rows, n_k):
    """Return the keys that some row of a panel sees, and the keys that every row sees.

    Args:
        plan: of the attention.
        first: position of the panel's first row, tokens.
        rows: of the panel.
        n_k: valid keys.

    Returns:
        low, high, all_low, all_high: as `rules.keys_seen`.
    """
    return keys_seen(plan.left, plan.right, first, rows, n_k)


@njit(error_model="numpy")
def lanes_seeing(plan, first, rows, j, n):
    """Return the rows of a panel that see some of the keys j, ..., j + n - 1: [low, high)."""
    return rows_seeing(plan.left, plan.right, first, rows, j, n)
