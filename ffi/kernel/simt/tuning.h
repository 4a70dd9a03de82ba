// Sizes of a GPU block that the host must know, too.
#pragma once

#include "kernel/plan.h"

namespace mono {

constexpr i32 kMaxPieces = 96;      // pieces of weights multiplied between two barriers of the block
constexpr i32 kChunkWords = 8 * 32;  // weights in one chunk of a tile, see TileFormat in jax_mono/plan.py

// Of compressed tapes, see compressed.h and jax_mono/tile.py.
constexpr i32 kGroupChunks = 4, kLongestPiece = 16, kHeadWords = 32;

// Lanes that attend to some positions together. As many of these squads share a pair of queries as leave every pair one, if
// there are that many; their number is a power of two.
constexpr i32 kSquad = 32;
constexpr i32 squads_that_share(i32 squads, i32 queries) {
  i32 sharers = squads;
  while (sharers > 1 && sharers * ((queries + 1) / 2) > squads) sharers /= 2;
  return sharers;
}
// Floats that a squad keeps of one query.
constexpr i32 part_floats(i32 head_dim) { return 4 + head_dim; }

// A tile's part (the columns of one lane) is streamed in equal pieces of at most `most` chunks: chunks of one piece.
constexpr i32 piece_chunks(i32 chunks, i32 most, bool compressed) {
  if (chunks == 0) return 0;
  i32 pieces = (chunks + most - 1) / most;
  while (chunks % pieces || (compressed && chunks / pieces % kGroupChunks)) ++pieces;
  return chunks / pieces;
}

// How many chunks pieces of a stage have, or 0 if that differs from device to device, and how many pieces every block has at least.
struct StagePieces {
  i32 chunks, fewest;
};
// How many chunks a piece may have.
struct PieceLengths {
  i32 count, of[kStages * kMaxDevices];
};

// Words that a piece of so many chunks takes on the tape, as long as 16-bit weights.
constexpr i32 piece_words(i32 chunks, bool compressed) {
  return compressed ? kHeadWords + chunks * (kChunkWords / 4 * 3) : chunks * kChunkWords;
}

}  // namespace mono
