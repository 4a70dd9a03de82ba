// A one-thread block's own part of the scratch memory.
#pragma once

#include "kernel/scratch.h"

namespace mono::MONO_VARIANT {

template <class T>
struct Workspace {
  float* x;      // [lanes, hidden words] residual stream as received
  float* parts;  // [queries_per_kv, head_dim + 2] attention output so far, with its maximum and sum
  u64* bins;     // for selection
  float* joins;  // [kv_splits + head_dim] of one query: maxima of the splits, and their joint output

  // Bytes that the activations' memory must have besides what activations need.
  MONO_DEVICE static i64 kernel_bytes(const Header&) { return 0; }
  MONO_DEVICE void carve(Carver& carve, const Header& h, const Extents& extents) {
    carve(x, extents.touched_lanes * h.hidden_width);
    carve(parts, i64(h.queries_per_kv) * (h.head_dim + 2));
    carve(bins, 256);
    carve(joins, i64(h.kv_splits) + h.head_dim);
  }
};

}  // namespace mono::MONO_VARIANT
