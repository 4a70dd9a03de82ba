// Which tokens may be sampled: top-k, top-p and min-p as one threshold on the scaled logits.
//
// Order as in Hugging Face transformers: temperature, top-k, top-p among what is left, min-p. All three keep the highest
// scores, so the strictest threshold decides; equal scores stay or go together.
#pragma once

#include "kernel/maths.h"

namespace mono::MONO_VARIANT {

constexpr i32 kBins = 256;

// Finds the largest key K such that the weights of all scores with sort_key >= K reach `goal`, eight bits at a time.
// weight(score) is an integer, so the result does not depend on the order of the scores. bins: [kBins], near memory.
template <class Weight>
MONO_DEVICE u32 threshold_key(const float* scores, i32 count, u32 floor_key, u64 goal, u64* bins, Weight weight) {
  u32 prefix = 0;
  u64 above = 0;  // weight of keys beyond the prefix's range
  MONO_ROLLED
  for (int shift = 24; shift >= 0; shift -= 8) {
    arch::for_each(kBins, [&](i32 i) { bins[i] = 0; });
    arch::sync();
    arch::for_each(count, [&](i32 i) {
      const u32 key = sort_key(scores[i]);
      const bool in_prefix = shift == 24 || (key >> (shift + 8)) == (prefix >> (shift + 8));
      if (in_prefix && key >= floor_key) arch::add(bins + ((key >> shift) & 255), weight(scores[i]));
    });
    arch::sync();
    i32 bin = kBins - 1;
    MONO_ROLLED
    while (bin > 0 && above + bins[bin] < goal) above += bins[bin--];
    prefix |= u32(bin) << shift;
    arch::sync();
  }
  return prefix > floor_key ? prefix : floor_key;
}

struct Filter {
  i32 top_k;  // 0 or >= count: all
  float top_p, min_p;
};

// The lowest score that may be sampled.
MONO_DEVICE float selection_threshold(const float* scores, i32 count, const Filter& filter, u64* bins) {
  float maximum = -kInfinity;
  arch::for_each(count, [&](i32 i) { maximum = scores[i] > maximum ? scores[i] : maximum; });
  maximum = arch::all_reduce(maximum, [](float a, float b) { return a > b ? a : b; });
  u32 key = sort_key(-kInfinity);
  if (filter.top_k > 0 && filter.top_k < count)
    key = threshold_key(scores, count, key, u64(filter.top_k), bins, [](float) { return u64(1); });
  if (filter.top_p < 1.0f) {
    auto weight = [maximum](float score) { return mass(score - maximum); };
    u64 total = 0;
    arch::for_each(count, [&](i32 i) {
      if (sort_key(scores[i]) >= key) total += weight(scores[i]);
    });
    total = arch::all_reduce(total, [](u64 a, u64 b) { return a + b; });
    const u64 goal = u64(double(total) * double(filter.top_p));
    key = threshold_key(scores, count, key, goal > 0 ? goal : 1, bins, weight);
  }
  float threshold = from_sort_key(key);
  if (filter.min_p > 0.0f) {
    const float lowest = maximum + log(filter.min_p);
    threshold = lowest > threshold ? lowest : threshold;
  }
  return threshold < maximum ? threshold : maximum;
}

}  // namespace mono::MONO_VARIANT
