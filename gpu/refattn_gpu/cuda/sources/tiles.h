// Tiles in shared memory, and products of them on tensor cores.
//
// A row of a tile is CHUNKS chunks of 16 bytes. ldmatrix reads one chunk of each of 8 rows at
// once: if chunk c of every row lay below chunk c of the row before, all 8 would be in the same
// banks, and the read would take 8 turns. So the chunks of a row are permuted by XOR with its number
// ("swizzle"), which puts the 8 into different banks.
#pragma once
#include "cells.h"

constexpr int THREADS = 32 * (WARPS + COPYING);  // warps that own rows, and those that only copy
constexpr int EACH = 16 / sizeof(Number);  // numbers of a chunk
constexpr int CHUNKS = FEATURES / EACH;
constexpr int M_TILES = ROWS / SHARES / 16;   // tiles of 16 rows that a warp has
constexpr int STAGE_KEYS = WARPS / SHARES * COLS;  // of a stage, of which a warp multiplies COLS
constexpr int PERMUTED = CHUNKS < 8 ? CHUNKS : 8;
constexpr u32 Q_BYTES = ROWS * CHUNKS * 16, K_BYTES = STAGE_KEYS * CHUNKS * 16;
constexpr u32 STAGE_BYTES = 2 * K_BYTES;  // K_j and V_j
constexpr u32 TILE_BYTES = OWN_TILES * Q_BYTES + STAGES * STAGE_BYTES;  // OWN_TILES stay, stages pass
constexpr u32 SHARED_BYTES =  // weights, and barriers of copies
    TILE_BYTES + ROWS * WEIGHT_BYTES + (COPYING ? 128 : 0);

static_assert(ROWS % (16 * SHARES) == 0 && SPLIT % STAGE_KEYS == 0 && COLS % 16 == 0 && FEATURES % 32 == 0, "tile sizes");

// A row of a thread: of 16 rows it has two.
DEVICE int row_of(const Place& at, int t, int half) {
  return at.i_first + at.warp * 16 * M_TILES + 16 * t + at.lane / 4 + 8 * half;
}

DEVICE u32 chunk_address(u32 tile, int row, int chunk) {
  const int key = row / (8 / PERMUTED) % PERMUTED;
  return tile + (row * CHUNKS + (chunk ^ key)) * 16;
}

// The address of a chunk that lies so many rows, 8 or a multiple, and pairs of chunks from another. The
// permutation repeats every 8 rows, and XOR with an even number comes to the same before it and after:
// a lane needs one address a tile, and one instruction a pair.
DEVICE u32 moved(u32 address, int rows, int pairs) {
  return (address ^ 32 * pairs) + rows * CHUNKS * 16;
}

// Begin to copy rows first, ..., first + COUNT - 1 of a head, every thread its share; zeros stand
// for rows at or beyond `rows` and for features at or beyond d, whose memory is not read. Addresses that
// are made beforehand take registers: AT_ONCE limits them.
template <int COUNT, int AT_ONCE = 64>
DEVICE void copy_tile(u32 tile, const Number* head, i64 stride, int first, int rows, int d) {
#pragma unroll AT_ONCE
  for (int k = 0; k < (COUNT * CHUNKS + THREADS - 1) / THREADS; k++) {
    const int which = k * THREADS + thread_index();
    const int row = which / CHUNKS, chunk = which % CHUNKS;
    if (COUNT * CHUNKS % THREADS && row >= COUNT) break;
    const bool there = first + row < rows && EACH * chunk < d;
    const Number* from = there ? head + (first + row) * stride + EACH * chunk : head;
    cp_async_16(chunk_address(tile, row, chunk), from, there);
  }
}

// Where a lane begins to read 16 rows and two chunks of Q_i: the left operand of an mma.
DEVICE u32 left_address(u32 tile, int row, int lane) {
  return chunk_address(tile, row + lane % 16, lane / 16);
}

// The same of 16 keys of K_j, two right operands.
DEVICE u32 right_address(u32 tile, int lane) {
  return chunk_address(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
