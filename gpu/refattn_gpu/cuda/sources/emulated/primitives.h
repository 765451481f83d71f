// What a kernel asks of a device, done by the machine; ../device has the same names and their words.
#pragma once
#include <cmath>

#include "machine.h"

#define DEVICE static inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

DEVICE unsigned thread_index() { return machine::current; }
DEVICE unsigned block_index() { return machine::block; }
DEVICE unsigned shared_memory() { return 0; }

template <class T>
DEVICE T read(const T* from) {
  if (!machine::readable(from, sizeof(T))) machine::fail("a read outside of every array", 0);
  return *from;
}

DEVICE void cp_async_16(unsigned to, const void* from, bool there) {
  machine::begin_copy(to, from, there);
}
DEVICE void cp_async_commit() { machine::close_group(); }
template <int N>
DEVICE void cp_async_wait() { machine::wait_for_groups(N); }
DEVICE void barrier() { machine::wait_at_barrier(); }

struct Matrices {
  unsigned row;
  unsigned* r;
};

// Eight rows that are read at once must lie in different banks: 128 bytes are one turn.
static void check_banks(Matrices* (&all)[32], int matrix) {
  unsigned seen = 0;
  for (int row = 0; row < 8; row++) seen |= 1u << all[8 * matrix + row]->row / 16 % 8;
  if (seen != 0xFF) machine::fail("rows of ldmatrix in the same banks", all[8 * matrix]->row);
}

template <bool TRANSPOSED>
static void load_matrices(Matrices* (&all)[32]) {
  for (int matrix = 0; matrix < 4; matrix++) {
    check_banks(all, matrix);
    unsigned short numbers[8][8];
    for (int row = 0; row < 8; row++) {
      memcpy(numbers[row], machine::read_chunk(all[8 * matrix + row]->row), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int a = lane / 4, b = lane % 4 * 2;
      const unsigned low = TRANSPOSED ? numbers[b][a] : numbers[a][b];
      const unsigned high = TRANSPOSED ? numbers[b + 1][a] : numbers[a][b + 1];
      all[lane]->r[matrix] = low | high << 16;
    }
  }
}

DEVICE void ldmatrix_x4(unsigned (&r)[4], unsigned row) {
  Matrices mine{row, r};
  machine::together("ldmatrix", mine, load_matrices<false>);
}

DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], unsigned row) {
  Matrices mine{row, r};
  machine::together("ldmatrix.trans", mine, load_matrices<true>);
}

struct Load {
  unsigned from;
  float number;
};

// Two lanes may read one number, but not two of one bank: 32 banks are 4 bytes wide.
static void load_numbers(Load* (&all)[32]) {
  for (int lane = 0; lane < 32; lane++) {
    const unsigned from = all[lane]->from;
    for (int other = 0; other < lane; other++) {
      if (all[other]->from != from && (all[other]->from ^ from) % 128 / 4 == 0) {
        machine::fail("numbers in the same bank", from);
      }
    }
    memcpy(&all[lane]->number, machine::read_chunk(from / 16 * 16) + from % 16, 4);
  }
}

DEVICE float load_shared(unsigned from) {
  Load mine{from, 0.0f};
  machine::together("ld.shared", mine, load_numbers);
  return mine.number;
}

#if BFLOAT16
DEVICE float widen(unsigned short number) {
  const unsigned bits = (unsigned)number << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}

DEVICE unsigned short narrow(float number) {  // to nearest, ties to even
  unsigned bits;
  memcpy(&bits, &number, 4);
  if (number != number) return 0x7FFF;
  return (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
#else
DEVICE float widen(unsigned short number) {
  _Float16 r;
  memcpy(&r, &number, 2);
  return (float)r;
}

DEVICE unsigned short narrow(float number) {
  const _Float16 rounded = (_Float16)number;
  unsigned short r;
  memcpy(&r, &rounded, 2);
  return r;
}
#endif

DEVICE unsigned pack(float low, float high) { return narrow(low) | (unsigned)narrow(high) << 16; }

struct Product {
  float* c;
  const unsigned* a;
  unsigned b[2];
};

// A number of the left operand, and of the right one, from the lane and the register that hold it.
DEVICE float left_of(Product* (&all)[32], int row, int k) {
  const unsigned pair = all[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2];
  return widen((unsigned short)(pair >> 16 * (k % 2)));
}

DEVICE float right_of(Product* (&all)[32], int k, int col) {
  const unsigned pair = all[col * 4 + k % 8 / 2]->b[k / 8];
  return widen((unsigned short)(pair >> 16 * (k % 2)));
}

// Exact products, one rounding of their sum: a device's tensor cores round more often, and their
// bits are not these.
static void multiply(Product* (&all)[32]) {
  float A[16][16], B[16][8];
  for (int k = 0; k < 16; k++) {
    for (int row = 0; row < 16; row++) A[row][k] = left_of(all, row, k);
    for (int col = 0; col < 8; col++) B[k][col] = right_of(all, k, col);
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int e = 0; e < 4; e++) {
      double sum = all[lane]->c[e];
      for (int k = 0; k < 16; k++) sum += (double)A[lane / 4 + e / 2 * 8][k] * B[k][lane % 4 * 2 + e % 2];
      all[lane]->c[e] = (float)sum;
    }
  }
}

DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Product mine{c, a, {b0, b1}};
  machine::together("mma", mine, multiply);
}

DEVICE unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}

DEVICE float float_of(unsigned bits) {
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
DEVICE float widen(float number) { return number; }

static void multiply_tf32(Product* (&all)[32]) {
  for (int lane = 0; lane < 32; lane++) {
    for (int e = 0; e < 4; e++) {
      const int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
      double sum = all[lane]->c[e];
      for (int k = 0; k < 8; k++) {
        const unsigned left = all[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2];
        const unsigned right = all[col * 4 + k % 4]->b[k / 4];
        if ((left | right) & 0x1FFF) machine::fail("an operand of mma that is not TF32", lane);
        sum += (double)float_of(left) * float_of(right);
      }
      all[lane]->c[e] = (float)sum;
    }
  }
}

DEVICE void mma_m16n8k8(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Product mine{c, a, {b0, b1}};
  machine::together("mma.tf32", mine, multiply_tf32);
}

DEVICE float times(float x, float y) {
  volatile float product = x * y;  // a compiler that makes multiply-adds makes none of it
  return product;
}

DEVICE float infinity() { return INFINITY; }

DEVICE float ex2(float x) {
  const float r = exp2f(x);
  return r < 1.17549435e-38f ? 0.0f : r;  // NaN passes
}

struct Shuffle {
  float number;
  int lane;
  float result;
};

static void exchange(Shuffle* (&all)[32]) {
  for (Shuffle* mine : all) mine->result = all[mine->lane]->number;
}

DEVICE float shuffle(float number, int lane) {
  Shuffle mine{number, lane, 0.0f};
  machine::together("shuffle", mine, exchange);
  return mine.result;
}

DEVICE float shuffle_xor(float number, int bits) {
  return shuffle(number, (int)(machine::current % 32) ^ bits);
}

struct Vote {
  bool holds;
  unsigned result;
};

static void count(Vote* (&all)[32]) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++) votes |= (unsigned)all[lane]->holds << lane;
  for (Vote* mine : all) mine->result = votes;
}

DEVICE unsigned ballot(bool holds) {
  Vote mine{holds, 0};
  machine::together("ballot", mine, count);
  return mine.result;
}
