// Scalar functions that every target computes alike, and sums whose order does not depend on the plan.
#pragma once

#include "kernel/types.h"

namespace mono::MONO_VARIANT {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLowest = -3.402823466e38f;  // a maximum of nothing: finite, so that nothing is infinity - infinity
constexpr float kLog2E = 1.44269504088896341f;

// e^(x - n ln 2) for the whole number n nearest to x / ln 2; minimax polynomial on [-ln2/2, ln2/2] (coefficients: Cephes expf,
// S. Moshier, 1989).
MONO_DEVICE float exp_remainder(float x, float n) {
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p;
}

// e^x. Relative error < 2e-7. NaN stays NaN.
MONO_DEVICE float exp(float x) {
  if (!(x >= -87.0f)) return x < -87.0f ? 0.0f : x;
  if (x > 88.0f) return kInfinity;
  float n = x * kLog2E;
  i32 whole = i32(n + (n < 0 ? -0.5f : 0.5f));
  return exp_remainder(x, float(whole)) * arch::bits_float(u32(whole + 127) << 23);
}

// The same for x that are not positive, in fewer instructions and without a branch: a number is rounded to a whole one, whose
// lowest bits are then the float's, by adding 1.5 * 2^23. Below kLeast that is -127, and the power of two zero.
MONO_DEVICE float exp_below(float x) {
  constexpr float kWhole = 12582912.0f, kLeast = -88.0f;
  x = x < kLeast ? kLeast : x;
  const float shifted = x * kLog2E + kWhole, n = shifted - kWhole;
  const float power = arch::bits_float((arch::float_bits(shifted) << 23) + 0x3f800000u);
  return exp_remainder(x, n) * power;
}

// ln(x) for normal x > 0 (coefficients: Cephes logf). Relative error < 2e-7 away from 1.
MONO_DEVICE float log(float x) {
  u32 bits = arch::float_bits(x);
  i32 exponent = i32(bits >> 23) - 126;
  float m = arch::bits_float((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  if (m < 0.707106781186547524f) {
    exponent -= 1;
    m = m + m;
  }
  float r = m - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  float r2 = r * r;
  float y = p * r * r2 + float(exponent) * -2.12194440e-4f - 0.5f * r2;
  return r + y + float(exponent) * 0.693359375f;
}

// x / (1 + e^-x), by the exponential that is not above 1.
MONO_DEVICE float silu(float x) {
  const float e = exp_below(x < 0.0f ? x : -x);
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// Pairwise sum in index order; overwrites the values. Lanes of a device first and devices second gives the same result as all
// lanes at once when counts are powers of two, so a Laneformer's sums do not depend on the number of devices.
template <class V>
MONO_DEVICE V& tree_sum(V* values, int count) {
  MONO_UNROLLED
  for (int step = 1; step < count; step *= 2)
    MONO_UNROLLED
    for (int i = 0; i + step < count; i += 2 * step) values[i] += values[i + step];
  return values[0];
}

// Probabilities relative to the most likely token, as 40-bit fixed point: their sums are exact, so they depend neither on
// the order of summation nor on how the vocabulary is cut. NaN has none.
constexpr float kMassScale = 1099511627776.0f;  // 2^40
MONO_DEVICE u64 mass(float below_max) { return below_max <= 0.0f ? u64(exp(below_max) * kMassScale) : 0; }

// Order-preserving map from floats to unsigned integers.
MONO_DEVICE u32 sort_key(float x) {
  u32 bits = arch::float_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MONO_DEVICE float from_sort_key(u32 key) {
  return arch::bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace mono::MONO_VARIANT
