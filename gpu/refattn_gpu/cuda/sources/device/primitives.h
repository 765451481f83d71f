// What a kernel asks of a device, a PTX instruction a function; ../emulated has the same names.
#pragma once

#define DEVICE __device__ __forceinline__

DEVICE unsigned thread_index() { return threadIdx.x; }
DEVICE unsigned block_index() { return blockIdx.x; }

// Address of the block's shared memory, in its own address space.
DEVICE unsigned shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return (unsigned)__cvta_generic_to_shared(bytes);
}

// A number that no thread writes.
template <class T>
DEVICE T read(const T* from) { return __ldg(from); }

// Begin to copy 16 bytes into shared memory; zeros, and nothing is read, where they are not there.
DEVICE void cp_async_16(unsigned to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The copies begun since the last call are one group.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most N of this thread's groups, the newest, are under way.
template <int N>
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE void barrier() { __syncthreads(); }

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(unsigned (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// A number in shared memory.
DEVICE float load_shared(unsigned from) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(from) : "memory");
  return r;
}

#if BFLOAT16
#define FORMAT "bf16"
#else
#define FORMAT "f16"
#endif

// C += A B on tensor cores, A of 16 x 16 and B of 16 x 8, accumulated in float32.
DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." FORMAT "." FORMAT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of TF32, A of 16 x 8 and B of 8 x 8: float32 whose last 13 bits are 0.
DEVICE void mma_m16n8k8(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to 16 bits, the first in the low half.
DEVICE unsigned pack(float low, float high) {
  unsigned r;
  asm("cvt.rn." FORMAT "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE float widen(unsigned short number) {
#if BFLOAT16
  return __uint_as_float((unsigned)number << 16);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(number));
  return r;
#endif
}

DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }

// A product that is rounded before anything is added to it.
DEVICE float times(float x, float y) { return __fmul_rn(x, y); }

DEVICE float infinity() { return __int_as_float(0x7f800000); }

DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
DEVICE float widen(float number) { return number; }

// 2^x, to 2^-22 of its size; below 2^-126 it is 0.
DEVICE float ex2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The number of the lane whose index differs in these bits, and of a lane.
DEVICE float shuffle_xor(float number, int bits) { return __shfl_xor_sync(~0u, number, bits); }
DEVICE float shuffle(float number, int lane) { return __shfl_sync(~0u, number, lane); }

// The lanes of the warp for which it holds, a bit each.
DEVICE unsigned ballot(bool holds) { return __ballot_sync(~0u, holds); }
