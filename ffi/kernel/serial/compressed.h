// Products of compressed tiles on a CPU.
#pragma once

#include "kernel/compressed.h"

namespace mono::MONO_VARIANT {

// Products of one tile's part, `chunks` chunks in pieces of `piece`, with activations that are stored times kActivationScale.
template <class T>
MONO_DEVICE void dot_compressed(const T* part, const T* x, i32 chunks, i32 piece, float* out) {
  constexpr i32 kRows = arch::kTileRows, kCols = arch::kTileCols;
  for (i32 r = 0; r < kRows; ++r) out[r] = 0.0f;
  const char* at = reinterpret_cast<const char*>(part);
  for (i32 first = 0; first < chunks; first += piece, x += piece * kCols) {
    const u32* head = reinterpret_cast<const u32*>(at);
    const u32* words = head + kHeadBytes / 4;
    float sums[kRows] = {};
    for (i32 c = 0; c < piece; ++c)
      for (i32 r = 0; r < kRows; ++r)
        for (i32 p = 0; p < 4; ++p) {
          const u32* w = words + c / kGroupChunks * (kGroupBytes / 4) + (r * 4 + p) * 4 + c % kGroupChunks;
          const Codes codes(w[0], w[kPlaneBytes / 4], w[2 * kPlaneBytes / 4]);
          for (i32 k = 0; k < 8; ++k)
            sums[r] += arch::bits_float(codes.pairs[k / 2] >> (k % 2 * 16) << 16) * arch::to_float(x[c * kCols + p * 8 + k]);
        }
    const float scale = arch::bits_float(head[kEntries]);
    for (i32 r = 0; r < kRows; ++r) out[r] += sums[r] * scale;
    for (i32 i = 0; i < kEntries && Entry{head[i]}.used(); ++i) {
      const Entry entry{head[i]};
      out[entry.row()] += entry.product(arch::to_float(x[entry.col()]));
    }
    at += piece_words(piece, true) * 2;
  }
}

}  // namespace mono::MONO_VARIANT
