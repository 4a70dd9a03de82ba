// A gang of GPUs: the handlers of one call, one per GPU, going through it together.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "host/failure.h"
#include "host/gpu_buffers.h"

namespace mono {

class GpuGang {
 public:
  // Steps that no member leaves before all have come to its end.
  enum Step { kPrepared, kConnected, kFinished, kSteps };

  // `devices` of the plan, run by `members` handlers.
  GpuGang(i32 devices, i32 members) : members_(members), exchange_(devices, nullptr), ordinals_(devices, -1) {}

  // Says where the exchange memory of devices [first, ...) is. The gang keeps the buffers until its last member has left:
  // other devices write into them.
  void bring(int ordinal, i32 first, const std::shared_ptr<GpuBuffers>& buffers);
  u64* exchange(i32 device) const { return exchange_[device]; }
  const std::vector<int>& ordinals() const { return ordinals_; }  // per device of the plan

  // The record that all blocks share: that of device 0.
  GpuBuffers& shared() const { return *shared_; }

  // Ends a step. Returns the first failure of any member, also at once if there is one already, or that not all came
  // within `limit` nanoseconds.
  Failure meet(Step step, const Failure& mine, i64 limit);

 private:
  const i32 members_;
  std::vector<u64*> exchange_;
  std::vector<int> ordinals_;
  std::vector<std::shared_ptr<GpuBuffers>> buffers_;
  std::shared_ptr<GpuBuffers> shared_;
  std::mutex mutex_;
  std::condition_variable changed_;
  i32 arrived_[kSteps] = {};
  Failure first_;
};

}  // namespace mono
