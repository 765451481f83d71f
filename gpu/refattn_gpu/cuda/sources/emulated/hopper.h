// Hopper's own instructions, done by the machine; ../device has the same names and says where their
// meaning is taken from. Everything happens as late as it may.
#pragma once
#include "warp_groups.h"

namespace machine {

static void begin_hopper() {
  boxes.clear();
  begin_order();
  begin_works();
}

static void end_hopper() {
  if (!boxes.empty()) note("copies that were not waited for", boxes.size());
  for (const MBarrier& barrier : mbarriers) {
    if (barrier.bytes) note("bytes that were expected and did not come", barrier.address);
  }
  end_works();
}

static const bool extended =
    (more = {begin_hopper, meet_all, deliver_box, end_hopper, read_elsewhere}, true);

}  // namespace machine

DEVICE void mbarrier_init(unsigned barrier, int arrivals) { machine::make_barrier(barrier, arrivals); }
DEVICE void mbarrier_fence() { machine::fence_barriers(); }
DEVICE void mbarrier_arrive(unsigned barrier) { machine::arrive(barrier, 0); }
DEVICE void mbarrier_arrive_expecting(unsigned barrier, unsigned bytes) {
  machine::arrive(barrier, bytes);
}
DEVICE void mbarrier_wait(unsigned barrier, unsigned parity) {
  machine::wait_for_phase(barrier, parity);
}

DEVICE void copy_box(unsigned to, const TensorMap& map, int feature, int row, int head, int item,
                     unsigned barrier) {
  machine::begin_box({map, {feature, row, head, item}, to, machine::barrier_at(barrier)});
}

template <int COUNT>
DEVICE void fewer_registers() {
  unsigned count = COUNT;
  machine::together("setmaxnreg", count, machine::set_registers);
}
template <int COUNT>
DEVICE void more_registers() { fewer_registers<COUNT>(); }

DEVICE void wgmma_fence() {
  unsigned none = 0;
  machine::together("wgmma.fence", none, +[](unsigned* (&)[32]) {
    machine::alike("fence");
    machine::my_work().fenced = true;
  });
}

DEVICE void wgmma_commit() {
  unsigned none = 0;
  machine::together("wgmma.commit", none, machine::close_products);
}

template <int N>
DEVICE void wgmma_wait() {
  unsigned under_way = N;
  machine::together("wgmma.wait", under_way, machine::wait_for_products);
}

template <int COUNT>
DEVICE void pin(float* numbers) {
  machine::together("pin", *numbers, machine::check_pinned);
}
template <int COUNT>
DEVICE void pin(unsigned*) {}

template <int N, bool TRANSPOSED>
DEVICE void wgmma_shared(float* c, unsigned long long a, unsigned long long b, bool add) {
  machine::Request mine{a, b, N, TRANSPOSED, add, c, nullptr};
  machine::together("wgmma", mine, machine::begin_product);
}

template <int N, bool TRANSPOSED>
DEVICE void wgmma_registers(float* c, const unsigned (&a)[4], unsigned long long b, bool add) {
  machine::Request mine{0, b, N, TRANSPOSED, add, c, a};
  machine::together("wgmma", mine, machine::begin_product);
}
