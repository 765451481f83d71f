"""Dropout that two machines can agree on: a given keep mask, or the stream it is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refattn.arrays import Array, array_namespace
from refattn.checks import OptionError, check_memory, is_finite, is_integer, shown

ROUNDS = 10
"""Rounds of Philox4x32, as its authors recommend."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""Round multipliers of Philox4x32."""

WEYL = (0x9E3779B9, 0xBB67AE85)
"""Key increments a round, the golden ratio and √3 - 1 as 32-bit fractions."""

DRAWN_BYTES = 36
"""Bytes that drawing one element of a keep mask takes at its peak, as `tracemalloc` measures."""

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Return the words of Philox4x32-10 at the given counters.

    Spec: OWN-DROPOUT2 (Salmon et al., SC 2011).

        (c0, c1, c2, c3) ← (hi(M1 c2) ⊕ c1 ⊕ k0, lo(M1 c2), hi(M0 c0) ⊕ c3 ⊕ k1, lo(M0 c0))

    Args:
        counter: (n, 4), uint32 words, least significant first.
        seed: 64-bit key, least significant word first.

    Returns:
        words: (n, 4), uint32.
    """
    c0, c1, c2, c3 = (counter[:, w].astype(np.uint64) for w in range(4))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def keep_mask(
    shape: Sequence[int],
    *,
    seed: int,
    offset: int = 0,
    keep_probability: float,
    xp: Any = np,
) -> Array:
    """Draw a keep mask from the specified stream; integer arithmetic, the same bits anywhere.

    Spec: OWN-DROPOUT2, OWN-MEMORY1.

        keep_e = philox(⌊e/4⌋ + offset, seed)[e mod 4] < ⌊keep_probability · 2³²⌋

    Args:
        shape: of the mask; e is the flat index in C order.
        seed: 0 ≤ seed < 2⁶⁴.
        offset: first counter of the stream, 0 ≤ offset < 2⁶³.
        keep_probability: chance that a weight is kept, 0 to 1.
        xp: array library of the result; the words are drawn on the host.

    Returns:
        keep: bool, of the shape.

    Raises:
        OptionError: a number is outside its range, or shape is no list of sizes.
        MemoryLimitError: the words do not fit into the free memory.
    """
    if not (is_finite(keep_probability) and 0 <= keep_probability <= 1):
        raise OptionError(
            f"keep_probability is {shown(keep_probability)}, but it must be from 0 to 1 [keep_mask]"
        )
    for name, number, end in (("seed", seed, 64), ("offset", offset, 63)):
        if not (is_integer(number) and 0 <= number < 2**end):
            raise OptionError(
                f"{name} is {shown(number)}, but it must be an integer from 0 to 2^{end} - 1 "
                f"[keep_mask]"
            )
    if not (isinstance(shape, Sequence) and all(is_integer(n) and n >= 0 for n in shape)):
        raise OptionError(
            f"shape is {shown(shape)}, but it must be a list of sizes, integers that are not "
            f"negative [keep_mask]"
        )
    sizes = tuple(int(n) for n in shape)
    check_memory("keep_mask", sizes, itemsize=1, arrays=DRAWN_BYTES)
    count = math.prod(sizes)
    index = np.arange((count + 3) // 4, dtype=np.uint64) + np.uint64(int(offset))
    zero = np.zeros_like(index)
    words = philox(np.stack([index & _LOW, index >> _SHIFT, zero, zero], axis=1), int(seed))
    threshold = np.uint64(math.floor(float(keep_probability) * 2**32))
    keep = words.reshape(-1)[:count].astype(np.uint64) < threshold
    return xp.asarray(keep.reshape(sizes))


def drop_weights(weights: Array, keep: Array | None, keep_probability: float) -> Array:
    """Drop the weights that are not kept and scale up the others; rows are not renormalised.

    Spec: OWN-DROPOUT1, FA1-ALG2 line 14.

        P_dropped = P ∘ keep / keep_probability

    Args:
        weights: P (or a gradient with respect to the dropped weights), (..., n_q, n_k).
        keep: bool, the same shape; None keeps all.
        keep_probability: 0 < keep_probability ≤ 1.

    Returns:
        dropped: (..., n_q, n_k).
    """
    if keep is None:
        return weights
    xp = array_namespace(weights)
    return xp.where(keep, weights / keep_probability, xp.zeros_like(weights))
