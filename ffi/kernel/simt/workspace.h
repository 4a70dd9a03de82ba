// A many-thread block's own part of the scratch memory.
#pragma once

#include "kernel/scratch.h"
#include "kernel/simt/tuning.h"

namespace mono::MONO_VARIANT {

template <class T, i32 kWarps>
struct WarpWorkspace {
  float* partial;  // [kMaxPieces, tile rows] products of pieces
  float* joins;    // see join_floats; these share their memory, since each is done with before the next is needed
  u64* bins;       // for selection
  i32* pieces;     // [stages] chunks of a piece

  // Partial softmaxes of all warps lie where activations do at other times: [warps, queries_per_kv, head_dim + 2].
  MONO_DEVICE static i64 kernel_bytes(const Header& h) {
    return i64(kWarps) * h.queries_per_kv * (h.head_dim + 2) * i64(sizeof(float));
  }
  MONO_DEVICE void carve(Carver& carve, const Header& h, const Device& d, const Block&) {
    carve(partial, larger(larger(i64(kMaxPieces) * h.tile_rows, 2 * 256), join_floats(h, d)));
    joins = partial;
    bins = reinterpret_cast<u64*>(partial);
    carve(pieces, kStages);
  }
};

}  // namespace mono::MONO_VARIANT
