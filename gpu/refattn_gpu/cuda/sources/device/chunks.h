// Chunks of 16 bytes, four numbers, read and written by plain instructions; ../emulated has the same names.
#pragma once
#include "primitives.h"

// Four numbers of shared memory, at a multiple of 16 bytes. Eight lanes are served at once, and should ask
// for the same chunk or for different banks.
DEVICE void load_chunk(float (&x)[4], unsigned from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(from)
               : "memory");
}

DEVICE void store_chunk(unsigned to, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

// What the lanes of a warp stored before it, each may read after it.
DEVICE void warp_barrier() { __syncwarp(); }

// Four numbers of an array, at a multiple of 16 bytes.
DEVICE void put_chunk(float* to, const float (&x)[4]) {
  *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
}

// a b + c, rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// 2^x, to 2^-22 of its size, or to 2^-149 where numbers have fewer bits.
DEVICE float power(float x) {
  float r;
  asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
