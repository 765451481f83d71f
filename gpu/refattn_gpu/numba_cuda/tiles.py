"""Algorithm 1 with a small block of cells a thread: the same listing, faster.

A thread has `rows_each` rows and `cols_each` columns of S_ij in registers, and as many rows and
`features_each` columns of O_i, so that each number it reads from shared memory meets several
others. The threads of one row, its lanes, tell each other their maxima; each keeps the sum l of its
own columns only, and the sums meet at the end. A forbidden cell has the weight -0, a weight that
vanished is 0: where a tile holds a value that is not finite, this tells which cells read it. What
`rows` says about lines 5, 7, 8, 12 and 13 holds here too.
"""

from __future__ import annotations

import math
from typing import Any

from refattn_gpu.device import cuda
from refattn_gpu.numba_cuda.bound import cell_rules, key_head, keys_seen, rescale
from refattn_gpu.numba_cuda.loading import tile_loads
from refattn_gpu.numba_cuda.shapes import TileShape


def attention_tiles(real: Any, shape: TileShape) -> Any:
    """Return the kernel for a format and a shape of tiles.

    Spec: FA1-ALG1 lines 1-16, FA1-ALG2 line 14, FA1-S31, OWN-LSE1, OWN-SINK1, OWN-EMPTY1,
        OWN-POISON1.

    Args:
        real: NumPy's type of the format.
        shape: tiles and the most features that fit.

    Returns:
        A function of (Results, Operands, Band, Terms), for b · h · ⌈n_q / B_r⌉ blocks.
    """
    B_r, B_c, features, rows_each, cols_each, features_each, pad = shape  # line 1
    lanes = shape.lanes
    row_line, col_line = B_r + pad, B_c + pad
    loads = tile_loads(real, shape.threads, features)
    load_rows, load_columns = loads.load_rows, loads.load_columns
    cell = cell_rules(real)
    allowed, logit, dropped = cell.allowed, cell.logit, cell.dropped
    lowest, zero, one = real(-math.inf), real(0), real(1)
    forbidden = real(-0.0)

    def forward_tiles(results, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_q + B_r - 1) // B_r  # line 3
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // heads
        h = cuda.blockIdx.x // tiles % heads
        # lines 4 and 7: this block's tile, the last ones first, which causal rows make the longest
        i_first = (tiles - 1 - cuda.blockIdx.x % tiles) * B_r
        g = key_head(h, heads, key_heads, band.tiled_heads)
        lane = thread % lanes
        y = thread // lanes * rows_each  # this thread's rows, columns and features begin here
        z, w = lane * cols_each, lane * features_each

        Q_i = cuda.shared.array((features, row_line), real)  # transposed, and so are K_j and P_ij
        K_j = cuda.shared.array((features, col_line), real)
        V_j = cuda.shared.array((B_c, features), real)
        P_ij = cuda.shared.array((B_c, row_line), real)
        of_lanes = cuda.shared.array((B_r, lanes), real)
        S = cuda.local.array((rows_each, cols_each), real)
        O = cuda.local.array((rows_each, features_each), real)
        m = cuda.local.array(rows_each, real)
        l = cuda.local.array(rows_each, real)
        old = cuda.local.array(rows_each, real)
        for r in range(rows_each):  # line 2
            m[r], l[r] = lowest, zero
            if terms.sinks.size:  # a sink is a logit that lane 0 saw before any key
                m[r], l[r] = terms.sinks[h], one if lane == 0 else zero
            for x in range(features_each):
                O[r, x] = zero
        load_columns(Q_i, operands.query, b, h, i_first, n_q - i_first, B_r, thread)  # line 8

        n_valid = min(n_k, band.key_lengths[b])
        first = band.offsets[b] + i_first
        low, high, all_low, all_high = keys_seen(band.left, band.right, first, B_r, n_valid)
        masked = terms.mask.size or terms.bias.size or i_first + B_r > band.query_lengths[b]
        for j_first in range(low // B_c * B_c, high, B_c):  # line 5
            cuda.syncthreads()  # until every thread is done with the tile before
            load_columns(K_j, operands.key, b, g, j_first, n_k - j_first, B_c, thread)  # line 6
            odd = load_rows(V_j, operands.value, b, g, j_first, n_k - j_first, B_c, thread)
            odd = cuda.syncthreads_or(odd)  # until the tile is whole; is a value not finite?
            for r in range(rows_each):  # line 9
                for c in range(cols_each):
                    S[r, c] = zero
            for x in range(d_k):
                for r in range(rows_each):
                    for c in range(cols_each):
                        S[r, c] += Q_i[x, y + r] * K_j[x, z + c]
            for r in range(rows_each):
                for c in range(cols_each):
                    P_ij[z + c, y + r] = S[r, c]
            whole = not masked and all_low <= j_first and j_first + B_c <= all_high
            for r in range(rows_each):
                top = lowest
                for c in range(cols_each):
                    i, j, S_ij = i_first + y + r, j_first + z + c, lowest
                    if whole or allowed(band, terms, b, h, i, j):
                        S_ij = logit(band, terms, b, h, i, j, P_ij[z + c, y + r])
                    P_ij[z + c, y + r] = S_ij
                    top = max(top, S_ij)
                of_lanes[y + r, lane] = top  # line 10
            cuda.syncthreads()  # until every lane has told its maximum
            for r in range(rows_each):
                m_new = m[r]  # line 11
                for other in range(lanes):
                    m_new = max(m_new, of_lanes[y + r, other])
                old[r] = rescale(m[r], m_new, zero)
                l[r] = old[r] * l[r]
                for c in range(cols_each):
                    S_ij, weight = P_ij[z + c, y + r], forbidden
                    if S_ij != lowest:
                        weight = rescale(S_ij, m_new, zero)  # line 10, shifted by m_new at once
                        l[r] += weight
                        i, j = i_first + y + r, j_first + z + c
                        weight = dropped(terms, b, h, i, j, weight)
                    P_ij[z + c, y + r] = weight
                m[r] = m_new  # line 13
            cuda.syncthreads()  # until the weights are whole
            for r in range(rows_each):  # line 12
                for x in range(features_each):
                    O[r, x] = old[r] * O[r, x]
            if not odd:
                for c in range(B_c):
                    for r in range(rows_each):
                        for x in range(features_each):
                            O[r, x] += P_ij[c, y + r] * V_j[c, w + x]
            else:  # 0 · NaN is NaN: a forbidden cell does not read
                for c in range(B_c):
                    for r in range(rows_each):
                        if math.copysign(one, P_ij[c, y + r]) > zero:
                            for x in range(features_each):
                                O[r, x] += P_ij[c, y + r] * V_j[c, w + x]
        # lines 14 and 15
        cuda.syncthreads()
        for r in range(rows_each):
            of_lanes[y + r, lane] = l[r]
        cuda.syncthreads()
        for r in range(rows_each):  # line 16
            l_i = zero
            for other in range(lanes):
                l_i += of_lanes[y + r, other]
            old[r] = zero if l_i == zero else one / l_i
            i = i_first + y + r
            if i < n_q and lane == 0:
                results.logsumexp[b, h, i] = lowest if l_i == zero else m[r] + math.log(l_i)
        for r in range(rows_each):
            for x in range(features_each):
                if i_first + y + r < n_q and w + x < d_v:
                    results.output[b, h, i_first + y + r, w + x] = old[r] * O[r, x]

    return forward_tiles
