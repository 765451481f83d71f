"""How many elements each pass reads from and writes to the slow memory (HBM).

FlashAttention's Theorems 2 and 5 give the orders of these counts; here they stand exactly, line by
line of the listings, for any lengths, head size and on-chip memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from refattn.checks import check_counts, check_option
from refattn.flash import block_sizes


class Traffic(NamedTuple):
    """Elements read from and written to the slow memory."""

    reads: int
    writes: int


def hbm_traffic(*, n_q: int, n_k: int, d: int, sram: int, algorithm: str) -> Traffic:
    """Return how many elements a pass moves between the slow memory and the chip.

    Spec: FA1-THM2, FA1-THM5, FA1-ALG1 line 1.

        standard: Θ(N d + N²),  tiled: Θ(N² d² / M)

    Args:
        n_q: query rows (N in the paper).
        n_k: key rows (N in the paper).
        d: d, features of a head, of the value too.
        sram: M, elements that the on-chip memory holds; of no effect on the standard passes,
            whose products the paper counts as reading each operand once.
        algorithm: "standard", "standard_backward", "tiled" or "tiled_backward".

    Returns:
        reads: elements read, exact.
        writes: elements written, exact.

    Raises:
        OptionError: a number is not an integer of at least 1, or the algorithm is unknown.
    """
    sizes = check_counts("hbm_traffic", n_q=n_q, n_k=n_k, d=d, sram=sram)
    check_option("hbm_traffic", "algorithm", algorithm, ALGORITHMS)
    return ALGORITHMS[algorithm](*sizes)


def least_traffic(*, n_q: int, n_k: int, d: int) -> Traffic:
    """Return what any exact attention must move: every operand read, every output written.

    Spec: FA1-PROP3.

        reads ≥ (n_q + 2 n_k) d,  writes ≥ n_q d

    Args:
        n_q: query rows.
        n_k: key rows.
        d: d, features of a head, of the value too.

    Returns:
        reads: elements of Q, K and V.
        writes: elements of O.

    Raises:
        OptionError: a number is not an integer of at least 1.
    """
    n_q, n_k, d = check_counts("least_traffic", n_q=n_q, n_k=n_k, d=d)
    return Traffic(reads=(n_q + 2 * n_k) * d, writes=n_q * d)


def _standard(n_q: int, n_k: int, d: int, sram: int) -> Traffic:
    """Count standard attention: each operand of a line once.

    Spec: FA1-ALG0 lines 1-3, FA1-THM2.
    """
    Q = O = n_q * d
    K = V = n_k * d
    S = P = n_q * n_k
    return Traffic(
        reads=(Q + K) + S + (P + V),  # lines 1, 2, 3
        writes=S + P + O,  # lines 1, 2, 3
    )


def _standard_backward(n_q: int, n_k: int, d: int, sram: int) -> Traffic:
    """Count the standard backward pass: each operand of a line once.

    Spec: FA1-ALG3 lines 1-5, FA1-THM5.
    """
    Q = dO = dQ = n_q * d
    K = V = dK = dV = n_k * d
    P = dP = dS = n_q * n_k
    return Traffic(
        reads=(P + dO) + (dO + V) + (P + dP) + (dS + K) + (dS + Q),  # lines 1, 2, 3, 4, 5
        writes=dV + dP + dS + dQ + dK,  # lines 1, 2, 3, 4, 5
    )


def _tiled(n_q: int, n_k: int, d: int, sram: int) -> Traffic:
    """Count the forward pass by tiles; the tiles of queries add up to n_q, ragged or not.

    Spec: FA1-ALG1 lines 2-13, FA1-THM2.
    """
    T_c = _outer_steps(n_k, d, sram)
    Q = O = n_q * d
    K = V = n_k * d
    l = m = n_q
    return Traffic(
        reads=(K + V) + T_c * (Q + O + l + m),  # lines 6, 8
        writes=(O + l + m) + T_c * (O + l + m),  # lines 2, 12 and 13
    )


def _tiled_backward(n_q: int, n_k: int, d: int, sram: int) -> Traffic:
    """Count the backward pass by tiles.

    Spec: FA1-ALG4 lines 5-24, FA1-THM5.
    """
    T_c = _outer_steps(n_k, d, sram)
    Q = O = dO = dQ = n_q * d
    K = V = dK = dV = n_k * d
    l = m = n_q
    return Traffic(
        reads=(K + V) + T_c * (Q + O + dO + dQ + l + m),  # lines 7, 10
        writes=(dQ + dK + dV) + T_c * dQ + (dK + dV),  # lines 5, 21, 24
    )


def _outer_steps(n_k: int, d: int, sram: int) -> int:
    """Return T_c = ⌈n_k / B_c⌉.

    Spec: FA1-ALG1 line 3.
    """
    return -(-n_k // block_sizes(sram=sram, d=d).block_cols)


ALGORITHMS: dict[str, Callable[[int, int, int, int], Traffic]] = {
    "standard": _standard,
    "standard_backward": _standard_backward,
    "tiled": _tiled,
    "tiled_backward": _tiled_backward,
}
"""The passes that are counted: Algorithms 0, 3, 1 and 4 of the paper."""
