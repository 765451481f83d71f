// Algorithm 1 (FA1-ALG1) by multiply-adds of float32, without tensor cores; line numbers are the listing's.
//
// A block walks over keys as in forward.cu. Every multiply-add of a product is one fma, rounded once, and
// nothing below the normal range is flushed to zero: neither numbers nor weights.
//
// 1. Eight lanes share a row, where the operands of mma ask for four: a lane is one of 4 lines and of 8
//    columns. A thread has S_ij of rows line, line + 4, ... and keys column, column + 8, ..., and O_i of
//    the same rows and of chunks column, column + 8, ... of four features. Every number that it reads meets
//    4 or 8 others, and all is read by chunks along the features, as it lies.
// 2. A lane and its neighbour have one column, a lane and its second neighbour one line. Whatever they
//    read, pairs of lanes ask for the same chunk, which a device may serve at once.
// 3. There is one stage: V_j travels while S is made, and K_j of the next tile while O_i is.
// 4. Weights pass from lane to lane through shared memory, 32 keys at a time. No other warp sees them.
#include "again.h"
#include "chunks.h"
#include "tiles.h"

constexpr int ACROSS = 8;                   // lanes that share a row: columns
constexpr int DOWN = 4;                     // lines
constexpr int LINES = ROWS / WARPS / DOWN;  // rows of a thread
constexpr int KEYS = COLS / ACROSS;         // keys of a thread in a tile
constexpr int PARTS = CHUNKS / ACROSS;      // chunks of a row of O_i that a thread has
constexpr u32 LINE_BYTES = CHUNKS * 16;     // of a row of a tile

// As registers allow: chunks of features that S reads beforehand, and parts of O that are summed at once.
constexpr int AHEAD = LINES == 8 ? 1 : 2, TOGETHER = PARTS == 8 ? 2 : PARTS;

static_assert(COLS % (4 * ACROSS) == 0 && WEIGHT_BYTES == 16 * ACROSS, "weights pass by four");

// A thread's rows of O_i, m_i and l_i.
struct Lines {
  float O[LINES][PARTS][4];
  float m[LINES], l[LINES];
};

DEVICE int line_of(int lane) { return lane / 16 * 2 + lane % 2; }
DEVICE int column_of(int lane) { return lane / 2 % ACROSS; }

DEVICE int own_row(const Place& at, int r) {
  return at.i_first + at.warp * (ROWS / WARPS) + line_of(at.lane) + DOWN * r;
}

// The largest or the sum over the lanes of a row.
template <class Combine>
DEVICE float over_row(float x, Combine combine) {
#pragma unroll
  for (int bits = 2; bits < 2 * ACROSS; bits *= 2) x = combine(x, shuffle_xor(x, bits));
  return x;
}

// Line 2.
DEVICE void begin(Lines& my, const Job& job, const Place& at) {
#pragma unroll
  for (int r = 0; r < LINES; r++) {
    my.m[r] = LOWEST;
    my.l[r] = 0.0f;
    if (TERMS && job.sinks) {  // a logit that one lane of a row saw before any key (OWN-SINK1)
      my.m[r] = read(job.sinks + at.h);
      my.l[r] = column_of(at.lane) ? 0.0f : 1.0f;
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
#pragma unroll
      for (int e = 0; e < 4; e++) my.O[r][p][e] = 0.0f;
    }
  }
}

// S = Q_i K_jᵀ (line 9), by chunks of four features. Q and K are where the lane's first row and key begin;
// a row 4 further lies permuted by 4 chunks more, and one 8 further as it does.
DEVICE void multiply_keys(float (&S)[LINES][KEYS], u32 Q, u32 K) {
#pragma unroll AHEAD
  for (int c = 0; c < CHUNKS; c++) {
    float q[LINES][4];
#pragma unroll
    for (int r = 0; r < LINES; r++) {
      load_chunk(q[r], (Q ^ 16 * c ^ r % 2 * 64) + r * DOWN * LINE_BYTES);
    }
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
      float k[4];
      load_chunk(k, (K ^ 16 * c) + n * ACROSS * LINE_BYTES);
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int r = 0; r < LINES; r++) S[r][n] = multiply_add(q[r][e], k[e], S[r][n]);
      }
    }
  }
}

// Where the weights of a lane's first row begin, 8 chunks; no other warp sees them. Rows of odd number lie
// permuted by half a row: lanes of both parities read, or write, at once.
DEVICE u32 weights_of(u32 weights, int lane) {
  return weights + line_of(lane) * WEIGHT_BYTES + lane % 2 * 64;
}

// Four keys of every row of a thread, to its own chunks.
DEVICE void put_four(const float (&P)[LINES][KEYS], int half, u32 own) {
#pragma unroll
  for (int r = 0; r < LINES; r++) {
    const float four[4] = {P[r][4 * half], P[r][4 * half + 1], P[r][4 * half + 2], P[r][4 * half + 3]};
    store_chunk(own + r * DOWN * WEIGHT_BYTES, four);
  }
}

// Every cell of a thread becomes cell(number, i, j). Four keys of a row at a time pass through the thread's
// own chunk of shared memory: there a loop may count rows, which among registers it may not, and what a
// cell takes stands in the code 4 times, and not up to 64.
template <class Cell>
DEVICE void by_cell(
    float (&S)[LINES][KEYS], const Place& at, int j_first, u32 weights, Cell cell) {
  const u32 own = weights_of(weights, at.lane) ^ 16 * column_of(at.lane);
#pragma unroll
  for (int half = 0; half < KEYS / 4; half++) {
    put_four(S, half, own);
#pragma unroll 1
    for (int r = 0; r < LINES; r++) {
      const int i = own_row(at, r), j = j_first + 32 * half + column_of(at.lane);
      float four[4];
      load_chunk(four, own + r * DOWN * WEIGHT_BYTES);
#pragma unroll
      for (int e = 0; e < 4; e++) four[e] = cell(four[e], i, j + ACROSS * e);
      store_chunk(own + r * DOWN * WEIGHT_BYTES, four);
    }
#pragma unroll
    for (int r = 0; r < LINES; r++) {
      float four[4];
      load_chunk(four, own + r * DOWN * WEIGHT_BYTES);
#pragma unroll
      for (int e = 0; e < 4; e++) S[r][4 * half + e] = four[e];
    }
  }
}

// What stands between line 9 and line 10: the logit of a product, -∞ where the cell is forbidden.
DEVICE float to_logit(const Job& job, const Place& at, float product, int i, int j) {
  const Span seen = keys_of_row(job, at.b, i);
  if (j < seen.from || j >= seen.to || (TERMS && !allowed(job, at, i, j))) return LOWEST;
  return TERMS ? logit(job, at, i, j, product) : product;
}

// Lines 10, 11 and 13, and of line 12 what O_i is multiplied by: old. S becomes P, not yet divided by l.
DEVICE void to_weights(float (&S)[LINES][KEYS], Lines& my, float (&old)[LINES], float unit) {
#pragma unroll
  for (int r = 0; r < LINES; r++) {
    float m_new = my.m[r], l = 0.0f;
#pragma unroll
    for (int n = 0; n < KEYS; n++) m_new = fmaxf(m_new, S[r][n]);  // line 10
    m_new = over_row(m_new, fmaxf);                                // line 11
    const float shift = shift_of(m_new, unit);
    old[r] = power(times(my.m[r], unit) - shift);
    my.m[r] = m_new;  // line 13
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
      S[r][n] = power(multiply_add(S[r][n], unit, -shift));  // line 10, shifted by m_new at once
      l += S[r][n];
    }
    my.l[r] = multiply_add(my.l[r], old[r], l);  // line 11
  }
}

// O = old O + P_ij V_j (line 12), 32 keys at a time. Of a row's 32 weights a lane has 4, and needs all. Chunk c
// holds those of keys c, c + 8, c + 16 and c + 24, and the keys are summed over in that order, by
// themselves, before their sum is added: what was summed over n keys is rounded n / 32 times, not n.
DEVICE void multiply_values(float (&O)[LINES][PARTS][4], const float (&P)[LINES][KEYS],
                            const float (&old)[LINES], u32 V, u32 weights, int lane) {
  const u32 row = weights_of(weights, lane);
#pragma unroll
  for (int half = 0; half < KEYS / 4; half++) {
    if (half) warp_barrier();  // what is overwritten was read
    put_four(P, half, row ^ 16 * column_of(lane));
    warp_barrier();
#pragma unroll
    for (int first = 0; first < PARTS; first += TOGETHER) {
      float T[LINES][TOGETHER][4] = {};
#pragma unroll 1
      for (int c = 0; c < ACROSS; c++) {
        float p[LINES][4];
#pragma unroll
        for (int r = 0; r < LINES; r++) load_chunk(p[r], (row ^ 16 * c) + r * DOWN * WEIGHT_BYTES);
        const u32 values = (V ^ 16 * c) + (32 * half + c) * LINE_BYTES + first * ACROSS * 16;
#pragma unroll
        for (int e = 0; e < 4; e++) {
#pragma unroll
          for (int part = 0; part < TOGETHER; part++) {
            float v[4];
            load_chunk(v, values + e * ACROSS * LINE_BYTES + part * ACROSS * 16);
#pragma unroll
            for (int x = 0; x < 4; x++) {
#pragma unroll
              for (int r = 0; r < LINES; r++) {
                T[r][part][x] = multiply_add(p[r][e], v[x], T[r][part][x]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < LINES; r++) {
#pragma unroll
        for (int part = 0; part < TOGETHER; part++) {
#pragma unroll
          for (int x = 0; x < 4; x++) {
            float& sum = O[r][first + part][x];
            sum = multiply_add(sum, half ? 1.0f : old[r], T[r][part][x]);
          }
        }
      }
    }
  }
}

// Lines 14 to 16: O_i divided by l_i, and the logsumexp. Every lane of a row has the same m, and its
// own columns' part of l. What a row that is made again needs waits in the place of its weights: so the
// code that makes one stands here once.
DEVICE void finish(Lines& my, const Job& job, const Place& at, float unit, u32 weights) {
  const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
  const int line = line_of(at.lane), column = column_of(at.lane);
  u32 odd_rows = 0;
  warp_barrier();  // the last weights were read
#pragma unroll
  for (int r = 0; r < LINES; r++) {
    const int i = own_row(at, r);
    const float l = over_row(my.l[r], [](float x, float y) { return x + y; });
    const float shift = shift_of(my.m[r], unit), inverse = inverse_of(l);
    float odd = 0.0f;  // NaN if a number of O_i is not finite
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
#pragma unroll
      for (int e = 0; e < 4; e++) odd += (my.O[r][p][e] *= inverse) * 0.0f;  // of line 12
    }
    const u32 lanes = ballot(i < job.n_q && odd != 0.0f);
    const bool again = lanes & 0x5555u << (line / 2 * 16 + line % 2);  // those of the row
    Number* to = job.output + (head + i) * job.d_v;
#pragma unroll
    for (int p = 0; p < PARTS; p++) {  // line 15
      const int feature = 4 * (column + ACROSS * p);
      if (!again && i < job.n_q && feature < job.d_v) put_chunk(to + feature, my.O[r][p]);
    }
    if (i < job.n_q && column == 0) job.logsumexp[head + i] = logsumexp_of(shift, l);
    const float needed[4] = {shift, inverse, again ? 1.0f : 0.0f, 0.0f};
    store_chunk((weights_of(weights, at.lane) ^ 16 * column) + r * DOWN * WEIGHT_BYTES, needed);
    odd_rows |= lanes;
  }
  if (!odd_rows) return;
  warp_barrier();
#pragma unroll 1
  for (int row = 0; row < LINES * DOWN; row++) {
    float its[4];
    load_chunk(its, weights + row * WEIGHT_BYTES);  // the lanes of a row left the same
    const int i = at.i_first + at.warp * (ROWS / WARPS) + row;
    if (its[2] != 0.0f) row_again<power>(job, at, i, its[0], its[1], unit);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_ffma(const __grid_constant__ Job job) {
  const Place at = place_of(job);  // lines 4 and 7
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const Number* query = row_at(job.query, at.b, at.h, 0);
  const Number* key = row_at(job.key, at.b, at.g, 0);
  const Number* value = row_at(job.value, at.b, at.g, 0);
  const u32 Q_i = shared_memory(), K_j = Q_i + Q_BYTES, V_j = K_j + K_BYTES;
  const u32 weights = V_j + K_BYTES + at.warp * (ROWS / WARPS) * WEIGHT_BYTES;
  const int line = line_of(at.lane), column = column_of(at.lane);
  const u32 queries = chunk_address(Q_i, at.warp * (ROWS / WARPS) + line, 0);
  const u32 keys = chunk_address(K_j, column, 0), values = V_j + 16 * column;

  const int n_q = valid_queries(job, at.b), n_k = valid_keys(job, at.b);
  const auto [some, every] = keys_of_tile(job, at);
  if (some.from < some.to) {  // line 8, and K_j of line 6
    copy_tile<ROWS, 2>(Q_i, query, job.query.row, at.i_first, n_q, job.d_k);
    copy_tile<COLS, 2>(K_j, key, job.key.row, some.from, n_k, job.d_k);
    cp_async_commit();
  }
  Lines my;
  begin(my, job, at);  // line 2
#pragma unroll 1
  for (int j_first = some.from; j_first < some.to; j_first += COLS) {  // line 5
    cp_async_wait<0>();
    barrier();  // K_j is whole, and no warp reads values or weights of the tile before any more
    copy_tile<COLS, 2>(V_j, value, job.value.row, j_first, n_k, job.d_v);  // line 6
    cp_async_commit();
    float S[LINES][KEYS] = {};
    multiply_keys(S, queries, keys);  // line 9
    const bool whole = every.from <= j_first && j_first + COLS <= every.to;
    if (TERMS || !whole) {
      by_cell(S, at, j_first, weights, [&](float product, int i, int j) {
        return to_logit(job, at, product, i, j);
      });
    }
    float old[LINES];
    to_weights(S, my, old, unit);  // lines 10 to 13
    if (TERMS && job.keep.data) {
      by_cell(S, at, j_first, weights, [&](float weight, int i, int j) {
        return i < job.n_q && j < job.n_k ? dropped(job, at, i, j, weight) : weight;
      });
    }
    cp_async_wait<0>();
    barrier();  // V_j is whole, and no warp reads K_j any more
    if (j_first + COLS < some.to) {
      copy_tile<COLS, 2>(K_j, key, job.key.row, j_first + COLS, n_k, job.d_k);  // line 6
      cp_async_commit();
    }
    multiply_values(my.O, S, old, values, weights, at.lane);  // line 12
  }
  finish(my, job, at, unit, weights);  // lines 14 to 16
}
