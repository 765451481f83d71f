"""Faults planted in the kernel for a Hopper are each found by a few small vectors.

Most are found by the machine under the emulation, in any order of threads and arrivals; it says
what it found. The others give wrong numbers, which the bounds of the vectors reject.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from cuda_cases import Fault, forward
from cuda_faults import assert_found, first_complaint
from optional import require_device
from refattn_gpu.cuda import emulate, store
from refattn_gpu.cuda.catalogue import SMALL_HOPPER, Tile

WIDE = Tile(128, 32, 8, 1, False)
"""A tile of two warp groups, and of two steps of keys."""

TRIES = (
    ("attention-family-rising", SMALL_HOPPER),  # 37 keys, whose logits rise: three tiles
    ("attention-causal-bottom-right-7x13", SMALL_HOPPER),
    ("attention-grouped-6-2-interleave", SMALL_HOPPER),
    ("attention-mask-several-tiles", SMALL_HOPPER),  # without overlap
    ("attention-edge-causal-127", WIDE),
    ("attention-head-size-128", WIDE),  # two panels
)
"""Vectors in the order in which they are tried, in float16."""

KERNEL, PRODUCTS = "forward_hopper.cu", "products_hopper.h"

FAULTS = {
    # copies and their barriers
    "fewer bytes are expected than come": Fault(
        KERNEL, "barrier, COUNT * PANELS * LINE", "barrier, COUNT * PANELS * LINE / 2", "more bytes"
    ),
    "more bytes are expected than come": Fault(
        KERNEL, "barrier, COUNT * PANELS * LINE", "barrier, COUNT * PANELS * LINE + 16", "for ever"
    ),
    "K is not waited for": Fault(
        KERNEL, "    mbarrier_wait(full_of(ring, 2 * j), turn_of(2 * j));\n", "", "not waited for"
    ),
    "V is not waited for": Fault(
        KERNEL,
        "    mbarrier_wait(full_of(ring, 2 * j + 1), turn_of(2 * j + 1));\n",
        "",
        "not waited for",
    ),
    "Q is not waited for": Fault(
        KERNEL, "  if (tiles) mbarrier_wait(arrival_of(ring), 0);\n", "", "not waited for"
    ),
    "V is waited for at the slot of K": Fault(
        KERNEL,
        "full_of(ring, 2 * j + 1), turn_of(2 * j + 1)",
        "full_of(ring, 2 * j), turn_of(2 * j)",
        "not waited for",
    ),
    "a slot is filled before it is empty": Fault(
        KERNEL,
        "    mbarrier_wait(empty_of(ring, x), turn_of(x) ^ 1);",
        "    //",
        "an arrival beyond",
    ),
    "a slot of K is never given back": Fault(
        KERNEL, "    give_back(2 * j);\n", "", "wait for ever"
    ),
    "a slot of V is never given back": Fault(
        KERNEL, "    give_back(2 * j + 1);\n", "", "wait for ever"
    ),
    "a slot is given back by one warp of four": Fault(
        KERNEL, "if (at.lane == 0) m", "if (at.warp == 0 && at.lane == 0) m", "wait for ever"
    ),
    "one warp of four speaks for all": Fault(
        KERNEL,
        "if (at.lane == 0) m",
        "if (at.warp == 0 && at.lane < WARPS) m",
        "another warp reads|product reads",
    ),
    "every lane gives a slot back": Fault(KERNEL, "if (at.lane == 0) m", "m", "wait for ever"),
    "K is given back before its product is made": Fault(
        KERNEL,
        "    wgmma_wait<0>();\n    end_S(0);\n",
        "    give_back(0);\n    wgmma_wait<0>();\n    pin<COLS / 2>(&S[0][0][0]);\n",
        "product reads|another warp reads",
    ),
    "V is given back before its product is made": Fault(
        KERNEL,
        "      weigh(j);  // while O_i is added to\n      wgmma_wait<0>();\n      end_O(j - 1);",
        "      give_back(2 * j - 1);\n      weigh(j);\n      wgmma_wait<0>();",
        "product reads|another warp reads",
    ),
    "the parity of a turn is wrong": Fault(
        KERNEL, "return x / SLOTS % 2;", "return x % SLOTS % 2;", "wait for ever"
    ),
    "the first turn waits for the turn before": Fault(
        KERNEL, "turn_of(x) ^ 1);", "turn_of(x));", "wait for ever"
    ),
    "the slot is stale": Fault(
        KERNEL,
        "return ring.tiles + x % SLOTS * K_BYTES;",
        "return ring.tiles + x % 2 * K_BYTES;",
        "a copy over|on its way|waited for",
    ),
    "barriers are made without a fence": Fault(
        KERNEL, "    mbarrier_fence();\n", "", "before a fence"
    ),
    "barriers are used before all know of them": Fault(
        KERNEL, "  }\n  barrier();\n", "  }\n", "before all know|nobody initialised"
    ),
    "a barrier counts one warp too few": Fault(
        KERNEL,
        "mbarrier_init(empty_of(ring, x), WARPS);",
        "mbarrier_init(empty_of(ring, x), WARPS - 1);",
        "another warp reads|product reads|wait for ever",
    ),
    "barriers lie in the last slot": Fault(
        KERNEL, "Q_i + TILE_BYTES}", "Q_i + TILE_BYTES + 128}", "beyond the shared memory"
    ),
    "K is copied from the next tile": Fault(
        KERNEL, "from + x / 2 * COLS", "from + (x + 1) / 2 * COLS"
    ),
    "V comes from K's tensor": Fault(KERNEL, "maps.value, job.value", "maps.key, job.key"),
    "an item is taken for a head": Fault(
        KERNEL,
        "rows.head ? head : 0, rows.batch ? item : 0",
        "rows.batch ? item : 0, rows.head ? head : 0",
    ),
    # products
    "a step of features is half as long": Fault(PRODUCTS, "k % 4 * 32", "k % 4 * 16"),
    "a step of keys is half as long": Fault(PRODUCTS, "V_j + 2 * k * EIGHT", "V_j + k * EIGHT"),
    "eight rows lie half as far apart": Fault(
        PRODUCTS, "return descriptor(tile, 16, EIGHT);", "return descriptor(tile, 16, EIGHT / 2);"
    ),
    "eight keys lie half as far apart": Fault(
        PRODUCTS, "COLS * LINE, EIGHT);", "COLS * LINE, EIGHT / 2);"
    ),
    "panels lie half as far apart": Fault(
        PRODUCTS, "descriptor(tile, COLS * LINE, EIGHT)", "descriptor(tile, COLS * LINE / 2, EIGHT)"
    ),
    "panels of Q lie as far apart as those of K": Fault(
        PRODUCTS, "Q + panel * ROWS * LINE", "Q + panel * COLS * LINE"
    ),
    "a descriptor names another permutation": Fault(
        PRODUCTS, "1ull << 62", "2ull << 62", "a permutation that"
    ),
    "an address takes bits of its neighbour": Fault(
        PRODUCTS,
        "(u64)(stride >> 4) << 32",
        "(u64)(stride) << 32",
        "nobody wrote",
    ),
    "V is not read transposed": Fault(
        PRODUCTS,
        "wgmma_registers<FEATURES, true>",
        "wgmma_registers<FEATURES, false>",
        "on its way",
    ),
    "S begins with what was there": Fault(PRODUCTS, "a, b, k > 0)", "a, b, true)"),
    "O forgets the tiles before": Fault(
        PRODUCTS, "2 * k * EIGHT), true)", "2 * k * EIGHT), k > 0)"
    ),
    "the second warp group multiplies the first one's rows": Fault(
        KERNEL, "Q_i + at.warp / 4 * GROUP * LINE", "Q_i"
    ),
    "products are in no group": Fault(
        PRODUCTS,
        "a, b, k > 0);\n  }\n  wgmma_commit();",
        "a, b, k > 0);\n  }",
        "under way adds to|not waited for",
    ),
    "S is not waited for": Fault(KERNEL, "      wgmma_wait<1>();\n", "", "under way adds to"),
    "S is waited for as if nothing came after it": Fault(
        KERNEL, "      wgmma_wait<1>();\n", "      wgmma_wait<2>();\n", "under way adds to"
    ),
    "O is not waited for": Fault(
        KERNEL, "to\n      wgmma_wait<0>();\n", "to\n", "under way adds to"
    ),
    "the last product is not waited for": Fault(
        KERNEL,
        "    begin_O(tiles - 1);\n    wgmma_wait<0>();\n    end_O(tiles - 1);\n",
        "    begin_O(tiles - 1);\n",
        "that were not waited for",
    ),
    "O is turned while it is added to": Fault(
        KERNEL,
        "      weigh(j);  // while O_i is added to\n",
        "      weigh(j);\n      rescale(my, old);\n",
        "under way adds to",
    ),
    "weights are rounded while they are multiplied": Fault(
        KERNEL,
        "      weigh(j);  // while O_i is added to\n",
        "      weigh(j);\n      round_weights(P, S);\n",
        "under way reads",
    ),
    "O of the tile itself, without overlap, is not waited for": Fault(
        KERNEL,
        "      begin_O(j);\n      wgmma_wait<0>();\n",
        "      begin_O(j);\n",
        "under way adds to",
    ),
    "values of the next tile meet the weights": Fault(
        KERNEL, "      begin_O(j - 1);\n", "      begin_O(j);\n", "on its way|not waited for"
    ),
    "no fence before S": Fault(
        KERNEL, "    wgmma_fence();\n    begin_keys", "    begin_keys", "without a fence"
    ),
    "no fence before O": Fault(
        KERNEL, "    wgmma_fence();\n    begin_values", "    begin_values", "without a fence"
    ),
    "a warp leaves a product out": Fault(
        PRODUCTS,
        "    wgmma_registers<FEATURES, true>",
        "    if (thread_index() / 32 != 2) wgmma_registers<FEATURES, true>",
        "different products",
    ),
    "more registers are asked for than there are": Fault(
        KERNEL, "more_registers<240>", "more_registers<256>", "more registers than|wait for ever"
    ),
    # the softmax
    "O is not rescaled": Fault(KERNEL, "    rescale(my, old);\n", ""),
    "the tail is not masked": Fault(KERNEL, "j_first + COLS <= every.to", "j_first < every.to"),
}
"""Beside those of test_cuda_faults.py, which are in sources that both kernels include."""


@pytest.fixture(autouse=True)
def _faulty_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("gxx", emulate.no_gxx())
    monkeypatch.setattr(store, "folder", lambda: tmp_path)


def complaint(texts: dict[str, str]) -> str:
    """Return what is said of the kernel with other sources, "" if nothing is."""
    tries = [(name, "float16", tile) for name, tile in TRIES]
    return first_complaint(partial(forward, kernel="hopper"), tries, texts)


def test_the_sources_without_a_fault_pass_the_same_vectors() -> None:
    assert complaint({}) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert_found(FAULTS[name], complaint)
