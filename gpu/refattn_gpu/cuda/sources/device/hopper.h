// What a kernel asks of a Hopper (sm_90a) beyond primitives.h: barriers that count bytes, copies of whole
// boxes, products of warp groups. A PTX instruction a function; ../emulated has the same names.
//
// What the instructions mean is taken from NVIDIA's PTX ISA, sections "Parallel Synchronization and
// Communication Instructions: mbarrier", "Data Movement and Conversion Instructions: cp.async.bulk.tensor"
// and "Asynchronous Warpgroup Level Matrix Instructions"; the bits of a descriptor and the layouts behind
// them also from CUTLASS, include/cute/arch/mma_sm90_desc.hpp and include/cute/atom/mma_traits_sm90_gmma.hpp.
#pragma once
#include "primitives.h"

// Where a tensor lies and which box of it is copied at once; the driver writes it (CUtensorMap).
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// A barrier in shared memory whose phases end when so many have arrived and all expected bytes are there.
DEVICE void mbarrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Before the others' and the copies' first use of what this thread initialised (as CUTLASS,
// include/cutlass/arch/barrier.h, does).
DEVICE void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void mbarrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the phase wait for bytes too.
DEVICE void mbarrier_arrive_expecting(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Wait for the end of the phase of this parity: of the one under way, or it was the one before.
DEVICE void mbarrier_wait(unsigned barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!ended);
}

// Begin to copy a map's box that begins at these coordinates, and count its bytes on the barrier: all of
// them, also those of the zeros that stand for what lies outside of the tensor.
DEVICE void copy_box(unsigned to, const TensorMap& map, int feature, int row, int head, int item,
                     unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
               "l"((unsigned long long)&map), "r"(feature), "r"(row), "r"(head), "r"(item), "r"(barrier)
               : "memory");
}

// Registers of each thread of the warp group from here on.
template <int COUNT>
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Between what this warp did to registers and products that read or write them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products begun since the last call are one group.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most N groups, the newest, are under way.
template <int N>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// No use of these numbers moves from one side of this line to the other: the compiler does not know
// that products write and read them until they are waited for.
template <int COUNT>
DEVICE void pin(float* numbers) {
#pragma unroll
  for (int e = 0; e < COUNT; e++) asm volatile("" : "+f"(numbers[e])::"memory");
}
template <int COUNT>
DEVICE void pin(unsigned* numbers) {
#pragma unroll
  for (int e = 0; e < COUNT; e++) asm volatile("" : "+r"(numbers[e])::"memory");
}

// The names and the operands of a thread's part of a result of 64 x N: N / 2 numbers.
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32                                                                                  \
  NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                  \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
           "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                 \
  NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
           "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
           "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
           "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
           "%124, %125, %126, %127"
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define NUMBERS_16 SIXTEEN(0)
#define NUMBERS_32 SIXTEEN(0), SIXTEEN(16)
#define NUMBERS_64 NUMBERS_32, SIXTEEN(32), SIXTEEN(48)
#define NUMBERS_128 NUMBERS_64, SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)

// A, B, ADD and TURN name the operands after the result: the factors, whether to add, whether B is
// transposed.
#define WGMMA(N, NAMES, A, B, ADD, REST)                                                          \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT "." FORMAT " {" NAMES "}, " A ", " B   \
  ", p, 1, 1, " REST ";\n}"
#define WGMMA_SHARED(N, NAMES, NUMBERS, A, B, ADD, TURN)                                          \
  asm volatile(WGMMA(N, NAMES, A, B, ADD, "0, " TURN)                                             \
               : NUMBERS                                                                          \
               : "l"(a), "l"(b), "r"((int)add), "n"((int)TRANSPOSED)                              \
               : "memory")
#define WGMMA_REGISTERS(N, NAMES, NUMBERS, A, B, ADD, TURN)                                       \
  asm volatile(WGMMA(N, NAMES, "{" A "}", B, ADD, TURN)                                           \
               : NUMBERS                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),               \
                 "n"((int)TRANSPOSED)                                                             \
               : "memory")

// Begin C += A B for a warp group, or C = A B if nothing is to be added: A of 64 x 16 and B of 16 x N in
// shared memory, as descriptors tell. Rows of A lie by k; so do columns of B, unless it is transposed,
// where the N numbers of a k lie side by side.
template <int N, bool TRANSPOSED>
DEVICE void wgmma_shared(float* c, unsigned long long a, unsigned long long b, bool add) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256, "a width of no kernel");
  if constexpr (N == 32) WGMMA_SHARED(32, NAMES_16, NUMBERS_16, "%16", "%17", "%18", "%19");
  if constexpr (N == 64) WGMMA_SHARED(64, NAMES_32, NUMBERS_32, "%32", "%33", "%34", "%35");
  if constexpr (N == 128) WGMMA_SHARED(128, NAMES_64, NUMBERS_64, "%64", "%65", "%66", "%67");
  if constexpr (N == 256) WGMMA_SHARED(256, NAMES_128, NUMBERS_128, "%128", "%129", "%130", "%131");
}

// The same with A in registers: each warp has 16 rows, as the left operand of mma.m16n8k16.
template <int N, bool TRANSPOSED>
DEVICE void wgmma_registers(float* c, const unsigned (&a)[4], unsigned long long b, bool add) {
  static_assert(N == 64 || N == 128 || N == 256, "a width of no kernel");
  if constexpr (N == 64) {
    WGMMA_REGISTERS(64, NAMES_32, NUMBERS_32, "%32, %33, %34, %35", "%36", "%37", "%38");
  }
  if constexpr (N == 128) {
    WGMMA_REGISTERS(128, NAMES_64, NUMBERS_64, "%64, %65, %66, %67", "%68", "%69", "%70");
  }
  if constexpr (N == 256) {
    WGMMA_REGISTERS(
        256, NAMES_128, NUMBERS_128, "%128, %129, %130, %131", "%132", "%133", "%134");
  }
}
