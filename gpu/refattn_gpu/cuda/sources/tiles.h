// Tiles of 16-bit numbers in shared memory, and products of them on tensor cores.
//
// A row of a tile is FEATURES / 8 chunks of 16 bytes. ldmatrix reads one chunk of each of 8 rows at
// once: if chunk c of every row lay below chunk c of the row before, all 8 would be in the same
// banks, and the read would take 8 turns. So the chunks of a row are permuted by XOR with its number
// ("swizzle"), which puts the 8 into different banks.
#pragma once
#include "cells.h"

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = FEATURES / 8;
constexpr int M_TILES = ROWS / WARPS / 16;  // tiles of 16 rows that a warp has
constexpr int PERMUTED = CHUNKS < 8 ? CHUNKS : 8;
constexpr u32 Q_BYTES = ROWS * FEATURES * 2, K_BYTES = COLS * FEATURES * 2;
constexpr u32 STAGE_BYTES = 2 * K_BYTES;  // K_j and V_j
constexpr u32 SHARED_BYTES = Q_BYTES + 2 * STAGE_BYTES;

static_assert(ROWS % (16 * WARPS) == 0 && COLS % 16 == 0 && FEATURES % 32 == 0, "tile sizes");

DEVICE u32 chunk_address(u32 tile, int row, int chunk) {
  const int key = row / (8 / PERMUTED) % PERMUTED;
  return tile + (row * CHUNKS + (chunk ^ key)) * 16;
}

// Begin to copy rows first, ..., first + COUNT - 1 of a head, every thread its share; zeros stand
// for rows at or beyond `rows` and for features at or beyond d, whose memory is not read.
template <int COUNT>
DEVICE void copy_tile(u32 tile, const u16* head, i64 stride, int first, int rows, int d) {
#pragma unroll
  for (int k = 0; k < (COUNT * CHUNKS + THREADS - 1) / THREADS; k++) {
    const int which = k * THREADS + thread_index();
    const int row = which / CHUNKS, chunk = which % CHUNKS;
    if (COUNT * CHUNKS % THREADS && row >= COUNT) break;
    const bool there = first + row < rows && 8 * chunk < d;
    const u16* from = there ? head + (first + row) * stride + 8 * chunk : head;
    cp_async_16(chunk_address(tile, row, chunk), from, there);
  }
}

// Fragments of 16 rows and 16 features of Q_i: the left operand of mma.m16n8k16.
DEVICE void load_left(u32 (&a)[4], u32 tile, int row, int k, int lane) {
  ldmatrix_x4(a, chunk_address(tile, row + lane % 16, 2 * k + lane / 16));
}

// S += Q_i K_jᵀ, for the warp's rows (line 9). The rows of K_j are the columns of the right operand.
template <class Left>
DEVICE void multiply_keys(float (&S)[M_TILES][COLS / 8][4], Left left, u32 K_j, int lane) {
#pragma unroll
  for (int k = 0; k < FEATURES / 16; k++) {
    u32 a[M_TILES][4];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) left(a[t], t, k);
#pragma unroll
    for (int n = 0; n < COLS / 16; n++) {
      u32 b[4];
      const int key = 16 * n + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(b, chunk_address(K_j, key, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
        mma_m16n8k16(S[t][2 * n], a[t], b[0], b[1]);
        mma_m16n8k16(S[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// O += P_ij V_j (line 12). The weights of 16 keys lie in a thread's registers as the left operand
// wants them, once they are rounded to 16 bits; V_j is read transposed.
DEVICE void multiply_values(
    float (&O)[M_TILES][FEATURES / 8][4], const float (&P)[M_TILES][COLS / 8][4], u32 V_j, int lane) {
#pragma unroll
  for (int k = 0; k < COLS / 16; k++) {
    u32 a[M_TILES][4];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) {
      a[t][0] = pack(P[t][2 * k][0], P[t][2 * k][1]);
      a[t][1] = pack(P[t][2 * k][2], P[t][2 * k][3]);
      a[t][2] = pack(P[t][2 * k + 1][0], P[t][2 * k + 1][1]);
      a[t][3] = pack(P[t][2 * k + 1][2], P[t][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < FEATURES / 16; n++) {
      u32 b[4];
      ldmatrix_x4_trans(b, chunk_address(V_j, 16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
        mma_m16n8k16(O[t][2 * n], a[t], b[0], b[1]);
        mma_m16n8k16(O[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}
