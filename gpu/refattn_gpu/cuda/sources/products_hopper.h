// Tiles as a Hopper's copies write and its products read them, and those products.
//
// A tile is panels of 64 features, and a row of a panel is 128 bytes: eight chunks of 16, permuted by XOR
// with the number of the row modulo 8. The copy of a box and the products both know this permutation
// ("128-byte swizzle"), which repeats every 8 rows: a panel begins at a multiple of 1024 bytes.
#pragma once
#include "hopper.h"
#include "products16.h"

using u64 = unsigned long long;

// How the launch tells where Q, K and V lie.
struct Maps {
  TensorMap query, key, value;
};

constexpr int GROUP = 64;  // rows of a warp group's product
constexpr int PANEL = 64, PANELS = FEATURES / PANEL;
constexpr u32 LINE = 128;        // bytes of a row of a panel
constexpr u32 EIGHT = 8 * LINE;  // bytes of what the permutation repeats

static_assert(ROWS == 16 * WARPS && ROWS % GROUP == 0 && FEATURES % PANEL == 0, "tile sizes");

// Where a matrix of a product begins in shared memory, bits 0 to 13, and how it goes on, bits 16 to 29 and
// 32 to 45, all in units of 16 bytes; 1 in bits 62 and 63 is the permutation of 128 bytes. The matrix of
// a step may begin at any chunk of the first of 8 rows: the bits for other rows, 49 to 51, stay 0.
DEVICE u64 descriptor(u32 from, u32 leading, u32 stride) {
  return (u64)(from >> 4 & 0x3FFF) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

// Rows of 16 features each, as Q_i and K_j are read: from 8 rows to the next 8 it is `stride`, and
// `leading` has no meaning.
DEVICE u64 rows_from(u32 tile) { return descriptor(tile, 16, EIGHT); }

// 16 rows of all features, as V_j is read: from a panel to the next it is `leading`, from 8 rows to the
// next 8 `stride`.
DEVICE u64 columns_from(u32 tile) { return descriptor(tile, COLS * LINE, EIGHT); }

// Begin S = Q_i K_jᵀ for a warp group's rows (line 9), a group of products.
DEVICE void begin_keys(float (&S)[1][COLS / 8][4], u32 Q, u32 K_j) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    const u32 panel = k / 4, within = k % 4 * 32;  // a step is 32 bytes of a row
    const u64 a = rows_from(Q + panel * ROWS * LINE + within);
    const u64 b = rows_from(K_j + panel * COLS * LINE + within);
    wgmma_shared<COLS, false>(&S[0][0][0], a, b, k > 0);
  }
  wgmma_commit();
}

// The weights, rounded to 16 bits, as the left operands of a product by steps of 16 keys.
DEVICE void round_weights(u32 (&P)[COLS / 16][4], const float (&S)[1][COLS / 8][4]) {
#pragma unroll
  for (int k = 0; k < COLS / 16; k++) left_of_weights(P[k], S[0], k);
}

// Begin O += P_ij V_j (line 12), a group of products.
DEVICE void begin_values(float (&O)[1][FEATURES / 8][4], const u32 (&P)[COLS / 16][4], u32 V_j) {
#pragma unroll
  for (int k = 0; k < COLS / 16; k++) {
    wgmma_registers<FEATURES, true>(&O[0][0][0], P[k], columns_from(V_j + 2 * k * EIGHT), true);
  }
  wgmma_commit();
}
