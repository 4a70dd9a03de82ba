#include "host/sha256.h"

#include <cstring>

namespace mono {
namespace {

constexpr u32 kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

u32 rotated(u32 x, int by) { return x >> by | x << (32 - by); }

}  // namespace

void Sha256::add(const std::string& text) {
  u64 length = text.size();
  bytes(reinterpret_cast<const unsigned char*>(&length), sizeof length);
  bytes(reinterpret_cast<const unsigned char*>(text.data()), text.size());
}

std::string Sha256::hex() {
  const u64 bits = total_ * 8;
  unsigned char end[72] = {0x80};
  const size_t padding = (total_ % 64 < 56 ? 56 : 120) - total_ % 64;
  for (int i = 0; i < 8; ++i) end[padding + i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
  bytes(end, padding + 8);
  std::string text;
  for (u32 word : state_)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  return text;
}

void Sha256::bytes(const unsigned char* data, size_t count) {
  while (count > 0) {
    const size_t at = total_ % 64, part = count < 64 - at ? count : 64 - at;
    std::memcpy(pending_ + at, data, part);
    total_ += part;
    data += part;
    count -= part;
    if (total_ % 64 == 0) block(pending_);
  }
}

void Sha256::block(const unsigned char* data) {
  u32 w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = u32(data[4 * i]) << 24 | u32(data[4 * i + 1]) << 16 | u32(data[4 * i + 2]) << 8 | data[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const u32 s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
    const u32 s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int i = 0; i < 64; ++i) {
    const u32 t1 = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    const u32 t2 = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  const u32 out[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += out[i];
}

}  // namespace mono
