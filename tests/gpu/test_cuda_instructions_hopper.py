"""The emulation of a Hopper's instructions, against what NVIDIA's manual says of each in words."""

from __future__ import annotations

import numpy as np
import pytest

from optional import require_device
from refattn_gpu.cuda import build, emulate, instructions_hopper
from refattn_gpu.cuda.instructions_hopper import COLS, FEATURES, FIRST, HEADS, IN_MEMORY, ROWS

BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])

THREADS = np.arange(128)
ROW, PAIR = THREADS // 32 * 16 + THREADS % 32 // 4, THREADS % 4 * 2
"""The row of a result that a thread holds pairs of, and where in 8 columns they begin."""


@pytest.fixture(autouse=True)
def _gxx() -> None:
    require_device("gxx", emulate.no_gxx())


def tiles(dtype: str) -> dict[str, np.ndarray]:
    """Return the boxes as they are copied: zeros beyond the tensor's rows and features."""
    found = {}
    for name, numbers in instructions_hopper.operands(dtype).items():
        rows = numbers[1, HEADS[name]][FIRST * (name == "value") :]
        found[name] = np.zeros((64, FEATURES), rows.dtype)
        found[name][: len(rows), : rows.shape[1]] = rows
    return found


def accumulators(product: np.ndarray) -> np.ndarray:
    """Return the registers of a result of 64 rows, a row a register."""
    columns = [8 * n + e % 2 for n in range(product.shape[1] // 8) for e in range(4)]
    halves = [8 * (e // 2) for _ in range(product.shape[1] // 8) for e in range(4)]
    return np.stack([product[ROW + h, PAIR + c] for h, c in zip(halves, columns, strict=True)])


def permuted(panel: np.ndarray) -> np.ndarray:
    """Return a panel as words in shared memory: chunk c of row r lies at c ^ r % 8."""
    chunks = np.ascontiguousarray(panel).view(np.uint32).reshape(len(panel), 8, 4)
    rows, places = np.arange(len(panel))[:, None], np.arange(8)[None, :]
    return chunks[rows, places ^ rows % 8].reshape(len(panel), 32)


@BOTH
def test_a_box_lies_permuted_with_zeros_beyond_its_tensor(dtype: str) -> None:
    words, there = instructions_hopper.emulated(dtype), tiles(dtype)
    for which, name in enumerate(("key", "value")):
        memory = permuted(there[name][:, :64])
        for k in range(4):
            rows = 16 * k + THREADS // 32
            assert np.array_equal(words[2 * k + which], memory[rows, THREADS % 32])
    assert not there["key"][53:].any()


@BOTH
def test_a_product_of_two_tiles_in_shared_memory_is_theirs(dtype: str) -> None:
    words, there = instructions_hopper.emulated(dtype), tiles(dtype)
    S = there["query"].astype(np.float32) @ there["key"].astype(np.float32).T
    found = words[IN_MEMORY : IN_MEMORY + COLS // 2].view(np.float32)
    assert np.array_equal(found, accumulators(S))
    assert len(np.unique(S)) > 50


@BOTH
def test_a_product_of_registers_and_a_transposed_tile_is_added(dtype: str) -> None:
    words, there = instructions_hopper.emulated(dtype), tiles(dtype)
    P, O = np.zeros((ROWS, COLS), np.float32), np.zeros((ROWS, FEATURES), np.float32)
    for n in range(FEATURES // 8):
        for e in range(4):
            rows, columns = ROW + 8 * (e // 2), 8 * n + PAIR + e % 2
            O[rows, columns] = n - e
            if n < COLS // 8:
                P[rows, columns] = (THREADS * 7 + n * 5 + e * 3) % 9 - 4
    found = words[IN_MEMORY + COLS // 2 :].view(np.float32)
    assert np.array_equal(found, accumulators(O + P @ there["value"].astype(np.float32)))


@BOTH
def test_the_order_of_threads_and_of_arrivals_changes_no_word(dtype: str) -> None:
    words = [instructions_hopper.emulated(dtype, backwards=way) for way in (False, True)]
    assert np.array_equal(*words)
    assert instructions_hopper.different(*words) == []
    words[1][5, 7] ^= 1
    assert instructions_hopper.different(*words) == [5]


@BOTH
def test_the_instructions_compile_for_a_device(dtype: str) -> None:
    require_device("nvrtc", build.no_nvrtc())
    variant = instructions_hopper.variant_of(dtype)
    cubin = build.build(variant, *variant.targets)
    assert cubin.usage.spill == 0
    assert not build.SERIAL.search(cubin.report)
