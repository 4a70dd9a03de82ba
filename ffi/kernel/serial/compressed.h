// Products of compressed tiles on a CPU.
//
// A line of a plane has one pair of codes of every lane of a row and every chunk of a group. So activations are arranged
// likewise before a product: of a group's 128, the first 32 belong to the first pairs, and so on. Then lines and
// activations are multiplied as they come, and nothing moves between the words of a vector.
#pragma once

#include "kernel/compressed.h"

namespace mono::MONO_VARIANT {

constexpr i32 kGroupCols = kGroupChunks * arch::kTileCols, kPairs = 4;

// Where an activation of a piece is once they are arranged.
MONO_DEVICE i32 arranged(i32 col) {
  const i32 chunk = col / arch::kTileCols % kGroupChunks, lane = col / 8 % 4, pair = col / 2 % kPairs;
  return col / kGroupCols * kGroupCols + pair * arch::kTileCols + (lane * kGroupChunks + chunk) * 2 + col % 2;
}

// Arranges whole groups of activations, in place.
template <class T>
MONO_DEVICE void arrange(T* x, i64 count) {
  for (T* group = x; group < x + count; group += kGroupCols) {
    T natural[kGroupCols];
    __builtin_memcpy(natural, group, sizeof natural);
    for (i32 col = 0; col < kGroupCols; ++col) group[arranged(col)] = natural[col];
  }
}

// Adds the products of a row's codes in a group with its activations.
MONO_DEVICE void add_products(const Codes<arch::Vec16u>& codes, const bf16* x, arch::Vec16& sum) {
  for (i32 j = 0; j < kPairs; ++j) {
    arch::Vec16u pairs;
    __builtin_memcpy(&pairs, x + j * arch::kTileCols, sizeof pairs);
#if defined(__AVX512BF16__)
    sum = (arch::Vec16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)codes.pairs[j], (__m512bh)pairs);
#else
    sum += (arch::Vec16)(codes.pairs[j] << 16) * (arch::Vec16)(pairs << 16);
    sum += (arch::Vec16)(codes.pairs[j] & 0xffff0000u) * (arch::Vec16)(pairs & 0xffff0000u);
#endif
  }
}

// Products of one tile's part, `chunks` chunks in pieces of `piece`, with arranged activations that are stored times
// kActivationScale.
MONO_DEVICE void dot_compressed(const bf16* part, const bf16* x, i32 chunks, i32 piece, float* out) {
  constexpr i32 kRows = arch::kTileRows;
  static_assert(kPlaneBytes == kRows * arch::kLine, "a line per row and plane");
  float total[kRows] = {};
  const char* at = reinterpret_cast<const char*>(part);
  for (i32 first = 0; first < chunks; first += piece, x += piece * arch::kTileCols) {
    const char* head = at;
    arch::Vec16 sums[kRows] = {};
    at += kHeadBytes;
    for (i32 group = 0; group < piece / kGroupChunks; ++group, at += kGroupBytes) {
      for (i32 r = 0; r < kRows; ++r) {
        arch::Vec16u planes[3];
        for (i32 p = 0; p < 3; ++p) {
          arch::ask_for_line(at + (r * 3 + p + arch::kLinesAhead) * arch::kLine);
          __builtin_memcpy(&planes[p], at + p * kPlaneBytes + r * arch::kLine, sizeof planes[p]);
        }
        add_products({planes[0], planes[1], planes[2]}, x + group * kGroupCols, sums[r]);
      }
    }
    float of_codes[kRows];
    arch::store_sums(sums, of_codes);
    u32 entries[kEntries];
    float scale;
    __builtin_memcpy(entries, head, sizeof entries);
    __builtin_memcpy(&scale, head + sizeof entries, sizeof scale);
    for (i32 r = 0; r < kRows; ++r) total[r] += of_codes[r] * scale;
    for (i32 i = 0; i < kEntries && Entry{entries[i]}.used(); ++i) {
      const Entry entry{entries[i]};
      total[entry.row()] += entry.product(arch::to_float(x[arranged(entry.col())]));
    }
  }
  for (i32 r = 0; r < kRows; ++r) out[r] = total[r];
}
// Only bfloat16 weights are compressed.
MONO_DEVICE void dot_compressed(const float*, const float*, i32, i32, float*) {}

}  // namespace mono::MONO_VARIANT
