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
  constexpr i32 kBatch = splits_at_once(), kBatches = (Shape::kv_splits + kBatch - 1) / kBatch;
  constexpr i32 kOutputs = words_for(Shape::head_dim, kFloatsPerWord), kGroup = Shape::queries_per_kv;
  static_assert(kPartHead == 1, "one word has maximum and sum");
  const i32 width = s.device.stages[kO].width, per_lane = s.heads_per_lane() * kGroup, own = arch::lane() % kBatch;
  MONO_ROLLED
  for (i32 query = arch::warp(); query < s.kv_heads() * kGroup; query += arch::kWarps) {
    const arch::Word* of_query = parts.of(s.header, query);
    MONO_ROLLED
    for (i32 first = 0; first < kOutputs; first += arch::kWarp) {
      const i32 w = first + arch::lane();
      const arch::Word* of_word = of_query + kPartHead + w;
      float maximum = kLowest, total = 0.0f, joined[kFloatsPerWord] = {};
      // The batches that have visible splits, each once: they go round.
      i32 begin = kBatches == 1 ? 0 : parts.first_split / kBatch * kBatch, end = parts.first_split - begin + parts.splits;
      MONO_ROLLED
      for (i32 done = 0; done < kBatches && end > 0; ++done) {
        arch::Word words[kBatch + 1];  // of the output of every split, and this lane's split's maximum and sum
        auto split = [&](i32 k) { return begin + (k < kBatch ? k : own); };
        s.link.wait_for(
            words, Blocks::kOfDevice, kAttentionParts, layer,
            [&](i32 k) { return (k < kBatch ? of_word : of_query) + parts.stride(Shape{}) * split(k); },
            [&](i32 k) { return parts.has(Shape{}, split(k)) && (k == kBatch || w < kOutputs); });
        float head[kFloatsPerWord];
        arch::unpack(words[kBatch], head);
        const bool visible = parts.has(Shape{}, split(kBatch));
        const float of_split = visible ? head[0] : kLowest;
        float highest = of_split > maximum ? of_split : maximum;
        MONO_UNROLLED
        for (i32 mask = 1; mask < kBatch; mask *= 2) {
          const float other = arch::swapped(highest, mask);
          highest = other > highest ? other : highest;
        }
        const float weight = visible ? exp_below(of_split - highest) : 0.0f;
        const float shrink = done > 0 ? exp_below(maximum - highest) : 0.0f;
        float sum = visible ? weight * head[1] : 0.0f;
        MONO_UNROLLED
        for (i32 mask = 1; mask < kBatch; mask *= 2) sum += arch::swapped(sum, mask);
        maximum = highest;
        total = total * shrink + sum;
        for (float& x : joined) x *= shrink;
        MONO_UNROLLED
        for (i32 k = 0; k < kBatch; ++k) {
          const float weight_of = arch::of_lane(weight, k);
          float values[kFloatsPerWord];
          arch::unpack(words[k], values);
          for (i32 j = 0; j < kFloatsPerWord; ++j) joined[j] += weight_of * values[j];
        }
        end -= begin + kBatch < Shape::kv_splits ? kBatch : Shape::kv_splits - begin;
        begin = begin + kBatch < Shape::kv_splits ? begin + kBatch : 0;
      }
      const float factor = activation_scale(Shape{}) / total;
      const i32 lane = query / per_lane;
      T* out = s.scratch.activations + lane * width + (query - lane * per_lane) * Shape::head_dim;
      MONO_UNROLLED
      for (i32 j = 0; j < kFloatsPerWord; ++j)
        if (w < kOutputs && w * kFloatsPerWord + j < Shape::head_dim)
          arch::from_float(joined[j] * factor, out[w * kFloatsPerWord + j]);
    }
  }
}

}  // namespace mono::MONO_VARIANT
