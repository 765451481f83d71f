"""Algorithm 4 by register tiles, in two kernels as `backward_rows` has it.

A block has a tile of its own, of queries or of keys, and walks over tiles of the other kind. A
thread has a small block of S_ij and of dP_ij in registers, makes weights and gradients of its cells
in shared memory, and then a small block of the products that are summed. As in the forward pass a
forbidden cell has the weight -0, and reads nothing where a tile holds a number that is not finite.
"""

from __future__ import annotations

import math
from typing import Any

from refattn_gpu.device import cuda, leaf
from refattn_gpu.numba_cuda.bound import (
    cell_rules,
    key_head,
    keys_seen,
    query_head,
    rows_seeing,
    steps,
)
from refattn_gpu.numba_cuda.loading import tile_loads
from refattn_gpu.numba_cuda.shapes import TileShape


def tile_products(real: Any, shape: TileShape) -> Any:
    """Return the products of two tiles that a thread keeps in registers.

    Returns:
        multiply: device function; C_rc = Σ_x own_xr walked_xc of this thread's rows and columns.
    """
    rows_each, cols_each, zero = shape.rows_each, shape.cols_each, real(0)

    @leaf
    def multiply(own, walked, d, y, z, into, C):
        for r in range(rows_each):
            for c in range(cols_each):
                C[r, c] = zero
        for x in range(d):
            for r in range(rows_each):
                for c in range(cols_each):
                    C[r, c] += own[x, y + r] * walked[x, z + c]
        for r in range(rows_each):
            for c in range(cols_each):
                into[z + c, y + r] = C[r, c]

    return multiply


def tile_sums(real: Any, shape: TileShape) -> Any:
    """Return the sum of weighted rows that a thread keeps in registers.

    Returns:
        add: device function; C_rx += Σ_c weights_cr walked_xc of this thread's rows and features,
            over the cells whose sign is not -0 if numbers are odd.
    """
    rows_each, features_each, lanes = shape.rows_each, shape.features_each, shape.lanes
    cols, zero, one = shape.cols, real(0), real(1)

    @leaf
    def add(weights, walked, signs, odd, y, lane, C):
        if not odd:
            for c in range(cols):
                for r in range(rows_each):
                    for x in range(features_each):
                        C[r, x] += weights[c, y + r] * walked[lane + x * lanes, c]
        else:  # 0 · NaN is NaN: a forbidden cell does not read
            for c in range(cols):
                for r in range(rows_each):
                    if math.copysign(one, signs[c, y + r]) > zero:
                        for x in range(features_each):
                            C[r, x] += weights[c, y + r] * walked[lane + x * lanes, c]

    return add


def backward_query_tiles(real: Any, shape: TileShape) -> Any:
    """Return the kernel of dQ by tiles of queries.

    Spec: FA1-ALG4 lines 6-21, OWN-BACKWARD1, OWN-POISON1.

        dQ_i = Σ_j scale · dX_ij K_j

    Args:
        real: NumPy's type of the format.
        shape: tiles, the block's own of queries, and the most features that fit.

    Returns:
        A function of (QueryGradients, Saved, Operands, Band, Terms), for b · h · ⌈n_q / B_r⌉
        blocks.
    """
    B_r, B_c, features, rows_each, cols_each, features_each, pad = shape  # line 2
    lanes, row_line, col_line = shape.lanes, B_r + pad, B_c + pad
    load_columns = tile_loads(real, shape.threads, features).load_columns
    multiply, add = tile_products(real, shape), tile_sums(real, shape)
    cell, zero, forbidden = cell_rules(real), real(0), real(-0.0)
    allowed, gradients = cell.allowed, cell.gradients

    def query_tiles(results, saved, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_q + B_r - 1) // B_r  # lines 3 and 4
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // heads
        h = cuda.blockIdx.x // tiles % heads
        i_first = (tiles - 1 - cuda.blockIdx.x % tiles) * B_r  # line 9: this block's tile
        g = key_head(h, heads, key_heads, band.tiled_heads)
        lane = thread % lanes
        y, z = thread // lanes * rows_each, lane * cols_each

        Q_i = cuda.shared.array((features, row_line), real)  # all tiles are transposed
        dO_i = cuda.shared.array((features, row_line), real)
        K_j = cuda.shared.array((features, col_line), real)
        V_j = cuda.shared.array((features, col_line), real)
        P_ij = cuda.shared.array((B_c, row_line), real)
        dX_ij = cuda.shared.array((B_c, row_line), real)
        C = cuda.local.array((rows_each, cols_each), real)
        dQ = cuda.local.array((rows_each, features_each), real)
        for r in range(rows_each):  # line 5
            for x in range(features_each):
                dQ[r, x] = zero
        d_slopes = cuda.local.array(rows_each, real)
        for r in range(rows_each):
            d_slopes[r] = zero
        load_columns(Q_i, operands.query, b, h, i_first, n_q - i_first, B_r, thread)  # line 10
        load_columns(dO_i, saved.d_output, b, h, i_first, n_q - i_first, B_r, thread)

        first = band.offsets[b] + i_first
        low, high, _, _ = keys_seen(
            band.left, band.right, first, B_r, min(n_k, band.key_lengths[b])
        )
        for j_first in range(low // B_c * B_c, high, B_c):  # line 6
            cuda.syncthreads()  # until every thread is done with the tile before
            odd = load_columns(K_j, operands.key, b, g, j_first, n_k - j_first, B_c, thread)
            load_columns(V_j, operands.value, b, g, j_first, n_k - j_first, B_c, thread)  # line 7
            odd = cuda.syncthreads_or(odd)  # until the tile is whole; is a key not finite?
            multiply(Q_i, K_j, d_k, y, z, P_ij, C)  # line 11
            multiply(dO_i, V_j, d_v, y, z, dX_ij, C)  # line 17
            for r in range(rows_each):
                for c in range(cols_each):
                    i, j = i_first + y + r, j_first + z + c
                    weight, d_product = forbidden, zero
                    if allowed(band, terms, b, h, i, j):
                        S, dP = P_ij[z + c, y + r], dX_ij[z + c, y + r]
                        L_i, D_i = saved.logsumexp[b, h, i], saved.dots[b, h, i]  # line 19
                        weight, d_added, d_product = gradients(
                            band, terms, b, h, i, j, S, dP, L_i, D_i
                        )  # lines 12 to 20
                        if terms.bias.size:
                            results.d_bias[b, h, i, j] = d_added
                        if terms.slopes.size:
                            step = steps(terms.distance, band.offsets[b] + i, j)
                            d_slopes[r] += d_added * real(step)
                    P_ij[z + c, y + r], dX_ij[z + c, y + r] = weight, d_product
            cuda.syncthreads()  # until the gradients of the cells are whole
            add(dX_ij, K_j, P_ij, odd, y, lane, dQ)  # line 21
        cuda.syncthreads()
        for r in range(rows_each):
            P_ij[lane, y + r] = d_slopes[r]
            for x in range(features_each):
                if i_first + y + r < n_q and lane + x * lanes < d_k:
                    results.d_query[b, h, i_first + y + r, lane + x * lanes] = dQ[r, x]
        cuda.syncthreads()
        for r in range(rows_each):
            if terms.slopes.size and lane == 0 and i_first + y + r < n_q:
                total = zero
                for other in range(lanes):
                    total += P_ij[other, y + r]
                results.d_slopes[b, h, i_first + y + r] = total

    return query_tiles


def backward_key_tiles(real: Any, shape: TileShape) -> Any:
    """Return the kernel of dK and dV by tiles of keys.

    Spec: FA1-ALG4 lines 6-24, OWN-BACKWARD1, OWN-GQA1, OWN-POISON1.

        dV_j = Σ_i P_ij dO_i,  dK_j = Σ_i scale · dX_ij Q_i, over all query heads that read it

    Args:
        real: NumPy's type of the format.
        shape: tiles, the block's own of keys, and the most features that fit.

    Returns:
        A function of (KeyGradients, Saved, Operands, Band, Terms), for b · h_k · ⌈n_k / B_c⌉
        blocks.
    """
    B_c, B_r, features, rows_each, cols_each, features_each, pad = shape  # line 2
    lanes, row_line, col_line = shape.lanes, B_r + pad, B_c + pad
    load_columns = tile_loads(real, shape.threads, features).load_columns
    multiply, add = tile_products(real, shape), tile_sums(real, shape)
    cell, zero, forbidden = cell_rules(real), real(0), real(-0.0)
    allowed, gradients = cell.allowed, cell.gradients

    def key_tiles(results, saved, operands, band, terms):
        n_q, d_k = operands.query.shape[2], operands.query.shape[3]
        n_k, d_v = operands.value.shape[2], operands.value.shape[3]
        heads, key_heads = operands.query.shape[1], operands.key.shape[1]
        tiles = (n_k + B_c - 1) // B_c  # lines 3 and 4
        thread = cuda.threadIdx.x
        b = cuda.blockIdx.x // tiles // key_heads
        g = cuda.blockIdx.x // tiles % key_heads
        j_first = cuda.blockIdx.x % tiles * B_c  # line 6: this block's tile
        lane = thread % lanes
        y, z = thread // lanes * rows_each, lane * cols_each

        K_j = cuda.shared.array((features, col_line), real)  # all tiles are transposed
        V_j = cuda.shared.array((features, col_line), real)
        Q_i = cuda.shared.array((features, row_line), real)
        dO_i = cuda.shared.array((features, row_line), real)
        P_ij = cuda.shared.array((B_r, col_line), real)
        dX_ij = cuda.shared.array((B_r, col_line), real)
        C = cuda.local.array((rows_each, cols_each), real)
        dK = cuda.local.array((rows_each, features_each), real)
        dV = cuda.local.array((rows_each, features_each), real)
        for r in range(rows_each):  # line 8
            for x in range(features_each):
                dK[r, x] = zero
                dV[r, x] = zero
        load_columns(K_j, operands.key, b, g, j_first, n_k - j_first, B_c, thread)  # line 7
        load_columns(V_j, operands.value, b, g, j_first, n_k - j_first, B_c, thread)

        n_valid = min(n_q, band.query_lengths[b])
        low, high = rows_seeing(band.left, band.right, band.offsets[b], n_valid, j_first, B_c)
        for member in range(heads // key_heads):
            h = query_head(member, g, heads, key_heads, band.tiled_heads)
            for i_first in range(low // B_r * B_r, high, B_r):  # line 9
                rows = n_q - i_first
                cuda.syncthreads()  # until every thread is done with the tile before
                odd = load_columns(Q_i, operands.query, b, h, i_first, rows, B_r, thread)
                odd |= load_columns(dO_i, saved.d_output, b, h, i_first, rows, B_r, thread)
                odd = cuda.syncthreads_or(odd)  # line 10; is a row not finite?
                multiply(K_j, Q_i, d_k, y, z, P_ij, C)  # line 11
                multiply(V_j, dO_i, d_v, y, z, dX_ij, C)  # line 17
                for r in range(rows_each):
                    for c in range(cols_each):
                        i, j = i_first + z + c, j_first + y + r
                        weight, d_product = forbidden, zero
                        if allowed(band, terms, b, h, i, j):
                            S, dP = P_ij[z + c, y + r], dX_ij[z + c, y + r]
                            L_i, D_i = saved.logsumexp[b, h, i], saved.dots[b, h, i]  # line 19
                            weight, _, d_product = gradients(
                                band, terms, b, h, i, j, S, dP, L_i, D_i
                            )  # lines 12 to 20
                        P_ij[z + c, y + r], dX_ij[z + c, y + r] = weight, d_product
                cuda.syncthreads()  # until the gradients of the cells are whole
                add(P_ij, dO_i, P_ij, odd, y, lane, dV)  # line 16
                add(dX_ij, Q_i, P_ij, odd, y, lane, dK)  # line 22
        # lines 23 and 25
        for r in range(rows_each):  # line 24
            for x in range(features_each):
                if j_first + y + r < n_k and lane + x * lanes < d_k:
                    results.d_key[b, g, j_first + y + r, lane + x * lanes] = dK[r, x]
                if j_first + y + r < n_k and lane + x * lanes < d_v:
                    results.d_value[b, g, j_first + y + r, lane + x * lanes] = dV[r, x]

    return key_tiles
