// Algorithm 1 (FA1-ALG1) by a Hopper's own instructions; line numbers are the listing's.
//
// What forward.cu says holds here, and rows.h is the same. Different is who does what:
//
// 1. One thread of a warp group of its own copies: Q_i, and then K_j and V_j, turn by turn, into a ring
//    of slots. A slot has two barriers: at "full" its bytes are counted, at "empty" the warps that have
//    read them.
// 2. A warp group multiplies its 64 rows of Q_i with a whole tile, where both lie in shared memory; P comes
//    from registers, as ever. A thread has of a result what it would have of mma.sync's.
// 3. Who only copies gives registers to those who multiply.
// 4. With OVERLAP, S of the next tile is begun before O += P V, and becomes weights while that is under way.
//
// Rows beyond an item's last that the tensor has are copied too, where forward.cu puts zeros: their weights
// are 0, and NaN among them costs the time of a row of poison.
#include "products_hopper.h"
#include "rows.h"

constexpr int SLOTS = 4;

// Slot x % SLOTS holds K_j for x = 2 j, and V_j for x = 2 j + 1: tiles are counted from the first visited.
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
  const Spans keys = keys_of_tile(job, at);
  const Span some = keys.some, every = keys.every;
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
  float S[1][COLS / 8][4], old[1][2];
  u32 P[COLS / 16][4];
  const auto give_back = [&](int x) {  // this warp has read the slot
    if (at.lane == 0) mbarrier_arrive(empty_of(ring, x));
  };
  const auto begin_S = [&](int j) {
    mbarrier_wait(full_of(ring, 2 * j), turn_of(2 * j));
    wgmma_fence();
    begin_keys(S, Q, slot_of(ring, 2 * j));  // line 9
  };
  const auto end_S = [&](int j) {
    pin<COLS / 2>(&S[0][0][0]);
    give_back(2 * j);
  };
  const auto weigh = [&](int j) {
    const int j_first = some.from + j * COLS;
    const bool whole = every.from <= j_first && j_first + COLS <= every.to;
    if (TERMS || !whole) to_logits(S, job, at, j_first);
    to_weights(S, my, old, unit);  // lines 10 to 13
    if (TERMS && job.keep.data) drop(S, job, at, j_first);
    // V_j, which the weights meet. The assembler puts a wait for products ahead of all that needs none of
    // them, here the weights, but moves nothing across this loop: without it nothing would overlap.
    pin<COLS / 2>(&S[0][0][0]);
    mbarrier_wait(full_of(ring, 2 * j + 1), turn_of(2 * j + 1));
  };
  const auto begin_O = [&](int j) {
    wgmma_fence();
    begin_values(my.O, P, slot_of(ring, 2 * j + 1));  // line 12
  };
  const auto end_O = [&](int j) {
    pin<FEATURES / 2>(&my.O[0][0][0]);
    give_back(2 * j + 1);
  };
  const auto turn_O = [&] {  // between the weights of a tile and their product
    rescale(my, old);
    round_weights(P, S);
    pin<FEATURES / 2>(&my.O[0][0][0]);
    pin<COLS / 4>(&P[0][0]);
  };

  if (tiles) mbarrier_wait(arrival_of(ring), 0);
  if (!OVERLAP) {
#pragma unroll 1
    for (int j = 0; j < tiles; j++) {  // line 5
      begin_S(j);
      wgmma_wait<0>();
      end_S(j);
      weigh(j);
      turn_O();
      begin_O(j);
      wgmma_wait<0>();
      end_O(j);
    }
  } else if (tiles) {
    begin_S(0);
    wgmma_wait<0>();
    end_S(0);
    weigh(0);
    turn_O();
#pragma unroll 1
    for (int j = 1; j < tiles; j++) {  // line 5
      begin_S(j);
      begin_O(j - 1);
      wgmma_wait<1>();
      end_S(j);
      weigh(j);  // while O_i is added to
      wgmma_wait<0>();
      end_O(j - 1);
      turn_O();
    }
    begin_O(tiles - 1);
    wgmma_wait<0>();
    end_O(tiles - 1);
  }
  finish(my, job, at, unit);  // lines 14 to 16
}
