// Algorithm 1 (FA1-ALG1) for few queries and many keys, its second half: the parts that split.cu left of a
// row become one (FA2-MERGE), one after another in the order of splits and warps. A warp has a row, its
// lanes the features. Only parts that hold a key that the row sees are read.
#include "again.h"
#include "parts.h"

constexpr int THREADS = 32 * WARPS;
constexpr u32 SHARED_BYTES = 0;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_merge(const __grid_constant__ Job job) {
  const i64 row = (i64)block_index() * WARPS + thread_index() / 32;
  const i64 head = row / rows_of(job);
  if (head >= (i64)job.batch * job.key_heads) return;
  Place at;
  at.b = (int)(head / job.key_heads);
  at.g = (int)(head % job.key_heads);
  at.lane = thread_index() % 32;
  const int r = (int)(row % rows_of(job));
  const auto [its, i] = query_of(job, at, r);
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const float* outputs = job.part_outputs + parts_at(job, at, r) * job.d_v;
  const float* states = job.part_states + parts_at(job, at, r) * 2;
  const Span seen = keys_of_row(job, at.b, i);
  const bool empty = seen.from >= seen.to;
  const int first = empty ? 0 : seen.from / SPLIT * WARPS;
  const int end = empty ? 0 : (seen.to + SPLIT - 1) / SPLIT * WARPS;

  const bool sunk = TERMS && job.sinks;  // a logit beside those of all parts (OWN-SINK1)
  const float sink = sunk ? read(job.sinks + its.h) : LOWEST;
  float m = sink;
#pragma unroll 1
  for (int part = first + at.lane; part < end; part += 32) m = fmaxf(m, read(states + 2 * part));
#pragma unroll
  for (int bits = 16; bits; bits /= 2) m = fmaxf(m, shuffle_xor(m, bits));
  const float shift = shift_of(m, unit);
  float l = sunk ? ex2(times(sink, unit) - shift) : 0.0f;
  float O[FEATURES / 32] = {};
#pragma unroll 4  // so that the numbers of several parts are on their way at once
  for (int part = first; part < end; part++) {
    const float turn = ex2(times(read(states + 2 * part), unit) - shift);
    l += turn * read(states + 2 * part + 1);
#pragma unroll
    for (int x = 0; x < FEATURES / 32; x++) {
      const int feature = 32 * x + at.lane;
      if (feature < job.d_v) O[x] += turn * read(outputs + (i64)part * job.d_v + feature);
    }
  }
  const float inverse = inverse_of(l);
  const i64 which = ((i64)at.b * job.heads + its.h) * job.n_q + i;
  float odd = 0.0f;  // NaN if a number of the row is not finite
#pragma unroll
  for (int x = 0; x < FEATURES / 32; x++) {
    const int feature = 32 * x + at.lane;
    odd += (O[x] *= inverse) * 0.0f;
    if (feature < job.d_v) job.output[which * job.d_v + feature] = narrowed(O[x]);
  }
  if (ballot(odd != 0.0f)) row_again<ex2>(job, its, i, shift, inverse, unit);
  if (at.lane == 0) job.logsumexp[which] = logsumexp_of(shift, l);
}
