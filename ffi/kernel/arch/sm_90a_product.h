// Products of a piece with tensor cores; included by sm_90a.h.
#pragma once

#include "kernel/compressed.h"

namespace mono::MONO_VARIANT::arch {

// d += a b for a 16 x 16 fragment of weights and a 16 x 8 fragment of activations.
MONO_DEVICE void multiply(float (&d)[4], const uint4& a, const uint2& b, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b.x), "r"(b.y));
}
MONO_DEVICE void multiply(float (&d)[4], const uint4& a, const uint2& b, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b.x), "r"(b.y));
}

constexpr int kSums = 4;  // independent, to hide latency
struct Sums {
  float of[kSums][4] = {};
  MONO_DEVICE float total() const {
    return ((of[0][0] + of[0][3]) + (of[1][0] + of[1][3])) + ((of[2][0] + of[2][3]) + (of[3][0] + of[3][3]));
  }
};

// Where this lane's activations of a piece are, as pairs.
template <class T>
MONO_DEVICE const uint2* lane_activations(const T* x) {
  return reinterpret_cast<const uint2*>(x) + (lane() % 4) * 2 + (lane() / 4 & 1);
}

// Products of a piece: lanes 4 r to 4 r + 3 get row r.
//
// A chunk is 8 rows by 32 columns, row by row. Lane 4 r + t reads the eight weights of row r from column 8 t on, and the
// tensor core takes those four pairs, as they lie in registers, as row r, twice, and row r + 8, twice, of a 16 x 16 fragment.
// So even columns of the other operand are the activations of the first two pairs, odd ones those of the others: the product
// is the sum of two results.
template <class T>
MONO_DEVICE float plain_product(const unsigned char* piece, const T* x, i32 chunks) {
  const uint4* w = reinterpret_cast<const uint4*>(piece) + lane();
  const uint2* v = lane_activations(x);
  Sums sums;
  if (chunks == kSlotChunks) {
#pragma unroll
    for (int c = 0; c < kSlotChunks; ++c) multiply(sums.of[c % kSums], w[c * 32], v[c * 8], T{});
  } else {
    MONO_ROLLED
    for (i32 c = 0; c < chunks; c += kSums) {
#pragma unroll
      for (int k = 0; k < kSums; ++k)
        if (c + k < chunks) multiply(sums.of[k], w[(c + k) * 32], v[(c + k) * 8], T{});
    }
  }
  return sums.total();
}

// Adds a piece's exceptions, of which each lane has one or an unused one, in their order to its rows' products. Most pieces have
// none.
template <class T>
MONO_DEVICE float with_exceptions(Entry own, const T* x, float y) {
  u32 used = __ballot_sync(0xffffffffu, own.used());
  if (used == 0) return y;
  const float product = own.used() ? own.product(to_float(x[own.col()])) : 0.0f;
  MONO_ROLLED
  for (; used; used &= used - 1) {
    const int from = __ffs(int(used)) - 1;
    const float added = __shfl_sync(0xffffffffu, product, from);
    if (Entry{__shfl_sync(0xffffffffu, own.word, from)}.row() == lane() / kLanesPerRow) y += added;
  }
  return y;
}

// The same of a compressed piece. A lane has four words, one of each chunk of a group, in each of the group's planes.
template <class T>
MONO_DEVICE float compressed_product(const unsigned char* piece, const T* x, i32 chunks) {
  const u32* head = reinterpret_cast<const u32*>(piece);
  const uint4* w = reinterpret_cast<const uint4*>(piece + kHeadBytes) + lane();
  const uint2* v = lane_activations(x);
  Sums sums;
  const u32 own = head[lane() % (kHeadBytes / 4)];
  const i32 row = lane() / kLanesPerRow;
  const float scale = row_scale(__shfl_sync(0xffffffffu, own, kEntries + row / 4), row);
  static_assert(kSums == kGroupChunks);
  auto group = [&](i32 g) {
    const uint4 *planes = w + g * (kGroupBytes / 16), first = planes[0], second = planes[32], third = planes[64];
    const uint2* at = v + g * (kGroupChunks * 8);
    auto chunk = [&](int k, u32 a, u32 b, u32 c) {
      const Codes codes(a, b, c);
      multiply(sums.of[k], {codes.pairs[0], codes.pairs[1], codes.pairs[2], codes.pairs[3]}, at[k * 8], T{});
    };
    chunk(0, first.x, second.x, third.x);
    chunk(1, first.y, second.y, third.y);
    chunk(2, first.z, second.z, third.z);
    chunk(3, first.w, second.w, third.w);
  };
  if (chunks == kSlotChunks) {
#pragma unroll
    for (int g = 0; g < kSlotChunks / kGroupChunks; ++g) group(g);
  } else {
    MONO_ROLLED
    for (i32 g = 0; g < chunks / kGroupChunks; ++g) group(g);
  }
  return with_exceptions(Entry{lane() < kEntries ? own : 0}, x, sums.total() * scale);
}

}  // namespace mono::MONO_VARIANT::arch
