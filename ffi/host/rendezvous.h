// Where the handlers of one launch, one per JAX device, find each other.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel/types.h"

namespace mono {

// Brings handlers together around an object that the first of them has made. What it is, the handlers know.
class Meetings {
 public:
  // Brings `count` devices from `first` on, and waits until all `devices` have joined under `run_id`. Returns null after
  // `limit` nanoseconds, and says in `error` who is missing.
  std::shared_ptr<void> join(i64 run_id, i32 devices, i32 first, i32 count, i64 limit, const std::shared_ptr<void>& mine,
                             std::string& error);

 private:
  struct Meeting;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Meeting>> open_;
};

template <class Gang>
class Rendezvous {
 public:
  std::shared_ptr<Gang> join(i64 run_id, i32 devices, i32 first, i32 count, i64 limit, const std::shared_ptr<Gang>& mine,
                             std::string& error) {
    return std::static_pointer_cast<Gang>(meetings_.join(run_id, devices, first, count, limit, mine, error));
  }

 private:
  Meetings meetings_;
};

}  // namespace mono
