"""Algorithm 1 with one thread a query row: the listing, line by line.

Three things differ from the listing, none of them in the result. The loops of lines 5 and 7 are
exchanged: a block of threads keeps one tile of queries and walks over the keys, so that O_i, l_i
and m_i stay in registers (lines 8 and 13 move nothing) and blocks need not wait for each other.
O_i is kept without its division by l_i, which line 12 takes back and makes anew at every step, and
is divided once at the end. A cell that the masks forbid holds -∞ in S_ij; its value is not read.
"""

from __future__ import annotations

import math
from typing import Any

from refattn_gpu.device import cuda
from refattn_gpu.numba_cuda.bound import cell_rules, key_head, keys_seen, rescale
from refattn_gpu.numba_cuda.loading import tile_loads
from refattn_gpu.numba_cuda.shapes import RowShape


def attention_rows(real: Any, shape: RowShape) -> Any:
    """Return the kernel for a format and a shape of tiles.

    Spec: FA1-ALG1 lines 1-16, FA1-S31, OWN-LSE1, OWN-SINK1, OWN-EMPTY1, OWN-POISON1.

    Args:
        real: NumPy's type of the format.
        shape: tiles and the most features that fit.

    Returns:
        A function of (Results, Operands, Band, Terms), for b · h · ⌈n_q / B_r⌉ blocks of B_r
        threads.
    """
    B_r, B_c, features = shape  # line 1
    cell = cell_rules(real)
    allowed, logit, dropped = cell.allowed, cell.logit, cell.dropped
    load_rows = tile_loads(real, B_r, features).load_rows
    lowest, zero = real(-math.inf), real(0)

    def forward_rows(results, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_q + B_r - 1) // B_r  # line 3
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // heads
        h = cuda.blockIdx.x // tiles % heads
        i_first = cuda.blockIdx.x % tiles * B_r  # lines 4 and 7: this block's tile of queries
        i = i_first + thread
        g = key_head(h, heads, key_heads, band.tiled_heads)

        K_j = cuda.shared.array((B_c, features), real)
        V_j = cuda.shared.array((B_c, features), real)
        Q_i = cuda.local.array(features, real)
        O_i = cuda.local.array(features, real)
        S_ij = cuda.local.array(B_c, real)
        m_i, l_i = lowest, zero  # line 2
        if terms.sinks.size:  # a sink is a logit that was seen before any key
            m_i, l_i = terms.sinks[h], real(1)
        for x in range(d_v):
            O_i[x] = zero
        if i < n_q:  # line 8
            for x in range(d_k):
                Q_i[x] = operands.query[b, h, i, x]

        first = band.offsets[b] + i_first
        low, high, _, _ = keys_seen(
            band.left, band.right, first, B_r, min(n_k, band.key_lengths[b])
        )
        for j_first in range(low // B_c * B_c, high, B_c):  # line 5
            keys = min(B_c, n_k - j_first)
            cuda.syncthreads()  # until every row is done with the tile before
            load_rows(K_j, operands.key, b, g, j_first, keys, B_c, thread)  # line 6
            load_rows(V_j, operands.value, b, g, j_first, keys, B_c, thread)
            cuda.syncthreads()  # until the tile is whole
            if i < n_q:
                m_tilde_ij = lowest
                for c in range(keys):  # line 9
                    S_ij[c] = lowest
                    if allowed(band, terms, b, h, i, j_first + c):
                        product = zero
                        for x in range(d_k):
                            product += Q_i[x] * K_j[c, x]
                        S_ij[c] = logit(band, terms, b, h, i, j_first + c, product)
                    m_tilde_ij = max(m_tilde_ij, S_ij[c])  # line 10
                m_new = max(m_i, m_tilde_ij)  # line 11
                old = rescale(m_i, m_new, zero)
                l_i = old * l_i
                for x in range(d_v):  # line 12
                    O_i[x] = old * O_i[x]
                for c in range(keys):
                    if S_ij[c] != lowest:
                        P_ij = rescale(S_ij[c], m_new, zero)  # line 10, shifted by m_new at once
                        l_i += P_ij
                        P_ij = dropped(terms, b, h, i, j_first + c, P_ij)
                        for x in range(d_v):
                            O_i[x] += P_ij * V_j[c, x]
                m_i = m_new  # line 13
        # lines 14 and 15
        if i < n_q:  # line 16
            empty = l_i == zero
            for x in range(d_v):
                results.output[b, h, i, x] = zero if empty else O_i[x] / l_i
            results.logsumexp[b, h, i] = lowest if empty else m_i + math.log(l_i)

    return forward_rows
