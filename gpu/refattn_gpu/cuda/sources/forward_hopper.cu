// Algorithm 1 (FA1-ALG1) by a Hopper's own instructions; line numbers are the listing's.
//
// What forward.cu says holds here, and rows.h is the same. Different is who does what:
//
// 1. One thread of a warp group of its own copies: Q_i, and then K_j and V_j, turn by turn, into a ring of
//    slots. A slot has two barriers: at "full" its bytes are counted, at "empty" the warps that have read them.
// 2. A warp group multiplies its 64 rows of Q_i with a whole tile, where both lie in shared memory; P comes
//    from registers, as ever. A thread has of a result what it would have of mma.sync's.
// 3. Who only copies gives registers to those who multiply.
//
// Rows beyond an item's last that the tensor has are copied too, where forward.cu puts zeros: their weights
// are 0, and NaN among them costs the time of a row of poison.
#include "products_hopper.h"
#include "rows.h"

constexpr int SLOTS = 4;

// Slot x % SLOTS holds K_j for x = 2 j, and V_j for x = 2 j + 1, tiles counted from the first that is visited.
struct Ring {
  u32 tiles, barriers;
};

DEVICE u32 slot_of(const Ring& ring, int x) { return ring.tiles + x % SLOTS * K_BYTES; }
DEVICE u32 full_of(const Ring& ring, int x) { return ring.barriers + 8 + x % SLOTS * 16; }
DEVICE u32 empty_of(const Ring& ring, int x) { return ring.barriers + 16 + x % SLOTS * 16; }
DEVICE u32 arrival_of(const Ring& ring) { return ring.barriers; }
DEVICE u32 turn_of(int x) { return x / SLOTS % 2; }  // the parity of a slot's phase

DEVICE void begin_ring(const Ring& ring) {
  if (thread_index() == 0) {
    mbarrier_init(arrival_of(ring), 1);
    for (int x = 0; x < SLOTS; x++) {
      mbarrier_init(full_of(ring, x), 1);
      mbarrier_init(empty_of(ring, x), WARPS);
    }
    mbarrier_fence();
  }
  barrier();
}

// Begin to copy rows first, ..., first + COUNT - 1 of a head, and let a barrier count their bytes. An axis
// along which a tensor is the same has one place.
template <int COUNT>
DEVICE void copy_rows(u32 tile, const TensorMap& map, const Rows& rows, int first, int head, int item,
                      u32 barrier) {
  mbarrier_arrive_expecting(barrier, COUNT * PANELS * LINE);
#pragma unroll
  for (int p = 0; p < PANELS; p++) {
    copy_box(tile + p * COUNT * LINE, map, p * PANEL, first, rows.head ? head : 0, rows.batch ? item : 0,
             barrier);
  }
}

// Line 6, by one thread, as far ahead of the products as the ring allows.
DEVICE void copy_all(
    const Job& job, const Maps& maps, const Place& at, const Ring& ring, u32 Q_i, int from, int tiles) {
  copy_rows<ROWS>(Q_i, maps.query, job.query, at.i_first, at.h, at.b, arrival_of(ring));
#pragma unroll 1
  for (int x = 0; x < 2 * tiles; x++) {
    const int j_first = from + x / 2 * COLS;
    mbarrier_wait(empty_of(ring, x), turn_of(x) ^ 1);  // the phase before: of the first turn it is over
    if (x % 2 == 0) {
      copy_rows<COLS>(slot_of(ring, x), maps.key, job.key, j_first, at.g, at.b, full_of(ring, x));
    } else {
      copy_rows<COLS>(slot_of(ring, x), maps.value, job.value, j_first, at.g, at.b, full_of(ring, x));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_forward_hopper(const __grid_constant__ Job job, const __grid_constant__ Maps maps) {
  const Place at = place_of(job);  // lines 4 and 7
  const float unit = TERMS ? LOG2E : job.scale * LOG2E;
  const u32 Q_i = shared_memory();
  const Ring ring = {Q_i + Q_BYTES, Q_i + TILE_BYTES};
  const auto [some, every] = keys_of_tile(job, at);
  const int tiles = some.from < some.to ? (some.to - some.from + COLS - 1) / COLS : 0;

  begin_ring(ring);
  if (at.warp >= WARPS) {
    fewer_registers<24>();
    if (thread_index() == 32 * WARPS && tiles) copy_all(job, maps, at, ring, Q_i, some.from, tiles);
    return;
  }
  more_registers<240>();

  Lines my;
  begin(my, job, at);  // line 2
  const u32 Q = Q_i + at.warp / 4 * GROUP * LINE;
  if (tiles) mbarrier_wait(arrival_of(ring), 0);
#pragma unroll 1
  for (int j = 0; j < tiles; j++) {  // line 5
    const int j_first = some.from + j * COLS, x = 2 * j;
    float S[1][COLS / 8][4], old[1][2];
    u32 P[COLS / 16][4];
    mbarrier_wait(full_of(ring, x), turn_of(x));
    wgmma_fence();
    begin_keys(S, Q, slot_of(ring, x));  // line 9
    wgmma_wait<0>();
    pin<COLS / 2>(&S[0][0][0]);
    if (at.lane == 0) mbarrier_arrive(empty_of(ring, x));
    const bool whole = every.from <= j_first && j_first + COLS <= every.to;
    if (TERMS || !whole) to_logits(S, job, at, j_first);
    to_weights(S, my, old, unit);  // lines 10 to 13
    if (TERMS && job.keep.data) drop(S, job, at, j_first);
    rescale(my, old);
    round_weights(P, S);
    mbarrier_wait(full_of(ring, x + 1), turn_of(x + 1));
    pin<FEATURES / 2>(&my.O[0][0][0]);
    pin<COLS / 4>(&P[0][0]);
    wgmma_fence();
    begin_values(my.O, P, slot_of(ring, x + 1));  // line 12
    wgmma_wait<0>();
    pin<FEATURES / 2>(&my.O[0][0][0]);
    if (at.lane == 0) mbarrier_arrive(empty_of(ring, x + 1));
  }
  finish(my, job, at, unit);  // lines 14 to 16
}
