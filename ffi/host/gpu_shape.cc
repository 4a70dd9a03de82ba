#include "host/gpu_shape.h"

namespace mono {

GpuShape gpu_shape(const Plan&, WeightType, const std::string&, i64) { return {"#pragma once\n", 256, 0, 0}; }

}  // namespace mono
