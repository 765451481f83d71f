// Algorithm 1 (FA1-ALG1) for few queries and many keys, its first half; line numbers are the listing's.
//
// A block owns ROWS rows (parts.h) and SPLIT keys, over which it walks as forward.cu does. It has too few
// rows to share among warps: every warp has all of them, and keys of its own. Each leaves what it
// found, O_i not yet divided, m_i and l_i, as a part, and merge.cu adds the parts up in the order of keys.
//
// Key j is always met by warp j % STAGE_KEYS / COLS of split j / SPLIT: the bits of a row depend neither on what
// stands beside it nor on how many keys follow those that it sees.
#define PARTED 1
#include "rows.h"

struct Work {
  Place at;
  int split;
};

DEVICE Work work_of(const Job& job) {
  const int tiles = (rows_of(job) + ROWS - 1) / ROWS, splits = splits_of(job);
  const int block = block_index(), item = block / splits / tiles;
  Place at;
  at.b = item / job.key_heads;
  at.g = item % job.key_heads;
  at.h = query_head(job, at.g, 0);
  at.i_first = block / splits % tiles * ROWS;
  at.warp = 0;  // of those that share rows
  at.lane = thread_index() % 32;
  return {at, block % splits};
}

// The keys of a split that some row of the tile sees, from the begin of a tile of keys on, and those that
// every row sees.
DEVICE Spans keys_of_split(const Job& job, const Work& my) {
  const int end = my.at.i_first + ROWS < rows_of(job) ? my.at.i_first + ROWS : rows_of(job);
  const int first = my.at.i_first / group_of(job), last = (end - 1) / group_of(job);
  Spans found = keys_of_queries<STAGE_KEYS>(job, my.at.b, first, last + 1);
  const int from = my.split * SPLIT, to = from + SPLIT;
  if (found.some.from < from) found.some.from = from;
  if (found.some.to > to) found.some.to = to;
  return found;
}

// The block's part of line 8; rows beyond the last are zeros.
DEVICE void copy_queries(u32 Q_i, const Job& job, const Place& at) {
#pragma unroll 1
  for (int which = thread_index(); which < ROWS * CHUNKS; which += THREADS) {
    const int row = which / CHUNKS, chunk = which % CHUNKS;
    const Query query = query_of(job, at, at.i_first + row);
    const bool there = query.i < valid_queries(job, at.b) && EACH * chunk < job.d_k;
    const Number* from = row_at(job.query, at.b, query.at.h, there ? query.i : 0);
    cp_async_16(chunk_address(Q_i, row, chunk), from + (there ? EACH * chunk : 0), there);
  }
}

// A warp's part of its rows.
DEVICE void leave(const Lines& my, const Job& job, const Place& at, int part) {
#pragma unroll
  for (int t = 0; t < M_TILES; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row_of(at, t, half);
      float l = my.l[t][half];
      l += shuffle_xor(l, 1);
      l += shuffle_xor(l, 2);
      if (r >= rows_of(job)) continue;
      const i64 which = parts_at(job, at, r) + part;
#pragma unroll
      for (int n = 0; n < FEATURES / 8; n++) {
        const int feature = 8 * n + at.lane % 4 * 2;
        if (feature >= job.d_v) continue;
        float* to = job.part_outputs + which * job.d_v + feature;
        to[0] = my.O[t][n][2 * half];
        to[1] = my.O[t][n][2 * half + 1];
      }
      if (at.lane % 4 == 0) {
        job.part_states[2 * which] = my.m[t][half];
        job.part_states[2 * which + 1] = l;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_split(const __grid_constant__ Job job) {
  const auto [at, split] = work_of(job);
  const auto [some, every] = keys_of_split(job, {at, split});
  if (some.from >= some.to) return;  // no part of any row
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const Number* key = row_at(job.key, at.b, at.g, 0);
  const Number* value = row_at(job.value, at.b, at.g, 0);
  const u32 Q_i = shared_memory(), stages = Q_i + Q_BYTES;
  const int n_k = valid_keys(job, at.b), warp = thread_index() / 32;

  const auto copy_stage = [&](int stage, int j_first) {  // line 6
    const u32 K_j = stages + stage * STAGE_BYTES;
    copy_tile<STAGE_KEYS, 4>(K_j, key, job.key.row, j_first, n_k, job.d_k);
    copy_tile<STAGE_KEYS, 4>(K_j + K_BYTES, value, job.value.row, j_first, n_k, job.d_v);
    cp_async_commit();
  };
  copy_queries(Q_i, job, at);  // line 8
  copy_stage(0, some.from);
  Lines my;
  begin(my, job, at);  // line 2
  const u32 rows = left_address(Q_i, 0, at.lane);
  int stage = 0;
#pragma unroll 1
  for (int j_first = some.from; j_first < some.to; j_first += STAGE_KEYS, stage ^= 1) {  // line 5
    cp_async_wait<0>();
    barrier();  // K_j and V_j are whole, and no warp reads the other stage any more
    if (j_first + STAGE_KEYS < some.to) copy_stage(stage ^ 1, j_first + STAGE_KEYS);
    const u32 K_j = stages + stage * STAGE_BYTES + warp * COLS * CHUNKS * 16;
    const int its_first = j_first + warp * COLS;
    float S[M_TILES][COLS / 8][4] = {};
    multiply_keys(S, [&](u32(&a)[4], int t, int k) {
      ldmatrix_x4(a, moved(rows, 16 * t, k));
    }, K_j, at.lane);  // line 9
    const bool whole = every.from <= its_first && its_first + COLS <= every.to;
    if (TERMS || !whole) to_logits(S, job, at, its_first);
    to_weights(S, my, unit);  // lines 10 to 13
    if (TERMS && job.keep.data) drop(S, job, at, its_first);
    multiply_values(my.O, S, K_j + K_BYTES, at.lane);  // line 12
  }
  leave(my, job, at, split * WARPS + warp);
}
