// Sessions: what a running call and the Python side share. A call names its session by number.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "host/gpu_memory.h"
#include "kernel/call.h"

namespace mono {

class HostSession {
 public:
  // `deadline` on the monotonic clock, in nanoseconds; 0 for none. With a driver, GPUs reach the session while they run;
  // then it may throw std::runtime_error.
  HostSession(i32 capacity, i64 deadline, const Driver* driver);
  HostSession(const HostSession&) = delete;
  HostSession& operator=(const HostSession&) = delete;

  Session* shared() { return shared_; }
  bool reached_by(Platform platform) const { return driver_ && driver_->platform() == platform; }
  i32 produced() const { return __atomic_load_n(&shared_->produced, __ATOMIC_ACQUIRE); }
  // Waits until there are more tokens than `known`, but no longer than asked.
  void await_more(i32 known, std::chrono::nanoseconds longest) const;
  void cancel() { __atomic_store_n(&shared_->cancel, 1, __ATOMIC_RELEASE); }
  // Nanoseconds to the deadline, 0 for none: what a device with a clock of its own goes by.
  i64 time_left() const;

 private:
  const Driver* driver_;
  std::vector<u64> own_;                // either this
  std::shared_ptr<HostMemory> pinned_;  // or this holds the record and its arrays
  Session* shared_;
};

// Returns null for a number that is not open.
std::shared_ptr<HostSession> find_session(i32 id);

}  // namespace mono
