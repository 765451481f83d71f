// A block of CUDA threads on one thread of the host, each a fiber with a stack of its own.
//
// The fibers of a warp run until all 32 have come to the same operation of the warp, which is then
// done for all at once; a warp runs until it waits at a barrier, and only then the next one. Warps and
// lanes run from first to last or from last to first: what is right does not depend on it.
//
// Shared memory is watched by chunks of 16 bytes, so that a fault is found in any order of threads:
// a read of what is still on its way, or of what arrived after the last barrier; a copy or a store over
// what was read since the last barrier; a copy that nobody waited for. Memory holds poison before it is written,
// and copies happen as late as they may: at the wait that releases them.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace machine {

constexpr unsigned LANES = 32, CHUNK = 16, STACK = 256 * 1024;
constexpr unsigned char POISON = 0xFF;  // NaN in every format

struct Copy {
  unsigned to;
  const unsigned char* from;  // null: zeros
};

enum State { READY, AT_WARP, AT_BARRIER, AT_PHASE, DONE };

struct Fiber {
  State state;
  bool begun;
  ucontext_t context;  // where it begins
  jmp_buf point;       // where it goes on
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;  // not yet a group
  void* posted;            // arguments of the warp's operation
  const char* operation;
};

struct Chunk {
  int writer;      // thread whose copy is on its way, or -1
  long arrived;    // barriers passed when it was written; -1 before
  long read;       // barriers passed at the last read; -1 before any
  unsigned reader;  // warp that read it
  bool elsewhere;  // written by other instructions than copies of chunks: More tells what may read it
  int owner = -1;  // thread that stored it, or -1 where a copy came
  long turn = 0;   // barriers of the owner's warp at the store
  int lane = -1;   // thread that read it since its warp's last barrier, or -2 for several
  long read_turn = 0;
};

// What a machine with more instructions does besides (hopper.h).
struct More {
  void (*begin)();         // before a block's first thread
  void (*meet)();          // when all have come to a barrier
  bool (*late)();          // when no thread can go on: do something that was put off; false if nothing was
  void (*end)();           // after a block's last thread
  void (*read)(unsigned);  // before a read of what it wrote itself
};

struct Range {
  const unsigned char* begin;
  unsigned long long bytes;
};

static std::vector<Fiber> fibers;
static std::unique_ptr<char[]> stacks;  // one after another; memory that is never touched is never given
static std::vector<unsigned char> memory;  // the block's shared memory
static std::vector<Chunk> chunks;
static std::vector<Range> ranges;  // what a kernel may read of the host's memory
static jmp_buf scheduler;
static unsigned current, block;
static long barriers;
static std::vector<long> turns;  // barriers of a warp alone, by warp
static void (*body)();
static char fault[400];  // the first one found; empty if none
static bool reversed;    // the order of warps and lanes
static More more = {[] {}, [] {}, [] { return false; }, [] {}, [](unsigned) {}};

static void note(const char* what, unsigned long long which) {
  if (!fault[0]) {
    snprintf(fault, sizeof fault, "%s (%llu) [thread %u of block %u, after %ld barriers]", what,
             which, current, block, barriers);
  }
}

[[noreturn]] static void fail(const char* what, unsigned long long which) {
  note(what, which);
  longjmp(scheduler, 2);
}

static void yield(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  if (_setjmp(me.point) == 0) longjmp(scheduler, 1);
}

static void enter() {
  body();
  Fiber& me = fibers[current];
  if (!me.groups.empty() || !me.open.empty()) fail("copies that were not waited for", me.groups.size());
  me.state = DONE;
  longjmp(scheduler, 1);
}

// Do an operation for a whole warp once all its lanes are there.
template <class Arguments>
static void together(const char* operation, Arguments& mine, void (*work)(Arguments* (&)[LANES])) {
  Fiber& me = fibers[current];
  me.posted = &mine;
  me.operation = operation;
  const unsigned first = current / LANES * LANES;
  for (unsigned lane = 0; lane < LANES; lane++) {
    const Fiber& other = fibers[first + lane];
    if (first + lane != current && other.state != AT_WARP) return yield(AT_WARP);
    if (strcmp(other.operation, operation)) fail("lanes of a warp at different operations", lane);
  }
  Arguments* all[LANES];
  for (unsigned lane = 0; lane < LANES; lane++) all[lane] = (Arguments*)fibers[first + lane].posted;
  work(all);
  for (unsigned lane = 0; lane < LANES; lane++) fibers[first + lane].state = READY;
}

static void wait_at_barrier() {
  fibers[current].state = AT_BARRIER;
  for (const Fiber& other : fibers) {
    if (other.state != AT_BARRIER) return yield(AT_BARRIER);
  }
  barriers++;
  more.meet();
  for (Fiber& other : fibers) other.state = READY;
}

static Chunk& chunk_at(unsigned address) {
  if (address % CHUNK) fail("an address that is no multiple of 16", address);
  if (address / CHUNK >= chunks.size()) fail("an address beyond the shared memory", address);
  return chunks[address / CHUNK];
}

static bool readable(const void* from, unsigned long long bytes) {
  for (const Range& range : ranges) {
    const unsigned long long before = (const unsigned char*)from - range.begin;
    if (before <= range.bytes && bytes <= range.bytes - before) return true;
  }
  return false;
}

static void begin_copy(unsigned to, const void* from, bool there) {
  Chunk& chunk = chunk_at(to);
  if (chunk.writer >= 0) fail("a copy to where another is on its way", to);
  if (chunk.read == barriers && chunk.reader != current / LANES) {
    fail("a copy over what another warp reads: no barrier between", to);
  }
  if ((unsigned long long)from % CHUNK) fail("a source that is no multiple of 16", to);
  if (there && !readable(from, CHUNK)) fail("a copy from outside of every array", to);
  chunk.writer = (int)current;
  memset(&memory[to], POISON, CHUNK);
  fibers[current].open.push_back({to, there ? (const unsigned char*)from : nullptr});
}

static void close_group() {
  Fiber& me = fibers[current];
  me.groups.push_back(me.open);
  me.open.clear();
}

static void wait_for_groups(unsigned under_way) {
  Fiber& me = fibers[current];
  while (me.groups.size() > under_way) {
    for (const Copy& copy : me.groups.front()) {
      if (copy.from) memcpy(&memory[copy.to], copy.from, CHUNK);
      else memset(&memory[copy.to], 0, CHUNK);
      chunks[copy.to / CHUNK].writer = -1;
      chunks[copy.to / CHUNK].arrived = barriers;
      chunks[copy.to / CHUNK].owner = -1;
    }
    me.groups.erase(me.groups.begin());
  }
}

// Whether a thread may read what another one stored since the last barrier.
static bool shared_with(const Chunk& chunk, int thread) {
  if (chunk.owner < 0 || chunk.owner == thread) return chunk.owner == thread;
  const unsigned warp = thread / LANES;
  return chunk.owner / LANES == warp && chunk.turn < turns[warp];
}

static const unsigned char* read_chunk(unsigned address, int thread = (int)current) {
  Chunk& chunk = chunk_at(address);
  if (chunk.elsewhere) {
    more.read(address);
    return &memory[address];
  }
  if (chunk.writer >= 0) fail("a read of what is on its way: not waited for", address);
  if (chunk.arrived < 0) fail("a read of what nobody wrote", address);
  if (chunk.arrived == barriers && !shared_with(chunk, thread)) {
    fail("a read of what another thread wrote: no barrier between", address);
  }
  const unsigned warp = thread / LANES;
  const bool again = chunk.read == barriers && chunk.reader == warp && chunk.read_turn == turns[warp];
  chunk.lane = again && chunk.lane != thread ? -2 : thread;
  chunk.read = barriers;
  chunk.reader = warp;
  chunk.read_turn = turns[warp];
  return &memory[address];
}

static void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = &stacks[(size_t)thread * STACK];
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.begun = true;
  setcontext(&fiber.context);
}

// Run a fiber until it waits or ends; false if it found a fault.
static bool resume(unsigned thread) {
  current = thread;
  const int came = _setjmp(scheduler);
  if (came) return came == 1;
  if (fibers[thread].begun) longjmp(fibers[thread].point, 1);
  start(thread);
  return false;
}

static bool run_block(unsigned threads, unsigned bytes, bool backwards) {
  reversed = backwards;
  fibers.assign(threads, Fiber{});
  stacks.reset(new char[(size_t)threads * STACK]);
  memory.assign(bytes, POISON);
  chunks.assign(bytes / CHUNK, Chunk{-1, -1, -1, 0, false});
  barriers = 0;
  turns.assign(threads / LANES, 0);
  more.begin();
  for (unsigned ended = 0; ended < threads;) {
    bool moved = false;
    for (unsigned k = 0; k < threads / LANES; k++) {
      const unsigned first = (backwards ? threads / LANES - 1 - k : k) * LANES;
      for (bool again = true; again;) {
        again = false;
        for (unsigned l = 0; l < LANES; l++) {
          const unsigned thread = first + (backwards ? LANES - 1 - l : l);
          if (fibers[thread].state != READY) continue;
          if (!resume(thread)) return false;
          ended += fibers[thread].state == DONE;
          moved = again = true;
        }
      }
    }
    if (!moved && !(more.late() && !fault[0])) {
      if (!fault[0]) snprintf(fault, sizeof fault, "threads that wait for ever (%u ended of %u) [block %u]", ended, threads, block);
      return false;
    }
  }
  more.end();
  return !fault[0];
}

}  // namespace machine
