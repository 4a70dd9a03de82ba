// Chooses the variant of the resident program that this processor runs best.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/variant.h"

namespace mono {
namespace {

struct Candidate {
  const Variant& (*variant)();
  bool runs_here;
};

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(JAX_MONO_X86)
  __builtin_cpu_init();
#if defined(JAX_MONO_HAVE_AVX512) || defined(JAX_MONO_HAVE_AVX512BF16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("fma");
#endif
#if defined(JAX_MONO_HAVE_AVX512BF16)
  found.push_back({avx512bf16_variant, avx512 && __builtin_cpu_supports("avx512bf16") &&
                                           __builtin_cpu_supports("avx512vnni")});
#endif
#if defined(JAX_MONO_HAVE_AVX512)
  found.push_back({avx512_variant, avx512});
#endif
#if defined(JAX_MONO_HAVE_AVX2)
  found.push_back({avx2_variant, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#endif
  found.push_back({portable_variant, true});
  return found;
}

}  // namespace

const Variant& cpu_variant() {
  const char* wanted = std::getenv("JAX_MONO_CPU");
  std::string names;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.runs_here) continue;
    const Variant& variant = candidate.variant();
    if (!wanted || !*wanted || std::string(wanted) == variant.name) return variant;
    names += names.empty() ? variant.name : std::string(", ") + variant.name;
  }
  throw std::invalid_argument("JAX_MONO_CPU is '" + std::string(wanted) + "'; this processor runs " + names);
}

}  // namespace mono
