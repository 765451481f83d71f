"""Faults planted in the sources of the kernels in CUDA C++ are each found by small vectors.

Some are found by the machine under the emulation, in any order of threads; it says what it found.
The others give wrong numbers, which the bounds of the vectors reject.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cuda_cases import Fault, forward
from cuda_faults import assert_found, first_complaint
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.catalogue import SMALL, Tile

VECTORS = (
    "attention-family-rising",  # 37 keys, whose logits rise
    "attention-causal-bottom-right-7x13",
    "attention-causal-top-left-13x7",
    "attention-window-2-1",
    "attention-grouped-6-2-interleave",
    "attention-empty-lengths-zero",
    "attention-mask-several-tiles",
    "attention-lse-gradient-sinks",
    "attention-head-size-32",
)
"""In the order in which they are tried, in float16."""

POISON = "attention-poison-causal"
"""One more, in bfloat16: NaN among values that some rows may not read."""

WIDE = Tile(32, 32, 2, 1, False)
"""A tile of two steps of keys, which reads Q_i for each."""

LAST = ((VECTORS[0], "float16", WIDE), (VECTORS[-1], "float32", SMALL))
"""Tries for what only they reach."""


FAULTS = {
    # products
    "S takes a wrong step of features": Fault(
        "products16.h", "moved(keys, 16 * n, k)", "moved(keys, 16 * n, k / 2)"
    ),
    "O takes a wrong step of keys": Fault(
        "products16.h", "moved(values, 16 * k, n)", "moved(values, 8 * k, n)"
    ),
    "two registers of the weights change places": Fault(
        "products16.h", "a[1] = pack(P[2 * k][2]", "a[1] = pack(P[2 * k + 1][2]"
    ),
    "V is not read transposed": Fault("products16.h", "ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    "the weights of two keys change places": Fault(
        "products16.h",
        "pack(P[2 * k][0], P[2 * k][1])",
        "pack(P[2 * k][1], P[2 * k][0])",
    ),
    "a large part meets a large part only": Fault(
        "products32.h", "  mma_m16n8k8(c, a.small, b.large[first], b.large[first + 1]);\n", ""
    ),
    "the keys of two weights change places": Fault(
        "products32.h", "P[t][k][e / 2 + e % 2 * 2]", "P[t][k][e]"
    ),
    "the second key of a pair is the first": Fault(
        "products32.h", "chunk_address(V_j, key + 1, lane", "chunk_address(V_j, key, lane"
    ),
    "an operand is not rounded to TF32": Fault(
        "products32.h",
        "bits_of(x - float_of(parts.large[which])) & ~0x1FFFu",
        "bits_of(x - float_of(parts.large[which]))",
        "that is not TF32",
    ),
    "features of V change places": Fault(
        "products32.h",
        "word = lane / 4 % 4 * 4",
        "word = (3 - lane / 4 % 4) * 4",
    ),
    # the permutation of chunks
    "chunks are written where they are not read": Fault(
        "tiles.h",
        "cp_async_16(chunk_address(tile, row, chunk)",
        "cp_async_16(tile + (row * CHUNKS + chunk) * 16",
    ),
    "chunks are not permuted": Fault("tiles.h", "(chunk ^ key)", "chunk", "in the same banks"),
    "chunks are permuted by the last bits of the row": Fault(
        "tiles.h", "row / (8 / PERMUTED) % PERMUTED", "row % PERMUTED", "in the same banks"
    ),
    "chunks are permuted beyond their row": Fault(
        "tiles.h", "row / (8 / PERMUTED) % PERMUTED", "row % 8", "another is on its way|beyond"
    ),
    # copies
    "a tile is not waited for": Fault(
        "forward.cu", "    cp_async_wait<0>();\n    barrier();", "    barrier();", "not waited for"
    ),
    "the newest tile is not waited for": Fault(
        "forward.cu", "cp_async_wait<0>()", "cp_async_wait<1>()", "not waited for"
    ),
    "Q is not waited for": Fault(
        "forward.cu", "    cp_async_wait<1>();", "    ", "not waited for|no barrier between"
    ),
    "copies are in no group": Fault(
        "forward.cu",
        "j_first, n_k, job.d_v);\n    cp_async_commit();",
        "j_first, n_k, job.d_v);",
        "not waited for",
    ),
    "no barrier before a tile is read": Fault(
        "forward.cu", "barrier();  // K_j and V_j", "// K_j and V_j", "not waited for|no barrier"
    ),
    "no barrier before Q is read": Fault(
        "forward.cu", "on its way\n    barrier();", "on its way", "no barrier between"
    ),
    "the next tile overwrites this one": Fault(
        "forward.cu", "copy_stage(stage ^ 1", "copy_stage(stage", "not waited for|on its way"
    ),
    "the stage is stale": Fault("forward.cu", "j_first += COLS, stage ^= 1", "j_first += COLS"),
    "the next tile is copied before the barrier": Fault(
        "forward.cu",
        "    cp_async_wait<0>();\n    barrier();",
        "    cp_async_wait<0>();\n"
        "    if (j_first + COLS < some.to) copy_stage(stage ^ 1, j_first + COLS);\n    barrier();",
        "on its way|no barrier between|not waited for",
    ),
    "one stage too little shared memory": Fault(
        "tiles.h",
        "Q_BYTES + STAGES * STAGE_BYTES",
        "Q_BYTES + STAGE_BYTES",
        "beyond the shared memory",
    ),
    "rows beyond the last are copied": Fault(
        "tiles.h", "first + row < rows && EACH", "EACH", "outside of every array|output"
    ),
    "features beyond the last are copied": Fault(
        "tiles.h", "rows && EACH * chunk < d", "rows", "outside of every array|output"
    ),
    "a copy that nobody waits for": Fault(
        "forward.cu",
        "if (j_first + COLS < some.to) copy",
        "copy",
        "that were not waited for",
    ),
    "one lane is left out of a shuffle": Fault(
        "rows.h",
        "m_new = fmaxf(m_new, shuffle_xor(m_new, 2));",
        "if (thread_index() % 32) m_new = fmaxf(m_new, shuffle_xor(m_new, 2));",
        "different operations|wait for ever",
    ),
    # the softmax
    "O is not rescaled": Fault("rows.h", "my.O[t][n][e] *= old[t][e / 2];", ";"),
    "l is not rescaled": Fault("rows.h", "l = old[t][half] * my.l[t][half]", "l = my.l[t][half]"),
    "the maximum of two lanes is the row's": Fault(
        "rows.h", "m_new = fmaxf(m_new, shuffle_xor(m_new, 2));", ""
    ),
    "the sum of two lanes is the row's": Fault("rows.h", "l += shuffle_xor(l, 2);", ""),
    "the logsumexp is in bits": Fault("again.h", "shift * LN2", "shift"),
    "an empty row is shifted by -∞": Fault(
        "again.h", "m == LOWEST ? 0.0f : times(m, unit)", "times(m, unit)"
    ),
    "every lane sees the sink": Fault("rows.h", "at.lane % 4 ? 0.0f : 1.0f", "1.0f"),
    "a row of poison is not made again": Fault("rows.h", "if (again & 15)", "if (false)"),
    # which cells
    "the tail is not masked": Fault("rows.h", "j < seen.from || j >= seen.to", "j < seen.from"),
    "a tile in part is taken for whole": Fault(
        "forward.cu", "j_first + COLS <= every.to", "j_first < every.to"
    ),
    "the diagonal is forbidden": Fault("cells.h", "p + job.right + 1", "p + job.right"),
    "the alignment is left out": Fault("cells.h", "p = job.offsets[b] + i;", "p = i;"),
    "the window has no beginning": Fault("cells.h", "job.left >= p ? 0 : p - job.left", "0"),
    "the mask is not read": Fault("cells.h", "if (job.mask.data && !read", "if (false && !read"),
    "query heads read the wrong keys": Fault(
        "cells.h", "at.h / (job.heads / job.key_heads)", "at.h % job.key_heads"
    ),
    "the rows of an item do not end": Fault(
        "cells.h", "if (i >= job.query_lengths[b]) return {0, 0};", ""
    ),
}


@pytest.fixture(autouse=True)
def _faulty_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: tmp_path)


def complaint(texts: dict[str, str]) -> str:
    """Return what is said of the kernels with other sources, "" if nothing is."""
    tries = [(name, "float16", SMALL) for name in VECTORS]
    return first_complaint(forward, [*tries, (POISON, "bfloat16", SMALL), *LAST], texts)


def test_the_sources_without_a_fault_pass_the_same_vectors() -> None:
    assert complaint({}) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert_found(FAULTS[name], complaint)
