"""Faults planted in the kernels that split keys and merge parts are each found by small vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from cuda_cases import Fault, forward
from cuda_faults import assert_found, first_complaint
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.catalogue import SMALL_SPLIT, Tile

ALONE = Tile(16, 16, 1, 1, False, 32)
"""A tile of one warp, which meets two tiles of keys a split."""

TRIES = (
    ("attention-family-rising", "float16", SMALL_SPLIT),  # 37 keys, whose logits rise
    ("attention-grouped-6-2-interleave", "float16", SMALL_SPLIT),
    ("attention-edge-causal-65", "float16", SMALL_SPLIT),
    ("attention-edge-causal-65", "float16", ALONE),
    ("attention-lse-gradient-sinks", "float16", SMALL_SPLIT),
    ("attention-poison-causal", "bfloat16", SMALL_SPLIT),
)
"""Vectors, formats and tiles in the order in which they are tried."""

FAULTS = {
    # who has which keys
    "a split begins a key late": Fault(
        "split.cu", "from = my.split * SPLIT", "from = my.split * SPLIT + 1"
    ),
    "a split ends with the next one": Fault(
        "split.cu", "to = from + SPLIT", "to = from + 2 * SPLIT"
    ),
    "every split has the first keys": Fault("split.cu", "{at, block % splits}", "{at, 0}"),
    "every warp has the first keys": Fault("split.cu", " + warp * COLS * CHUNKS * 16;", ";"),
    "a warp's logits are those of the first": Fault("split.cu", "j_first + warp * COLS", "j_first"),
    "the tail is taken for whole": Fault(
        "split.cu", "its_first + COLS <= every.to", "its_first < every.to"
    ),
    # who has which rows
    "query heads change places": Fault(
        "parts.h", "query_head(job, at.g, r % group_of(job))", "query_head(job, at.g, 0)"
    ),
    "rows are counted by head": Fault(
        "parts.h", "return {its, r / group_of(job)};", "return {its, r / (group_of(job) + 1)};"
    ),
    "the last query of a tile is left out": Fault(
        "split.cu", "(end - 1) / group_of(job)", "(end - 1) / group_of(job) - 1"
    ),
    "features of Q change places": Fault(
        "split.cu", "chunk_address(Q_i, row, chunk)", "Q_i + (row * CHUNKS + chunk) * 16"
    ),
    # parts
    "a part is another warp's": Fault("split.cu", "split * WARPS + warp)", "split * WARPS)"),
    "a part holds the sum of two lanes": Fault("split.cu", "l += shuffle_xor(l, 2);", ""),
    "the parts of a row overlap": Fault("parts.h", " * splits_of(job) * WARPS;", " * WARPS;"),
    "a part is not turned": Fault(
        "merge.cu", "ex2(times(read(states + 2 * part), unit) - shift)", "1.0f"
    ),
    "the sum is not turned": Fault("merge.cu", "l += turn * read(states", "l += read(states"),
    "the last part is left out": Fault("merge.cu", "part < end; part++", "part < end - 1; part++"),
    "parts that nobody wrote are read": Fault(
        "merge.cu", "empty ? 0 : (seen.to", "(job.n_k + SPLIT - 1) / SPLIT * WARPS; (seen.to"
    ),
    "the sink is met by every part": Fault(
        "rows.h", "TERMS && !SPLIT && job.sinks", "TERMS && job.sinks"
    ),
    "the sink is not met": Fault(
        "merge.cu", "sunk ? ex2(times(sink, unit) - shift) : 0.0f", "0.0f"
    ),
    "a row of poison is not made again": Fault(
        "merge.cu", "if (ballot(odd != 0.0f))", "if (false)"
    ),
    # copies
    "Q and the first tile are not waited for": Fault(
        "split.cu", "cp_async_wait<0>()", "cp_async_wait<1>()", "not waited for"
    ),
    "no barrier before a tile is read": Fault(
        "split.cu", "barrier();  // K_j", "// K_j", "no barrier between|not waited for"
    ),
    "the next tile overwrites this one": Fault(
        "split.cu", "copy_stage(stage ^ 1", "copy_stage(stage", "not waited for|on its way"
    ),
}


@pytest.fixture(autouse=True)
def _faulty_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: tmp_path)


def complaint(texts: dict[str, str]) -> str:
    """Return what is said of the kernels with other sources, "" if nothing is."""
    return first_complaint(partial(forward, kernel="split"), TRIES, texts)


def test_the_sources_without_a_fault_pass_the_same_vectors() -> None:
    assert complaint({}) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert_found(FAULTS[name], complaint)
