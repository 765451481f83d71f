// What a launch is told: one record, passed by value, the same to a device and to the emulation.
// `refattn_gpu/cuda/records.py` fills it; JOB_BYTES is the size that it has there.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#if FLOAT32
using Number = float;
#else
using Number = u16;  // the bits of float16 or bfloat16
#endif

// Rows of numbers by (batch, head, row): neighbouring features lie side by side, and rows begin at
// multiples of 16 bytes.
struct Rows {
  const Number* data;
  i64 batch, head, row;  // numbers between neighbours
};

// What is told by cell; the stride of an axis of size 1 is 0, and data is null where there is none.
struct Cells {
  const void* data;
  i64 batch, head, row, col;
};

// The backward pass reads and writes what begins with d_output.
struct Job {
  Rows query, key, value;  // Q, K, V
  Number* output;          // O, (b, h, n_q, d_v), contiguous
  float* logsumexp;        // L, (b, h, n_q), nats
  const i64* offsets;      // position of query row 0, tokens, by batch item
  const i64* query_lengths;
  const i64* key_lengths;
  Cells mask;           // bool, true = attend
  Cells bias;           // logits, in the format of Q; a cell of -∞ is forbidden
  Cells keep;           // bool: dropout's keep mask
  const float* slopes;  // ALiBi's m by head, or null
  const float* sinks;   // by head, or null
  i64 left, right;      // keys behind and ahead of its position that a query sees; causal is right = 0
  int batch, heads, key_heads, n_q, n_k, d_k, d_v;
  int tiled_heads;    // 1 if query head h reads key-value head h mod h_k, 0 if ⌊h / g⌋
  int distance;       // form of ALiBi's distance, a code of refattn.rules
  int softcap_order;  // likewise
  float scale, softcap;
  float kept;  // 1 / the probability of keeping a weight
  int padding;
  Rows d_output, result;     // dO, and O of the forward pass
  const float* d_logsumexp;  // dL, (b, h, n_q), or null
  float* dots;               // D - dL, (b, h, n_q): the kernel of dQ writes it, that of dK and dV reads it
  Number *d_query, *d_key, *d_value;  // contiguous, in the shapes of Q, K and V
  float* d_bias;                      // by cell, (b, h, n_q, n_k), or null
  float* d_slopes;                    // by row, (b, h, n_q), or null
  float *part_outputs, *part_states;  // O, and m and l, of each part of a row (parts.h)
};

static_assert(sizeof(Job) == JOB_BYTES, "the record of the host and of the kernels differ");
