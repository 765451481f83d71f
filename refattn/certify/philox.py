"""Philox4x32-10 in Python integers, and the dropout mask drawn from it.

Source of the generator: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3", SC11.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from refattn.certify.errors import CertifyError
from refattn.certify.exact import Array
from refattn.certify.setting import expect

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""Round multipliers of Philox4x32."""

WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the two key words grow by each round."""

WORD = (1 << 32) - 1
"""Mask of a 32-bit word."""


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Apply ten rounds to a counter of four words under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & WORD,
            (first >> 32) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(seed: int, offset: int, count: int) -> list[int]:
    """Return the first words of the stream of a seed, from a block offset."""
    key = (seed & WORD, (seed >> 32) & WORD)
    stream: list[int] = []
    for block in range(offset, offset + (count + 3) // 4):
        number = block % (1 << 128)
        stream += philox(
            (number & WORD, (number >> 32) & WORD, (number >> 64) & WORD, number >> 96), key
        )
    return stream[:count]


def keep_mask(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> dict[str, Array]:
    """Keep element e if and only if its word is below ⌊p·2³²⌋."""
    expect(inputs, frozenset(), "input")
    expect(parameters, frozenset({"seed", "offset", "shape", "keep_probability"}), "parameter")
    expect(conventions, frozenset(), "convention")
    p = Fraction(parameters["keep_probability"])
    if not 0 <= p <= 1:
        raise CertifyError(f"keep_probability is {p}, but it must be in [0, 1]")
    shape = tuple(int(x) for x in parameters["shape"])
    count = 1
    for size in shape:
        count *= size
    threshold = (p * (1 << 32)).__floor__()
    stream = words(int(parameters["seed"]), int(parameters.get("offset", 0)), count)
    kept = [word < threshold for word in stream]
    return {"keep": np.array(kept, dtype=bool).reshape(shape)}
