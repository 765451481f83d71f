// Products of 16-bit numbers: mma.m16n8k16, its sums float32.
#pragma once
#include "tiles.h"

constexpr int STEPS = FEATURES / 16;  // of line 9, by features

// S += Q_i K_jᵀ, for the warp's rows (line 9). The rows of K_j are the columns of the right operand.
template <class Left>
DEVICE void multiply_keys(float (&S)[M_TILES][COLS / 8][4], Left left, u32 K_j, int lane) {
  const u32 keys = right_address(K_j, lane);
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 a[M_TILES][4];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) left(a[t], t, k);
#pragma unroll
    for (int n = 0; n < COLS / 16; n++) {
      u32 b[4];
      ldmatrix_x4(b, moved(keys, 16 * n, k));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
        mma_m16n8k16(S[t][2 * n], a[t], b[0], b[1]);
        mma_m16n8k16(S[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// The weights of 16 keys lie in a thread's registers as the left operand wants them, once they are
// rounded to 16 bits.
DEVICE void left_of_weights(u32 (&a)[4], const float (&P)[COLS / 8][4], int k) {
  a[0] = pack(P[2 * k][0], P[2 * k][1]);
  a[1] = pack(P[2 * k][2], P[2 * k][3]);
  a[2] = pack(P[2 * k + 1][0], P[2 * k + 1][1]);
  a[3] = pack(P[2 * k + 1][2], P[2 * k + 1][3]);
}

// O += P_ij V_j (line 12); V_j is read transposed.
DEVICE void multiply_values(
    float (&O)[M_TILES][FEATURES / 8][4], const float (&P)[M_TILES][COLS / 8][4], u32 V_j, int lane) {
  const u32 values = left_address(V_j, 0, lane);
#pragma unroll
  for (int k = 0; k < COLS / 16; k++) {
    u32 a[M_TILES][4];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) left_of_weights(a[t], P[t], k);
#pragma unroll
    for (int n = 0; n < FEATURES / 16; n++) {
      u32 b[4];
      ldmatrix_x4_trans(b, moved(values, 16 * k, n));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
        mma_m16n8k16(O[t][2 * n], a[t], b[0], b[1]);
        mma_m16n8k16(O[t][2 * n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

DEVICE void store_pair(Number* to, float x, float y) { *(u32*)to = pack(x, y); }
