// The order in which a block's tape is read: what the pump feeds and the stages consume.
#pragma once

#include "kernel/simt/pieces.h"

namespace mono::MONO_VARIANT {

// Whether the fed-th token of a call needs the LM head.
MONO_DEVICE bool needs_head(const Request& request, i32 fed) {
  return request.mode != kGenerate || fed + 1 >= request.num_forced;
}

// Feeds one of arch::kFeeders shares of the tape of one token after the other, until told to stop. `runs`: per stage.
template <class T>
MONO_DEVICE void feed_tokens(const Call& call, i32 block, const PieceRun* runs, int feeder) {
  const Block& share = call.plan.block(call.device, block);
  const T* layers = static_cast<const T*>(call.layers) + share.layers;
  const T* head = static_cast<const T*>(call.head) + share.head;
  arch::Feed feed(feeder);
  auto copy = [&](i32 stage, const T* tape) {
    const PieceRun& run = runs[stage];
    return feed.copy(reinterpret_cast<const char*>(tape + run.offset), u32(run.words) * u32(sizeof(T)), run.count);
  };
  bool going = true;
  MONO_ROLLED
  for (i32 fed = 0; going; ++fed) {
    const T* tape = layers;
    MONO_ROLLED
    for (i32 layer = 0; layer < Shape::num_layers && going; ++layer, tape += Shape::layer_words)
      MONO_ROLLED
      for (i32 stage = 0; stage < kHead && going; ++stage) going = copy(stage, tape);
    if (going && needs_head(call.request, fed)) going = copy(kHead, head);
  }
  feed.drain();
}

// Takes the pieces of `budget` tokens off the ring.
MONO_DEVICE void drop_tokens(const Call& call, const PieceRun* runs) {
  i32 pieces = 0;
  MONO_ROLLED
  for (i32 stage = 0; stage < kStages; ++stage) pieces += runs[stage].count * (stage == kHead ? 1 : Shape::num_layers);
  arch::Pump pump;
  MONO_ROLLED
  for (i32 fed = 0; fed < call.request.budget; ++fed) {
    MONO_ROLLED
    for (i32 p = pump.first(); p < pieces; p += arch::kWarps) pump.drop(p);
    pump.advance(pieces);
  }
}

}  // namespace mono::MONO_VARIANT
