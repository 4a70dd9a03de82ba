// The resident program compiled for one instruction set. ffi/host/program_*.cc each define one.
#pragma once

#include "kernel/call.h"

namespace mono {

// In the order of jax_mono.tape.STORAGE.
enum class WeightType { kFloat32, kBfloat16, kFloat16 };

struct Variant {
  const char* name;
  void (*run_block)(const Call& call, i32 block, WeightType type);
  i64 (*scratch_words)(const Plan& plan, i32 device, i32 block, WeightType type);
  // Reads memory as fast as one thread can, as `streams` equal parts in turn; returns a checksum.
  u64 (*read_memory)(const void* data, i64 bytes, i32 streams);
};

const Variant& portable_variant();
const Variant& avx2_variant();
const Variant& avx512_variant();
const Variant& avx512bf16_variant();

// The best variant for this processor, or the one that JAX_MONO_CPU names. Throws std::invalid_argument for a name that
// is unknown or does not run here.
const Variant& cpu_variant();

}  // namespace mono
