// Included once by every ffi/host/program_*.cc, after MONO_VARIANT is defined.
#include "host/variant.h"
// Headers of the resident program see only their own namespace.
#include "kernel/arch/host.h"
#include "kernel/program.h"

namespace mono::MONO_VARIANT {

// Denormals are flushed, as XLA does on its own threads; ours are new and must ask for it.
inline void flush_denormals() {
#if defined(__SSE2__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

inline void run(const Call& call, i32 block, WeightType type) {
  flush_denormals();
  if (type == WeightType::kFloat32) {
    run_block<float>(call, block);
  } else {
    run_block<bf16>(call, block);
  }
}

inline i64 scratch_words(const Plan& plan, i32 device, i32 block, WeightType type) {
  return type == WeightType::kFloat32 ? Scratch<float>(plan, device, block, nullptr).words
                                      : Scratch<bf16>(plan, device, block, nullptr).words;
}

inline u64 read_memory(const void* data, i64 bytes, i32 streams) {
  const i64 part = bytes / streams / 64 * 64;
  arch::Vec16u acc[8] = {};
  for (i64 at = 0; at < part; at += 64) {
    for (i32 stream = 0; stream < streams; ++stream) {
      const char* from = static_cast<const char*>(data) + stream * part + at;
      arch::Vec16u value;
      __builtin_memcpy(&value, from, sizeof value);
      acc[stream & 7] ^= value;
    }
  }
  u64 sum = 0;
  for (const auto& vector : acc)
    for (int i = 0; i < 16; ++i) sum += vector[i];
  return sum;
}

inline const Variant variant = {MONO_VARIANT_NAME, run, scratch_words, read_memory};

}  // namespace mono::MONO_VARIANT
