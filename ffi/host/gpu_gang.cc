#include "host/gpu_gang.h"

#include <chrono>
#include <string>

namespace mono {

void GpuGang::bring(int ordinal, i32 first, const std::shared_ptr<GpuBuffers>& buffers) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < buffers->exchange_of.size(); ++i) {
    exchange_[first + i] = buffers->exchange_of[i];
    ordinals_[first + i] = ordinal;
  }
  buffers_.push_back(buffers);
  if (first == 0) shared_ = buffers;
}

Failure GpuGang::meet(Step step, const Failure& mine, i64 limit) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (mine && !first_) first_ = mine;
  ++arrived_[step];
  changed_.notify_all();
  const bool all = changed_.wait_for(lock, std::chrono::nanoseconds(limit),
                                     [&] { return first_ || arrived_[step] == members_; });
  if (!all)
    first_ = {FailureKind::kLate, "only " + std::to_string(arrived_[step]) + " of " + std::to_string(members_) +
                                      (step == kFinished ? " GPUs ended" : " GPUs were ready to start") +
                                      " the program within " + std::to_string(limit / 1000000) + " ms; raise " +
                                      (step == kFinished ? "JAX_MONO_WAIT_LIMIT_MS" : "JAX_MONO_MEETING_LIMIT_MS")};
  return first_;
}

}  // namespace mono
