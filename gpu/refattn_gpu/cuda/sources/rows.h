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
#include "again.h"
#if FLOAT32
#include "products32.h"
#else
#include "products16.h"
#endif

#if SPLIT
#include "parts.h"
#else
// A row of a tile: query i of head at.h.
struct Query {
  Place at;
  int i;
};

// Row r of what the block's rows are counted in: here, the queries of one head.
DEVICE Query query_of(const Job&, const Place& at, int r) { return {at, r}; }
#endif

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
      if (TERMS && !SPLIT && job.sinks) {  // a logit that one lane of a row saw before any key (OWN-SINK1)
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
      // Both maxima are rounded once: a multiply-add would turn rows whose maximum stays by its own
      // rounding, in every tile anew (NUM-MODEL1).
      const float shift = shift_of(m_new, unit);
      old[t][half] = ex2(times(my.m[t][half], unit) - shift);
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

// Of line 12: O_i as the row's new maximum has it.
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

// Both, where no product is under way that adds to O_i.
DEVICE void to_weights(float (&S)[M_TILES][COLS / 8][4], Lines& my, float unit) {
  float old[M_TILES][2];
  to_weights(S, my, old, unit);
  rescale(my, old);
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
      const float shift = shift_of(my.m[t][half], unit);
      const float inverse = inverse_of(l);
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
      if (i < job.n_q && at.lane % 4 == 0) job.logsumexp[row] = logsumexp_of(shift, l);
#pragma unroll 1
      for (int k = 0; again; k++, again >>= 4) {
        const float its_shift = shuffle(shift, 4 * k), its_inverse = shuffle(inverse, 4 * k);
        const Query query = query_of(job, at, r - at.lane / 4 + k);
        if (again & 15) row_again<ex2>(job, query.at, query.i, its_shift, its_inverse, unit);
      }
    }
  }
}
