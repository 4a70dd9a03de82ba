// Where a block's walk along its tape goes.
#pragma once

#include "kernel/simt/pieces.h"

namespace mono::MONO_VARIANT {

// By how many granules a tape lies further on in each region that it touches, of the `regions` of its array. Returns how many
// periods of the first of them lie before it.
MONO_DEVICE u32 set_swizzle(const float* swizzle, i64 regions, i64 start, i32 count, signed char* further) {
  const u32 granule = u32(start / Shape::granule_words), own = granule % u32(Shape::period);
  const u32 period = u32(swizzle[0]) % arch::kRegionPeriods + granule / u32(Shape::period), first = period / arch::kRegionPeriods;
  arch::for_each(count, [&](i32 i) {
    // Whatever the table says, no tape leaves its period.
    const u32 exchanged = first + i < regions ? u32(swizzle[1 + first + i]) % u32(Shape::period) : 0;
    further[i] = (signed char)(i32(own ^ exchanged) - i32(own));
  });
  return period % arch::kRegionPeriods;
}

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
  if constexpr (arch::kRegionPeriods > 0) {
    arch::Swizzle& swizzle = arch::swizzle();
    const u32 layers = set_swizzle(call.constants + Shape::layers_swizzle, Shape::head_swizzle - Shape::layers_swizzle - 1, share.layers,
                                   arch::kLayersRegions, swizzle.further);
    const u32 head = set_swizzle(call.constants + Shape::head_swizzle, device.constants.floats - Shape::head_swizzle - 1, share.head,
                                 arch::kHeadRegions + 1, swizzle.further + arch::kLayersRegions);
    if (arch::thread() == 0) {
      swizzle.layers_begun = layers;
      swizzle.head_begun = head;
    }
  }
  arch::sync();
  return pieces;
}

// The fed token from which on a request needs the LM head.
MONO_DEVICE i32 first_head(const Request& request) { return request.mode == kGenerate ? request.num_forced - 1 : 0; }

}  // namespace mono::MONO_VARIANT
