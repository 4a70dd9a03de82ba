// The softmax of attention, a vector of positions at a time.
#pragma once

#include "kernel/maths.h"

namespace mono::MONO_VARIANT {

// exp() of maths.h of numbers that are not positive, to the same bits.
MONO_DEVICE void exp_vector(const arch::Vec16& x, arch::Vec16& out) {
  const arch::Vec16i normal = x >= -87.0f, tiny = x < -87.0f;
  const arch::Vec16 zero{}, y = normal ? x : zero, n = y * kLog2E;
  const arch::Vec16i whole = __builtin_convertvector(n + (n < 0.0f ? zero - 0.5f : zero + 0.5f), arch::Vec16i);
  const arch::Vec16 count = __builtin_convertvector(whole, arch::Vec16);
  arch::Vec16 r = y - count * 0.693359375f;
  r = r - count * -2.12194440e-4f;
  arch::Vec16 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const arch::Vec16 result = p * (arch::Vec16)((whole + 127) << 23);
  out = normal ? result : (tiny ? zero : x);  // NaN stays NaN
}

// scores[i] = exp(scores[i] - maximum); returns what `total` and they add up to, one after the other.
MONO_DEVICE float weigh(float* scores, i32 count, float maximum, float total) {
  for (i32 i = 0; i < count; i += 16) {
    arch::Vec16 x, weights;
    arch::load(scores + i, x);
    exp_vector(x - maximum, weights);
    arch::store(weights, scores + i);
  }
  for (i32 i = 0; i < count; ++i) total += scores[i];
  return total;
}

}  // namespace mono::MONO_VARIANT
