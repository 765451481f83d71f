"""Which keys a panel of queries may see: the band of causal, window and length rules.

A panel's rows stand at positions p, p + 1, ...; the key of row i ranges from p + i - left to
p + i + right, and never reaches the key length.
"""

from __future__ import annotations

from numba import njit


@njit(error_model="numpy")
def reach(plan, first, rows, n_k):
    """Return the keys that some row of a panel sees, and the keys that every row sees.

    Args:
        plan: of the attention.
        first: position of the panel's first row, tokens.
        rows: of the panel.
        n_k: valid keys.

    Returns:
        low, high: keys that some row sees lie in [low, high).
        all_low, all_high: keys in [all_low, all_high) are seen by every row.
    """
    low = max(0, first - plan.left)
    high = min(n_k, first + rows - 1 + plan.right + 1)
    all_low = max(0, first + rows - 1 - plan.left)
    all_high = min(n_k, first + plan.right + 1)
    return low, max(low, high), all_low, all_high


@njit(error_model="numpy")
def lanes_seeing(plan, first, rows, j, n):
    """Return the rows of a panel that see some of the keys j, ..., j + n - 1: [low, high)."""
    low = max(0, j - plan.right - first)
    high = min(rows, j + n - 1 + plan.left - first + 1)
    return low, high
