// The rules of a row and of a cell, as refattn/rules.py states them.
#pragma once
#include "primitives.h"
#include "job.h"

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;
#define LOWEST (-infinity())

// Where a block, a warp and a lane are at work.
struct Place {
  int b, h, g;   // batch item, query head, key-value head
  int i_first;   // first row of the block's tile Q_i
  int warp, lane;
};

// The keys [from, to).
struct Span {
  int from, to;
};

DEVICE Place place_of(const Job& job) {
  const int tiles = (job.n_q + ROWS - 1) / ROWS;  // line 3
  const int block = block_index(), item = block / tiles;
  Place at;
  at.b = item / job.heads;
  at.h = item % job.heads;
  // OWN-GQA1
  at.g = job.tiled_heads ? at.h % job.key_heads : at.h / (job.heads / job.key_heads);
  at.i_first = (tiles - 1 - block % tiles) * ROWS;  // the last first: causal rows make it longest
  at.warp = thread_index() / 32;
  at.lane = thread_index() % 32;
  return at;
}

// The query head of a group's member (OWN-GQA1); the inverse of what place_of has.
DEVICE int query_head(const Job& job, int g, int member) {
  return job.tiled_heads ? member * job.key_heads + g : g * (job.heads / job.key_heads) + member;
}

// The keys that row i sees by its place alone: [from, to), none where from >= to (OWN-CAUSAL1,
// OWN-WINDOW1, OWN-LENGTH1). Both ends grow with i. No sum leaves 64 bits, whatever the offset and
// however open the window.
DEVICE Span keys_of_row(const Job& job, int b, int i) {
  if (i >= job.query_lengths[b]) return {0, 0};
  const i64 p = job.offsets[b] + i;
  const i64 n = job.key_lengths[b] < job.n_k ? job.key_lengths[b] : job.n_k;
  const i64 from = job.left >= p ? 0 : p - job.left;
  const i64 to = job.right >= n - 1 - p ? n : p + job.right + 1;
  return {(int)(from < n ? from : n), (int)(to > 0 ? to : 0)};
}

// Rows and keys of an item before its end.
DEVICE int valid_queries(const Job& job, int b) {
  return job.query_lengths[b] < job.n_q ? (int)job.query_lengths[b] : job.n_q;
}

DEVICE int valid_keys(const Job& job, int b) {
  return job.key_lengths[b] < job.n_k ? (int)job.key_lengths[b] : job.n_k;
}

// The others that some row of the block's tile meets, from the begin of a tile on, and those that every
// row meets.
struct Spans {
  Span some, every;
};

// Of keys, in tiles of WIDTH, and queries first, ..., end - 1. Queries from n_q on are not written, and
// forbid nothing; those of a shorter item are empty.
template <int WIDTH>
DEVICE Spans keys_of_queries(const Job& job, int b, int first, int end) {
  const int n_q = valid_queries(job, b);
  Spans found = {{0, 0}, {0, 0}};
  if (first >= n_q) return found;
  const Span top = keys_of_row(job, b, first), last = keys_of_row(job, b, (end < n_q ? end : n_q) - 1);
  found.some = {top.from / WIDTH * WIDTH, last.to};
  if (n_q == job.n_q || end <= n_q) found.every = {last.from, top.to};
  return found;
}

DEVICE Spans keys_of_tile(const Job& job, const Place& at) {
  return keys_of_queries<COLS>(job, at.b, at.i_first, at.i_first + ROWS);
}

// The queries that see key j, likewise; both ends grow with j.
DEVICE Span queries_of_key(const Job& job, int b, int j) {
  if (j >= job.key_lengths[b] || j >= job.n_k) return {0, 0};
  const i64 a = j - job.offsets[b];
  const i64 n = job.query_lengths[b] < job.n_q ? job.query_lengths[b] : job.n_q;
  const i64 from = job.right >= a ? 0 : a - job.right;
  const i64 to = job.left >= n - 1 - a ? n : a + job.left + 1;
  return {(int)(from < n ? from : n), (int)(to > 0 ? to : 0)};
}

DEVICE i64 offset_of(const Cells& cells, const Place& at, int i, int j) {
  return at.b * cells.batch + at.h * cells.head + i * cells.row + j * cells.col;
}

DEVICE float bias_of(const Job& job, const Place& at, int i, int j) {
  return widen(read((const Number*)job.bias.data + offset_of(job.bias, at, i, j)));
}

DEVICE const Number* row_at(const Rows& rows, int b, int head, int row) {
  return rows.data + b * rows.batch + head * rows.head + row * rows.row;
}

// The product of two rows, by all lanes of a warp, which all get it.
DEVICE float product_of(const Number* x, const Number* y, int d, int lane) {
  float sum = 0.0f;
#pragma unroll 1
  for (int c = lane; c < d; c += 32) sum += widen(read(x + c)) * widen(read(y + c));
#pragma unroll
  for (int bits = 16; bits; bits /= 2) sum += shuffle_xor(sum, bits);
  return sum;
}

// Whether mask and bias allow a cell that row i sees (OWN-MASK1, OWN-BIAS1).
DEVICE bool allowed(const Job& job, const Place& at, int i, int j) {
  if (job.mask.data && !read((const u8*)job.mask.data + offset_of(job.mask, at, i, j))) {
    return false;
  }
  return !(job.bias.data && bias_of(job, at, i, j) == LOWEST);
}

// What ALiBi's slope multiplies, tokens (ALIBI-S3a, OWN-ALIBI1).
DEVICE float steps(const Job& job, const Place& at, int i, int j) {
  if (job.distance == 3) return (float)j;
  const i64 ahead = j - (job.offsets[at.b] + i);
  return (float)(job.distance == 1 && ahead > 0 ? -ahead : ahead);
}

DEVICE float soften(float x, float c) { return c * tanhf(x / c); }  // OWN-SOFTCAP1

// The logit of a cell from q · k (VAS-EQ1, OWN-SOFTCAP1, OWN-BIAS1, ALIBI-FN10).
DEVICE float logit(const Job& job, const Place& at, int i, int j, float product) {
  float x = product * job.scale;
  if (job.softcap_order == 1) x = soften(x, job.softcap);
  if (job.bias.data) x += bias_of(job, at, i, j);
  if (job.slopes) x += read(job.slopes + at.h) * steps(job, at, i, j);
  return job.softcap_order == 2 ? soften(x, job.softcap) : x;
}

// A weight after dropout (FA1-ALG2 line 14, OWN-DROPOUT1).
DEVICE float dropped(const Job& job, const Place& at, int i, int j, float weight) {
  if (!job.keep.data) return weight;
  return read((const u8*)job.keep.data + offset_of(job.keep, at, i, j)) ? weight * job.kept
                                                                        : weight * 0.0f;
}

// What the softcap multiplies a gradient by, from q · k and the logit (OWN-SOFTCAP1, OWN-BACKWARD1).
DEVICE float bend(const Job& job, float product, float logit) {
  if (job.softcap_order == 0) return 1.0f;
  const float c = job.softcap;
  const float t = job.softcap_order == 1 ? tanhf(product * job.scale / c) : logit / c;
  return 1.0f - t * t;
}
