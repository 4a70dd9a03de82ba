// Sizes of a GPU block that the host must know, too.
#pragma once

#include "kernel/plan.h"

namespace mono {

constexpr i32 kMaxPieces = 96;      // pieces of weights multiplied between two barriers of the block
constexpr i32 kChunkWords = 8 * 32;  // weights in one chunk of a tile, see TileFormat in jax_mono/plan.py

// Of compressed tapes, see compressed.h and jax_mono/tile.py.
constexpr i32 kGroupChunks = 4, kLongestPiece = 16, kHeadWords = 32;

// A tile's part (the columns of one lane) is streamed in equal pieces of at most `most` chunks: chunks of one piece.
constexpr i32 piece_chunks(i32 chunks, i32 most, bool compressed) {
  if (chunks == 0) return 0;
  i32 pieces = (chunks + most - 1) / most;
  while (chunks % pieces || (compressed && chunks / pieces % kGroupChunks)) ++pieces;
  return chunks / pieces;
}

// Words that a piece of so many chunks takes on the tape, as long as 16-bit weights.
constexpr i32 piece_words(i32 chunks, bool compressed) {
  return compressed ? kHeadWords + chunks * (kChunkWords / 4 * 3) : chunks * kChunkWords;
}

}  // namespace mono
