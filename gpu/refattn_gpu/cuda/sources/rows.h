// What a warp does with its rows of O_i, l_i and m_i between two products, in every forward kernel: lines
// 2, 10 to 13 and 15 of Algorithm 1 (FA1-ALG1).
//
// Weights are powers of 2: e^(S - m) = 2^(S·unit - m·unit), one multiply-add and one ex2 a cell. S is
// q · k and the unit scale·log₂e where a product needs nothing but the scale (TERMS is 0); where it needs
// more, S is the logit and the unit log₂e.
//
// A thread has, of every 8 columns, columns 2 (lane % 4) and the next, in rows lane / 4 and that + 8:
// four lanes share a row, and tell each other its maximum by shuffles.
#pragma once
#if FLOAT32
#include "products32.h"
#else
#include "products16.h"
#endif

// A row of a tile: query i of head at.h.
struct Query {
  Place at;
  int i;
};

// Row r of what the block's rows are counted in: here, the queries of one head.
DEVICE Query query_of(const Job&, const Place& at, int r) { return {at, r}; }

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
        my.m[t][half] = read(job.sinks + query_of(job, at, row_of(at, t, half)).at.h);
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
      const auto [its, i] = query_of(job, at, row_of(at, t, half));
      const Span seen = keys_of_row(job, at.b, i);  // not held in registers from tile to tile
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const int j = j_first + 8 * n + at.lane % 4 * 2 + e % 2;
          if (j < seen.from || j >= seen.to) {
            S[t][n][e] = LOWEST;
          } else if (TERMS) {
            const bool open = allowed(job, its, i, j);
            S[t][n][e] = open ? logit(job, its, i, j, S[t][n][e]) : LOWEST;
          }
        }
      }
    }
  }
}

// Lines 10, 11 and 13, and of line 12 what O_i is multiplied by. S becomes P, not yet divided by l.
DEVICE void to_weights(float (&S)[M_TILES][COLS / 8][4], Lines& my, float unit) {
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
      // Both maxima are rounded once: a multiply-add would turn rows whose maximum stays by its own
      // rounding, in every tile anew (NUM-MODEL1). -∞ - (-∞) is no number.
      const float shift = m_new == LOWEST ? 0.0f : times(m_new, unit);
      const float old = ex2(times(my.m[t][half], unit) - shift);
      my.m[t][half] = m_new;  // line 13
      float l = old * my.l[t][half];
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          S[t][n][e] = ex2(S[t][n][e] * unit - shift);  // line 10, shifted by m_new at once
          l += S[t][n][e];
        }
      }
      my.l[t][half] = l;
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {  // line 12
        my.O[t][n][2 * half] *= old;
        my.O[t][n][2 * half + 1] *= old;
      }
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
        const auto [its, i] = query_of(job, at, row_of(at, t, e / 2));
        const int j = j_first + 8 * n + at.lane % 4 * 2 + e % 2;
        if (i < job.n_q && j < job.n_k) P[t][n][e] = dropped(job, its, i, j, P[t][n][e]);
      }
    }
  }
}

// A row of the output by the keys that it may read, one after another, the features shared by the
// lanes. Tensor cores multiply the weight 0 of a forbidden cell with the value too, and 0 · NaN is NaN
// (OWN-POISON1): a row that is not finite is made again, so that a row of poison costs time and
// no other row anything.
DEVICE void row_again(const Job& job, const Query& query, float shift, float inverse, float unit) {
  const auto& [at, i] = query;
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
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row_of(at, t, half);
      const auto [its, i] = query_of(job, at, r);
      const i64 row = ((i64)its.b * job.heads + its.h) * job.n_q + i;
      float l = my.l[t][half];
      l += shuffle_xor(l, 1);
      l += shuffle_xor(l, 2);
      const float shift = my.m[t][half] == LOWEST ? 0.0f : times(my.m[t][half], unit);
      const float inverse = l == 0.0f ? 0.0f : 1.0f / l;  // OWN-EMPTY1
      float odd = 0.0f;  // NaN if a number of O_i is not finite
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {  // of line 12
        const float x = my.O[t][n][2 * half] *= inverse, y = my.O[t][n][2 * half + 1] *= inverse;
        odd += x * 0.0f + y * 0.0f;
      }
      u32 again = ballot(i < job.n_q && odd != 0.0f);  // four lanes a row
      const bool sound = (again >> at.lane / 4 * 4 & 15) == 0;
      Number* to = job.output + row * job.d_v;
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {  // line 15
        const int feature = 8 * n + at.lane % 4 * 2;
        if (sound && i < job.n_q && feature < job.d_v) {
          store_pair(to + feature, my.O[t][n][2 * half], my.O[t][n][2 * half + 1]);
        }
      }
      if (i < job.n_q && at.lane % 4 == 0) {  // OWN-LSE1
        job.logsumexp[row] = l == 0.0f ? LOWEST : shift * LN2 + logf(l);
      }
#pragma unroll 1
      for (int k = 0; again; k++, again >>= 4) {
        const float its_shift = shuffle(shift, 4 * k), its_inverse = shuffle(inverse, 4 * k);
        const Query query = query_of(job, at, r - at.lane / 4 + k);
        if (again & 15) row_again(job, query, its_shift, its_inverse, unit);
      }
    }
  }
}
