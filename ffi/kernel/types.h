// Fixed-width types without a standard header: run-time compilers have none.
#pragma once

namespace mono {

using i32 = int;
using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

static_assert(sizeof(i32) == 4 && sizeof(i64) == 8, "unexpected integer widths");

// A bfloat16 weight: the upper half of a float32.
struct bf16 {
  u16 bits;
};

// A float16 weight (IEEE binary16).
struct f16 {
  u16 bits;
};

}  // namespace mono
