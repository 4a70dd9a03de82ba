// One call of the resident program on GPUs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "host/failure.h"
#include "host/program.h"
#include "host/session.h"

namespace mono {

struct GpuJob {
  const Driver& driver;
  int ordinal;   // of the GPU
  void* stream;  // what was put there before is finished first
  i64 run_id;
  std::string record;  // the plan
  WeightType weights;
  std::vector<Call> calls;  // of the plan's devices on this GPU: all of them, or one
  std::shared_ptr<HostSession> session;
  bool benchmark;  // mono_stream instead of mono_decode
  i64 wait_limit, meeting_limit;
  HandoffFault lost;
};

// Runs the program, together with the other GPUs of the launch if the plan has more devices than `calls`, and waits for
// its end. All of them return the same failure. `status` are the two words of Outputs::status.
Failure run_on_gpu(const GpuJob& job, i32* status);

}  // namespace mono
