"""Algorithm 4 with one thread a row, in two kernels, so that no two threads add to one number.

The listing adds to dQ_i in its inner loop and to dK_j, dV_j in its outer one. Here one kernel gives
every query row a thread and walks over the keys, another gives every key row one and walks over the
queries; each makes S_ij, P_ij and dS_ij again. That is two products of five more, and the same bits
in every run, without atomic additions.
"""

from __future__ import annotations

from typing import Any

from refattn_gpu.device import cuda
from refattn_gpu.numba_cuda.bound import (
    cell_rules,
    key_head,
    keys_seen,
    query_head,
    rows_seeing,
    steps,
)
from refattn_gpu.numba_cuda.loading import tile_loads
from refattn_gpu.numba_cuda.shapes import RowShape


def backward_dots(real: Any, threads: int) -> Any:
    """Return the kernel of the sums D, a thread a query row.

    Spec: FA1-ALG4 line 19, OWN-BACKWARD1.

        D_i = Σ_x dO_ix O_ix - dL_i
    """
    zero = real(0)

    def row_dots(results, rows):
        heads, n_q = rows.output.shape[1], rows.output.shape[2]
        tiles = (n_q + threads - 1) // threads
        b = cuda.blockIdx.x // tiles // heads
        h = cuda.blockIdx.x // tiles % heads
        i = cuda.blockIdx.x % tiles * threads + cuda.threadIdx.x
        if i < n_q:
            D_i = zero
            for x in range(rows.output.shape[3]):
                # the output of an empty row is 0, and its gradient is not read
                if rows.output[b, h, i, x] != zero:
                    D_i += rows.d_output[b, h, i, x] * rows.output[b, h, i, x]
            results.dots[b, h, i] = D_i - rows.d_logsumexp[b, h, i]

    return row_dots


def backward_query_rows(real: Any, shape: RowShape) -> Any:
    """Return the kernel of dQ, a thread a query row.

    Spec: FA1-ALG4 lines 6-21, OWN-BACKWARD1, OWN-POISON1.

        dQ_i = Σ_j scale · dX_ij K_j

    Args:
        real: NumPy's type of the format.
        shape: tiles and the most features that fit.

    Returns:
        A function of (QueryGradients, Saved, Operands, Band, Terms), for b · h · ⌈n_q / B_r⌉
        blocks of B_r threads.
    """
    B_r, B_c, features = shape  # line 2
    load_rows = tile_loads(real, B_r, features).load_rows
    cell, zero = cell_rules(real), real(0)
    allowed, gradients = cell.allowed, cell.gradients

    def query_rows(results, saved, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_q + B_r - 1) // B_r  # lines 3 and 4
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // heads
        h = cuda.blockIdx.x // tiles % heads
        i_first = cuda.blockIdx.x % tiles * B_r  # line 9: this block's tile of queries
        i = i_first + thread
        g = key_head(h, heads, key_heads, band.tiled_heads)

        K_j = cuda.shared.array((B_c, features), real)
        V_j = cuda.shared.array((B_c, features), real)
        Q_i = cuda.local.array(features, real)
        dO_i = cuda.local.array(features, real)
        dQ_i = cuda.local.array(features, real)
        d_slope = zero
        for x in range(d_k):  # lines 5 and 10
            dQ_i[x] = zero
            if i < n_q:
                Q_i[x] = operands.query[b, h, i, x]
        for x in range(d_v):
            if i < n_q:
                dO_i[x] = saved.d_output[b, h, i, x]

        first = band.offsets[b] + i_first
        low, high, _, _ = keys_seen(
            band.left, band.right, first, B_r, min(n_k, band.key_lengths[b])
        )
        for j_first in range(low // B_c * B_c, high, B_c):  # line 6
            keys = min(B_c, n_k - j_first)
            cuda.syncthreads()  # until every row is done with the tile before
            load_rows(K_j, operands.key, b, g, j_first, keys, B_c, thread)  # line 7
            load_rows(V_j, operands.value, b, g, j_first, keys, B_c, thread)
            cuda.syncthreads()  # until the tile is whole
            for c in range(keys):
                j = j_first + c
                if allowed(band, terms, b, h, i, j):
                    product = dP = zero
                    for x in range(d_k):  # line 11
                        product += Q_i[x] * K_j[c, x]
                    for x in range(d_v):  # line 17
                        dP += dO_i[x] * V_j[c, x]
                    L_i, D_i = saved.logsumexp[b, h, i], saved.dots[b, h, i]  # line 19
                    _, d_added, d_product = gradients(
                        band, terms, b, h, i, j, product, dP, L_i, D_i
                    )  # lines 12 to 20
                    for x in range(d_k):  # line 21
                        dQ_i[x] += d_product * K_j[c, x]
                    if terms.bias.size:
                        results.d_bias[b, h, i, j] = d_added
                    if terms.slopes.size:
                        d_slope += d_added * real(steps(terms.distance, band.offsets[b] + i, j))
        if i < n_q:
            for x in range(d_k):
                results.d_query[b, h, i, x] = dQ_i[x]
            if terms.slopes.size:
                results.d_slopes[b, h, i] = d_slope

    return query_rows


def backward_key_rows(real: Any, shape: RowShape) -> Any:
    """Return the kernel of dK and dV, a thread a key row.

    Spec: FA1-ALG4 lines 6-24, OWN-BACKWARD1, OWN-GQA1, OWN-POISON1.

        dV_j = Σ_i P_ij dO_i,  dK_j = Σ_i scale · dX_ij Q_i, over all query heads that read it

    Args:
        real: NumPy's type of the format.
        shape: tiles, the block's own of keys, and the most features that fit.

    Returns:
        A function of (KeyGradients, Saved, Operands, Band, Terms), for b · h_k · ⌈n_k / B_c⌉
        blocks of B_c threads.
    """
    B_c, B_r, features = shape  # line 2
    load_rows = tile_loads(real, B_c, features).load_rows
    cell, zero = cell_rules(real), real(0)
    allowed, gradients = cell.allowed, cell.gradients

    def key_rows(results, saved, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_k + B_c - 1) // B_c  # lines 3 and 4
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // key_heads
        g = cuda.blockIdx.x // tiles % key_heads
        j_first = cuda.blockIdx.x % tiles * B_c  # line 6: this block's tile of keys
        j = j_first + thread

        Q_i = cuda.shared.array((B_r, features), real)
        dO_i = cuda.shared.array((B_r, features), real)
        K_j = cuda.local.array(features, real)
        V_j = cuda.local.array(features, real)
        dK_j = cuda.local.array(features, real)
        dV_j = cuda.local.array(features, real)
        for x in range(d_k):  # lines 7 and 8
            dK_j[x] = zero
            if j < n_k:
                K_j[x] = operands.key[b, g, j, x]
        for x in range(d_v):
            dV_j[x] = zero
            if j < n_k:
                V_j[x] = operands.value[b, g, j, x]

        n_valid = min(n_q, band.query_lengths[b])
        low, high = rows_seeing(band.left, band.right, band.offsets[b], n_valid, j_first, B_c)
        for member in range(heads // key_heads):
            h = query_head(member, g, heads, key_heads, band.tiled_heads)
            for i_first in range(low // B_r * B_r, high, B_r):  # line 9
                rows = min(B_r, n_q - i_first)
                cuda.syncthreads()  # until every row is done with the tile before
                load_rows(Q_i, operands.query, b, h, i_first, rows, B_r, thread)  # line 10
                load_rows(dO_i, saved.d_output, b, h, i_first, rows, B_r, thread)
                cuda.syncthreads()  # until the tile is whole
                for r in range(rows):
                    i = i_first + r
                    if j < n_k and allowed(band, terms, b, h, i, j):
                        product = dP = zero
                        for x in range(d_k):  # line 11
                            product += Q_i[r, x] * K_j[x]
                        for x in range(d_v):  # line 17
                            dP += dO_i[r, x] * V_j[x]
                        L_i, D_i = saved.logsumexp[b, h, i], saved.dots[b, h, i]  # line 19
                        weight, _, d_product = gradients(
                            band, terms, b, h, i, j, product, dP, L_i, D_i
                        )  # lines 12 to 20
                        for x in range(d_v):  # line 16
                            dV_j[x] += weight * dO_i[r, x]
                        for x in range(d_k):  # line 22
                            dK_j[x] += d_product * Q_i[r, x]
        # lines 23 and 25
        if j < n_k:  # line 24
            for x in range(d_k):
                results.d_key[b, g, j, x] = dK_j[x]
            for x in range(d_v):
                results.d_value[b, g, j, x] = dV_j[x]

    return key_rows
