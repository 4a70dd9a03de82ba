// Joins partial softmaxes: a warp looks after one query at a time, its lanes after the words of the output.
#pragma once

#include "kernel/attention.h"

namespace mono::MONO_VARIANT {

// Splits whose words a lane asks for at once: a power of two, because their maxima meet in a butterfly.
constexpr i32 splits_at_once() {
  i32 splits = 1;
  while (splits < 8 && splits < Shape::kv_splits) splits *= 2;
  return splits;
}

// Into the activations. A running maximum goes from batch to batch of splits (Milakov and Gimelshein, 2018); of each batch every
// split has a lane for its maximum and sum.
template <class T>
MONO_DEVICE void join_parts(BlockState<T>& s, i32 layer, const Parts& parts) {
  constexpr i32 kBatch = splits_at_once(), kOutputs = words_for(Shape::head_dim, kFloatsPerWord), kGroup = Shape::queries_per_kv;
  static_assert(kPartHead == 1, "one word has maximum and sum");
  const i32 width = s.device.stages[kO].width, per_lane = s.heads_per_lane() * kGroup, own = arch::lane() % kBatch;
  MONO_ROLLED
  for (i32 query = arch::warp(); query < s.kv_heads() * kGroup; query += arch::kWarps) {
    MONO_ROLLED
    for (i32 first = 0; first < kOutputs; first += arch::kWarp) {
      const i32 w = first + arch::lane();
      float maximum = -kInfinity, total = 0.0f, joined[kFloatsPerWord] = {};
      MONO_ROLLED
      for (i32 begin = 0; begin < parts.splits; begin += kBatch) {
        arch::Word words[kBatch + 1];
        const arch::Word* at[kBatch + 1];
        MONO_UNROLLED
        for (i32 k = 0; k < kBatch; ++k)
          at[k] = begin + k < parts.splits && w < kOutputs ? parts.of(s.header, query, begin + k) + kPartHead + w : nullptr;
        at[kBatch] = begin + own < parts.splits ? parts.of(s.header, query, begin + own) : nullptr;
        s.link.wait_for(words, at, kAttentionParts, layer);
        float head[kFloatsPerWord];
        arch::unpack(words[kBatch], head);
        const float of_split = at[kBatch] ? head[0] : -kInfinity;
        float highest = of_split > maximum ? of_split : maximum;
        MONO_UNROLLED
        for (i32 mask = 1; mask < kBatch; mask *= 2) {
          const float other = arch::swapped(highest, mask);
          highest = other > highest ? other : highest;
        }
        const float weight = exp_below(of_split - highest), shrink = begin > 0 ? exp_below(maximum - highest) : 0.0f;
        float sum = at[kBatch] ? weight * head[1] : 0.0f;
        MONO_UNROLLED
        for (i32 mask = 1; mask < kBatch; mask *= 2) sum += arch::swapped(sum, mask);
        maximum = highest;
        total = total * shrink + sum;
        for (float& x : joined) x *= shrink;
        MONO_UNROLLED
        for (i32 k = 0; k < kBatch; ++k) {
          const float of_word = arch::of_lane(weight, k);
          float values[kFloatsPerWord];
          arch::unpack(words[k], values);  // zeros where there is no word
          for (i32 j = 0; j < kFloatsPerWord; ++j) joined[j] += of_word * values[j];
        }
      }
      const float factor = activation_scale(Shape{}) / total;
      const i32 lane = query / per_lane;
      T* out = s.scratch.activations + lane * width + (query - lane * per_lane) * Shape::head_dim;
      MONO_UNROLLED
      for (i32 j = 0; j < kFloatsPerWord; ++j)
        if (w < kOutputs && w * kFloatsPerWord + j < Shape::head_dim) arch::from_float(joined[j] * factor, out[w * kFloatsPerWord + j]);
    }
  }
}

}  // namespace mono::MONO_VARIANT
