// A block's tiles of one stage, multiplied piece by piece by the warps in turn.
#pragma once

#include "kernel/block.h"

namespace mono::MONO_VARIANT {

template <class T>
MONO_DEVICE void prepare(Workspace<T>& work, const Device& device) {
  arch::for_each(kStages, [&](i32 i) { work.pieces[i] = piece_chunks(device.stages[i].width / arch::kTileCols, kSlotChunks); });
}

// Multiplies tiles of a stage, piece by piece, with the activations. Pieces are summed in order, so results do not depend on
// who multiplied them. Returns the pump, advanced.
template <class T>
MONO_OUTLINE arch::Pump multiply_tiles(const Stage& stage, Span run, i32 chunks, const T* tape, const T* activations,
                                       float* partial, float* out, i32 part_stride, arch::Pump pump) {
  const i32 parts = part_stride ? stage.lanes : 1, width = stage.width;
  const i32 pieces = width / (chunks * arch::kTileCols), per_tile = parts * pieces, round = kMaxPieces / per_tile;
  const i32 first_lane = touched_lanes(stage, run).first, tiles_per_lane = stage.tiles_per_lane;
  // Which piece of which part of which tile, and the tile's lane: counted on, because divisions take long.
  i32 lane = 0;
  MONO_ROLLED
  for (i32 begin = 0; begin < run.count; begin += round) {
    const i32 tiles = run.count - begin < round ? run.count - begin : round;
    i32 tile = 0, part = 0, k = pump.first();
    MONO_ROLLED
    for (i32 p = pump.first(); p < tiles * per_tile; p += arch::kWarps, k += arch::kWarps) {
      MONO_ROLLED
      for (; k >= pieces; k -= pieces)
        if (++part == parts) part = 0, ++tile;
      MONO_ROLLED
      while (run.first + begin + tile >= (first_lane + lane + 1) * tiles_per_lane) ++lane;
      const T* x = activations + (part_stride ? part : lane) * width + k * chunks * arch::kTileCols;
      const float y = pump.dot(p, tape + i64(begin * per_tile + p) * chunks * kChunkWords, x, chunks);
      if (arch::lane() % arch::kLanesPerRow == 0) partial[p * arch::kTileRows + arch::lane() / arch::kLanesPerRow] = y;
    }
    pump.advance(tiles * per_tile);
    arch::sync();
    arch::for_each(tiles * parts * arch::kTileRows, [&](i32 i) {
      const i32 part_index = i / arch::kTileRows, r = i - part_index * arch::kTileRows;
      const i32 tile = part_index / parts, part = part_index - tile * parts;
      float sum = 0.0f;
      MONO_ROLLED
      for (i32 k = 0; k < pieces; ++k) sum += partial[(part_index * pieces + k) * arch::kTileRows + r];
      out[part * part_stride + (begin + tile) * arch::kTileRows + r] = sum;
    });
    arch::sync();
  }
  return pump;
}

// Multiplies a block's tiles of a stage with the activations. A tile has one part per lane in a row parallel stage, else one
// part: out[part * part_stride + row].
template <class T>
MONO_DEVICE void product(BlockState<T>& s, StageIndex index, i32 layer, float* out, i32 part_stride) {
  const i32 chunks = s.scratch.work.pieces[index];
  if (chunks == 0) {  // a device without heads
    const i32 rows = s.share.shares[index].count * arch::kTileRows;
    for (i32 lane = 0; lane < s.lanes(); ++lane)
      arch::for_each(rows, [&](i32 i) { out[lane * part_stride + i] = 0.0f; });
    arch::sync();
    return;
  }
  s.link.pump = multiply_tiles(s.device.stages[index], s.share.shares[index], chunks, s.tape(index, layer),
                               s.scratch.activations, s.scratch.work.partial, out, part_stride, s.link.pump);
}

}  // namespace mono::MONO_VARIANT
