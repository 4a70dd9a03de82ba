// From the last residual stream to this block's logits.
#pragma once

#include "layer.h"

namespace mono::MONO_VARIANT {

// Adds the lanes (normalised first, or not) of all devices: own rows are summed here, peers' sums arrive in the inbox,
// and every block receives the whole vector into scratch.x of lane 0.
template <class T>
MONO_DEVICE void sum_lanes(BlockState<T>& s, bool normalise) {
  const Channels& channels = s.device.channels;
  const i32 hidden = s.header.hidden_size, devices = s.header.num_devices;
  const float* scale = s.constants(s.device.constants.final_norm);
  float inverse[kMaxLanes], parts[kMaxDevices > kMaxLanes ? kMaxDevices : kMaxLanes][1];
  for (i32 lane = 0; lane < s.lanes() && normalise; ++lane)
    inverse[lane] = inverse_rms(s, s.scratch.x + i64(lane) * hidden);

  float* own = s.history(0, kMlp, 0);  // free by now: nothing of this token reads it again
  u32 tag = s.link.out_tag(kFinalInbox, 0);
  for (i32 r = 0; r < s.rows; ++r) {
    const i32 row = s.first_row + r;
    for (i32 lane = 0; lane < s.lanes(); ++lane) {
      float x = s.scratch.x[i64(lane) * hidden + row];
      parts[lane][0] = normalise ? x * inverse[lane] * scale[row] : x;
    }
    tree_sum(parts, s.lanes());
    own[r] = parts[0][0];
    for (i32 peer = 0; peer < devices; ++peer) {
      if (peer == s.device_index) continue;
      arch::Word* to = s.call.exchange[peer] + s.call.plan.devices[peer].channels.final_inbox;
      publish(to + i64(s.device_index) * hidden + row, tag, own[r]);
    }
  }
  const arch::Word* from = s.call.exchange[s.device_index] + channels.final_inbox;
  arch::Word* to = s.call.exchange[s.device_index] + channels.final_sum;
  tag = s.link.out_tag(kFinalSum, 0);
  const float factor = normalise ? 1.0f / float(s.header.num_lanes) : 1.0f;
  for (i32 r = 0; r < s.rows; ++r) {
    const i32 row = s.first_row + r;
    for (i32 peer = 0; peer < devices; ++peer)
      parts[peer][0] = peer == s.device_index
                        ? own[r]
                        : arch::bits_float(s.link.wait(from + i64(peer) * hidden + row, kFinalInbox, 0));
    tree_sum(parts, devices);
    publish(to + row, tag, parts[0][0] * factor);
  }
  s.link.read(to, hidden, kFinalSum, 0, [&](i64 i, float value) { s.scratch.x[i] = value; });
}

// Leaves the logits of the block's own vocabulary rows in scratch.logits, tile by tile.
template <class T>
MONO_DEVICE void head_stage(BlockState<T>& s) {
  const i64 norm = s.device.constants.final_norm;
  switch (s.header.head_kind) {
    case kMeanOfNorms:
      sum_lanes(s, true);
      for (i32 i = 0; i < s.header.hidden_size; ++i) arch::from_float(s.scratch.x[i], s.scratch.activations[i]);
      pad_activations(s.scratch.activations, s.header.hidden_size, s.header.hidden_width);
      break;
    case kNormOfSum:
      sum_lanes(s, false);
      norm_to_activations(s, 1, norm);
      break;
    default:  // dense: one lane; per_lane: each lane has its own rows
      norm_to_activations(s, s.lanes(), norm);
  }
  float* logits = s.scratch.logits;
  column_product(s, kHead, 0, [&](i32, i32, const float* out) {
    for (i32 r = 0; r < arch::kTileRows; ++r) *logits++ = out[r];
  });
}

// Calls body(token, logit) for every vocabulary row of this block.
template <class T, class Body>
MONO_DEVICE void for_own_logits(const BlockState<T>& s, Body body) {
  const Stage& stage = s.device.stages[kHead];
  const Span& run = s.share.shares[kHead];
  for (i32 t = run.first; t < run.first + run.count; ++t) {
    const i32 lane = t / stage.tiles_per_lane, first = (t - lane * stage.tiles_per_lane) * arch::kTileRows;
    const float* logits = s.scratch.logits + i64(t - run.first) * arch::kTileRows;
    for (i32 r = 0; r < arch::kTileRows && first + r < stage.rows; ++r)
      body(s.device.vocab.first + lane * stage.rows + first + r, logits[r]);
  }
}

}  // namespace mono::MONO_VARIANT
