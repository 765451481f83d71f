// Algorithm 1 (FA1-ALG1) on tensor cores; line numbers are the listing's.
//
// A block owns a tile of ROWS queries and walks over tiles of COLS keys, as numba_cuda/rows.py does;
// what it says about lines 5, 7, 8, 12 and 13 holds here. Three things are new:
//
// 1. Products are made by mma.sync, a warp its 16 or 32 rows, and S, P, O, l and m stay in registers.
// 2. While tile j is computed with, tile j + 1 is on its way into the other of two stages.
// 3. Weights are powers of 2 (rows.h, which has all that is done to a row).
//
// ROWS, COLS, FEATURES, WARPS, BLOCKS, Q_IN_REGISTERS, TERMS, BFLOAT16 and FLOAT32 are given to the compiler.
#include "rows.h"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_forward(const __grid_constant__ Job job) {
  const Place at = place_of(job);  // lines 4 and 7
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const Number* query = job.query.data + at.b * job.query.batch + at.h * job.query.head;
  const Number* key = job.key.data + at.b * job.key.batch + at.g * job.key.head;
  const Number* value = job.value.data + at.b * job.value.batch + at.g * job.value.head;
  const u32 Q_i = shared_memory(), stages = Q_i + Q_BYTES;

  const int n_q = valid_queries(job, at.b), n_k = valid_keys(job, at.b);
  const auto [some, every] = keys_of_tile(job, at);

  const auto copy_stage = [&](int stage, int j_first) {  // line 6
    const u32 K_j = stages + stage * STAGE_BYTES;
    copy_tile<COLS>(K_j, key, job.key.row, j_first, n_k, job.d_k);
    copy_tile<COLS>(K_j + K_BYTES, value, job.value.row, j_first, n_k, job.d_v);
    cp_async_commit();
  };
  if (some.from < some.to) {  // line 8
    copy_tile<ROWS>(Q_i, query, job.query.row, at.i_first, n_q, job.d_k);
    cp_async_commit();
    copy_stage(0, some.from);
  }

  Lines my;
  begin(my, job, at);  // line 2
  const u32 rows = left_address(Q_i, at.warp * 16 * M_TILES, at.lane);
  u32 Q[Q_IN_REGISTERS ? M_TILES : 1][STEPS][4];
  if (Q_IN_REGISTERS && some.from < some.to) {
    cp_async_wait<1>();  // the first stage may still be on its way
    barrier();
#pragma unroll
    for (int t = 0; t < M_TILES; t++) {
#pragma unroll
      for (int k = 0; k < STEPS; k++) ldmatrix_x4(Q[t][k], moved(rows, 16 * t, k));
    }
  }
  int stage = 0;
#pragma unroll 1
  for (int j_first = some.from; j_first < some.to; j_first += COLS, stage ^= 1) {  // line 5
    cp_async_wait<0>();
    barrier();  // K_j and V_j are whole, and no warp reads the other stage any more
    if (j_first + COLS < some.to) copy_stage(stage ^ 1, j_first + COLS);
    const u32 K_j = stages + stage * STAGE_BYTES;
    float S[M_TILES][COLS / 8][4] = {};
    if (Q_IN_REGISTERS) {  // line 9
      multiply_keys(S, [&](u32(&a)[4], int t, int k) {
#pragma unroll
        for (int e = 0; e < 4; e++) a[e] = Q[t][k][e];
      }, K_j, at.lane);
    } else {
      multiply_keys(S, [&](u32(&a)[4], int t, int k) {
        ldmatrix_x4(a, moved(rows, 16 * t, k));
      }, K_j, at.lane);
    }
    const bool whole = every.from <= j_first && j_first + COLS <= every.to;
    if (TERMS || !whole) to_logits(S, job, at, j_first);
    to_weights(S, my, unit);  // lines 10 to 13
    if (TERMS && job.keep.data) drop(S, job, at, j_first);
    multiply_values(my.O, S, K_j + K_BYTES, at.lane);  // line 12
  }
  finish(my, job, at, unit);  // lines 14 to 16
}
