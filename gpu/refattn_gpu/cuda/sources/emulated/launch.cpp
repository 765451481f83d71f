// The kernel ENTRY of KERNEL_FILE as a function of a shared library: blocks one after another.
#include KERNEL_FILE

static Job launched;
#if MAPS
static Maps told;
#endif

// Run a kernel on what the ranges (begin, bytes) of the host's memory hold, and on maps of tensors if it
// takes any. Returns the first fault that was found, or "".
extern "C" const char* run(const Job* job, const void* maps, const machine::Range* ranges,
                           unsigned count, unsigned blocks, bool backwards) {
  launched = *job;
  machine::ranges.assign(ranges, ranges + count);
#if MAPS
  memcpy(&told, maps, sizeof told);
  machine::body = [] { ENTRY(launched, told); };
#else
  machine::body = [] { ENTRY(launched); };
#endif
  machine::fault[0] = 0;
  for (machine::block = 0; machine::block < blocks; machine::block++) {
    if (!machine::run_block(THREADS, SHARED_BYTES, backwards)) break;
  }
  machine::stacks.reset();  // the library stays loaded
  return machine::fault;
}
