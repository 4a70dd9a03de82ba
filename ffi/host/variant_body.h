// Included once by every ffi/host/program_*.cc, after MONO_VARIANT is defined.
#include "host/variant.h"
// Headers of the resident program see only their own namespace.
#include "kernel/arch/host.h"
#include "kernel/serial/workspace.h"
#include "kernel/program.h"
#include "kernel/serial/mix.h"
#include "kernel/serial/ops.h"

namespace mono::MONO_VARIANT {

// Denormals are flushed, as XLA does on its own threads; ours are new and must ask for it.
inline void flush_denormals() {
#if defined(__SSE2__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

template <class T>
inline Scratch<T, Workspace<T>> scratch_of(const Plan& plan, i32 device, i32 block) {
  return {*plan.header, block_extents(plan, device, block), block == 0, nullptr, nullptr};
}
template <class T>
inline i64 scratch_bytes(const Plan& plan, i32 device, i32 block) {
  const auto scratch = scratch_of<T>(plan, device, block);
  return scratch.near_bytes + scratch.far_bytes;
}

template <class T>
inline void run_typed(const Call& call, i32 block) {
  char* near = static_cast<char*>(call.scratch);
  for (i32 b = 0; b < block; ++b) near += scratch_bytes<T>(call.plan, call.device, b);
  BlockState<T> s(call, block, near, near + scratch_of<T>(call.plan, call.device, block).near_bytes);
  run_block(s);
}

inline void run(const Call& call, i32 block, WeightType type) {
  flush_denormals();
  if (type == WeightType::kFloat32) {
    run_typed<float>(call, block);
  } else {
    run_typed<bf16>(call, block);
  }
}

inline i64 scratch_words(const Plan& plan, i32 device, i32 block, WeightType type) {
  return (type == WeightType::kFloat32 ? scratch_bytes<float>(plan, device, block)
                                       : scratch_bytes<bf16>(plan, device, block)) / 8;
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
