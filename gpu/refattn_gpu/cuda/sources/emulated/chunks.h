// Chunks of 16 bytes read and written by plain instructions; ../device has the same names and their words.
#pragma once
#include "primitives.h"

namespace machine {

// Where a thread may store 16 bytes at once.
static unsigned char* written_chunk(unsigned address, int thread) {
  Chunk& chunk = chunk_at(address);
  const unsigned warp = thread / LANES;
  if (chunk.writer >= 0) fail("a store to where a copy is on its way", address);
  if (chunk.arrived == barriers && !shared_with(chunk, thread)) {
    fail("a store over what another thread wrote: no barrier between", address);
  }
  if (chunk.read == barriers &&
      (chunk.reader != warp || (chunk.read_turn == turns[warp] && chunk.lane != thread))) {
    fail("a store over what another thread reads: no barrier between", address);
  }
  chunk.arrived = barriers;
  chunk.owner = thread;
  chunk.turn = turns[warp];
  return &memory[address];
}

}  // namespace machine

struct Passage {
  unsigned at;
  float* numbers;
};

// 8 lanes are served at once: their chunks are the same or lie in different banks.
static void check_chunks(Passage* (&all)[32]) {
  for (int lane = 0; lane < 32; lane++) {
    for (int other = lane / 8 * 8; other < lane; other++) {
      const unsigned apart = all[lane]->at ^ all[other]->at;
      if (apart && apart / 16 % 8 == 0) machine::fail("chunks in the same banks", all[lane]->at);
    }
  }
}

static void load_chunks(Passage* (&all)[32]) {
  check_chunks(all);
  for (int lane = 0; lane < 32; lane++) {
    const int thread = (int)machine::current / 32 * 32 + lane;
    memcpy(all[lane]->numbers, machine::read_chunk(all[lane]->at, thread), 16);
  }
}

DEVICE void load_chunk(float (&x)[4], unsigned from) {
  Passage mine{from, x};
  machine::together("ld.shared.v4", mine, load_chunks);
}

static void store_chunks(Passage* (&all)[32]) {
  check_chunks(all);
  for (int lane = 0; lane < 32; lane++) {
    const int thread = (int)machine::current / 32 * 32 + lane;
    memcpy(machine::written_chunk(all[lane]->at, thread), all[lane]->numbers, 16);
  }
}

DEVICE void store_chunk(unsigned to, const float (&x)[4]) {
  float numbers[4] = {x[0], x[1], x[2], x[3]};
  Passage mine{to, numbers};
  machine::together("st.shared.v4", mine, store_chunks);
}

struct Meeting {};

static void meet(Meeting* (&)[32]) { machine::turns[machine::current / 32]++; }

DEVICE void warp_barrier() {
  Meeting mine;
  machine::together("a barrier of the warp", mine, meet);
}

DEVICE void put_chunk(float* to, const float (&x)[4]) {
  if ((unsigned long long)to % 16) machine::fail("a place that is no multiple of 16", 0);
  memcpy(to, x, 16);
}

DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

DEVICE float power(float x) { return exp2f(x); }
