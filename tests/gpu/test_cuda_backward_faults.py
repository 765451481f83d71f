"""Faults planted in the kernels of the backward pass are each found by small vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cuda_cases import Fault, backward, differentiated
from cuda_faults import assert_found, first_complaint
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.catalogue import SMALL

VECTORS = (
    ("attention-everything-13x7-after-bias", "float16"),
    ("attention-softcap-before-bias-bias", "float16"),
    ("attention-dropout-half", "float16"),
    ("attention-alibi-absolute", "float16"),
    ("attention-poison-left-padding", "float16"),
    ("attention-edge-backward-33x31", "float16"),
    ("attention-edge-backward-64x64", "float16"),
    ("attention-lse-gradient-both", "float16"),
    ("attention-grouped-6-2-tile", "float16"),
    ("attention-value-size-16-24", "float16"),
    ("attention-window-0-open", "float16"),
    ("attention-window-open-0", "float16"),
    ("attention-window-2-1", "float16"),
    ("attention-poison-causal", "bfloat16"),
)
"""In the order in which they are tried: two variants of each kernel, and a third at last."""

FAULTS = {
    # the sums of a row
    "D is left out": Fault("gradients.h", "(kept * dP - D)", "(kept * dP)"),
    "a lane's part of D is the row's": Fault("backward_query.cu", "D += shuffle_xor(D, 2);", ""),
    "dL is left out": Fault(
        "backward_query.cu", "if (there && job.d_logsumexp) D -=", "if (false) D -="
    ),
    "L is taken for bits": Fault(
        "backward_query.cu",
        "read((const float*)job.logsumexp + head + i) * LOG2E",
        "read((const float*)job.logsumexp + head + i)",
    ),
    "D of another row": Fault(
        "backward_key.cu",
        "? read((const float*)job.dots + head + i)",
        "? read((const float*)job.dots + head + i / 2)",
    ),
    "L of another head": Fault(
        "backward_key.cu",
        "    at.h = query_head(job, at.g, turn / tiles);\n",
        "",
        "outside|d_",
    ),
    # products
    "dX meets V": Fault(
        "backward_query.cu",
        "multiply_values(my.dQ, dP, K_j,",
        "multiply_values(my.dQ, dP, K_j + K_BYTES,",
    ),
    "P meets Q": Fault(
        "backward_key.cu",
        "multiply_values(my.dV, S, Q_i + K_BYTES,",
        "multiply_values(my.dV, S, Q_i,",
    ),
    "dP is of Q": Fault(
        "backward_query.cu", "moved(rows + Q_BYTES, 16 * t, k)", "moved(rows, 16 * t, k)"
    ),
    "dPᵀ is of K": Fault(
        "backward_key.cu", "moved(rows + Q_BYTES, 16 * t, k)", "moved(rows, 16 * t, k)"
    ),
    "dQ is not scaled": Fault(
        "backward_query.cu",
        "job.d_k, job.d_k, job.scale, at.lane",
        "job.d_k, job.d_k, 1.0f, at.lane",
    ),
    "dV is scaled": Fault(
        "backward_key.cu",
        "(head + j) * job.d_v, job.d_v, 1.0f",
        "(head + j) * job.d_v, job.d_v, job.scale",
    ),
    # options
    "the softcap has no derivative": Fault("cells.h", "return 1.0f - t * t;", "return 1.0f;"),
    "dropout forgets dP": Fault("gradients.h", "(kept * dP - D)", "(dP - D)"),
    "dropout forgets P": Fault("gradients.h", "return {P * kept,", "return {P,"),
    "slopes are summed over two lanes": Fault(
        "backward_query.cu", "sum += shuffle_xor(sum, 2);", ""
    ),
    "only the first head of a group is read": Fault(
        "backward_key.cu",
        "turns = tiles * (job.heads / job.key_heads)",
        "turns = tiles",
    ),
    # which cells
    "the last query that sees a key is left out": Fault(
        "cells.h", "a + job.left + 1", "a + job.left"
    ),
    "a query sees the key ahead of it": Fault("cells.h", "a - job.right;", "a - job.right - 1;"),
    "a tile of queries in part is taken for whole": Fault(
        "backward_key.cu", "i_first + COLS <= queries.every.to", "i_first < queries.every.to"
    ),
    "a tile of keys in part is taken for whole": Fault(
        "backward_query.cu", "j_first + COLS <= keys.every.to", "j_first < keys.every.to"
    ),
    "a row of poison is not made again": Fault(
        "backward_query.cu", "if (again & 15)", "if (false)"
    ),
    # copies
    "no barrier before a tile of keys is read": Fault(
        "backward_query.cu", "barrier();  // K_j", "// K_j", "not waited for|no barrier"
    ),
    "no barrier before a tile of queries is read": Fault(
        "backward_key.cu", "barrier();  // Q_i", "// Q_i", "not waited for|no barrier"
    ),
    "the next queries overwrite these": Fault(
        "backward_key.cu",
        "copy_stage(stage ^ 1, turn + 1)",
        "copy_stage(stage, turn + 1)",
        "not waited for|on its way",
    ),
    "the stage is stale": Fault("backward_key.cu", "turn++, stage ^= 1", "turn++"),
    "the turn after the last is copied": Fault(
        "backward_key.cu", "if (turn + 1 < turns) copy", "copy", "not waited for|outside"
    ),
    "dO has no room": Fault(
        "tiles.h", "OWN_TILES * Q_BYTES", "Q_BYTES", "beyond the shared memory"
    ),
    "rows of V are those of K": Fault(
        "backward_query.cu",
        "copy_tile<ROWS>(dO_i, d_output, job.d_output.row",
        "copy_tile<ROWS>(dO_i, d_output, job.query.row",
        "outside|d_",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where code is kept: what has no fault is compiled once."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(autouse=True)
def _faulty_code_stays_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: place)


KEY_OF_POISON = "if (again & 15)", "if (false)"
"""One more fault, in the kernel of dK and dV, and what stands in its place."""


def complaint(texts: dict[str, str]) -> str:
    """Return what is said of the gradients with other sources, "" if nothing is."""
    tries = [(name, dtype, SMALL) for name, dtype in VECTORS]
    return first_complaint(backward, tries, texts)


def test_the_sources_without_a_fault_pass_the_same_vectors() -> None:
    assert complaint({}) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert_found(FAULTS[name], complaint)


def test_a_key_that_is_not_made_again_is_found() -> None:
    text = (store.SOURCES / "backward_key.cu").read_text("utf-8")
    assert text.count(KEY_OF_POISON[0]) == 1
    operands = list(np.random.default_rng(3).standard_normal((3, 1, 1, 37, 8)).astype(np.float16))
    d_output = operands[0].copy()
    d_output[:, :, 9] = np.nan  # which keys 0 to 9 read
    for texts, sound in (({}, 27), ({"backward_key.cu": text.replace(*KEY_OF_POISON)}, 5)):
        found = differentiated(operands, d_output, None, {"causal": True}, SMALL, texts=texts)
        numbers = found.d_value[0, 0, :, 0]
        assert (np.isfinite(numbers) & (numbers != 0)).sum() == sound  # 0 where none was stored
