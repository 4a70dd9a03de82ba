// Sums over lanes and the residual stream, a word at a time: the block's threads share the words.
#pragma once

#include "kernel/layer.h"

namespace mono::MONO_VARIANT {

// Sum over this device's lanes of a module's output, of one own row.
template <class T>
MONO_DEVICE float own_sum(const BlockState<T>& s, i32 layer, i32 module, i32 row) {
  float parts[kMaxLanes];
  MONO_UNROLLED
  for (i32 lane = 0; lane < s.lanes(); ++lane) parts[lane] = s.history(layer, module, lane)[row];
  return tree_sum(parts, s.lanes());
}

// Pushes the sums of own rows to the block of the same number on every other device.
template <class T>
MONO_DEVICE void push_sums(const BlockState<T>& s, i32 layer, i32 module) {
  const u32 tag = s.link.out_tag(inbox_channel(module), layer);
  const i64 run = (i64(s.device_index) * s.header.num_blocks + s.block_index) * s.header.hidden_run;
  arch::for_each(s.header.hidden_run, [&](i32 w) {
    float payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 row = w * kFloatsPerWord + k;
      payload[k] = row < s.rows ? own_sum(s, layer, module, row) : 0.0f;
    }
    const arch::Word word = arch::pack(tag, payload);
    MONO_ROLLED
    for (i32 peer = 0; peer < s.header.num_devices; ++peer)
      if (peer != s.device_index)
        arch::store_word(s.peer_words(peer, s.scratch.channels[peer].inbox[module], layer) + run + w, word);
  });
}

// Sum over all lanes of all devices of a module's output of own rows, into scratch.total. A peer's word is its lanes' sum;
// the order of additions is the same on every device.
template <class T>
MONO_DEVICE void total_sums(BlockState<T>& s, i32 layer, i32 module) {
  const arch::Word* inbox = s.own_words(s.device.channels.inbox[module], layer) + i64(s.block_index) * s.header.hidden_run;
  const i64 stride = i64(s.header.num_blocks) * s.header.hidden_run;
  arch::for_each(s.header.hidden_run, [&](i32 w) {
    float parts[kFloatsPerWord][kMaxDevices];
    arch::Word words[kMaxDevices];
    MONO_UNROLLED
    for (i32 peer = 0; peer < s.header.num_devices; ++peer)
      if (peer != s.device_index) words[peer] = arch::load_word(inbox + peer * stride + w);
    MONO_UNROLLED
    for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
      float values[kFloatsPerWord] = {};
      if (peer != s.device_index)
        arch::unpack(s.link.confirm(words[peer], inbox + peer * stride + w, inbox_channel(module), layer), values);
      for (i32 k = 0; k < kFloatsPerWord; ++k) {
        const i32 row = w * kFloatsPerWord + k;
        if (peer == s.device_index) values[k] = row < s.rows ? own_sum(s, layer, module, row) : 0.0f;
        parts[k][peer] = values[k];
      }
    }
    for (i32 k = 0; k < kFloatsPerWord; ++k)
      if (w * kFloatsPerWord + k < s.rows) s.scratch.total[w * kFloatsPerWord + k] = tree_sum(parts[k], s.header.num_devices);
  });
  arch::sync();
}

// Adds to the block's own rows of the residual stream what a module's output and sums over all lanes bring, and publishes them:
// the sums of layer `source` if that is not negative, immediate or delayed.
template <class T>
MONO_DEVICE void mix_rows(BlockState<T>& s, i32 layer, i32 module, i32 source, bool immediate, float own_scale) {
  const bool delayed = source >= 0 && !immediate;
  const u32 tag = s.link.out_tag(residual_channel(module), layer);
  const i32 run = s.header.hidden_run;
  arch::Word* to = s.own_words(s.device.channels.residual[module], layer) + i64(s.block_index) * run;
  arch::for_each(s.lanes() * run, [&](i32 i) {
    const i32 lane = i / run, w = i - lane * run;
    float* x = s.residual(lane);
    const float* own = s.history(layer, module, lane);
    const float* past = s.history(delayed ? source : layer, module, lane);
    float payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 row = w * kFloatsPerWord + k;
      payload[k] = 0.0f;
      if (row >= s.rows) continue;
      float value = x[row];
      if (immediate) {
        value += s.scratch.total[row];  // bit-identical in all lanes
      } else {
        value += own_scale * own[row];
        if (delayed) value += s.scratch.total[row] - past[row];
      }
      x[row] = payload[k] = value;
    }
    publish(s.header, s.header.num_dies, to + i64(lane) * hidden_words(s.header) + w, arch::pack(tag, payload));
    s.link.pump.step();
  });
}

}  // namespace mono::MONO_VARIANT
