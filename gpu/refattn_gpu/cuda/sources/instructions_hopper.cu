// What single instructions of a Hopper give, for one warp group: a device and the emulation must agree on
// every word.
//
// Q has 64 rows, K and V no more; the words of a thread lie 128 apart in the output.
#include "products_hopper.h"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
single_instructions(const __grid_constant__ Job job, const __grid_constant__ Maps maps) {
  const int thread = thread_index(), lane = thread % 32;
  const u32 Q = shared_memory(), K = Q + Q_BYTES, V = K + K_BYTES, full = Q + TILE_BYTES;
  if (thread == 0) {
    mbarrier_init(full, 1 + WARPS);
    mbarrier_fence();
  }
  barrier();
  if (thread == 32 * WARPS) {  // boxes, whose zeros count too
    mbarrier_arrive_expecting(full, Q_BYTES + 2 * K_BYTES);
    for (int p = 0; p < PANELS; p++) {
      copy_box(Q + p * ROWS * LINE, maps.query, p * PANEL, 0, 1, 1, full);
      copy_box(K + p * COLS * LINE, maps.key, p * PANEL, 0, 1, 1, full);
      copy_box(V + p * COLS * LINE, maps.value, p * PANEL, 16, 0, 1, full);
    }
  }
  if (thread >= 32 * WARPS) return;
  u32* out = (u32*)job.output + thread;
  const auto put = [&](u32 word) {
    *out = word;
    out += 128;
  };
  if (lane == 0) mbarrier_arrive(full);
  mbarrier_wait(full, 0);
  for (int row = 0; row < 64; row += 16) {  // as the boxes lie
    put(bits_of(load_shared(K + (row + thread / 32) * LINE + lane * 4)));
    put(bits_of(load_shared(V + (row + thread / 32) * LINE + lane * 4)));
  }
  float S[1][COLS / 8][4], O[1][FEATURES / 8][4];
  u32 P[COLS / 16][4];
  wgmma_fence();
  begin_keys(S, Q, K);  // both from shared memory, rows by k
  wgmma_wait<0>();
  pin<COLS / 2>(&S[0][0][0]);
  for (int n = 0; n < COLS / 8; n++) {
    for (int e = 0; e < 4; e++) put(bits_of(S[0][n][e]));
  }
  for (int n = 0; n < COLS / 8; n++) {
    for (int e = 0; e < 4; e++) S[0][n][e] = (float)((thread * 7 + n * 5 + e * 3) % 9 - 4);
  }
  for (int n = 0; n < FEATURES / 8; n++) {
    for (int e = 0; e < 4; e++) O[0][n][e] = (float)(n - e);
  }
  round_weights(P, S);
  pin<FEATURES / 2>(&O[0][0][0]);
  pin<COLS / 4>(&P[0][0]);
  wgmma_fence();
  begin_values(O, P, V);  // the left one from registers, the right one transposed
  wgmma_wait<0>();
  pin<FEATURES / 2>(&O[0][0][0]);
  for (int n = 0; n < FEATURES / 8; n++) {
    for (int e = 0; e < 4; e++) put(bits_of(O[0][n][e]));
  }
}
