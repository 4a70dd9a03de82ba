// Counter-based random numbers: the same stream on every target, whatever the plan.
#pragma once

#include "kernel/maths.h"

namespace mono::MONO_VARIANT {

struct Random4 {
  u32 word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
MONO_DEVICE Random4 philox(u32 key0, u32 key1, u32 c0, u32 c1, u32 c2, u32 c3) {
  for (int round = 0; round < 10; ++round) {
    u64 p0 = u64(0xD2511F53u) * c0, p1 = u64(0xCD9E8D57u) * c2;
    u32 n0 = u32(p1 >> 32) ^ c1 ^ key0, n2 = u32(p0 >> 32) ^ c3 ^ key1;
    c0 = n0;
    c1 = u32(p1);
    c2 = n2;
    c3 = u32(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Standard Gumbel noise from 32 random bits. With v uniform in (0, 1), -log(-log(1 - v)) keeps full resolution where it
// matters: large noise comes from small v.
MONO_DEVICE float gumbel(u32 bits) {
  float v = (float(bits >> 8) + (float(bits & 0xff) + 0.5f) * 0.00390625f) * 5.9604644775390625e-8f;
  if (v > 0.99999994f) v = 0.99999994f;
  float exponential = v < 0.0009765625f ? v + v * v * (0.5f + v * 0.333333333f) : -log(1.0f - v);
  return -log(exponential);
}

}  // namespace mono::MONO_VARIANT
