#include "host/gang.h"

#include <chrono>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "host/trace.h"

namespace mono {
Gang::Gang(const Plan& plan, i64 wait_limit, const HandoffFault& fault)
    : blocks_(plan.header->num_blocks), places_(plan.header->num_devices * blocks_, 0), offers_(places_.size()) {
  for (i32 device = 0; device < plan.header->num_devices; ++device)
    exchange_.emplace_back(plan.devices[device].channels.words, 0);
  start_control(control_, places_.data(), i32(places_.size()), wait_limit, fault);
}

void Gang::run(const Variant& variant, WeightType type, std::vector<Call> calls) {
  std::vector<std::vector<u64>> scratch;
  const TraceWish wish = trace_wish();
  std::unique_ptr<TraceTimes> times;
  if (!wish.path.empty())
    times = std::make_unique<TraceTimes>(wish, *calls.front().plan.header, calls.front().device, i32(calls.size()));
  for (Call& call : calls) {
    i64 words = 0;
    for (i32 block = 0; block < blocks_; ++block) words += variant.scratch_words(call.plan, call.device, block, type);
    // One more cache line, to start on a boundary.
    scratch.emplace_back(words + 8, 0);
    auto address = reinterpret_cast<uintptr_t>(scratch.back().data());
    call.scratch = reinterpret_cast<u64*>((address + 63) / 64 * 64);
    call.control = &control_;
    if (times) call.trace = {times->of(i32(scratch.size()) - 1), wish.first, wish.tokens};
    if (calls.size() == exchange_.size()) call.offers = offers_.data();  // else their memory may be gone before another's end
    for (size_t device = 0; device < exchange_.size(); ++device) call.exchange[device] = exchange_[device].data();
  }
  start_blocks(variant, type, calls);
  std::unique_lock<std::mutex> lock(mutex_);
  finished_ += calls.size();
  finished_changed_.notify_all();
  // Every wait of every block is bounded by wait_limit, so the others are at most that far behind.
  finished_changed_.wait_for(lock, std::chrono::nanoseconds(2 * control_.wait_limit),
                             [this] { return finished_ == exchange_.size(); });
  lock.unlock();
  if (times) times->write();
}

void Gang::start_blocks(const Variant& variant, WeightType type, const std::vector<Call>& calls) {
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < calls.size() * blocks_; ++i)
      threads.emplace_back([&, i] { variant.run_block(calls[i / blocks_], i32(i % blocks_), type); });
    variant.run_block(calls[0], 0, type);
  } catch (const std::system_error&) {
    // Blocks that did start wait for those that did not; let them go.
    no_thread_ = true;
    __atomic_store_n(&control_.aborted, 1, __ATOMIC_RELEASE);
  }
  for (std::thread& thread : threads) thread.join();
}

std::string Gang::error() const {
  if (no_thread_) return "could not start one thread per block; lower the number of blocks";
  return lost_handoff(control_, places_.data(), i32(places_.size()), blocks_);
}

Rendezvous<Gang>& rendezvous() {
  static Rendezvous<Gang> instance;
  return instance;
}

}  // namespace mono
