// A block's tiles of one stage, multiplied piece by piece by the warps in turn.
#pragma once

#include "kernel/block.h"

namespace mono::MONO_VARIANT {

MONO_DEVICE bool row_parallel(i32 stage) { return stage == kO || stage == kDown; }

// Lanes of a device: so many parts a tile of a row parallel stage has.
constexpr i32 kOwnLanes = lanes_of_device(Shape{});

template <class T>
MONO_DEVICE void prepare(Workspace<T>& work, const Device& device, const Block& share) {
  arch::for_each(kStages, [&](i32 i) {
    const Stage& stage = device.stages[i];
    TileWork& tiles = work.tiles[i];
    const i32 chunks = stage.width / arch::kTileCols;
    tiles.chunks = piece_chunks(chunks, kSlotChunks, Shape::compressed);
    tiles.pieces = tiles.chunks ? chunks / tiles.chunks : 0;
    tiles.per_piece = tiles.pieces ? i32(kOnePiece) / tiles.pieces + 1 : 0;
    tiles.round = tiles.pieces ? kMaxPieces / ((row_parallel(i) ? stage.lanes : 1) * tiles.pieces) : 0;
    tiles.lanes = touched_lanes(stage, share.shares[i]);
  });
}

// Multiplies tiles of a stage, piece by piece, with the activations. Pieces are summed in order, so results do not depend on
// who multiplied them. The pump knows where they lie: it walks the tape in the order of the stages. Returns it, advanced.
template <class T>
MONO_OUTLINE arch::Pump multiply_tiles(const Stage& stage, const TileWork& work, Span run, const T* activations,
                                       float* partial, float* out, i32 part_stride, arch::Pump pump) {
  const i32 chunks = work.chunks, pieces = work.pieces, width = stage.width, tiles_per_lane = stage.tiles_per_lane;
  const bool by_lane = part_stride != 0;  // a tile has a part for every lane
  const i32 per_tile = by_lane ? kOwnLanes * pieces : pieces;
  const bool whole = pieces == 1;  // there is nothing to add up
  auto place = [&](i32 begin, i32 part, i32 r) {
    const i32 tile = by_lane ? part / kOwnLanes : part;
    return out + (part - tile * (by_lane ? kOwnLanes : 1)) * part_stride + (begin + tile) * arch::kTileRows + r;
  };
  i32 lane = 0;  // of a tile that has one part: counted on
  MONO_ROLLED
  for (i32 begin = 0; begin < run.count; begin += work.round) {
    const i32 tiles = run.count - begin < work.round ? run.count - begin : work.round;
    MONO_ROLLED
    for (i32 p = pump.first(); p < tiles * per_tile; p += arch::kWarps) {
      const i32 part = i32(u32(p * work.per_piece) / kOnePiece), k = p - part * pieces;  // of all tiles' parts, and its piece
      MONO_ROLLED
      while (!by_lane && run.first + begin + part >= (work.lanes.first + lane + 1) * tiles_per_lane) ++lane;
      const T* x = activations + (by_lane ? part % kOwnLanes : lane) * width + k * chunks * arch::kTileCols;
      const float y = pump.dot(p, x, chunks);
      const i32 r = arch::lane() / arch::kLanesPerRow;
      float* to = whole ? place(begin, part, r) : partial + p * arch::kTileRows + r;
      if (arch::lane() % arch::kLanesPerRow == 0) *to = y;
    }
    pump.advance(tiles * per_tile);
    arch::sync();
    if (whole) continue;
    arch::for_each(tiles * (by_lane ? kOwnLanes : 1) * arch::kTileRows, [&](i32 i) {
      const i32 part = i / arch::kTileRows, r = i % arch::kTileRows;
      const float* of = partial + part * pieces * arch::kTileRows + r;
      float sum = 0.0f;
      constexpr i32 kAtOnce = 6;
      MONO_ROLLED
      for (i32 first = 0; first < pieces; first += kAtOnce) {
        float some[kAtOnce];
        MONO_UNROLLED
        for (i32 k = 0; k < kAtOnce; ++k) some[k] = first + k < pieces ? of[(first + k) * arch::kTileRows] : 0.0f;
        MONO_UNROLLED
        for (i32 k = 0; k < kAtOnce; ++k) sum += some[k];
      }
      *place(begin, part, r) = sum;
    });
    arch::sync();
  }
  return pump;
}

template <class T>
MONO_DEVICE Span input_lanes(const BlockState<T>& s, StageIndex stage) {
  return s.scratch.work.tiles[stage].lanes;
}

// Multiplies a block's tiles of a stage with the activations. A tile has one part per lane in a row parallel stage, else one
// part: out[part * part_stride + row].
template <class T>
MONO_DEVICE void product(BlockState<T>& s, StageIndex index, i32, float* out, i32 part_stride) {
  const TileWork& work = s.scratch.work.tiles[index];
  if (work.chunks == 0) {  // a device without heads
    const i32 rows = s.share.shares[index].count * arch::kTileRows;
    for (i32 lane = 0; lane < s.lanes(); ++lane)
      arch::for_each(rows, [&](i32 i) { out[lane * part_stride + i] = 0.0f; });
    arch::sync();
    return;
  }
  s.link.pump = multiply_tiles(s.device.stages[index], work, s.share.shares[index], s.scratch.activations,
                               s.scratch.work.partial, out, part_stride, s.link.pump);
}

}  // namespace mono::MONO_VARIANT
