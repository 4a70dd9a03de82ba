// From the last residual stream to this block's logits.
#pragma once

#include "kernel/layer.h"

namespace mono::MONO_VARIANT {

// Adds the lanes (normalised first, or not) of all devices: own rows are summed here, peers' sums arrive in the inbox, and
// the sums of all rows are published as final_sum.
template <class T>
MONO_DEVICE void sum_lanes(BlockState<T>& s, bool normalise) {
  const Channels& channels = s.device.channels;
  Shape h = s.header;
  const float* scale = s.constants(s.device.constants.final_norm);
  float inverse[kMaxLanes];
  arch::sync();  // other threads wrote the residuals
  const i32 last = h.num_layers - 1;
  if (normalise) lane_inverses(s, s.own_copy(s.own_words(channels.residual[kMlp], last)), last, inverse);

  auto own = [&](i32 row) {
    float parts[kMaxLanes];
    MONO_UNROLLED
    for (i32 lane = 0; lane < s.lanes(); ++lane) {
      const float x = s.residual(lane)[row];
      parts[lane] = normalise ? x * inverse[lane] * scale[s.first_row + row] : x;
    }
    return tree_sum(parts, s.lanes());
  };
  const i64 run = i64(s.block_index) * h.hidden_run, stride = hidden_words(h);
  u32 tag = s.link.out_tag(kFinalInbox, 0);
  for (i32 peer = 0; peer < h.num_devices; ++peer) {
    if (peer == s.device_index) continue;
    arch::Word* to = s.exchange(peer) + s.scratch.channels[peer].final_inbox;
    publish_run(h, Blocks::kOfAll, to + s.device_index * stride + run, h.hidden_run, tag, s.rows, own);
  }
  const arch::Word* from = s.exchange(s.device_index) + channels.final_inbox + run;
  arch::Word* to = s.exchange(s.device_index) + channels.final_sum + run;
  tag = s.link.out_tag(kFinalSum, 0);
  const float factor = normalise ? 1.0f / float(h.num_lanes) : 1.0f;
  arch::for_each(h.hidden_run, [&](i32 w) {
    float parts[kFloatsPerWord][kMaxDevices], payload[kFloatsPerWord];
    MONO_UNROLLED
    for (i32 peer = 0; peer < h.num_devices; ++peer) {
      float values[kFloatsPerWord] = {};
      if (peer != s.device_index) arch::unpack(s.link.wait(from + peer * stride + w, kFinalInbox, 0), values);
      for (i32 k = 0; k < kFloatsPerWord; ++k) {
        const i32 row = w * kFloatsPerWord + k;
        if (peer == s.device_index) values[k] = row < s.rows ? own(row) : 0.0f;
        parts[k][peer] = values[k];
      }
    }
    for (i32 k = 0; k < kFloatsPerWord; ++k) payload[k] = tree_sum(parts[k], h.num_devices) * factor;
    publish(h, Blocks::kOfDevice, to + w, arch::pack(tag, payload));
  });
  arch::sync();  // no thread waits for the sums before the block has what it adds to them: a wait in vain names the cause
}

// Leaves the logits of the block's own vocabulary rows in scratch.rows.
template <class T>
MONO_DEVICE void head_stage(BlockState<T>& s) {
  column_product<kHead>(s, 0, [&] {
    const i64 norm = s.device.constants.final_norm;
    if (s.header.head_kind == kMeanOfNorms || s.header.head_kind == kNormOfSum) {
      const bool normalised = s.header.head_kind == kMeanOfNorms;
      sum_lanes(s, normalised);
      const arch::Word* sums = s.own_copy(s.exchange(s.device_index) + s.device.channels.final_sum);
      norm_words(s, sums, 1, kFinalSum, 0, normalised ? nullptr : s.constants(norm));
    } else {  // dense: one lane; per_lane: each lane has its own rows
      norm_input(s, kHead, norm, Input{-1, s.header.num_layers - 1, kMlp});
    }
    s.note(kHeadInput);
  });
  s.note(kHeadProduct);
}

// Of a block's head rows: the token of the i-th, or -1 where a tile is padded.
MONO_DEVICE i32 token_of(const Device& device, const Block& block, i32 i) {
  const Stage& stage = device.stages[kHead];
  const i32 tile = block.shares[kHead].first + i / arch::kTileRows, lane = tile / stage.tiles_per_lane;
  const i32 row = (tile - lane * stage.tiles_per_lane) * arch::kTileRows + i % arch::kTileRows;
  return row < stage.rows ? device.vocab.first + lane * stage.rows + row : -1;
}

// Calls body(token, logit) for every vocabulary row of this block; the block's threads share the rows.
template <class T, class Body>
MONO_DEVICE void for_own_logits(const BlockState<T>& s, Body body) {
  arch::for_each(s.share.shares[kHead].count * arch::kTileRows, [&](i32 i) {
    const i32 token = token_of(s.device, s.share, i);
    if (token >= 0) body(token, s.scratch.rows[i]);
  });
}

}  // namespace mono::MONO_VARIANT
