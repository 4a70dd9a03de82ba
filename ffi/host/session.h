// Sessions: what a running call and the Python side share. A call names its session by number.
#pragma once

#include <memory>
#include <vector>

#include "kernel/call.h"

namespace mono {

class HostSession {
 public:
  HostSession(i32 capacity, i64 deadline)
      : tokens_(capacity), logprobs_(capacity), shared_{deadline, 0, capacity, 0, tokens_.data(), logprobs_.data()} {}
  HostSession(const HostSession&) = delete;
  HostSession& operator=(const HostSession&) = delete;

  Session* shared() { return &shared_; }
  i32 produced() const { return __atomic_load_n(&shared_.produced, __ATOMIC_ACQUIRE); }
  void cancel() { __atomic_store_n(&shared_.cancel, 1, __ATOMIC_RELEASE); }

 private:
  std::vector<i32> tokens_;
  std::vector<float> logprobs_;
  Session shared_;
};

// Returns null for a number that is not open.
std::shared_ptr<HostSession> find_session(i32 id);

}  // namespace mono
