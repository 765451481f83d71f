"""Faults planted in the kernel of multiply-adds are each found by small vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cuda_cases import Fault, forward
from cuda_faults import assert_found, first_complaint
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.attention import emulated, result_of
from refattn_gpu.cuda.catalogue import SMALL_FFMA, Tile
from refattn_gpu.cuda.problem import problem_of

WIDE = Tile(64, 64, 2, 1, False)
"""A tile whose weights pass in two turns."""

TRIES = (
    ("attention-family-rising", SMALL_FFMA),  # 37 keys, whose logits rise
    ("attention-window-2-1", SMALL_FFMA),
    ("attention-poison-causal", SMALL_FFMA),
    ("attention-lse-gradient-sinks", SMALL_FFMA),
    ("attention-dropout-half", SMALL_FFMA),
    ("attention-family-outliers", SMALL_FFMA),  # 64 features
    ("attention-family-rising", WIDE),
    ("attention-head-size-256", SMALL_FFMA),
)
"""Vectors and tiles in the order in which they are tried."""

FAULTS = {
    # products
    "S takes a wrong chunk of Q": Fault("ffma.cu", "(Q ^ 16 * c ^", "(Q ^ 16 * (c / 2) ^"),
    "a row 4 further is read as one 8 further": Fault("ffma.cu", " ^ r % 2 * 64)", ")"),
    "a lane's keys are neighbours": Fault("ffma.cu", "c) + n * ACROSS * LINE", "c) + n * LINE"),
    "O takes the weights of other keys": Fault(
        "ffma.cu", "load_chunk(p[r], (row ^ 16 * c)", "load_chunk(p[r], (row ^ 16 * (c ^ 1))"
    ),
    "O takes the values of other keys": Fault(
        "ffma.cu", "values + e * ACROSS * LINE", "values + e * LINE"
    ),
    "the second half of the weights meets the first values": Fault(
        "ffma.cu", "(32 * half + c) * LINE_BYTES", "c * LINE_BYTES"
    ),
    "every chunk of O is the first": Fault("ffma.cu", " + part * ACROSS * 16", ""),
    "every sum is added to the first chunks of O": Fault(
        "ffma.cu", "O[r][first + part]", "O[r][part]"
    ),
    "a product of a chunk is left out": Fault(
        "ffma.cu", "S[r][n] = multiply_add(q[r][e]", "if (e) S[r][n] = multiply_add(q[r][e]"
    ),
    # shared memory
    "chunks are not permuted": Fault("tiles.h", "(chunk ^ key)", "chunk", "in the same banks"),
    "weights are not permuted": Fault(
        "ffma.cu", " + lane % 2 * 64;", ";", "chunks in the same banks"
    ),
    "there is no room for weights": Fault(
        "tiles.h", " + ROWS * WEIGHT_BYTES", "", "beyond the shared memory"
    ),
    "two warps have the same place for weights": Fault(
        "ffma.cu", " + at.warp * (ROWS / WARPS) * WEIGHT_BYTES", "", "no barrier between"
    ),
    "no barrier before weights are read": Fault(
        "ffma.cu",
        "    warp_barrier();\n#pragma unroll\n    for (int first",
        "#pragma unroll\n    for (int first",
        "a read of what another thread wrote: no barrier",
    ),
    "no barrier before weights are overwritten": Fault(
        "ffma.cu", "if (half) warp_barrier();", "", "a store over what another thread reads"
    ),
    "no barrier before the weights' place is used again": Fault(
        "ffma.cu",
        "  warp_barrier();  // the last",
        "  // the last",
        "another thread reads: no barrier",
    ),
    "one lane is left out of a barrier": Fault(
        "ffma.cu",
        "    warp_barrier();\n#pragma unroll\n    for (int first",
        "    if (lane) warp_barrier();\n#pragma unroll\n    for (int first",
        "different operations|wait for ever",
    ),
    # copies
    "K is not waited for": Fault(
        "ffma.cu",
        "    cp_async_wait<0>();\n    barrier();  // K_j",
        "    barrier();  // K_j",
        "not waited for",
    ),
    "V is not waited for": Fault(
        "ffma.cu",
        "    cp_async_wait<0>();\n    barrier();  // V_j",
        "    barrier();  // V_j",
        "not waited for",
    ),
    "no barrier before K is read": Fault(
        "ffma.cu", "barrier();  // K_j", "// K_j", "not waited for|no barrier between|on its way"
    ),
    "no barrier before V is read": Fault(
        "ffma.cu", "barrier();  // V_j", "// V_j", "nobody wrote|no barrier between|on its way"
    ),
    "V arrives where K is read": Fault(
        "ffma.cu", "copy_tile<COLS, 2>(V_j,", "copy_tile<COLS, 2>(K_j,", "on its way|not waited for"
    ),
    "K is copied once": Fault(
        "ffma.cu", "job.key.row, j_first + COLS, n_k", "job.key.row, some.from, n_k"
    ),
    # the softmax
    "O is not rescaled": Fault("ffma.cu", "half ? 1.0f : old[r]", "1.0f"),
    "O is rescaled twice in a tile": Fault("ffma.cu", "half ? 1.0f : old[r]", "old[r]"),
    "l is not rescaled": Fault("ffma.cu", "my.l[r], old[r], l)", "my.l[r], 1.0f, l)"),
    "half of a row's lanes are the row": Fault("ffma.cu", "int bits = 2;", "int bits = 4;"),
    "every lane sees the sink": Fault("ffma.cu", "? 0.0f : 1.0f;\n    }", "? 1.0f : 1.0f;\n    }"),
    "a small weight is flushed to zero": Fault(
        "ffma.cu", "S[r][n] = power(", "S[r][n] = ex2(", "a weight was flushed"
    ),
    "a row of poison is not made again": Fault("ffma.cu", "if (its[2] != 0.0f)", "if (false)"),
    "a row that is made again is not divided": Fault("ffma.cu", "its[0], its[1]", "its[0], 1.0f"),
    "nothing is dropped": Fault("ffma.cu", "if (TERMS && job.keep.data)", "if (false)"),
    # which cells
    "the cells of a chunk are neighbours": Fault("ffma.cu", "j + ACROSS * e)", "j + e)"),
    "the tail is not masked": Fault("ffma.cu", "j < seen.from || j >= seen.to", "j < seen.from"),
    "a tile in part is taken for whole": Fault(
        "ffma.cu", "j_first + COLS <= every.to", "j_first < every.to"
    ),
}


@pytest.fixture(autouse=True)
def _faulty_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: tmp_path)


def flushed(texts: dict[str, str]) -> bool:
    """Return whether a weight of 2^-130 is lost, which no vector asks for."""
    query, key, value = (np.zeros((1, 1, n, 8), np.float32) for n in (1, 2, 2))
    query[...], key[0, 0, 1, 0], value[0, 0, 1] = 1, -90, 1e30
    found = problem_of("test", query, key, value, {"scale": 1.0})
    emulated(found, SMALL_FFMA, kernel="ffma", texts=texts)
    return not result_of(found, query, value).output.any()


def complaint(texts: dict[str, str]) -> str:
    """Return what is said of the kernel with other sources, "" if nothing is."""
    tries = [(name, "float32", tile) for name, tile in TRIES]
    said = first_complaint(partial(forward, kernel="ffma"), tries, texts)
    return said or ("a weight was flushed" if flushed(texts) else "")


def test_the_sources_without_a_fault_pass_the_same_vectors() -> None:
    assert complaint({}) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert_found(FAULTS[name], complaint)
