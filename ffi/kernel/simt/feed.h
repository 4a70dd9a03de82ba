// The order in which a block's tape is read: what the pump feeds and the stages consume.
#pragma once

#include "kernel/simt/pieces.h"

namespace mono::MONO_VARIANT {

// Whether the fed-th token of a call needs the LM head.
MONO_DEVICE bool needs_head(const Request& request, i32 fed) {
  return request.mode != kGenerate || fed + 1 >= request.num_forced;
}

// Feeds the tape of one token after the other until told to stop.
template <class T>
MONO_DEVICE void feed_tokens(const Call& call, i32 block, const volatile i32* stop) {
  const Device& device = call.plan.devices[call.device];
  const Block& share = call.plan.block(call.device, block);
  PieceRun runs[kStages] = {{device, share, 0}, {device, share, 1}, {device, share, 2}, {device, share, 3}, {device, share, 4}};
  const T* layers = static_cast<const T*>(call.layers) + i64(block) * Shape::num_layers * Shape::layer_words;
  const T* head = static_cast<const T*>(call.head) + i64(block) * Shape::head_words;
  arch::Feed feed(stop);
  bool going = true;
  auto run = [&](const PieceRun& pieces, const T* tape) {
    const T* at = tape + pieces.offset;
    MONO_ROLLED
    for (i32 i = 0; i < pieces.count && going; ++i, at += pieces.words) going = feed.copy(at, pieces.words * sizeof(T));
  };
  MONO_ROLLED
  for (i32 fed = 0; going; ++fed) {
    MONO_ROLLED
    for (i32 layer = 0; layer < Shape::num_layers; ++layer)
#pragma unroll
      for (i32 stage = 0; stage < kHead; ++stage) run(runs[stage], layers + i64(layer) * Shape::layer_words);
    if (needs_head(call.request, fed)) run(runs[kHead], head);
  }
  feed.drain();
}

// Takes the pieces of `budget` tokens off the ring.
template <class T>
MONO_DEVICE void drop_tokens(const Call& call, i32 block) {
  const Device& device = call.plan.devices[call.device];
  const Block& share = call.plan.block(call.device, block);
  i32 pieces = 0;
  MONO_ROLLED
  for (i32 stage = 0; stage < kStages; ++stage)
    pieces += PieceRun(device, share, stage).count * (stage == kHead ? 1 : Shape::num_layers);
  arch::Pump pump;
  MONO_ROLLED
  for (i32 fed = 0; fed < call.request.budget; ++fed) {
    MONO_ROLLED
    for (i32 p = pump.first(); p < pieces; p += arch::kWarps) pump.drop(p);
    pump.advance(pieces);
  }
}

}  // namespace mono::MONO_VARIANT
