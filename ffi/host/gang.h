// A gang: all devices of one call on the CPU, started together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/failure.h"
#include "host/rendezvous.h"
#include "host/variant.h"

namespace mono {

// Memory that the blocks of a call share. It must outlive every block of every device: peers write into it.
class Gang {
 public:
  Gang(const Plan& plan, i64 wait_limit, const HandoffFault& fault);

  // Runs all blocks of the devices of `calls`, one thread each; the calling thread runs one of them. Then waits for the
  // other devices of the gang, so that all of them report the same error.
  void run(const Variant& variant, WeightType type, std::vector<Call> calls);

  // Empty, or why the call failed; the same for every device of the gang.
  std::string error() const;

 private:
  void start_blocks(const Variant& variant, WeightType type, const std::vector<Call>& calls);

  const i32 blocks_;
  std::vector<std::vector<u64>> exchange_;  // per device
  std::vector<u64> places_;
  std::vector<Offer> offers_;  // zeroed
  Control control_{};
  std::atomic<bool> no_thread_{false};
  std::mutex mutex_;
  std::condition_variable finished_changed_;
  size_t finished_ = 0;  // devices
};

// Where the handlers of one launch on the CPU, one per JAX device, find their gang.
Rendezvous<Gang>& rendezvous();

}  // namespace mono
