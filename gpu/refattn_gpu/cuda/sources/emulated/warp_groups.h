// Products of warp groups: made at the wait that releases them. Until then their sums hold a NaN that any
// arithmetic changes, and their registers and operands must stay as they are.
#pragma once
#include "boxes.h"
#include "primitives.h"

namespace machine {

constexpr unsigned REGISTERS = 64 * 1024;  // of a multiprocessor
constexpr unsigned SIGNAL = 0xFFBFFFFF;    // a NaN that no arithmetic leaves as it is

// Numbers that products under way add to.
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

// What a warp began.
struct Work {
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

static std::vector<Work> works;               // by warp
static std::vector<std::vector<Entry>> logs;  // by warp group

static Work& my_work() { return works[my_warp()]; }

static void begin_works() {
  works.assign(clocks.size(), Work{});
  logs.assign((works.size() + 3) / 4, {});
}

static void end_works() {
  for (size_t w = 0; w < works.size(); w++) {
    const Work& work = works[w];
    if (!work.groups.empty() || !work.open.empty()) note("products that were not waited for", w);
    if (work.told != logs[w / 4].size()) note("warps of a group at different products", w);
  }
}

// Warps of a group must do this alike, in the same order.
static void alike(
    const char* what, unsigned long long x = 0, unsigned long long y = 0, unsigned long long z = 0) {
  Work& mine = my_work();
  std::vector<Entry>& log = logs[my_warp() / 4];
  const Entry entry{what, {x, y, z}};
  if (mine.told == log.size()) log.push_back(entry);
  const Entry& first = log[mine.told++];
  if (strcmp(first.what, what) || memcmp(first.words, entry.words, sizeof entry.words)) {
    fail("warps of a group at different products", x);
  }
}

// A matrix in shared memory by the bits of its descriptor, and where its chunks of eight numbers lie. By k:
// 8 rows are 128 bytes apart, the next 8 after `stride`. Transposed: 64 numbers of a k lie side by side, the
// next 64 after `leading`; 8 of k are 128 bytes apart, the next 8 after `stride`.
struct Matrix {
  unsigned from, leading, stride;

  explicit Matrix(unsigned long long bits)
      : from((bits & 0x3FFF) << 4),
        leading((bits >> 16 & 0x3FFF) << 4),
        stride((bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) fail("a permutation that is not of 128 bytes", bits >> 62);
    if (bits & 0x3FFFC000C000C000) fail("bits of a descriptor that mean something else", bits);
    if (from >> 7 & 7) fail("a matrix that does not begin with the permutation", from);
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
    for (unsigned r = 0; r < 32; r++) found.push_back(A.by_k(my_warp() % 4 * 16 + r / 2, r % 2));
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
  for (Sums& sums : my_work().sums) {
    if (sums.numbers[0] == numbers) return &sums;
  }
  return nullptr;
}

static void begin_product(Request* (&all)[LANES]) {
  Work& mine = my_work();
  Product product{*all[0], {}, {}};
  const Request& asked = product.asked;
  alike("wgmma", asked.a, asked.b, asked.columns * 4 + asked.transposed * 2 + asked.add);
  if (!mine.fenced) fail("registers of a product without a fence before it", asked.columns);
  for (unsigned lane = 0; lane < LANES; lane++) {
    const Request& its = *all[lane];
    if (its.a != asked.a || its.b != asked.b) fail("lanes of a warp at different products", lane);
    product.left[lane] = its.left;
    if (asked.left) memcpy(product.words[lane], its.left, sizeof product.words[lane]);
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
  my_work().groups.push_back(my_work().open);
  my_work().open.clear();
}

static float widened(unsigned address, unsigned which) {
  unsigned short number;
  memcpy(&number, &memory[address + 2 * which], 2);
  return widen(number);
}

static float left_of(const Product& product, unsigned row, unsigned k) {
  if (!product.asked.left) {
    return widened(Matrix(product.asked.a).by_k(my_warp() % 4 * 16 + row, k / 8), k % 8);
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
        const unsigned row = lane / 4 + e / 2 % 2 * 8, col = e / 4 * 8 + lane % 4 * 2 + e % 2;
        put(sums.values[lane * sums.each + e], C[row][col]);
      }
    }
  };
  each([&](float& number, double& cell) { cell = asked.add ? number : 0.0; });
  add_products(C, A, B, asked.columns);
  each([](float& number, double& cell) { number = (float)cell; });
}

static void finish_product(const Product& product) {
  Work& mine = my_work();
  const Request& asked = product.asked;
  for (unsigned lane = 0; lane < LANES; lane++) {
    const auto& words = product.words[lane];
    if (product.left[lane] && memcmp(product.left[lane], words, sizeof words)) {
      fail("registers written that a product under way reads", lane);
    }
  }
  Sums* sums = sums_of(asked.numbers);
  if (!untouched(*sums)) fail("registers written that a product under way adds to", asked.columns);
  make(product);
  for (unsigned address : chunks_of(asked)) {
    trace_at(address).under_way--;
    remember_read(address);
  }
  if (--sums->products) return;
  for (unsigned lane = 0; lane < LANES; lane++) {
    memcpy(sums->numbers[lane], &sums->values[lane * sums->each], 4 * sums->each);
  }
  mine.sums.erase(mine.sums.begin() + (sums - mine.sums.data()));
}

static void wait_for_products(unsigned* (&all)[LANES]) {
  Work& mine = my_work();
  alike("wait", *all[0]);
  while (mine.groups.size() > *all[0]) {
    for (const Product& product : mine.groups.front()) finish_product(product);
    mine.groups.erase(mine.groups.begin());
  }
  mine.fenced = false;
}

static void check_pinned(float* (&all)[LANES]) {
  if (sums_of(all[0])) fail("registers used that a product under way adds to", 0);
}

static void set_registers(unsigned* (&all)[LANES]) {
  alike("setmaxnreg", *all[0]);
  if (*all[0] % 8 || *all[0] < 24 || *all[0] > 256) fail("a count of registers that cannot be", *all[0]);
  my_work().registers = *all[0];
  unsigned sum = 0;
  for (const Work& work : works) sum += LANES * work.registers;
  if (sum > REGISTERS) fail("more registers than there are", sum);
}

}  // namespace machine
