// Copies of boxes: each arrives when no thread can go on without it, its place holds poison until then,
// and its bytes are counted on a barrier.
#pragma once
#include "order.h"

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

static std::vector<Box> boxes;  // on their way

// Where the permutation of 128 bytes puts a number: it moves 16 bytes by the number of their 128.
static unsigned permuted(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

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
      const long long x = box.place[0] + (long long)feature, y = box.place[1] + (long long)row;
      const unsigned short number = number_at(box.map, {x, y, box.place[2], box.place[3]});
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

}  // namespace machine
