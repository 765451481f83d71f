// Products of float32 by three of TF32 each: a number is the sum of two of 11 bits and a rest below
// 2^-22 of it. The product of the two small parts is as small as the rest, and is left out.
#pragma once
#include "tiles.h"

constexpr int STEPS = FEATURES / 8;  // of line 9, by features

template <int COUNT>
struct Parts {
  u32 large[COUNT], small[COUNT];
};

// The large part is rounded to nearest; the small one has at most 13 bits, of which the last two are
// cut off. Where x is NaN, the small part is.
template <int COUNT>
DEVICE void split(Parts<COUNT>& parts, int which, float x) {
  parts.large[which] = (bits_of(x) + 0x1000) & ~0x1FFFu;
  parts.small[which] = bits_of(x - float_of(parts.large[which])) & ~0x1FFFu;
}

// C += A B, the smaller products first.
DEVICE void multiply_add(float (&c)[4], const Parts<4>& a, const Parts<4>& b, int first) {
  mma_m16n8k8(c, a.small, b.large[first], b.large[first + 1]);
  mma_m16n8k8(c, a.large, b.small[first], b.small[first + 1]);
  mma_m16n8k8(c, a.large, b.large[first], b.large[first + 1]);
}

// S += Q_i K_jᵀ, for the warp's rows (line 9). A chunk is 4 features: ldmatrix gives a lane what this
// mma wants, as it does for 16-bit numbers.
template <class Left>
DEVICE void multiply_keys(float (&S)[M_TILES][COLS / 8][4], Left left, u32 K_j, int lane) {
  const u32 keys = right_address(K_j, lane);
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    Parts<4> a[M_TILES];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) {
      u32 numbers[4];
      left(numbers, t, k);
#pragma unroll
      for (int e = 0; e < 4; e++) split(a[t], e, float_of(numbers[e]));
    }
#pragma unroll
    for (int n = 0; n < COLS / 16; n++) {
      u32 numbers[4];
      ldmatrix_x4(numbers, moved(keys, 16 * n, k));
      Parts<4> b;
#pragma unroll
      for (int e = 0; e < 4; e++) split(b, e, float_of(numbers[e]));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
        multiply_add(S[t][2 * n], a[t], b, 0);
        multiply_add(S[t][2 * n + 1], a[t], b, 2);
      }
    }
  }
}

// O += P_ij V_j (line 12). A lane has the weights of keys 2 t and 2 t + 1 of every 8, t = lane % 4, where
// the left operand wants columns t and t + 4: the keys are summed over in that order instead, and the
// rows of V_j are read so.
DEVICE void multiply_values(
    float (&O)[M_TILES][FEATURES / 8][4], const float (&P)[M_TILES][COLS / 8][4], u32 V_j, int lane) {
  const int key = lane % 4 * 2, word = lane / 4 % 4 * 4;
  const u32 first = chunk_address(V_j, key, lane / 16) + word;
  const u32 second = chunk_address(V_j, key + 1, lane / 16) + word;
#pragma unroll
  for (int k = 0; k < COLS / 8; k++) {
    Parts<4> a[M_TILES];
#pragma unroll
    for (int t = 0; t < M_TILES; t++) {
#pragma unroll
      for (int e = 0; e < 4; e++) split(a[t], e, P[t][k][e / 2 + e % 2 * 2]);
    }
#pragma unroll
    for (int n = 0; n < FEATURES / 8; n++) {
      Parts<4> b;
      split(b, 0, load_shared(moved(first, 8 * k, n)));
      split(b, 1, load_shared(moved(second, 8 * k, n)));
#pragma unroll
      for (int t = 0; t < M_TILES; t++) multiply_add(O[t][n], a[t], b, 0);
    }
  }
}

DEVICE void store_pair(Number* to, float x, float y) {
  to[0] = x;
  to[1] = y;
}
