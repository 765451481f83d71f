// What ends a row, whatever multiplied it.
#pragma once
#include "cells.h"

// What a row's logits are shifted by, in bits; -∞ - (-∞) is no number.
DEVICE float shift_of(float m, float unit) { return m == LOWEST ? 0.0f : times(m, unit); }

DEVICE float inverse_of(float l) { return l == 0.0f ? 0.0f : 1.0f / l; }  // OWN-EMPTY1

// OWN-LSE1
DEVICE float logsumexp_of(float shift, float l) {
  return l == 0.0f ? LOWEST : shift * LN2 + logf(l);
}

// A number of the output.
#if FLOAT32
DEVICE Number narrowed(float x) { return x; }
#else
DEVICE Number narrowed(float x) { return (Number)pack(x, 0.0f); }
#endif

// A row of the output by the keys that it may read, one after another, the features shared by the
// lanes. A product multiplies the weight 0 of a forbidden cell with the value too, and 0 · NaN is NaN
// (OWN-POISON1): a row that is not finite is made again, so that a row of poison costs time and
// no other row anything. POWER is the kernel's own power of 2.
template <float (*POWER)(float)>
DEVICE void row_again(
    const Job& job, const Place& at, int i, float shift, float inverse, float unit) {
  const Number* q = row_at(job.query, at.b, at.h, i);
  const Number* K = row_at(job.key, at.b, at.g, 0);
  const Number* V = row_at(job.value, at.b, at.g, 0);
  const Span seen = keys_of_row(job, at.b, i);
  float O[FEATURES / 32];
#pragma unroll
  for (int x = 0; x < FEATURES / 32; x++) O[x] = 0.0f;
#pragma unroll 1
  for (int j = seen.from; j < seen.to; j++) {
    if (TERMS && !allowed(job, at, i, j)) continue;
    float S = product_of(q, K + j * job.key.row, job.d_k, at.lane);
    if (TERMS) S = logit(job, at, i, j, S);
    float P = POWER(S * unit - shift);
    if (TERMS) P = dropped(job, at, i, j, P);
#pragma unroll
    for (int x = 0; x < FEATURES / 32; x++) {
      if (32 * x + at.lane < job.d_v) O[x] += P * widen(read(V + j * job.value.row + 32 * x + at.lane));
    }
  }
  Number* to = job.output + (((i64)at.b * job.heads + at.h) * job.n_q + i) * job.d_v;
#pragma unroll
  for (int x = 0; x < FEATURES / 32; x++) {
    if (32 * x + at.lane < job.d_v) to[32 * x + at.lane] = narrowed(O[x] * inverse);
  }
}
