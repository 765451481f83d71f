// What single instructions give, for one warp: a device and the emulation must agree on every word.
//
// Q is 16 rows, K at most 16; the words of a lane lie 32 apart in the output.
#include "chunks.h"
#include "tiles.h"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
single_instructions(const __grid_constant__ Job job) {
  const int lane = thread_index();
  u32* out = (u32*)job.output + lane;
  const auto put = [&](u32 word) {
    *out = word;
    out += 32;
  };
  const u32 Q = shared_memory(), K = Q + Q_BYTES;
  copy_tile<ROWS>(Q, job.query.data, job.query.row, 0, job.n_q, job.d_k);  // cp.async
  cp_async_commit();
  copy_tile<COLS>(K, job.key.data, job.key.row, 0, job.n_k, job.d_k);  // with zeros
  cp_async_commit();
  cp_async_wait<1>();
  barrier();
  u32 a[4], b[4], transposed[4];
  ldmatrix_x4(a, moved(left_address(Q, 0, lane), 0, 1));  // ldmatrix: features 16 to 31
  for (int e = 0; e < 4; e++) put(a[e]);
  cp_async_wait<0>();
  barrier();
  ldmatrix_x4(b, moved(right_address(K, lane), 0, 1));
  for (int e = 0; e < 4; e++) put(b[e]);
  ldmatrix_x4_trans(transposed, left_address(K, 0, lane));  // features 0 to 15
  for (int e = 0; e < 4; e++) put(transposed[e]);
  float c[4] = {0.0f, 1.0f, 2.0f, 3.0f};  // mma
  mma_m16n8k16(c, a, b[0], b[1]);
  for (int e = 0; e < 4; e++) put(bits_of(c[e]));
  mma_m16n8k16(c, a, transposed[0], transposed[1]);
  for (int e = 0; e < 4; e++) put(bits_of(c[e]));
  put(pack(c[0] / 3.0f, c[1] / 3.0f));  // cvt
  put(bits_of(widen((u16)a[0])));
  put(bits_of(shuffle_xor(c[0], 5)));
  put(bits_of(shuffle(c[0], 7)));
  put(ballot(c[0] > 0.0f));
  u32 numbers[4];
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int e = 0; e < 4; e++) numbers[e] = bits_of(rintf(c[e] / 16.0f));
  mma_m16n8k8(d, numbers, numbers[0], numbers[3]);  // exact
  for (int e = 0; e < 4; e++) put(bits_of(d[e]));
  put(bits_of(load_shared(chunk_address(K, lane / 16, lane / 4 % 4) + lane % 4 * 4)));
  const float four[4] = {c[0], c[1], d[0], d[1]};  // st.shared.v4 and ld.shared.v4
  float other[4];
  warp_barrier();
  store_chunk(Q + 16 * lane, four);
  warp_barrier();
  load_chunk(other, Q + 16 * (lane ^ 5));
  for (int e = 0; e < 4; e++) put(bits_of(other[e]));
  put(bits_of(multiply_add(c[0], 1.0f / 3.0f, d[0])));
  put(bits_of(ex2(c[0] / 64.0f)));  // the last words: no two machines need agree on all their bits
  put(bits_of(power(c[0] / 64.0f - 130.0f)));
}
