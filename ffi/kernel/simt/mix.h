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

// Pushes the sums of own rows to the block of the same number on every other device. The last threads do it, while the first mix
// rows.
template <class T>
MONO_DEVICE void push_sums(const BlockState<T>& s, i32 layer, i32 module) {
  const u32 tag = s.link.out_tag(inbox_channel(module), layer);
  const i32 run = (s.device_index * s.header.num_blocks + s.block_index) * s.header.hidden_run;
  MONO_ROLLED
  for (i32 w = arch::kThreads - 1 - arch::thread(); w < s.header.hidden_run; w += arch::kThreads) {
    float payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 row = w * kFloatsPerWord + k;
      payload[k] = even_rows(s.header) || row < s.rows ? own_sum(s, layer, module, row) : 0.0f;
    }
    const arch::Word word = arch::pack(tag, payload);
    MONO_ROLLED
    for (i32 peer = 0; peer < s.header.num_devices; ++peer)
      if (peer != s.device_index)
        arch::store_word(s.peer_words(peer, s.scratch.channels[peer].inbox[module], layer) + run + w, word);
  }
}

// Sums over all lanes of all devices of a module's output of own rows, without each lane's own output if that is delayed, into
// scratch.arrived. A peer's word is its lanes' sum; the order of additions is the same on every device. The last threads do it:
// they have least to do in what follows.
template <class T>
MONO_DEVICE void take_sums(BlockState<T>& s, i32 layer, i32 module, bool delayed) {
  constexpr i32 kDevices = Shape::num_devices;
  const arch::Word* inbox = s.own_words(s.device.channels.inbox[module], layer) + s.block_index * s.header.hidden_run;
  MONO_ROLLED
  for (i32 w = arch::kThreads - 1 - arch::thread(); w < s.header.hidden_run; w += arch::kThreads) {
    arch::Word words[kDevices];
    if constexpr (kDevices > 1)
      s.link.wait_for(
          words, Blocks::kOfAll, inbox_channel(module), layer,
          [&](i32 peer) { return inbox + peer * s.header.num_blocks * s.header.hidden_run + w; },
          [&](i32 peer) { return peer != s.device_index; });
    float sums[kDevices][kFloatsPerWord];
    MONO_UNROLLED
    for (i32 peer = 0; peer < kDevices; ++peer) arch::unpack(words[peer], sums[peer]);
    MONO_UNROLLED
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 row = w * kFloatsPerWord + k;
      if (!even_rows(s.header) && row >= s.rows) break;
      const float own = own_sum(s, layer, module, row);
      float parts[kDevices];
      MONO_UNROLLED
      for (i32 peer = 0; peer < kDevices; ++peer) parts[peer] = peer == s.device_index ? own : sums[peer][k];
      const float total = tree_sum(parts, kDevices);
      MONO_ROLLED
      for (i32 lane = 0; lane < s.lanes(); ++lane)
        s.arrived(lane)[row] = delayed ? total - s.history(layer, module, lane)[row] : total;
    }
  }
}

// Adds a module's output and what has arrived (if any: `arrives`) to the block's own rows of the residual stream, and publishes
// them. Where sums arrive at once, they have the output already.
template <class T>
MONO_DEVICE void mix_rows(BlockState<T>& s, i32 layer, i32 module, bool arrives, bool immediate, float own_scale) {
  const u32 tag = s.link.out_tag(residual_channel(module), layer);
  const i32 run = s.header.hidden_run;
  arch::Word* to = s.own_words(s.device.channels.residual[module], layer) + s.block_index * run;
  arch::for_each(s.lanes() * run, [&](i32 i) {
    const i32 lane = i / run, w = i - lane * run;
    float* x = s.residual(lane);
    const float *own = s.history(layer, module, lane), *others = s.arrived(lane);
    const i32 first = w * kFloatsPerWord;
    float payload[kFloatsPerWord] = {};
    if (even_rows(s.header) || first < s.rows) {
      float before[kFloatsPerWord], output[kFloatsPerWord], arrived[kFloatsPerWord];
      // All at once, wanted or not: a branch for each would wait for each.
      MONO_UNROLLED
      for (i32 k = 0; k < kFloatsPerWord; ++k) {
        const i32 at = even_rows(s.header) || first + k < s.rows ? first + k : first;
        before[k] = x[at];
        output[k] = own[at];
        arrived[k] = others[at];
      }
      MONO_UNROLLED
      for (i32 k = 0; k < kFloatsPerWord; ++k) {
        if (!even_rows(s.header) && first + k >= s.rows) break;
        payload[k] = immediate ? before[k] + arrived[k]  // bit-identical in all lanes
                               : before[k] + own_scale * output[k] + (arrives ? arrived[k] : 0.0f);
        x[first + k] = payload[k];
      }
    }
    publish(s.header, Blocks::kOfDevice, to + lane * hidden_words(s.header) + w, arch::pack(tag, payload));
    s.link.pump.step();
  });
}

}  // namespace mono::MONO_VARIANT
