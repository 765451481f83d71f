"""Faults that are planted in the kernels' own sources are rejected by small certified vectors.

The simulator runs CUDA threads as threads of the operating system, so that a missing barrier would
show by chance only. It is planted as what it allows: a tile that is read before it is written, or
written anew before it was read.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from optional import require

require("numba")
require("refattn_gpu.device")
from faulty_kernels import Fault, faulty_modules  # noqa: E402
from refattn.bounds import profile_of  # noqa: E402
from refattn.judge import judge  # noqa: E402
from refattn.vectors import core_pack  # noqa: E402
from refattn_gpu import device  # noqa: E402
from refattn_gpu.numba_cuda import backend  # noqa: E402
from refattn_gpu.numba_cuda.attention import Kernel  # noqa: E402
from refattn_gpu.numba_cuda.attention_backward import BackwardKernels  # noqa: E402
from refattn_gpu.numba_cuda.shapes import backward_shape, row_shape, tile_shape  # noqa: E402

if device.STATE.kind == "absent":
    pytest.skip(device.STATE.reason, allow_module_level=True)

host = importlib.import_module("refattn_gpu.numba_cuda.attention")
host_backward = importlib.import_module("refattn_gpu.numba_cuda.attention_backward")

FORWARD = (
    "attention-family-rising",
    "attention-causal-top-left-11x11",
    "attention-causal-bottom-right-7x13",
    "attention-window-2-1",
    "attention-grouped-6-2-interleave",
    "attention-mask-sparse",
    "attention-poison-tail-nan",
)
"""Vectors put to the forward kernels: 37 keys that rise, bands, groups, a mask, a tail of NaN."""

BACKWARD = (
    "attention-grouped-4-2-interleave",
    "attention-lse-gradient-bias",
    "attention-lse-gradient-causal",
    "attention-alibi-signed-corner",
    "attention-edge-backward-15x17",
)
"""Vectors put to the backward kernels."""

PACK = {case.id: case for case in core_pack().cases}

READ_TILE = """            load_rows(K_j, operands.key, b, g, j_first, keys, B_c, thread)  # line 6
            load_rows(V_j, operands.value, b, g, j_first, keys, B_c, thread)
"""

LINE_13 = "                m_i = m_new  # line 13\n"

ROWS = {
    "O is not rescaled": ("rows", "O_i[x] = old * O_i[x]", "O_i[x] = O_i[x]"),
    "l is not rescaled": ("rows", "l_i = old * l_i", "l_i = l_i"),
    "m is stale": ("rows", LINE_13, ""),
    "a tile is shifted by its own maximum": (
        "rows",
        "P_ij = rescale(S_ij[c], m_new, zero)",
        "P_ij = rescale(S_ij[c], m_tilde_ij, zero)",
    ),
    "the last tile is left out": (
        "rows",
        "// B_c * B_c, high, B_c)",
        "// B_c * B_c, high - B_c, B_c)",
    ),
    "the tail of the last tile is read": ("rows", "keys = min(B_c, n_k - j_first)", "keys = B_c"),
    "the band of a tile forgets the alignment": (
        "rows",
        "first = band.offsets[b] + i_first",
        "first = i_first",
    ),
    "a cell forgets the alignment": (
        "bound",
        "if not sees(band.left, band.right, band.offsets[b] + i, j):",
        "if not sees(band.left, band.right, i, j):",
    ),
    "the wrong key-value head is read": (
        "rows",
        "g = key_head(h, heads, key_heads, band.tiled_heads)",
        "g = h % key_heads",
    ),
    "no barrier after the tile is written: it is read before": (
        "rows",
        READ_TILE + "            cuda.syncthreads()  # until the tile is whole\n",
        "",
    ),
    "no barrier before a tile is written: the next one is there": (
        "rows",
        "load_rows(V_j, operands.value, b, g, j_first, keys, B_c, thread)",
        "load_rows(V_j, operands.value, b, g, min(j_first + B_c, n_k - keys), keys, B_c, thread)",
    ),
    "the scale is applied twice": (
        "bound",
        "x = product * terms.scale\n        if terms.softcap_order == 1:",
        "x = product * terms.scale * terms.scale\n        if terms.softcap_order == 1:",
    ),
    "the mask is inverted": (
        "bound",
        "if terms.mask.size and not entry(terms.mask, b, h, i, j):",
        "if terms.mask.size and entry(terms.mask, b, h, i, j):",
    ),
    "a forbidden value is read": ("rows", "if S_ij[c] != lowest:", "if True:"),
    "the output is not divided by l": ("rows", "O_i[x] / l_i", "O_i[x]"),
}

TILES = {
    "O is not rescaled": (
        "tiles",
        "O[r, x] = old[r] * O[r, x]\n            if",
        "pass\n            if",
    ),
    "l is not rescaled": ("tiles", "l[r] = old[r] * l[r]", "pass"),
    "m is stale": ("tiles", "m[r] = m_new  # line 13", "pass"),
    "the maxima of other lanes are not asked": (
        "tiles",
        "                for other in range(lanes):\n                    m_new",
        "                for other in range(1):\n                    m_new",
    ),
    "the sums of other lanes are not added": (
        "tiles",
        "            for other in range(lanes):\n                l_i",
        "            for other in range(1):\n                l_i",
    ),
    "a tile at the edge of the band counts as whole": (
        "tiles",
        "all_low <= j_first and j_first + B_c <= all_high",
        "all_low <= j_first and j_first <= all_high",
    ),
    "a tile under a mask counts as whole": ("tiles", "whole = not masked and", "whole ="),
    "the last tile is left out": (
        "tiles",
        "// B_c * B_c, high, B_c)",
        "// B_c * B_c, high - B_c, B_c)",
    ),
    "the tail of a tile is not cleared": (
        "loading",
        "                tile[row, x] = number\n",
        "                if row < rows:\n                    tile[row, x] = number\n",
    ),
    "the first tile of queries is computed twice": (
        "tiles",
        "(tiles - 1 - cuda.blockIdx.x % tiles) * B_r",
        "0",
    ),
    "weights are read before they are written": (
        "tiles",
        "                    P_ij[z + c, y + r] = weight\n",
        "",
    ),
    "a forbidden value is read": ("tiles", "if not odd:", "if True:"),
}

BACKWARD_ROWS = {
    "D is left out": ("bound", "dS = P * (dP - D)", "dS = P * dP"),
    "the gradient of the logsumexp is left out": (
        "backward_rows",
        "D_i - rows.d_logsumexp[b, h, i]",
        "D_i",
    ),
    "the scale is left out": ("bound", "dX * terms.scale", "dX"),
    "the softcap's slope is left out": (
        "bound",
        "dX = dS * bend(band, terms, b, h, i, j, product)",
        "dX = dS",
    ),
    "the last tile of keys is left out": (
        "backward_rows",
        "for j_first in range(low // B_c * B_c, high, B_c)",
        "for j_first in range(low // B_c * B_c, high - B_c, B_c)",
    ),
    "the last tile of queries is left out": (
        "backward_rows",
        "for i_first in range(low // B_r * B_r, high, B_r)",
        "for i_first in range(low // B_r * B_r, high - B_r, B_r)",
    ),
    "one query head of a group is left out": (
        "backward_rows",
        "for member in range(heads // key_heads)",
        "for member in range(max(1, heads // key_heads - 1))",
    ),
    "the queries of a band forget the alignment": (
        "backward_rows",
        "rows_seeing(band.left, band.right, band.offsets[b], n_valid, j_first, B_c)",
        "rows_seeing(band.left, band.right, 0, n_valid, j_first, B_c)",
    ),
}

BACKWARD_TILES = {
    "D is left out": ("bound", "dS = P * (dP - D)", "dS = P * dP"),
    "the gradients of cells are read before they are written": (
        "backward_tiles",
        "                    P_ij[z + c, y + r], dX_ij[z + c, y + r] = weight, d_product\n"
        "            cuda.syncthreads()",
        "                    pass\n            cuda.syncthreads()",
    ),
    "the slopes of other lanes are not added": (
        "backward_tiles",
        "for other in range(lanes):",
        "for other in range(1):",
    ),
    "dK takes the weights of dV": (
        "backward_tiles",
        "add(dX_ij, Q_i, P_ij, odd, y, lane, dK)",
        "add(P_ij, Q_i, P_ij, odd, y, lane, dK)",
    ),
    "features of the other lanes are written": (
        "backward_tiles",
        "results.d_query[b, h, i_first + y + r, lane + x * lanes] = dQ[r, x]",
        "results.d_query[b, h, i_first + y + r, lane] = dQ[r, x]",
    ),
}


def rejections(names, form):
    """Yield the vectors that reject what runs now; an error in a kernel is a rejection."""
    for name in names:
        case = PACK[name]
        conventions = {**case.conventions, "form": form}
        try:
            outputs = backend.run(case.op, case.inputs, case.parameters, conventions, "float64")
        except IndexError:  # beyond an array: the sanitizer's finding on a device
            yield name
            continue
        if not judge(case, outputs, profile_of("float64")).ok:
            yield name


def plant(monkeypatch, kernels, fault):
    """Let the forward or the backward pass run a faulty module of kernels."""
    names = faulty_modules(Fault(*fault), kernels)
    real = np.float64

    def forward_kernel(form, dtype, d):
        row, tile = row_shape(d, 8, device.SIMULATED), tile_shape(d, dtype, device.SIMULATED)
        if form == "rows":
            return Kernel(device.kernel(names["attention_rows"](real, row)), row.rows, row.rows)
        text = names["attention_tiles"](real, tile)
        return Kernel(device.kernel(text), tile.rows, tile.threads)

    def backward_kernels(form, dtype, d):
        sound = sound_backward(form, dtype, d)
        row, tile = row_shape(d, 8, device.SIMULATED), backward_shape(d, dtype, device.SIMULATED)
        if form == "rows":
            texts = [names["backward_dots"](real, row.rows)]
            texts += [names[f"backward_{kind}_rows"](real, row) for kind in ("query", "key")]
            return BackwardKernels(
                *(Kernel(device.kernel(text), row.rows, row.rows) for text in texts)
            )
        texts = [names[f"backward_{kind}_tiles"](real, tile) for kind in ("query", "key")]
        kernels = [Kernel(device.kernel(text), tile.rows, tile.threads) for text in texts]
        return BackwardKernels(sound.dots, *kernels)

    sound_backward = host_backward.backward_kernels
    if kernels.startswith("backward"):
        monkeypatch.setattr(host_backward, "backward_kernels", backward_kernels)
    else:
        monkeypatch.setattr(host, "forward_kernel", forward_kernel)


PASSES = {
    "rows": (ROWS, FORWARD, "rows"),
    "tiles": (TILES, FORWARD, "tiles"),
    "backward_rows": (BACKWARD_ROWS, BACKWARD, "rows"),
    "backward_tiles": (BACKWARD_TILES, BACKWARD, "tiles"),
}
"""Faults, vectors and form of each module of kernels."""


@pytest.mark.parametrize("kernels", PASSES)
def test_the_sources_without_a_fault_pass_the_same_vectors(kernels, monkeypatch):
    plant(monkeypatch, kernels, (kernels, "from __future__ import annotations", ""))
    _, vectors, form = PASSES[kernels]
    assert list(rejections(vectors, form)) == []


@pytest.mark.skipif(not device.SIMULATED, reason="a fault may stop a device")
@pytest.mark.parametrize(
    ("kernels", "name"), [(kernels, name) for kernels in PASSES for name in PASSES[kernels][0]]
)
def test_a_planted_fault_is_rejected(kernels, name, monkeypatch):
    faults, vectors, form = PASSES[kernels]
    plant(monkeypatch, kernels, faults[name])
    assert any(rejections(vectors, form))
