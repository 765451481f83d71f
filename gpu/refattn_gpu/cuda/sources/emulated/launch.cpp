// The kernel ENTRY of KERNEL_FILE as a function of a shared library: blocks one after another.
#include KERNEL_FILE

static Job launched;

// Run a kernel on what the ranges (begin, bytes) of the host's memory hold. Returns the first fault
// that was found, or "".
extern "C" const char* run(
    const Job* job, const machine::Range* ranges, unsigned count, unsigned blocks, bool backwards) {
  launched = *job;
  machine::ranges.assign(ranges, ranges + count);
  machine::body = [] { ENTRY(launched); };
  machine::fault[0] = 0;
  for (machine::block = 0; machine::block < blocks; machine::block++) {
    if (!machine::run_block(THREADS, SHARED_BYTES, backwards)) break;
  }
  return machine::fault;
}
