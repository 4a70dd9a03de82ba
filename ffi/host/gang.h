// A gang: all devices of one call, started together.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/variant.h"

namespace mono {

struct HandoffFault {
  i32 device = -1, block = 0, layer = 0, channel = 0;
};

// Memory that the blocks of a call share. It must outlive every block of every device: peers write into it.
class Gang {
 public:
  Gang(const Plan& plan, i64 wait_limit, const HandoffFault& fault);

  // Runs all blocks of the devices of `calls`, one thread each; the calling thread runs one of them.
  void run(const Variant& variant, WeightType type, std::vector<Call> calls);

  // Empty, or why the call failed; the same for every device of the gang.
  std::string error() const;

 private:
  std::vector<std::vector<u64>> exchange_;  // per device
  Control control_{};
};

// Where the handlers of one launch, one per JAX device, find their gang.
class Rendezvous {
 public:
  // Waits until all devices of the plan have joined under `run_id`. Returns null after `limit` nanoseconds, and says in
  // `error` who is missing.
  std::shared_ptr<Gang> join(i64 run_id, const Plan& plan, i32 device, i64 limit, const std::shared_ptr<Gang>& mine,
                             std::string& error);

 private:
  struct Meeting;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Meeting>> open_;
};

Rendezvous& rendezvous();

}  // namespace mono
