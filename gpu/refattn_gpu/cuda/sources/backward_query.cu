// Algorithm 4 (FA1-ALG4) for dQ, on tensor cores; line numbers are the listing's.
//
// A block owns a tile of ROWS queries and walks over tiles of COLS keys as forward.cu does, by the same
// products: S = Q_i K_jᵀ, dP = dO_i V_jᵀ, and dX, made of both in place, is the left operand of
// dQ_i += dX K_j. No block adds to what another one does. D_i, which the kernel of dK and dV reads, is
// made here first, from O as the forward pass rounded it.
#include "gradients.h"

// A thread's rows.
struct Lines {
  float dQ[M_TILES][FEATURES / 8][4];
  float L[M_TILES][2], D[M_TILES][2];  // L in bits
  float d_slopes[M_TILES][2];
};

// D_i = Σ_x dO_ix O_ix - dL_i (line 19). The output of an empty row is 0, and its gradient is not read.
DEVICE float dot_of(const Job& job, const Place& at, int i) {
  const Number* dO = row_at(job.d_output, at.b, at.h, i);
  const Number* O = row_at(job.result, at.b, at.h, i);
  float D = 0.0f;
#pragma unroll 1
  for (int x = at.lane % 4; x < job.d_v; x += 4) {
    const float o = widen(read(O + x));
    if (o != 0.0f) D += widen(read(dO + x)) * o;
  }
  return D;
}

DEVICE void begin(Lines& my, const Job& job, const Place& at) {
  const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row_of(at, t, half);
      const bool there = i < job.n_q;
      float D = there ? dot_of(job, at, i) : 0.0f;
      D += shuffle_xor(D, 1);
      D += shuffle_xor(D, 2);
      if (there && job.d_logsumexp) D -= read(job.d_logsumexp + head + i);
      if (there && at.lane % 4 == 0) job.dots[head + i] = D;
      my.D[t][half] = D;
      my.L[t][half] = there ? read((const float*)job.logsumexp + head + i) * LOG2E : 0.0f;
      my.d_slopes[t][half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < FEATURES / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) my.dQ[t][n][e] = 0.0f;
    }
  }
}

// Lines 11 to 20: dP becomes dX, 0 where a cell is forbidden.
DEVICE void to_gradients(float (&dP)[M_TILES][COLS / 8][4], const float (&S)[M_TILES][COLS / 8][4],
                         Lines& my, const Job& job, const Place& at, int j_first, bool whole,
                         float unit) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row_of(at, t, half);
      const Span seen = whole ? Span{j_first, j_first + COLS} : keys_of_row(job, at.b, i);
#pragma unroll
      for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const int j = j_first + 8 * n + at.lane % 4 * 2 + e % 2;
          if (j < seen.from || j >= seen.to || (TERMS && !allowed(job, at, i, j))) {
            dP[t][n][e] = 0.0f;
            continue;
          }
          const Gradient cell = gradient_of(
              job, at, i, j, S[t][n][e], dP[t][n][e], my.L[t][half], my.D[t][half], unit);
          dP[t][n][e] = cell.product;
          if (TERMS && job.d_bias) {
            job.d_bias[(((i64)at.b * job.heads + at.h) * job.n_q + i) * job.n_k + j] = cell.added;
          }
          if (TERMS && job.slopes) my.d_slopes[t][half] += cell.added * steps(job, at, i, j);
        }
      }
    }
  }
}

// A row of dQ by the keys that it may read, one after another.
DEVICE void row_again(const Job& job, const Place& at, int i, float L, float D, float unit) {
  const Number* q = row_at(job.query, at.b, at.h, i);
  const Number* dO = row_at(job.d_output, at.b, at.h, i);
  const Span seen = keys_of_row(job, at.b, i);
  Shared dQ = {};
#pragma unroll 1
  for (int j = seen.from; j < seen.to; j++) {
    if (TERMS && !allowed(job, at, i, j)) continue;
    const Number* k = row_at(job.key, at.b, at.g, j);
    const float S = product_of(q, k, job.d_k, at.lane);
    const float dP = product_of(dO, row_at(job.value, at.b, at.g, j), job.d_v, at.lane);
    add_row(dQ, gradient_of(job, at, i, j, S, dP, L, D, unit).product, k, job.d_k, at.lane);
  }
  Number* to = job.d_query + (((i64)at.b * job.heads + at.h) * job.n_q + i) * job.d_k;
  store_shared(dQ, to, job.d_k, job.scale, at.lane);
}

DEVICE void finish(const Lines& my, const Job& job, const Place& at, float unit) {
  const i64 head = ((i64)at.b * job.heads + at.h) * job.n_q;
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row_of(at, t, half);
      const bool there = i < job.n_q;
      u32 again = odd_rows(my.dQ[t], half, there);
      if (there && (again >> at.lane / 4 * 4 & 15) == 0) {
        store_row(my.dQ[t], half, job.d_query + (head + i) * job.d_k, job.d_k, job.scale, at.lane);
      }
      if (TERMS) {
        float sum = my.d_slopes[t][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (there && job.d_slopes && at.lane % 4 == 0) job.d_slopes[head + i] = sum;
      }
#pragma unroll 1
      for (int row = 0; again; row++, again >>= 4) {
        const float L = shuffle(my.L[t][half], 4 * row), D = shuffle(my.D[t][half], 4 * row);
        if (again & 15) row_again(job, at, i - at.lane / 4 + row, L, D, unit);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_backward_query(const __grid_constant__ Job job) {
  const Place at = place_of(job);
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const Number* key = row_at(job.key, at.b, at.g, 0);
  const Number* value = row_at(job.value, at.b, at.g, 0);
  const u32 Q_i = shared_memory(), dO_i = Q_i + Q_BYTES, stages = dO_i + Q_BYTES;
  const int n_q = valid_queries(job, at.b), n_k = valid_keys(job, at.b);
  const Spans keys = keys_of_tile(job, at);

  const auto copy_stage = [&](int stage, int j_first) {  // line 7
    const u32 K_j = stages + stage * STAGE_BYTES;
    copy_tile<COLS>(K_j, key, job.key.row, j_first, n_k, job.d_k);
    copy_tile<COLS>(K_j + K_BYTES, value, job.value.row, j_first, n_k, job.d_v);
    cp_async_commit();
  };
  if (keys.some.from < keys.some.to) {  // line 10
    const Number* d_output = row_at(job.d_output, at.b, at.h, 0);
    copy_tile<ROWS>(Q_i, row_at(job.query, at.b, at.h, 0), job.query.row, at.i_first, n_q, job.d_k);
    copy_tile<ROWS>(dO_i, d_output, job.d_output.row, at.i_first, n_q, job.d_v);
    copy_stage(0, keys.some.from);
  }
  Lines my;
  begin(my, job, at);
  const u32 rows = left_address(Q_i, at.warp * 16 * M_TILES, at.lane);
  int stage = 0;
#pragma unroll 1
  for (int j_first = keys.some.from; j_first < keys.some.to; j_first += COLS, stage ^= 1) {  // line 6
    cp_async_wait<0>();
    barrier();  // K_j and V_j are whole, and no warp reads the other stage any more
    if (j_first + COLS < keys.some.to) copy_stage(stage ^ 1, j_first + COLS);
    const u32 K_j = stages + stage * STAGE_BYTES;
    float S[M_TILES][COLS / 8][4] = {}, dP[M_TILES][COLS / 8][4] = {};
    multiply_keys(S, [&](u32(&a)[4], int t, int k) {
      ldmatrix_x4(a, moved(rows, 16 * t, k));
    }, K_j, at.lane);  // line 11
    multiply_keys(dP, [&](u32(&a)[4], int t, int k) {
      ldmatrix_x4(a, moved(rows + Q_BYTES, 16 * t, k));
    }, K_j + K_BYTES, at.lane);  // line 17
    const bool whole = keys.every.from <= j_first && j_first + COLS <= keys.every.to;
    to_gradients(dP, S, my, job, at, j_first, !TERMS && whole, unit);  // lines 12 to 20
    multiply_values(my.dQ, dP, K_j, at.lane);                          // line 21
  }
  finish(my, job, at, unit);
}
