// The resident program of one plan, compiled and loaded on one GPU.
#pragma once

#include <string>

#include "host/driver.h"
#include "host/gpu_shape.h"

namespace mono {

struct Program {
  GpuShape shape;
  std::string architecture;
  void* decode;         // kernel mono_decode(const Call*)
  void* stream;         // kernel mono_stream(const Call*), the same reads without the work; may be null
  int resident_blocks;  // that fit on the GPU at once
};

// Compiles and loads what is not loaded yet. `record` are the bytes of the plan. The result stays as long as the process.
// Throws std::runtime_error or std::invalid_argument that says what is missing and what to do.
const Program& program(const Driver& driver, int ordinal, const std::string& record, WeightType type);

// Machine code for an architecture whose blocks have `shared_limit` bytes of shared memory. Needs the compiler but no GPU,
// and keeps the result in the cache, for program() to find. Throws like program().
std::string compile_program(Platform platform, const std::string& architecture, i64 shared_limit, const Plan& plan,
                            WeightType type);

}  // namespace mono
