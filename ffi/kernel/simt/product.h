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

// Where pieces of a stage's tiles find their activations, and where their products go.
template <class T>
struct PieceWork {
  i32 chunks, pieces, per_piece, width, tiles_per_lane, first_tile, first_lane, part_stride;
  const T* activations;
  float *partial, *out;

  MONO_DEVICE PieceWork(const Stage& stage, const TileWork& work, const Span& run, const T* x, float* sums, float* to, i32 stride)
      : chunks(work.chunks),
        pieces(work.pieces),
        per_piece(work.per_piece),
        width(stage.width),
        tiles_per_lane(stage.tiles_per_lane),
        first_tile(run.first),
        first_lane(work.lanes.first),
        part_stride(stride),
        activations(x),
        partial(sums),
        out(to) {}
  MONO_DEVICE bool by_lane() const { return part_stride != 0; }  // a tile has a part for every lane
  MONO_DEVICE i32 per_tile() const { return by_lane() ? kOwnLanes * pieces : pieces; }
  MONO_DEVICE bool whole() const { return pieces == 1; }  // there is nothing to add up
  // Of the p-th piece, or of anything less than kMaxPieces: the part of the tiles at hand that it belongs to.
  MONO_DEVICE i32 part_of(i32 p) const { return i32(u32(p * per_piece) / kOnePiece); }
  // Of a row of a part of the tiles from `begin` on.
  MONO_DEVICE float* place(i32 begin, i32 part, i32 r) const {
    const i32 tile = by_lane() ? part / kOwnLanes : part;
    return out + (part - tile * (by_lane() ? kOwnLanes : 1)) * part_stride + (begin + tile) * arch::kTileRows + r;
  }
  // Of the p-th piece of the tiles from `begin` on. `lane`, of a tile that has one part, is counted on from piece to piece.
  MONO_DEVICE const T* input(i32 begin, i32 p, i32& lane) const {
    const i32 part = part_of(p), k = p - part * pieces;
    MONO_ROLLED
    while (!by_lane() && first_tile + begin + part >= (first_lane + lane + 1) * tiles_per_lane) ++lane;
    return activations + (by_lane() ? part % kOwnLanes : lane) * width + k * chunks * arch::kTileCols;
  }
  MONO_DEVICE void store(i32 begin, i32 p, float y) const {
    const i32 r = arch::lane() / arch::kLanesPerRow;
    float* to = whole() ? place(begin, part_of(p), r) : partial + p * arch::kTileRows + r;
    if (arch::lane() % arch::kLanesPerRow == 0) *to = y;
  }
};

// Multiplies tiles of a stage, piece by piece, with the activations. Pieces are summed in order, so results do not depend on
// who multiplied them. The pump knows where they lie: it walks the tape in the order of the stages. `begun`: pieces whose products
// are there already. Returns the pump, advanced.
template <class T>
MONO_OUTLINE arch::Pump multiply_tiles(const Stage& stage, const TileWork& work, Span run, const T* activations,
                                       float* partial, float* out, i32 part_stride, arch::Pump pump, i32 begun) {
  const PieceWork<T> of(stage, work, run, activations, partial, out, part_stride);
  const i32 per_tile = of.per_tile(), round = work.round;
  i32 lane = 0;
  MONO_ROLLED
  for (i32 begin = 0; begin < run.count; begin += round, begun = 0) {
    const i32 tiles = run.count - begin < round ? run.count - begin : round;
    MONO_ROLLED
    for (i32 p = begun + pump.first(); p < tiles * per_tile; p += arch::kWarps)
      of.store(begin, p, pump.dot(p, of.input(begin, p, lane), of.chunks));
    pump.advance(tiles * per_tile);
    arch::sync();
    if (of.whole()) continue;
    arch::for_each(tiles * (of.by_lane() ? kOwnLanes : 1) * arch::kTileRows, [&](i32 i) {
      const i32 part = i / arch::kTileRows, r = i % arch::kTileRows;
      const float* products = partial + part * of.pieces * arch::kTileRows + r;
      float sum = 0.0f;
      constexpr i32 kAtOnce = 6;
      MONO_ROLLED
      for (i32 first = 0; first < of.pieces; first += kAtOnce) {
        float some[kAtOnce];
        MONO_UNROLLED
        for (i32 k = 0; k < kAtOnce; ++k) some[k] = first + k < of.pieces ? products[(first + k) * arch::kTileRows] : 0.0f;
        MONO_UNROLLED
        for (i32 k = 0; k < kAtOnce; ++k) sum += some[k];
      }
      *of.place(begin, part, r) = sum;
    });
    arch::sync();
  }
  return pump;
}

template <class T>
MONO_DEVICE Span input_lanes(const BlockState<T>& s, StageIndex stage) {
  return s.scratch.work.tiles[stage].lanes;
}

// Whether every warp takes its first piece of a stage off the ring while the block waits for the activations, so that the ring can
// go on filling: where that is what it is full for. Pieces of the other stages come no sooner than their activations.
template <StageIndex kStage>
constexpr bool takes_first() {
  // Where there is more than one round, the first has more than half of kMaxPieces, or one tile of them: enough for every warp, too.
  static_assert(kMaxPieces / 2 >= arch::kWarps);
  const StagePieces pieces = kStagePieces[kStage];
  return arch::kTakesPieces && (kStage == kQkv || kStage == kO || kStage == kUp) && pieces.chunks > 0 && pieces.fewest >= arch::kWarps;
}

// Multiplies a block's tiles of a stage with the activations, which receive() waits for and writes; it ends with a barrier. A tile has
// one part per lane in a row parallel stage, else one part: out[part * part_stride + row].
template <StageIndex kStage, class T, class Receive>
MONO_DEVICE void product(BlockState<T>& s, i32, float* out, i32 part_stride, Receive receive) {
  const Stage& stage = s.device.stages[kStage];
  const TileWork& work = s.scratch.work.tiles[kStage];
  const Span& run = s.share.shares[kStage];
  i32 begun = 0;
  if constexpr (takes_first<kStage>()) {
    const i32 p = s.link.pump.first();
    const auto piece = s.link.pump.template take<kStagePieces[kStage].chunks>(p);
    receive();
    const PieceWork<T> of(stage, work, run, s.scratch.activations, s.scratch.work.partial, out, part_stride);
    i32 lane = 0;
    of.store(0, p, piece.product(of.input(0, p, lane)));
    begun = arch::kWarps;
  } else {
    receive();
    if (work.chunks == 0) {  // a device without heads
      const i32 rows = run.count * arch::kTileRows;
      for (i32 lane = 0; lane < s.lanes(); ++lane)
        arch::for_each(rows, [&](i32 i) { out[lane * part_stride + i] = 0.0f; });
      arch::sync();
      return;
    }
  }
  s.link.pump = multiply_tiles(stage, work, run, s.scratch.activations, s.scratch.work.partial, out, part_stride, s.link.pump, begun);
}

}  // namespace mono::MONO_VARIANT
