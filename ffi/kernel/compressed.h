// Compressed tapes: bfloat16 weights in 12 bits each, to the last bit. jax_mono/compression.py says how a piece lies on the tape.
#pragma once

#include "kernel/simt/tuning.h"

namespace mono::MONO_VARIANT {

// Codes are weights whose exponents are 0 to 15, far below what can be multiplied without loss. So activations are stored
// times this, and a row's scale takes it out of the sum.
constexpr float kActivationScale = 0x1p64f;
MONO_DEVICE float activation_scale(Shape h) { return h.compressed ? kActivationScale : 1.0f; }

constexpr i32 kHeadBytes = kHeadWords * 2, kPlaneBytes = 512, kGroupBytes = 3 * kPlaneBytes;
constexpr i32 kEntries = kHeadBytes / 4 - 2;  // exceptions of a piece; its rows' scales come after them

// A row's scale, a byte of word kEntries + row / 4 of the head: a power of two, and its exponent as a float has it.
MONO_DEVICE u32 scale_exponent(u32 word, i32 row) { return word >> row % 4 * 8 & 0xff; }
MONO_DEVICE float row_scale(u32 word, i32 row) { return arch::bits_float(scale_exponent(word, row) << 23); }
constexpr u32 kScaleOfCodes = 127 - 79 + 15;  // that exponent where codes are the weights themselves

// An exception: a weight that has no code.
struct Entry {
  u32 word;

  MONO_DEVICE bool used() const { return word != 0; }
  MONO_DEVICE float weight() const { return arch::bits_float(word & 0xffff0000u); }
  MONO_DEVICE i32 row() const { return i32(word >> 9 & 7); }
  MONO_DEVICE i32 col() const { return i32(word & 0x1ff); }  // in the piece
  // What it adds to its row's product, of which the activation is stored times kActivationScale.
  MONO_DEVICE float product(float activation) const { return weight() * (activation * (1.0f / kActivationScale)); }
};

// Bits of a pair of codes, and those of a fourth pair that each of the planes has.
constexpr u32 kCodeBits = 0x87ff87ffu, kFromFirst = 0x00780078u, kFromSecond = 0x07800780u, kFromThird = 0x80078007u;

// The codes of eight weights of a row, in pairs, from a lane's words of the three planes.
struct Codes {
  u32 pairs[4];

  MONO_DEVICE Codes(u32 first, u32 second, u32 third)
      : pairs{first & kCodeBits, second & kCodeBits, third & kCodeBits,
              (first >> 8 & kFromFirst) | (second >> 4 & kFromSecond) | ((third >> 12 | third << 20) & kFromThird)} {}
};

}  // namespace mono::MONO_VARIANT
