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

// A lane's eight weights of a chunk.
MONO_DEVICE uint4 chunk_at(const unsigned char* piece, int c) { return reinterpret_cast<const uint4*>(piece)[c * 32 + lane()]; }

// Products of a piece: 8 rows of kChunks chunks. Lanes 4 r to 4 r + 3 get that of row r.
//
// A chunk is 8 rows by 32 columns, row by row. Lane 4 r + t has the eight weights of row r from column 8 t on, and the tensor core
// takes those four pairs, as they lie in registers, as row r, twice, and row r + 8, twice, of a 16 x 16 fragment. So even columns of
// the other operand are the activations of the first two pairs, odd ones those of the others: the product is the sum of two results.
//
// The lane's weights are where they are asked for: in memory, loaded one chunk or group after the other, or in registers.
template <int kChunks, class Chunk, class T>
MONO_DEVICE float plain_product(Chunk chunk, const T* x) {
  const uint2* v = lane_activations(x);
  Sums sums;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) multiply(sums.of[c % kSums], chunk(c), v[c * 8], T{});
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

// A lane's words of a group of chunks, of each plane one of each chunk; and its word of the piece's head.
struct Group {
  uint4 first, second, third;
};
MONO_DEVICE Group group_at(const unsigned char* piece, int g) {
  const uint4* planes = reinterpret_cast<const uint4*>(piece + kHeadBytes + g * kGroupBytes) + lane();
  return {planes[0], planes[32], planes[64]};
}
MONO_DEVICE u32 head_at(const unsigned char* piece) { return reinterpret_cast<const u32*>(piece)[lane() % (kHeadBytes / 4)]; }

template <int kChunks, class Groups, class T>
MONO_DEVICE float compressed_product(u32 head, Groups groups, const T* x) {
  const uint2* v = lane_activations(x);
  const i32 row = lane() / kLanesPerRow;
  const float scale = row_scale(__shfl_sync(0xffffffffu, head, kEntries + row / 4), row);
  Sums sums;
  static_assert(kSums == kGroupChunks);
#pragma unroll
  for (int g = 0; g < kChunks / kGroupChunks; ++g) {
    const Group group = groups(g);
    const uint2* at = v + g * (kGroupChunks * 8);
    auto chunk = [&](int k, u32 a, u32 b, u32 c) {
      const Codes codes(a, b, c);
      multiply(sums.of[k], {codes.pairs[0], codes.pairs[1], codes.pairs[2], codes.pairs[3]}, at[k * 8], T{});
    };
    chunk(0, group.first.x, group.second.x, group.third.x);
    chunk(1, group.first.y, group.second.y, group.third.y);
    chunk(2, group.first.z, group.second.z, group.third.z);
    chunk(3, group.first.w, group.second.w, group.third.w);
  }
  return with_exceptions(Entry{lane() < kEntries ? head : 0}, x, sums.total() * scale);
}

// Of a piece in memory, of one of the lengths that the tapes' pieces have.
template <int kLength = 0, class T>
MONO_DEVICE float product_of(const unsigned char* piece, const T* x, i32 chunks) {
  constexpr int kChunks = kPieceLengths.of[kLength];
  if constexpr (kLength + 1 < kPieceLengths.count) {
    if (chunks != kChunks) return product_of<kLength + 1>(piece, x, chunks);
  }
  if constexpr (Shape::compressed) {
    return compressed_product<kChunks>(head_at(piece), [&](int g) { return group_at(piece, g); }, x);
  } else {
    return plain_product<kChunks>([&](int c) { return chunk_at(piece, c); }, x);
  }
}

// A piece in a warp's registers.
template <bool kCompressed, int kChunks>
class HeldPiece;

template <int kChunks>
class HeldPiece<false, kChunks> {
 public:
  MONO_DEVICE explicit HeldPiece(const unsigned char* piece) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunks_[c] = chunk_at(piece, c);
  }
  // Something that is not known before all of it is loaded.
  MONO_DEVICE u32 mixed() const {
    u32 all = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) all ^= chunks_[c].x;
    return all;
  }
  template <class T>
  MONO_DEVICE float product(const T* x) const {
    return plain_product<kChunks>([&](int c) { return chunks_[c]; }, x);
  }

 private:
  uint4 chunks_[kChunks];
};

template <int kChunks>
class HeldPiece<true, kChunks> {
 public:
  MONO_DEVICE explicit HeldPiece(const unsigned char* piece) : head_(head_at(piece)) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) groups_[g] = group_at(piece, g);
  }
  MONO_DEVICE u32 mixed() const {
    u32 all = head_;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) all ^= groups_[g].first.x ^ groups_[g].second.x ^ groups_[g].third.x;
    return all;
  }
  template <class T>
  MONO_DEVICE float product(const T* x) const {
    return compressed_product<kChunks>(head_, [&](int g) { return groups_[g]; }, x);
  }

 private:
  static constexpr int kGroups = kChunks / kGroupChunks;
  Group groups_[kGroups];
  u32 head_;
};

template <int kChunks>
using Piece = HeldPiece<Shape::compressed != 0, kChunks>;

}  // namespace mono::MONO_VARIANT::arch
