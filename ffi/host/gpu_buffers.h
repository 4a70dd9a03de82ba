// What the resident program needs on a GPU besides the operands. Made at the first call of a plan and used again by the
// next: allocating takes long, and must not happen while the program of another device runs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "host/gpu_memory.h"
#include "host/program.h"

namespace mono {

struct GpuBuffers {
  // For devices [first, first + local) of the plan. Waits for the stream.
  GpuBuffers(const Driver& driver, int ordinal, const Program& program, const std::string& record, i32 first, i32 local,
             void* stream);

  Control& control() const { return *reinterpret_cast<Control*>(shared.data()); }
  u64* places() const { return reinterpret_cast<u64*>(shared.data() + sizeof(Control)); }

  DeviceMemory record;    // the plan
  DeviceMemory exchange;  // of the local devices, one after the other
  DeviceMemory scratch;   // of their blocks
  DeviceMemory calls;     // Call [local]
  HostMemory shared;      // Control, and a place per block of all devices
  std::vector<u64*> exchange_of, scratch_of;  // per local device
};

// Takes buffers that no call uses, or makes some; they return when the last reference goes.
std::shared_ptr<GpuBuffers> take_buffers(const Driver& driver, int ordinal, const Program& program,
                                         const std::string& record, i32 first, i32 local, void* stream);

}  // namespace mono
