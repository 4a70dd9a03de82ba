// Sizes of a GPU block that the host must know, too.
#pragma once

#include "kernel/plan.h"

namespace mono {

constexpr i32 kMaxPieces = 96;      // pieces of weights multiplied between two barriers of the block
constexpr i32 kChunkWords = 8 * 32;  // weights in one chunk of a tile, see TileFormat in jax_mono/plan.py

// A tile's part (the columns of one lane) is streamed in equal pieces of at most `most` chunks: chunks of one piece.
constexpr i32 piece_chunks(i32 chunks, i32 most) {
  if (chunks == 0) return 0;
  i32 pieces = (chunks + most - 1) / most;
  while (chunks % pieces) ++pieces;
  return chunks / pieces;
}

}  // namespace mono
