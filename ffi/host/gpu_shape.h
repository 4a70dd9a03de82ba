// What the program of a plan needs on a GPU, known before it is compiled.
#pragma once

#include <string>

#include "host/variant.h"

namespace mono {

constexpr size_t kWordBytes = 16;  // of the exchange memory

struct GpuShape {
  std::string header;  // text of "shape.h", the plan's numbers as constants
  i32 threads;         // of a block
  i32 shared_bytes;    // dynamic shared memory of a block
  i64 scratch_words;   // of all blocks of one device
};

// Throws std::invalid_argument if the plan cannot run on that architecture.
GpuShape gpu_shape(const Plan& plan, WeightType type, const std::string& architecture, i64 shared_limit);

}  // namespace mono
