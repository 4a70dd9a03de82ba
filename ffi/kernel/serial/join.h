// Joins partial softmaxes, word by word.
#pragma once

#include "kernel/attention.h"

namespace mono::MONO_VARIANT {

// Into the activations.
template <class T>
void join_parts(BlockState<T>& s, i32 layer, const Parts& parts) {
  static_assert(kFloatsPerWord == 1 && kPartHead == 2, "maximum and sum have a word each");
  const i32 size = s.header.head_dim, width = s.device.stages[kO].width;
  const i32 queries = s.kv_heads() * s.header.queries_per_kv, per_lane = s.heads_per_lane() * s.header.queries_per_kv;
  const i32 splits = s.header.kv_splits, stride = parts.stride(s.header);
  float *maxima = s.scratch.work.joins, *joined = maxima + splits;
  for (i32 query = 0; query < queries; ++query) {
    float maximum = -kInfinity, total = 0.0f;
    for (i32 k = 0; k < splits; ++k) {
      if (!parts.has(s.header, k)) continue;
      maxima[k] = arch::value_of(s.link.wait(parts.of(s.header, query) + k * stride, kAttentionParts, layer));
      if (maxima[k] > maximum) maximum = maxima[k];
    }
    for (i32 i = 0; i < size; ++i) joined[i] = 0.0f;
    for (i32 k = 0; k < splits; ++k) {
      if (!parts.has(s.header, k)) continue;
      const float weight = exp_below(maxima[k] - maximum);
      const arch::Word* sum = parts.of(s.header, query) + k * stride + 1;
      total += weight * arch::value_of(s.link.wait(sum, kAttentionParts, layer));
      s.link.read(
          size, kAttentionParts, layer, [&](i32 i) { return sum + 1 + i; },
          [&](i32 i, const arch::Word& word) { joined[i] += weight * arch::value_of(word); });
    }
    const float factor = activation_scale(s.header) / total;
    const i32 lane = query / per_lane;
    T* out = s.scratch.activations + i64(lane) * width + (query - lane * per_lane) * size;
    for (i32 i = 0; i < size; ++i) arch::from_float(joined[i] * factor, out[i]);
  }
}

}  // namespace mono::MONO_VARIANT
