// Hopper's own instructions, done by the machine; ../device has the same names and says where their
// meaning is taken from.
//
// Everything happens as late as it may: a box arrives when no thread can go on without it, products are
// made at the wait that releases their group. Until then what they write holds poison, and what they
// read must stay as it is.
//
// Warps are in no order but the one that barriers make. The machine keeps it by clocks: every warp counts
// its own steps, and knows of every other how far it had come when the two last met, by a barrier or by a
// phase that one ended and the other waited for. What a barrier's bytes wrote is counted by its phases.
// A chunk remembers who wrote it and which step of each warp read it last, so that a read, or a copy over
// it, is refused unless all this is known to have happened before: whatever order the threads run in.
#pragma once
#include "primitives.h"

namespace machine {

constexpr unsigned WARPS_MOST = 16, BARRIERS_MOST = 16, ACTORS = WARPS_MOST + BARRIERS_MOST;
constexpr unsigned REGISTERS = 64 * 1024;  // of a multiprocessor
constexpr unsigned SIGNAL = 0xFFBFFFFF;    // a NaN that no arithmetic leaves as it is

// Steps of every actor that are known to have happened: of warps, and of the barriers after them.
struct Clock {
  unsigned steps[ACTORS];
};

struct MBarrier {
  unsigned address, arrivals, pending, phase;
  long bytes;         // expected, and not yet there
  unsigned maker, step;  // the warp that initialised it, and when
  bool fenced;
  Clock arriving, ended;  // known to those who arrived, and to who waits for a phase that ended
};

// What is known of 16 bytes.
struct Trace {
  bool coming;               // a copy is on its way
  unsigned writer, step;     // actor
  unsigned under_way;        // products that read it and are not waited for
  unsigned read[WARPS_MOST];  // the step of each warp's last read
};

}  // namespace machine

// What the host tells of a tensor in place of the driver's bits: refattn_gpu/cuda/tensor_maps.py.
struct alignas(64) TensorMap {
  const unsigned char* data;
  unsigned long long sizes[4], strides[3];  // features, rows, heads, items; bytes from the second on
  unsigned box[2];                          // features and rows
  unsigned unused[14];
};

static_assert(sizeof(TensorMap) == 128, "the driver's record has 128 bytes");

namespace machine {

struct Box {
  TensorMap map;
  int place[4];
  unsigned to, barrier;  // an address, an index
};

// Numbers that products under way add to: a thread's memory holds poison until they are made.
struct Sums {
  float* numbers[LANES];
  unsigned each, products;
  std::vector<float> values;
};

// What a thread asks for.
struct Request {
  unsigned long long a, b;  // descriptors
  unsigned columns;
  bool transposed, add;
  float* numbers;
  const unsigned* left;  // registers of A, or null
};

struct Product {
  Request asked;  // by lane 0
  const unsigned* left[LANES];
  unsigned words[LANES][4];  // what was in the registers
};

struct WarpState {
  Clock clock;
  bool fenced;  // since products were last waited for
  unsigned registers;
  std::vector<std::vector<Product>> groups;
  std::vector<Product> open;
  std::vector<Sums> sums;
  size_t told;  // entries of its group's log
};

// What each of four warps does alike.
struct Entry {
  const char* what;
  unsigned long long words[3];
};

static std::vector<MBarrier> mbarriers;
static std::vector<Trace> traces;
static std::vector<Box> boxes;  // on their way
static std::vector<WarpState> warps;
static std::vector<std::vector<Entry>> logs;  // by warp group

static WarpState& my_warp() { return warps[current / LANES]; }

static void join(Clock& mine, const Clock& other) {
  for (unsigned a = 0; a < ACTORS; a++) {
    if (other.steps[a] > mine.steps[a]) mine.steps[a] = other.steps[a];
  }
}

// Let a clock know what the warp did so far; what it does from here on is a further step.
static void publish(Clock& to) {
  join(to, my_warp().clock);
  my_warp().clock.steps[current / LANES]++;
}

static bool known(unsigned actor, unsigned step) { return my_warp().clock.steps[actor] >= step; }

static void begin_hopper() {
  mbarriers.clear();
  boxes.clear();
  traces.assign(chunks.size(), Trace{});
  warps.assign(fibers.size() / LANES, WarpState{});
  logs.assign((warps.size() + 3) / 4, {});
  for (unsigned w = 0; w < warps.size(); w++) warps[w].clock.steps[w] = 1;
}

static void meet_all() {
  Clock all{};
  for (const WarpState& warp : warps) join(all, warp.clock);
  for (unsigned w = 0; w < warps.size(); w++) {
    warps[w].clock = all;
    warps[w].clock.steps[w]++;
  }
}

static void end_hopper() {
  if (!boxes.empty()) note("copies that were not waited for", boxes.size());
  for (const WarpState& warp : warps) {
    if (!warp.groups.empty() || !warp.open.empty()) note("products that were not waited for", 0);
  }
  for (size_t g = 0; g < logs.size(); g++) {
    for (size_t w = 4 * g; w < warps.size() && w < 4 * g + 4; w++) {
      if (warps[w].told != logs[g].size()) note("warps of a group at different products", w);
    }
  }
}

// Warps of a group must do this alike, in the same order.
static void alike(const char* what, unsigned long long x = 0, unsigned long long y = 0, unsigned long long z = 0) {
  WarpState& mine = my_warp();
  std::vector<Entry>& log = logs[current / LANES / 4];
  const Entry entry{what, {x, y, z}};
  if (mine.told == log.size()) log.push_back(entry);
  const Entry& first = log[mine.told++];
  if (strcmp(first.what, what) || memcmp(first.words, entry.words, sizeof entry.words)) {
    fail("warps of a group at different products", x);
  }
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
  join(my_warp().clock, mbarriers[which].ended);
}

static unsigned permuted(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

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
  for (unsigned w = 0; w < warps.size(); w++) {
    if (!known(w, trace.read[w])) fail("a copy over what another warp reads: no barrier between", address);
  }
  trace.coming = true;
  chunks[address / CHUNK].elsewhere = true;
  memset(&memory[address], POISON, CHUNK);
}

static void begin_box(const Box& box) {
  const TensorMap& map = box.map;
  if (map.box[0] * 2 != 128) fail("a box whose rows are not as wide as the permutation", map.box[0]);
  if (box.to % 1024) fail("a box that does not begin with the permutation", box.to);
  for (unsigned at = 0; at < 128 * map.box[1]; at += CHUNK) check_free(box.to + at);
  boxes.push_back(box);
}

// The number of a place in a tensor; 0 outside of it.
static unsigned short number_at(const TensorMap& map, const long long (&place)[4]) {
  const unsigned char* from = map.data + 2 * place[0];
  for (int axis = 0; axis < 4; axis++) {
    if (place[axis] < 0 || place[axis] >= (long long)map.sizes[axis]) return 0;
    if (axis) from += place[axis] * (long long)map.strides[axis - 1];
  }
  if (!readable(from, 2)) note("a copy from outside of every array", (unsigned long long)place[1]);
  unsigned short number = 0;
  if (!fault[0]) memcpy(&number, from, 2);
  return number;
}

static bool deliver_box() {
  if (boxes.empty()) return false;
  const auto which = reversed ? boxes.end() - 1 : boxes.begin();
  const Box box = *which;
  boxes.erase(which);
  MBarrier& barrier = mbarriers[box.barrier];
  for (unsigned row = 0; row < box.map.box[1]; row++) {
    for (unsigned feature = 0; feature < box.map.box[0]; feature++) {
      const unsigned short number = number_at(
          box.map, {box.place[0] + (long long)feature, box.place[1] + (long long)row, box.place[2], box.place[3]});
      memcpy(&memory[permuted(box.to + 128 * row + 2 * feature)], &number, 2);
    }
  }
  for (unsigned at = 0; at < 128 * box.map.box[1]; at += CHUNK) {
    Trace& trace = traces[(box.to + at) / CHUNK];
    trace.coming = false;
    trace.writer = WARPS_MOST + box.barrier;
    trace.step = barrier.phase + 1;
  }
  barrier.bytes -= 128 * box.map.box[1];
  if (barrier.bytes < 0) note("more bytes than a phase expects", barrier.address);
  end_phase(box.barrier);
  return true;
}

static void check_readable(unsigned address) {
  const Trace& trace = trace_at(address);
  if (trace.coming) fail("a read of what is on its way: not waited for", address);
  if (!trace.step) fail("a read of what nobody wrote", address);
  if (!known(trace.writer, trace.step)) fail("a read of what was not waited for", address);
}

static void read_elsewhere(unsigned address) {
  check_readable(address);
  traces[address / CHUNK].read[current / LANES] = my_warp().clock.steps[current / LANES];
}

static const bool extended = (more = {begin_hopper, meet_all, deliver_box, end_hopper, read_elsewhere}, true);

// The chunk of a matrix's row or column and half, and the eight numbers in it. By k: 8 rows lie 128 bytes
// apart, the next 8 after `stride`. Transposed: 64 numbers of a k lie side by side, the next 64 after
// `leading`; 8 of k lie 128 bytes apart, the next 8 after `stride`.
struct Matrix {
  unsigned from, leading, stride;

  explicit Matrix(unsigned long long bits)
      : from((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) fail("a permutation that is not of 128 bytes", bits >> 62);
    if (bits & 0x3FFFC000C000C000) fail("bits of a descriptor that mean something else", bits);
  }
  unsigned by_k(unsigned row, unsigned half) const {
    return permuted(from + row / 8 * stride + row % 8 * 128 + half * CHUNK);
  }
  unsigned by_column(unsigned k, unsigned eight) const {
    return permuted(from + eight / 8 * leading + k / 8 * stride + k % 8 * 128 + eight % 8 * CHUNK);
  }
};

// The chunks that a warp's part of a product reads.
static std::vector<unsigned> chunks_of(const Request& asked) {
  std::vector<unsigned> found;
  if (!asked.left) {
    const Matrix A(asked.a);
    for (unsigned r = 0; r < 32; r++) found.push_back(A.by_k(current / LANES % 4 * 16 + r / 2, r % 2));
  }
  const Matrix B(asked.b);
  for (unsigned c = 0; c < 2 * asked.columns; c++) {
    found.push_back(asked.transposed ? B.by_column(c % 16, c / 16) : B.by_k(c / 2, c % 2));
  }
  return found;
}

static bool untouched(const Sums& sums) {
  for (const float* numbers : sums.numbers) {
    for (unsigned e = 0; e < sums.each; e++) {
      if (memcmp(numbers + e, &SIGNAL, sizeof SIGNAL)) return false;
    }
  }
  return true;
}

static Sums* sums_of(const float* numbers) {
  for (Sums& sums : my_warp().sums) {
    if (sums.numbers[0] == numbers) return &sums;
  }
  return nullptr;
}

static void begin_product(Request* (&all)[LANES]) {
  WarpState& mine = my_warp();
  Product product{*all[0], {}, {}};
  const Request& asked = product.asked;
  alike("wgmma", asked.a, asked.b, asked.columns * 4 + asked.transposed * 2 + asked.add);
  if (!mine.fenced) fail("registers of a product without a fence before it", asked.columns);
  for (unsigned lane = 0; lane < LANES; lane++) {
    if (all[lane]->a != asked.a || all[lane]->b != asked.b) fail("lanes of a warp at different products", lane);
    product.left[lane] = all[lane]->left;
    if (asked.left) memcpy(product.words[lane], all[lane]->left, sizeof product.words[lane]);
  }
  Sums* sums = sums_of(asked.numbers);
  if (!sums) {
    mine.sums.push_back({{}, asked.columns / 2, 0, {}});
    sums = &mine.sums.back();
    for (unsigned lane = 0; lane < LANES; lane++) {
      float* const numbers = sums->numbers[lane] = all[lane]->numbers;
      sums->values.insert(sums->values.end(), numbers, numbers + sums->each);
      for (unsigned e = 0; e < sums->each; e++) memcpy(numbers + e, &SIGNAL, sizeof SIGNAL);
    }
  }
  if (sums->each != asked.columns / 2) fail("products of two widths to the same registers", sums->each);
  if (!untouched(*sums)) fail("registers written that a product under way adds to", asked.columns);
  sums->products++;
  for (unsigned address : chunks_of(asked)) {
    check_readable(address);
    traces[address / CHUNK].under_way++;
  }
  mine.open.push_back(product);
}

static void close_products(unsigned* (&)[LANES]) {
  alike("commit");
  my_warp().groups.push_back(my_warp().open);
  my_warp().open.clear();
}

static float widened(unsigned address, unsigned which) {
  unsigned short number;
  memcpy(&number, &memory[address + 2 * which], 2);
  return widen(number);
}

static float left_of(const Product& product, unsigned row, unsigned k) {
  if (!product.asked.left) {
    return widened(Matrix(product.asked.a).by_k(current / LANES % 4 * 16 + row, k / 8), k % 8);
  }
  const unsigned pair = product.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
  return widen((unsigned short)(pair >> 16 * (k % 2)));
}

// A sum for every cell of 16 rows. Most of an emulation's time is spent here.
__attribute__((optimize("O3"))) static void add_products(
    double (&sums)[16][256], const double (&A)[16][16], const double (&B)[16][256], unsigned columns) {
  for (unsigned row = 0; row < 16; row++) {
    for (unsigned k = 0; k < 16; k++) {
      for (unsigned col = 0; col < columns; col++) sums[row][col] += A[row][k] * B[k][col];
    }
  }
}

// Exact products, one rounding of their sum: a device's bits are not these.
static void make(const Product& product) {
  static double A[16][16], B[16][256], C[16][256];
  const Request& asked = product.asked;
  Sums& sums = *sums_of(asked.numbers);
  const Matrix right(asked.b);
  for (unsigned k = 0; k < 16; k++) {
    for (unsigned row = 0; row < 16; row++) A[row][k] = left_of(product, row, k);
    for (unsigned col = 0; col < asked.columns; col++) {
      B[k][col] = asked.transposed ? widened(right.by_column(k, col / 8), col % 8)
                                     : widened(right.by_k(col, k / 8), k % 8);
    }
  }
  const auto each = [&](auto&& put) {
    for (unsigned lane = 0; lane < LANES; lane++) {
      for (unsigned e = 0; e < sums.each; e++) {
        put(sums.values[lane * sums.each + e], C[lane / 4 + e / 2 % 2 * 8][e / 4 * 8 + lane % 4 * 2 + e % 2]);
      }
    }
  };
  each([&](float& number, double& cell) { cell = asked.add ? number : 0.0; });
  add_products(C, A, B, asked.columns);
  each([](float& number, double& cell) { number = (float)cell; });
}

static void finish_product(const Product& product) {
  WarpState& mine = my_warp();
  const Request& asked = product.asked;
  for (unsigned lane = 0; lane < LANES; lane++) {
    if (product.left[lane] && memcmp(product.left[lane], product.words[lane], sizeof product.words[lane])) {
      fail("registers written that a product under way reads", lane);
    }
  }
  Sums* sums = sums_of(asked.numbers);
  if (!untouched(*sums)) fail("registers written that a product under way adds to", asked.columns);
  make(product);
  for (unsigned address : chunks_of(asked)) {
    Trace& trace = trace_at(address);
    trace.under_way--;
    trace.read[current / LANES] = mine.clock.steps[current / LANES];
  }
  if (--sums->products) return;
  for (unsigned lane = 0; lane < LANES; lane++) {
    memcpy(sums->numbers[lane], &sums->values[lane * sums->each], 4 * sums->each);
  }
  mine.sums.erase(mine.sums.begin() + (sums - mine.sums.data()));
}

static void wait_for_products(unsigned* (&all)[LANES]) {
  WarpState& mine = my_warp();
  alike("wait", *all[0]);
  while (mine.groups.size() > *all[0]) {
    for (const Product& product : mine.groups.front()) finish_product(product);
    mine.groups.erase(mine.groups.begin());
  }
  mine.fenced = false;
}

static void check_pinned(float* (&all)[LANES]) {
  if (const Sums* sums = sums_of(all[0])) fail("registers used that a product under way adds to", sums->each);
}

static void set_registers(unsigned* (&all)[LANES]) {
  alike("setmaxnreg", *all[0]);
  if (*all[0] % 8 || *all[0] < 24 || *all[0] > 256) fail("a count of registers that cannot be", *all[0]);
  my_warp().registers = *all[0];
  unsigned sum = 0;
  for (const WarpState& warp : warps) sum += LANES * warp.registers;
  if (sum > REGISTERS) fail("more registers than there are", sum);
}

}  // namespace machine

DEVICE void mbarrier_init(unsigned barrier, int arrivals) {
  using namespace machine;
  if (barrier % 8 || barrier + 8 > memory.size()) fail("a barrier beyond the shared memory", barrier);
  if (mbarriers.size() == BARRIERS_MOST) fail("more barriers than the machine has", barrier);
  const unsigned warp = current / LANES, step = my_warp().clock.steps[warp];
  mbarriers.push_back({barrier, (unsigned)arrivals, (unsigned)arrivals, 0, 0, warp, step, false, {}, {}});
}

DEVICE void mbarrier_fence() {
  for (machine::MBarrier& barrier : machine::mbarriers) {
    if (barrier.maker == machine::current / machine::LANES) barrier.fenced = true;
  }
}

DEVICE void mbarrier_arrive(unsigned barrier) { machine::arrive(barrier, 0); }
DEVICE void mbarrier_arrive_expecting(unsigned barrier, unsigned bytes) { machine::arrive(barrier, bytes); }
DEVICE void mbarrier_wait(unsigned barrier, unsigned parity) { machine::wait_for_phase(barrier, parity); }

DEVICE void copy_box(unsigned to, const TensorMap& map, int feature, int row, int head, int item,
                     unsigned barrier) {
  machine::begin_box({map, {feature, row, head, item}, to, machine::barrier_at(barrier)});
}

template <int COUNT>
DEVICE void fewer_registers() {
  unsigned count = COUNT;
  machine::together("setmaxnreg", count, machine::set_registers);
}
template <int COUNT>
DEVICE void more_registers() { fewer_registers<COUNT>(); }

DEVICE void wgmma_fence() {
  unsigned none = 0;
  machine::together("wgmma.fence", none, +[](unsigned* (&)[32]) {
    machine::alike("fence");
    machine::my_warp().fenced = true;
  });
}

DEVICE void wgmma_commit() {
  unsigned none = 0;
  machine::together("wgmma.commit", none, machine::close_products);
}

template <int N>
DEVICE void wgmma_wait() {
  unsigned under_way = N;
  machine::together("wgmma.wait", under_way, machine::wait_for_products);
}

template <int COUNT>
DEVICE void pin(float* numbers) {
  machine::together("pin", *numbers, machine::check_pinned);
}
template <int COUNT>
DEVICE void pin(unsigned*) {}

template <int N, bool TRANSPOSED>
DEVICE void wgmma_shared(float* c, unsigned long long a, unsigned long long b, bool add) {
  machine::Request mine{a, b, N, TRANSPOSED, add, c, nullptr};
  machine::together("wgmma", mine, machine::begin_product);
}

template <int N, bool TRANSPOSED>
DEVICE void wgmma_registers(float* c, const unsigned (&a)[4], unsigned long long b, bool add) {
  machine::Request mine{0, b, N, TRANSPOSED, add, c, a};
  machine::together("wgmma", mine, machine::begin_product);
}
