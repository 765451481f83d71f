// What the two kernels of the backward pass share: the gradients of a cell, and rows of a result.
#pragma once
#include "again.h"
#if FLOAT32
#include "products32.h"
#else
#include "products16.h"
#endif

// Of one cell.
struct Gradient {
  float weight;   // P after dropout
  float added;    // of what is added to the logit
  float product;  // dX: of scale · q · k
};

// Lines 11 to 20 of FA1-ALG4, for a cell that may be read (OWN-BACKWARD1). L is the row's logsumexp, in
// bits; D its sum, less dL; the unit is as in forward.cu.
DEVICE Gradient gradient_of(const Job& job, const Place& at, int i, int j, float product, float dP,
                            float L, float D, float unit) {
  const float S = TERMS ? logit(job, at, i, j, product) : product;  // lines 11 and 12
  const float P = ex2(S * unit - L);                                // line 13
  const float kept = TERMS ? dropped(job, at, i, j, 1.0f) : 1.0f;   // line 14
  const float dS = P * (kept * dP - D);                             // lines 18 and 20
  const float dX = TERMS ? dS * bend(job, product, S) : dS;
  return {P * kept, TERMS && job.softcap_order == 2 ? dX : dS, dX};
}

// The lanes, four a row, of whose rows a number is not finite. Tensor cores multiply a forbidden cell's
// 0 with what stands beside it, and 0 · NaN is NaN (OWN-POISON1): such a row is made again.
DEVICE u32 odd_rows(const float (&C)[FEATURES / 8][4], int half, bool there) {
  float odd = 0.0f;
#pragma unroll
  for (int n = 0; n < FEATURES / 8; n++) odd += C[n][2 * half] * 0.0f + C[n][2 * half + 1] * 0.0f;
  return ballot(there && odd != 0.0f);
}

// A lane's features of a row, each times a factor.
DEVICE void store_row(
    const float (&C)[FEATURES / 8][4], int half, Number* to, int d, float factor, int lane) {
#pragma unroll
  for (int n = 0; n < FEATURES / 8; n++) {
    const int feature = 8 * n + lane % 4 * 2;
    if (feature < d) store_pair(to + feature, C[n][2 * half] * factor, C[n][2 * half + 1] * factor);
  }
}

// A row that all lanes of a warp share, lane x the features x, x + 32, ...
struct Shared {
  float sum[FEATURES / 32];
};

DEVICE void add_row(Shared& row, float weight, const Number* x, int d, int lane) {
#pragma unroll
  for (int n = 0; n < FEATURES / 32; n++) {
    if (32 * n + lane < d) row.sum[n] += weight * widen(read(x + 32 * n + lane));
  }
}

DEVICE void store_shared(const Shared& row, Number* to, int d, float factor, int lane) {
#pragma unroll
  for (int n = 0; n < FEATURES / 32; n++) {
    if (32 * n + lane < d) to[32 * n + lane] = narrowed(row.sum[n] * factor);
  }
}
