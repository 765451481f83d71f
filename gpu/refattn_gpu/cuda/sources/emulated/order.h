// The order of what warps and copies do, where no barrier of the block makes it.
//
// Every warp counts its own steps, and knows of every other how far it had come when the two last met: at
// a barrier of the block, or by a phase that one arrived at and the other waited for. A barrier in shared
// memory counts its phases likewise, for the bytes that came in each. A chunk remembers who wrote it and
// which step of each warp read it last: a read, or a copy over it, is refused unless all this is known to
// have happened before, in whatever order the threads run.
#pragma once
#include "machine.h"

namespace machine {

constexpr unsigned WARPS_MOST = 16, BARRIERS_MOST = 16, ACTORS = WARPS_MOST + BARRIERS_MOST;

// Steps of every actor that are known to have happened: of warps, and of the barriers after them.
struct Clock {
  unsigned steps[ACTORS];
};

struct MBarrier {
  unsigned address, arrivals, pending, phase;
  long bytes;            // expected, and not yet there
  unsigned maker, step;  // the warp that initialised it, and when
  bool fenced;
  Clock arriving, ended;  // what those who arrived know; the same when a phase ended
};

// What is known of 16 bytes.
struct Trace {
  bool coming;                // a copy is on its way
  unsigned writer, step;      // an actor
  unsigned under_way;         // products that read it and are not waited for
  unsigned read[WARPS_MOST];  // the step of each warp's last read
};

static std::vector<Clock> clocks;  // by warp
static std::vector<MBarrier> mbarriers;
static std::vector<Trace> traces;

static unsigned my_warp() { return current / LANES; }

static unsigned& my_step() { return clocks[my_warp()].steps[my_warp()]; }

static bool known(unsigned actor, unsigned step) { return clocks[my_warp()].steps[actor] >= step; }

static void join(Clock& mine, const Clock& other) {
  for (unsigned a = 0; a < ACTORS; a++) {
    if (other.steps[a] > mine.steps[a]) mine.steps[a] = other.steps[a];
  }
}

// Let a clock know what the warp did so far; what it does from here on is a further step.
static void publish(Clock& to) {
  join(to, clocks[my_warp()]);
  my_step()++;
}

static void begin_order() {
  mbarriers.clear();
  traces.assign(chunks.size(), Trace{});
  clocks.assign(fibers.size() / LANES, Clock{});
  for (unsigned w = 0; w < clocks.size(); w++) clocks[w].steps[w] = 1;
}

static void meet_all() {
  Clock all{};
  for (const Clock& clock : clocks) join(all, clock);
  for (unsigned w = 0; w < clocks.size(); w++) {
    clocks[w] = all;
    clocks[w].steps[w]++;
  }
}

static void make_barrier(unsigned address, unsigned arrivals) {
  if (address % 8 || address + 8 > memory.size()) fail("a barrier beyond the shared memory", address);
  if (mbarriers.size() == BARRIERS_MOST) fail("more barriers than the machine has", address);
  mbarriers.push_back({address, arrivals, arrivals, 0, 0, my_warp(), my_step(), false, {}, {}});
}

static void fence_barriers() {
  for (MBarrier& barrier : mbarriers) barrier.fenced |= barrier.maker == my_warp();
}

static unsigned barrier_at(unsigned address) {
  for (unsigned b = 0; b < mbarriers.size(); b++) {
    const MBarrier& barrier = mbarriers[b];
    if (barrier.address != address) continue;
    if (!barrier.fenced) fail("a barrier that is used before a fence", address);
    if (!known(barrier.maker, barrier.step)) fail("a barrier that is used before all know of it", address);
    return b;
  }
  fail("a barrier that nobody initialised", address);
}

static void end_phase(unsigned which) {
  MBarrier& barrier = mbarriers[which];
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  barrier.ended = barrier.arriving;
  barrier.ended.steps[WARPS_MOST + which] = barrier.phase;
  for (Fiber& other : fibers) {
    if (other.state == AT_PHASE) other.state = READY;  // it looks again
  }
}

static void arrive(unsigned address, unsigned bytes) {
  const unsigned which = barrier_at(address);
  MBarrier& barrier = mbarriers[which];
  if (!barrier.pending) fail("an arrival beyond those of the phase", address);
  publish(barrier.arriving);
  barrier.bytes += bytes;
  barrier.pending--;
  end_phase(which);
}

static void wait_for_phase(unsigned address, unsigned parity) {
  const unsigned which = barrier_at(address);
  while (mbarriers[which].phase % 2 == parity) yield(AT_PHASE);
  join(clocks[my_warp()], mbarriers[which].ended);
}

static Trace& trace_at(unsigned address) {
  chunk_at(address);
  return traces[address / CHUNK];
}

// A copy may begin where all that was read and written is known to be over.
static void check_free(unsigned address) {
  Trace& trace = trace_at(address);
  if (trace.coming) fail("a copy to where another is on its way", address);
  if (trace.under_way) fail("a copy over what a product reads that is under way", address);
  if (!known(trace.writer, trace.step)) fail("a copy over what was not waited for", address);
  for (unsigned w = 0; w < clocks.size(); w++) {
    if (!known(w, trace.read[w])) fail("a copy over what another warp reads", address);
  }
  trace.coming = true;
  chunks[address / CHUNK].elsewhere = true;
  memset(&memory[address], POISON, CHUNK);
}

static void check_readable(unsigned address) {
  const Trace& trace = trace_at(address);
  if (trace.coming) fail("a read of what is on its way: not waited for", address);
  if (!trace.step) fail("a read of what nobody wrote", address);
  if (!known(trace.writer, trace.step)) fail("a read of what was not waited for", address);
}

static void remember_read(unsigned address) { trace_at(address).read[my_warp()] = my_step(); }

static void read_elsewhere(unsigned address) {
  check_readable(address);
  remember_read(address);
}

}  // namespace machine
