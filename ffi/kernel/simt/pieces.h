// How a block's tape is cut into pieces, each multiplied by one warp.
#pragma once

#include "kernel/block.h"

namespace mono::MONO_VARIANT {

// Pieces of one stage of a block.
struct PieceRun {
  i64 offset;  // in the layer tape or the head tape, in words
  i32 words;   // of a piece
  i32 count;

  MONO_DEVICE PieceRun(const Device& device, const Block& share, i32 index)
      : offset(share.offsets[index]), words(0), count(0) {
    const Stage& stage = device.stages[index];
    const i32 chunks = piece_chunks(stage.width / arch::kTileCols, kSlotChunks, Shape::compressed);
    if (chunks == 0) return;
    words = piece_words(chunks, Shape::compressed);
    count = share.shares[index].count * i32(stage.tile_words / words);
  }
};

}  // namespace mono::MONO_VARIANT
