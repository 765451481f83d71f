// Lines 2 and 10 to 16 of Algorithm 1, for the rows of which a thread holds a part: what every forward
// kernel on tensor cores does between its products.
#pragma once
#include "tiles.h"

// A thread's rows of O_i, m_i and l_i.
struct Lines {
  float O[M_TILES][FEATURES / 8][4];
  float m[M_TILES][2], l[M_TILES][2];
};

// Line 2.
DEVICE void begin(Lines& my, const Job& job, const Place& at) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      my.m[t][half] = LOWEST;
      my.l[t][half] = 0.0f;
      if (TERMS && job.sinks) {  // a logit that one lane of a row saw before any key (OWN-SINK1)
        my.m[t][half] = read(job.sinks + at.h);
        my.l[t][half] = at.lane % 4 ? 0.0f : 1.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < FEATURES / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) my.O[t][n][e] = 0.0f;
    }
  }
}

// What stands between line 9 and line 10: logits of products, -∞ where a cell is forbidden.
DEVICE void to_logits(
    float (&S)[M_TILES][COLS / 8][4], const Job& job, const Place& at, int j_first) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row_of(at, t, half);
      const Span seen = keys_of_row(job, at.b, i);  // not held in registers from tile to tile
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const int j = j_first + 8 * n + at.lane % 4 * 2 + e % 2;
          if (j < seen.from || j >= seen.to) {
            S[t][n][e] = LOWEST;
          } else if (TERMS) {
            const bool open = allowed(job, at, i, j);
            S[t][n][e] = open ? logit(job, at, i, j, S[t][n][e]) : LOWEST;
          }
        }
      }
    }
  }
}

// Lines 10, 11 and 13, and of line 12 what O_i is to be multiplied by. S becomes P, not yet divided by l.
DEVICE void to_weights(
    float (&S)[M_TILES][COLS / 8][4], Lines& my, float (&old)[M_TILES][2], float unit) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float m_new = my.m[t][half];
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {  // line 10
        m_new = fmaxf(m_new, fmaxf(S[t][n][2 * half], S[t][n][2 * half + 1]));
      }
      m_new = fmaxf(m_new, shuffle_xor(m_new, 1));
      m_new = fmaxf(m_new, shuffle_xor(m_new, 2));  // line 11
      const float shift = m_new == LOWEST ? 0.0f : m_new * unit;  // -∞ - (-∞) is no number
      old[t][half] = ex2(my.m[t][half] * unit - shift);
      my.m[t][half] = m_new;  // line 13
      float l = old[t][half] * my.l[t][half];
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          S[t][n][e] = ex2(S[t][n][e] * unit - shift);  // line 10, shifted by m_new at once
          l += S[t][n][e];
        }
      }
      my.l[t][half] = l;
    }
  }
}

// Of line 12: O_i by the weights' new largest logit.
DEVICE void rescale(Lines& my, const float (&old)[M_TILES][2]) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int n = 0; n < FEATURES / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) my.O[t][n][e] *= old[t][e / 2];
    }
  }
}

DEVICE void drop(float (&P)[M_TILES][COLS / 8][4], const Job& job, const Place& at, int j_first) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = row_of(at, t, e / 2), j = j_first + 8 * n + at.lane % 4 * 2 + e % 2;
        if (i < job.n_q && j < job.n_k) P[t][n][e] = dropped(job, at, i, j, P[t][n][e]);
      }
    }
  }
}

// A row of the output by the keys that it may read, one after another, the features shared by the
// lanes. Tensor cores multiply the weight 0 of a forbidden cell with the value too, and 0 · NaN is NaN
// (OWN-POISON1): a row that is not finite is made again, so that a row of poison costs time and
// no other row anything.
DEVICE void row_again(
    const Job& job, const Place& at, int i, float shift, float inverse, float unit) {
  const Number* q = job.query.data + at.b * job.query.batch + at.h * job.query.head + i * job.query.row;
  const Number* K = job.key.data + at.b * job.key.batch + at.g * job.key.head;
  const Number* V = job.value.data + at.b * job.value.batch + at.g * job.value.head;
  const Span seen = keys_of_row(job, at.b, i);
  float O[FEATURES / 32];
#pragma unroll
  for (int x = 0; x < FEATURES / 32; x++) O[x] = 0.0f;
#pragma unroll 1
  for (int j = seen.from; j < seen.to; j++) {
    if (TERMS && !allowed(job, at, i, j)) continue;
    float S = product_of(q, K + j * job.key.row, job.d_k, at.lane);
    if (TERMS) S = logit(job, at, i, j, S);
    float P = ex2(S * unit - shift);
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

// Lines 14 to 16: O_i divided by l_i, and the logsumexp. Every lane of a row has the same m, and its
// own columns' part of l.
DEVICE void finish(Lines& my, const Job& job, const Place& at, float unit) {
  const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row_of(at, t, half);
      float l = my.l[t][half];
      l += shuffle_xor(l, 1);
      l += shuffle_xor(l, 2);
      const float shift = my.m[t][half] == LOWEST ? 0.0f : my.m[t][half] * unit;
      const float inverse = l == 0.0f ? 0.0f : 1.0f / l;  // OWN-EMPTY1
      float odd = 0.0f;  // NaN if a number of O_i is not finite
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {  // of line 12
        const float x = my.O[t][n][2 * half] *= inverse, y = my.O[t][n][2 * half + 1] *= inverse;
        odd += x * 0.0f + y * 0.0f;
      }
      u32 again = ballot(i < job.n_q && odd != 0.0f);  // four lanes a row
      const bool sound = (again >> at.lane / 4 * 4 & 15) == 0;
      Number* to = job.output + (head + i) * job.d_v;
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {  // line 15
        const int feature = 8 * n + at.lane % 4 * 2;
        if (sound && i < job.n_q && feature < job.d_v) {
          store_pair(to + feature, my.O[t][n][2 * half], my.O[t][n][2 * half + 1]);
        }
      }
      if (i < job.n_q && at.lane % 4 == 0) {  // OWN-LSE1
        job.logsumexp[head + i] = l == 0.0f ? LOWEST : shift * LN2 + logf(l);
      }
#pragma unroll 1
      for (int row = 0; again; row++, again >>= 4) {
        const float its_shift = shuffle(shift, 4 * row), its_inverse = shuffle(inverse, 4 * row);
        const int its_i = i - at.lane / 4 + row;
        if (again & 15) row_again(job, at, its_i, its_shift, its_inverse, unit);
      }
    }
  }
}
