// SHA-256 (FIPS 180-4), by which cached programs are known.
#pragma once

#include <array>
#include <string>

#include "kernel/types.h"

namespace mono {

class Sha256 {
 public:
  // Adds a text and its length, so that neighbouring texts cannot run into each other.
  void add(const std::string& text);
  // 64 hexadecimal digits. Nothing can be added afterwards.
  std::string hex();

 private:
  void bytes(const unsigned char* data, size_t count);
  void block(const unsigned char* data);

  std::array<u32, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char pending_[64];
  u64 total_ = 0;
};

}  // namespace mono
