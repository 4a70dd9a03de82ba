// A many-thread block's own part of the scratch memory.
#pragma once

#include "kernel/scratch.h"
#include "kernel/simt/tuning.h"

namespace mono::MONO_VARIANT {

constexpr u32 kOnePiece = 1 << 16;
static_assert(u32(kMaxPieces * kMaxPieces) < kOnePiece, "n * (kOnePiece / pieces + 1) / kOnePiece is n / pieces");

// How a block's tiles of one stage are multiplied; divisions take long, so they are done once.
struct TileWork {
  i32 chunks;      // of a piece
  i32 pieces;      // of a part
  i32 per_piece;   // a bit more than kOnePiece / pieces: numbers up to kMaxPieces times this give parts
  i32 round;       // tiles multiplied between two barriers of the block
  Span lanes;      // that the block's tiles belong to
};

template <class T, i32 kSquads>
struct WarpWorkspace {
  float* partial;   // [kMaxPieces, tile rows] products of pieces
  u64* bins;        // for selection, when there are no products; shares their memory
  TileWork* tiles;  // [stages]

  // Partial softmaxes lie where activations do at other times: for every query one of every squad that shares it. The last of
  // them is read as whole words.
  template <class H>
  MONO_DEVICE static i64 kernel_bytes(const H& h) {
    const i64 parts = squads_that_share(kSquads, h.queries_per_kv) * h.queries_per_kv;
    return (parts * part_floats(h.head_dim) + h.floats_per_word) * i64(sizeof(float));
  }
  template <class H>
  MONO_DEVICE void carve(Carver& carve, const H& h, const Extents&) {
    carve(partial, larger(i64(kMaxPieces) * h.tile_rows, 2 * 256));
    bins = reinterpret_cast<u64*>(partial);
    carve(tiles, kStages);
  }
};

}  // namespace mono::MONO_VARIANT
