"""The emulation of single instructions, against what NVIDIA's manual says of each in words."""

from __future__ import annotations

import numpy as np
import pytest

from optional import require_device
from refattn_gpu.cuda import build, emulate, instructions
from refattn_gpu.cuda.catalogue import TARGETS

BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])

LANES = np.arange(32)
ROW, PAIR = LANES // 4, LANES % 4 * 2
"""The row of a matrix of 8 by 8 that a lane holds a pair of, and where the pair begins."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def pairs(matrix: np.ndarray) -> np.ndarray:
    """Return the registers that hold a matrix of 8 by 8, one a lane."""
    bits = np.ascontiguousarray(matrix).view(np.uint16).astype(np.uint32)
    return bits[ROW, PAIR] | bits[ROW, PAIR + 1] << 16


def tiles(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return Q and K as they lie in shared memory: zeros beyond 13 rows and 24 features of K."""
    query, key = instructions.operands(dtype)
    there = np.zeros((16, 32), key.dtype)
    there[:13, :24] = key[:, :24]
    query = query.copy()
    query[:, 24:] = 0
    return query, there


def accumulators(product: np.ndarray) -> np.ndarray:
    """Return the four registers of a result of 16 by 8, a row a register."""
    return np.stack([product[ROW + 8 * (e // 2), PAIR + e % 2] for e in range(4)])


@BOTH
def test_ldmatrix_gives_a_lane_a_pair_of_a_row(dtype: str) -> None:
    words = instructions.emulated(dtype)
    Q, K = tiles(dtype)
    for e in range(4):
        rows, columns = 8 * (e % 2), 16 + 8 * (e // 2)  # a0 to a3 of mma.m16n8k16
        assert np.array_equal(words[e], pairs(Q[rows : rows + 8, columns : columns + 8]))
        rows, columns = 8 * (e // 2), 16 + 8 * (e % 2)  # b0 and b1 of two products
        assert np.array_equal(words[4 + e], pairs(K[rows : rows + 8, columns : columns + 8]))
        rows, columns = 8 * (e % 2), 8 * (e // 2)
        assert np.array_equal(words[8 + e], pairs(K[rows : rows + 8, columns : columns + 8].T))


@BOTH
def test_mma_adds_a_product_of_16_by_16_and_16_by_8(dtype: str) -> None:
    words = instructions.emulated(dtype)
    Q, K = (x.astype(np.float32) for x in tiles(dtype))
    first = accumulators(Q[:, 16:] @ K[:8, 16:].T) + np.arange(4, dtype=np.float32)[:, None]
    assert np.array_equal(words[12:16].view(np.float32), first)
    second = first + accumulators(Q[:, 16:] @ K[:, :8])
    assert np.array_equal(words[16:20].view(np.float32), second)
    assert len(np.unique(second)) > 20


@BOTH
def test_conversions_shuffles_votes_and_powers(dtype: str) -> None:
    words = instructions.emulated(dtype)
    c = words[16:20].view(np.float32)
    format_ = instructions.operands(dtype)[0].dtype
    thirds = [(x / np.float32(3)).astype(format_).view(np.uint16).astype(np.uint32) for x in c[:2]]
    assert np.array_equal(words[20], thirds[0] | thirds[1] << 16)
    low = (words[0] & 0xFFFF).astype(np.uint16).view(format_)
    assert np.array_equal(words[21].view(np.float32), low.astype(np.float32))
    assert np.array_equal(words[22].view(np.float32), c[0][LANES ^ 5])
    assert set(words[23].view(np.float32)) == {c[0][7]}
    votes = int(sum(1 << lane for lane in range(32) if c[0][lane] > 0))
    assert set(words[24]) == {votes}
    assert 0 < votes < 2**32 - 1
    assert np.allclose(words[35].view(np.float32), 2.0 ** (c[0] / 64), rtol=2.0**-21)
    least = 2.0 ** (c[0].astype(np.float64) / 64 - 130)
    assert least.min() < 2.0**-127
    assert np.allclose(words[36].view(np.float32), least, rtol=2.0**-21, atol=2.0**-149)


@BOTH
def test_tf32_is_multiplied_and_float32_read(dtype: str) -> None:
    words = instructions.emulated(dtype)
    c = words[16:20].view(np.float32)
    A, B = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    small = np.rint(c / np.float32(16))
    for e in range(4):
        A[ROW + 8 * (e % 2), LANES % 4 + 4 * (e // 2)] = small[e]
    B[LANES % 4, ROW], B[LANES % 4 + 4, ROW] = small[0], small[3]
    assert np.array_equal(words[25:29].view(np.float32), accumulators(A @ B))
    _, K = tiles(dtype)
    bits = K.view(np.uint32)
    assert np.array_equal(words[29], bits[LANES // 16, LANES % 16])


@BOTH
def test_chunks_pass_between_lanes_and_multiply_adds_are_rounded_once(dtype: str) -> None:
    words = instructions.emulated(dtype)
    c, d = words[16:20].view(np.float32), words[25:29].view(np.float32)
    stored = np.stack([c[0], c[1], d[0], d[1]])
    assert np.array_equal(words[30:34].view(np.float32), stored[:, LANES ^ 5])
    third = np.float64(np.float32(1) / np.float32(3))  # the product of two float32 is exact
    rounded = (c[0].astype(np.float64) * third + d[0]).astype(np.float32)
    assert np.array_equal(words[34].view(np.float32), rounded)


@BOTH
def test_the_order_of_lanes_changes_no_word(dtype: str) -> None:
    assert np.array_equal(
        instructions.emulated(dtype), instructions.emulated(dtype, backwards=True)
    )


def test_a_word_that_differs_is_told() -> None:
    words = instructions.emulated("float16")
    other = words.copy()
    other[3, 5] ^= 1
    close = list(instructions.CLOSE)
    other[close] ^= 1
    assert instructions.different(other, words) == [3]
    other[close] ^= 1 << 20
    assert instructions.different(other, words) == [3, *close]


@BOTH
def test_the_instructions_compile_for_a_device(dtype: str) -> None:
    require_device("nvrtc", build.no_nvrtc())
    for target in TARGETS:
        assert build.build(instructions.variant_of(dtype), target).usage.spill == 0
