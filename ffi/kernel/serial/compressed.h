// Products of compressed tiles on a CPU.
//
// A line of a plane has one pair of codes of every lane of a row and every chunk of a group. So activations are arranged
// likewise before a product: of a group's 128, the first 32 belong to the first pairs, and so on. Then lines and
// activations are multiplied as they come, and nothing moves between the words of a vector.
#pragma once

#include "kernel/compressed.h"

namespace mono::MONO_VARIANT {

constexpr i32 kPairs = 4, kGroupCols = kGroupChunks * arch::kTileCols;
static_assert(kPlaneBytes == arch::kTileRows * arch::kLine && kHeadBytes == arch::kLine, "lines of a row or a head");

// Where an activation of a piece is once they are arranged.
MONO_DEVICE i32 arranged(i32 col) {
  const i32 chunk = col / arch::kTileCols % kGroupChunks, lane = col / 8 % 4, pair = col / 2 % kPairs;
  return col / kGroupCols * kGroupCols + pair * arch::kTileCols + (lane * kGroupChunks + chunk) * 2 + col % 2;
}

// Arranges whole groups of activations, in place: pairs [chunk, lane, pair] become [pair, lane, chunk].
MONO_DEVICE void arrange(bf16* x, i64 count) {
  typedef u32 Quarter __attribute__((vector_size(16)));
  constexpr i32 kLanes = 4;
  for (bf16* group = x; group < x + count; group += kGroupCols) {
    Quarter from[kGroupChunks][kLanes], to[kPairs][kLanes];
    __builtin_memcpy(from, group, sizeof from);
    for (i32 lane = 0; lane < kLanes; ++lane)
      for (i32 pair = 0; pair < kPairs; ++pair)
        to[pair][lane] = Quarter{from[0][lane][pair], from[1][lane][pair], from[2][lane][pair], from[3][lane][pair]};
    __builtin_memcpy(group, to, sizeof to);
  }
}

// Arranged activations that belong to one line of codes.
class LineActivations {
 public:
  MONO_DEVICE explicit LineActivations(const bf16* x) {
    __builtin_memcpy(&pairs_, x, sizeof pairs_);
#if !defined(__AVX512BF16__)
    even_ = (arch::Vec16)(pairs_ << 16);
    odd_ = (arch::Vec16)(pairs_ & 0xffff0000u);
#endif
  }
  MONO_DEVICE void add_products(const arch::Vec16u& codes, arch::Vec16& sums) const {
#if defined(__AVX512BF16__)
    sums = (arch::Vec16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)codes, (__m512bh)pairs_);
#else
    sums += (arch::Vec16)(codes << 16) * even_;
    sums += (arch::Vec16)(codes & 0xffff0000u) * odd_;
#endif
  }

 private:
  arch::Vec16u pairs_;
#if !defined(__AVX512BF16__)
  arch::Vec16 even_, odd_;
#endif
};

// The tape of a compressed part, line by line, each asked for ahead as in ask_ahead().
class Lines {
 public:
  MONO_DEVICE explicit Lines(const bf16* part) : at_(reinterpret_cast<const char*>(part)) {}
  MONO_DEVICE void take(arch::Vec16u& line) {
    __builtin_prefetch(at_ + arch::kLinesAhead * arch::kLine, 0, 2);
    __builtin_memcpy(&line, at_, sizeof line);
    at_ += arch::kLine;
  }

 private:
  const char* at_;
};

// Adds the products of a group with its activations to the sums of its rows. Lines are taken in the order of the tape:
// taking a row's three together costs a fifth of the speed (measured on Zen 5).
MONO_DEVICE void add_group(Lines& lines, const bf16* x, arch::Vec16 (&sums)[arch::kTileRows]) {
  arch::Vec16u line, fourth[arch::kTileRows];
  const LineActivations x0(x), x1(x + arch::kTileCols), x2(x + 2 * arch::kTileCols), x3(x + 3 * arch::kTileCols);
  for (i32 r = 0; r < arch::kTileRows; ++r) {
    lines.take(line);
    x0.add_products(line & kCodeBits, sums[r]);
    fourth[r] = line >> 8 & kFromFirst;
  }
  for (i32 r = 0; r < arch::kTileRows; ++r) {
    lines.take(line);
    x1.add_products(line & kCodeBits, sums[r]);
    fourth[r] |= line >> 4 & kFromSecond;
  }
  for (i32 r = 0; r < arch::kTileRows; ++r) {
    lines.take(line);
    x2.add_products(line & kCodeBits, sums[r]);
    x3.add_products(fourth[r] | ((line >> 12 | line << 20) & kFromThird), sums[r]);
  }
}

// Products of one tile's part, `chunks` chunks in pieces of `piece`, with arranged activations that are stored times
// kActivationScale.
MONO_DEVICE void dot_compressed(const bf16* part, const bf16* x, i32 chunks, i32 piece, float* out) {
  constexpr i32 kRows = arch::kTileRows;
  Lines lines(part);
  arch::Vec16 sums[kRows] = {};
  float of_exceptions[kRows] = {};
  for (i32 first = 0; first < chunks; first += piece, x += piece * arch::kTileCols) {
    arch::Vec16u head;
    lines.take(head);
    arch::Vec16 of_codes[kRows] = {};
    for (i32 col = 0; col < piece * arch::kTileCols; col += kGroupCols) add_group(lines, x + col, of_codes);
    for (i32 r = 0; r < kRows; ++r) sums[r] += of_codes[r] * row_scale(head[kEntries + r / 4], r);
    for (i32 i = 0; i < kEntries && Entry{head[i]}.used(); ++i) {
      const Entry entry{head[i]};
      of_exceptions[entry.row()] += entry.product(arch::to_float(x[arranged(entry.col())]));
    }
  }
  arch::store_sums(sums, out);
  for (i32 r = 0; r < kRows; ++r) out[r] += of_exceptions[r];
}
// Only bfloat16 weights are compressed.
MONO_DEVICE void arrange(float*, i64) {}
MONO_DEVICE void dot_compressed(const float*, const float*, i32, i32, float*) {}

}  // namespace mono::MONO_VARIANT
