// The rows of a decoding, and where their parts lie. A decoding has few queries and many keys, so that
// tiles of queries are too few for the device: keys are split, SPLIT at a time whatever their number, a
// block a split, and a warp of a block has COLS keys of every STAGE_KEYS. What one warp found is a part.
//
// The query heads that read the same keys are rows side by side, so that keys are read once for all
// (OWN-GQA1): row r of key-value head g is query r / group of the group's member r % group.
#pragma once
#include "cells.h"

// A row: query i of head at.h.
struct Query {
  Place at;
  int i;
};

DEVICE int group_of(const Job& job) { return job.heads / job.key_heads; }

DEVICE Query query_of(const Job& job, const Place& at, int r) {
  Place its = at;
  its.h = query_head(job, at.g, r % group_of(job));
  return {its, r / group_of(job)};
}

DEVICE int rows_of(const Job& job) { return job.n_q * group_of(job); }  // of a key-value head
DEVICE int splits_of(const Job& job) { return (job.n_k + SPLIT - 1) / SPLIT; }

// The first part of a row.
DEVICE i64 parts_at(const Job& job, const Place& at, int r) {
  return (((i64)at.b * job.key_heads + at.g) * rows_of(job) + r) * splits_of(job) * WARPS;
}
