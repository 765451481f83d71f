// Algorithm 4 (FA1-ALG4) for dK and dV, on tensor cores; line numbers are the listing's.
//
// A block owns a tile of ROWS keys and walks over tiles of COLS queries, of every query head that reads
// it. All is transposed: K_j and V_j are the left operands, Sᵀ = K_j Q_iᵀ, dPᵀ = V_j dO_iᵀ, and P
// and dX, made of them in place, are the left operands of dV_j += Pᵀ dO_i and dK_j += dXᵀ Q_i. No block
// adds to what another one does. "Own rows" (ROWS, row_of) are keys here. Where both sums do not fit a
// thread's registers, the text is compiled twice, once for each (GIVES_KEY, GIVES_VALUE).
#include "gradients.h"

// A thread's rows.
struct Lines {
  float dK[M_TILES][FEATURES / 8][4], dV[M_TILES][FEATURES / 8][4];
};

DEVICE Place place_of_keys(const Job& job) {
  const int tiles = (job.n_k + ROWS - 1) / ROWS;
  const int block = block_index(), item = block / tiles;
  Place at;
  at.b = item / job.key_heads;
  at.g = item % job.key_heads;
  at.h = query_head(job, at.g, 0);
  at.i_first = block % tiles * ROWS;  // the first first: causal rows make it longest
  at.warp = thread_index() / 32;
  at.lane = thread_index() % 32;
  return at;
}

// The queries that see some key of the tile, and those that see every one. Keys from n_k on are not
// written, and forbid nothing; those of a shorter item are 0.
DEVICE Spans queries_of_tile(const Job& job, const Place& at) {
  const int n_k = valid_keys(job, at.b);
  Spans found = {{0, 0}, {0, 0}};
  if (at.i_first >= n_k) return found;
  const int end = at.i_first + ROWS < n_k ? at.i_first + ROWS : n_k;
  const Span first = queries_of_key(job, at.b, at.i_first), last = queries_of_key(job, at.b, end - 1);
  found.some = {first.from / COLS * COLS, last.to};
  if (n_k == job.n_k || at.i_first + ROWS <= n_k) found.every = {last.from, first.to};
  return found;
}

// Lines 11 to 20: S becomes P, dP becomes dX, both 0 where a cell is forbidden.
DEVICE void to_gradients(float (&S)[M_TILES][COLS / 8][4], float (&dP)[M_TILES][COLS / 8][4],
                         const Job& job, const Place& at, int i_first, int n_q, bool whole,
                         float unit) {
  const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
#pragma unroll
  for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const int i = i_first + 8 * n + at.lane % 4 * 2 + column;
      const bool there = i < n_q;
      const float L = there ? read((const float*)job.logsumexp + head + i) * LOG2E : 0.0f;
      const float D = there ? read((const float*)job.dots + head + i) : 0.0f;
#pragma unroll
      for (int t = 0; t < M_TILES; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int j = row_of(at, t, half), e = 2 * half + column;
          bool open = whole;
          if (!whole) {
            const Span seen = queries_of_key(job, at.b, j);
            open = i >= seen.from && i < seen.to && (!TERMS || allowed(job, at, i, j));
          }
          if (!open) {
            S[t][n][e] = dP[t][n][e] = 0.0f;
            continue;
          }
          const Gradient cell = gradient_of(job, at, i, j, S[t][n][e], dP[t][n][e], L, D, unit);
          S[t][n][e] = cell.weight;
          dP[t][n][e] = cell.product;
        }
      }
    }
  }
}

// A row of dK and of dV by the queries that may read it, one after another.
DEVICE void row_again(const Job& job, Place at, int j, float unit) {
  const Number* k = row_at(job.key, at.b, at.g, j);
  const Number* v = row_at(job.value, at.b, at.g, j);
  const Span seen = queries_of_key(job, at.b, j);
  Shared dK = {}, dV = {};
#pragma unroll 1
  for (int member = 0; member < job.heads / job.key_heads; member++) {
    at.h = query_head(job, at.g, member);
    const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
#pragma unroll 1
    for (int i = seen.from; i < seen.to; i++) {
      if (TERMS && !allowed(job, at, i, j)) continue;
      const Number* q = row_at(job.query, at.b, at.h, i);
      const Number* dO = row_at(job.d_output, at.b, at.h, i);
      const float S = product_of(q, k, job.d_k, at.lane);
      const float dP = product_of(dO, v, job.d_v, at.lane);
      const float L = read((const float*)job.logsumexp + head + i) * LOG2E;
      const float D = read((const float*)job.dots + head + i);
      const Gradient cell = gradient_of(job, at, i, j, S, dP, L, D, unit);
      add_row(dV, cell.weight, dO, job.d_v, at.lane);
      add_row(dK, cell.product, q, job.d_k, at.lane);
    }
  }
  const i64 to = ((i64)at.b * job.key_heads + at.g) * job.n_k + j;
  if (GIVES_KEY) store_shared(dK, job.d_key + to * job.d_k, job.d_k, job.scale, at.lane);
  if (GIVES_VALUE) store_shared(dV, job.d_value + to * job.d_v, job.d_v, 1.0f, at.lane);
}

// Line 24.
DEVICE void finish(const Lines& my, const Job& job, const Place& at, float unit) {
  const i64 head = ((i64)at.b * job.key_heads + at.g) * job.n_k;
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int j = row_of(at, t, half);
      const bool there = j < job.n_k;
      u32 again = 0;
      if (GIVES_KEY) again |= odd_rows(my.dK[t], half, there);
      if (GIVES_VALUE) again |= odd_rows(my.dV[t], half, there);
      const bool sound = there && (again >> at.lane / 4 * 4 & 15) == 0;
      if (GIVES_KEY && sound) {
        store_row(my.dK[t], half, job.d_key + (head + j) * job.d_k, job.d_k, job.scale, at.lane);
      }
      if (GIVES_VALUE && sound) {
        store_row(my.dV[t], half, job.d_value + (head + j) * job.d_v, job.d_v, 1.0f, at.lane);
      }
#pragma unroll 1
      for (int row = 0; again; row++, again >>= 4) {
        if (again & 15) row_again(job, at, j - at.lane / 4 + row, unit);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_backward_key(const __grid_constant__ Job job) {
  Place at = place_of_keys(job);  // line 6
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const u32 K_j = shared_memory(), V_j = K_j + Q_BYTES, stages = V_j + Q_BYTES;
  const int n_q = valid_queries(job, at.b), n_k = valid_keys(job, at.b);
  const Spans queries = queries_of_tile(job, at);
  const int span = queries.some.to - queries.some.from;
  const int tiles = span > 0 ? (span + COLS - 1) / COLS : 0;  // of a head
  const int turns = tiles * (job.heads / job.key_heads);

  const auto copy_stage = [&](int stage, int turn) {  // line 10
    const int h = query_head(job, at.g, turn / tiles), first = queries.some.from + turn % tiles * COLS;
    const u32 Q_i = stages + stage * STAGE_BYTES;
    const Number* d_output = row_at(job.d_output, at.b, h, 0);
    copy_tile<COLS>(Q_i, row_at(job.query, at.b, h, 0), job.query.row, first, n_q, job.d_k);
    copy_tile<COLS>(Q_i + K_BYTES, d_output, job.d_output.row, first, n_q, job.d_v);
    cp_async_commit();
  };
  if (turns) {  // line 7
    copy_tile<ROWS>(K_j, row_at(job.key, at.b, at.g, 0), job.key.row, at.i_first, n_k, job.d_k);
    copy_tile<ROWS>(V_j, row_at(job.value, at.b, at.g, 0), job.value.row, at.i_first, n_k, job.d_v);
    copy_stage(0, 0);
  }
  Lines my = {};  // line 8
  const u32 rows = left_address(K_j, at.warp * 16 * M_TILES, at.lane);
  int stage = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++, stage ^= 1) {  // line 9, and heads
    cp_async_wait<0>();
    barrier();  // Q_i and dO_i are whole, and no warp reads the other stage any more
    if (turn + 1 < turns) copy_stage(stage ^ 1, turn + 1);
    at.h = query_head(job, at.g, turn / tiles);
    const int i_first = queries.some.from + turn % tiles * COLS;
    const u32 Q_i = stages + stage * STAGE_BYTES;
    float S[M_TILES][COLS / 8][4] = {}, dP[M_TILES][COLS / 8][4] = {};
    multiply_keys(S, [&](u32(&a)[4], int t, int k) {
      ldmatrix_x4(a, moved(rows, 16 * t, k));
    }, Q_i, at.lane);  // line 11
    if (GIVES_KEY) {
      multiply_keys(dP, [&](u32(&a)[4], int t, int k) {
        ldmatrix_x4(a, moved(rows + Q_BYTES, 16 * t, k));
      }, Q_i + K_BYTES, at.lane);  // line 17
    }
    const bool whole = queries.every.from <= i_first && i_first + COLS <= queries.every.to;
    to_gradients(S, dP, job, at, i_first, n_q, !TERMS && whole, unit);   // lines 12 to 20
    if (GIVES_VALUE) multiply_values(my.dV, S, Q_i + K_BYTES, at.lane);  // line 16
    if (GIVES_KEY) multiply_values(my.dK, dP, Q_i, at.lane);             // line 22
  }
  finish(my, job, at, unit);
}
