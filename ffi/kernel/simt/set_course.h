// Where a block's walk along its tape goes.
#pragma once

#include "kernel/simt/pieces.h"

namespace mono::MONO_VARIANT {

// Sets the course of the block; returns its pieces per token, LM head included.
MONO_DEVICE i32 set_course(const Call& call, i32 block, i32 first_head) {
  const Device& device = call.plan.devices[call.device];
  const Block& share = call.plan.block(call.device, block);
  arch::Course& course = arch::course();
  i32 pieces = 0;
  MONO_ROLLED
  for (i32 stage = 0; stage < kStages; ++stage) {
    const PieceRun run(device, share, stage);
    pieces += run.count * (stage == kHead ? 1 : Shape::num_layers);
    constexpr u32 bytes = u32(sizeof(Weight));
    if (arch::thread() == 0) course.runs[stage] = {u32(run.offset) * bytes, u32(run.words) * bytes, run.count};
  }
  if (arch::thread() == 0) {
    course.layers = u64(static_cast<const Weight*>(call.layers) + share.layers);
    course.head = u64(static_cast<const Weight*>(call.head) + share.head);
    course.first_head = first_head;
  }
  arch::sync();
  return pieces;
}

// The fed token from which on a request needs the LM head.
MONO_DEVICE i32 first_head(const Request& request) { return request.mode == kGenerate ? request.num_forced - 1 : 0; }

}  // namespace mono::MONO_VARIANT
