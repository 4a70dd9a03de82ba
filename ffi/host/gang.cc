#include "host/gang.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <system_error>
#include <thread>

namespace mono {
namespace {

const char* const kChannelNames[kChannels] = {
    "qkv rows",  "attention parts",    "attention inbox", "residual after attention", "activations", "mlp inbox",
    "residual after mlp", "final inbox", "final sum",     "summary",                  "logits",      "choice"};

}  // namespace

Gang::Gang(const Plan& plan, i64 wait_limit, const HandoffFault& fault)
    : blocks_(plan.header->num_blocks), places_(plan.header->num_devices * blocks_, 0) {
  for (i32 device = 0; device < plan.header->num_devices; ++device)
    exchange_.emplace_back(plan.devices[device].channels.words, 0);
  control_.wait_limit = wait_limit;
  control_.places = places_.data();
  control_.lost_device = fault.device;
  control_.lost_block = fault.block;
  control_.lost_layer = fault.layer;
  control_.lost_channel = fault.channel;
}

void Gang::run(const Variant& variant, WeightType type, std::vector<Call> calls) {
  std::vector<std::vector<u64>> scratch;
  for (Call& call : calls) {
    i64 words = 0;
    for (i32 block = 0; block < blocks_; ++block) words += variant.scratch_words(call.plan, call.device, block, type);
    // One more cache line, to start on a boundary.
    scratch.emplace_back(words + 8, 0);
    auto address = reinterpret_cast<uintptr_t>(scratch.back().data());
    call.scratch = reinterpret_cast<u64*>((address + 63) / 64 * 64);
    call.control = &control_;
    for (size_t device = 0; device < exchange_.size(); ++device) call.exchange[device] = exchange_[device].data();
  }
  start_blocks(variant, type, calls);
  std::unique_lock<std::mutex> lock(mutex_);
  finished_ += calls.size();
  finished_changed_.notify_all();
  // Every wait of every block is bounded by wait_limit, so the others are at most that far behind.
  finished_changed_.wait_for(lock, std::chrono::nanoseconds(2 * control_.wait_limit),
                             [this] { return finished_ == exchange_.size(); });
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
  if (!__atomic_load_n(&control_.aborted, __ATOMIC_ACQUIRE)) return {};
  if (no_thread_) return "could not start one thread per block; lower the number of blocks";
  size_t first = 0;
  u64 earliest = ~u64(0);
  for (size_t block = 0; block < places_.size(); ++block) {
    u64 key = __atomic_load_n(&places_[block], __ATOMIC_RELAXED);
    if (key == 0 || key >= earliest) continue;
    earliest = key;
    first = block;
  }
  const Place place(earliest);
  const std::string where = place.channel() < kFinalInbox ? "in layer " + std::to_string(place.layer()) : "after the last layer";
  return "device " + std::to_string(first / blocks_) + ", block " + std::to_string(first % blocks_) +
         " waited longer than " + std::to_string(control_.wait_limit / 1000000) + " ms for '" +
         kChannelNames[place.channel()] + "' " + where + ", epoch " + std::to_string(place.epoch()) +
         ". A block stopped publishing; if the machine was merely overloaded, raise JAX_MONO_WAIT_LIMIT_MS";
}

struct Rendezvous::Meeting {
  i64 run_id;
  std::shared_ptr<Gang> gang;
  std::vector<bool> joined;
  bool failed = false;
  std::condition_variable changed;

  bool complete() const { return std::all_of(joined.begin(), joined.end(), [](bool here) { return here; }); }
};

std::shared_ptr<Gang> Rendezvous::join(i64 run_id, const Plan& plan, i32 device, i64 limit,
                                       const std::shared_ptr<Gang>& mine, std::string& error) {
  std::unique_lock<std::mutex> lock(mutex_);
  // A device that comes a second time under one run (a call inside a loop) finds its place taken and opens the next
  // meeting; the others will do the same in the same order.
  std::shared_ptr<Meeting> meeting;
  for (const auto& open : open_)
    if (open->run_id == run_id && !open->joined[device]) {
      meeting = open;
      break;
    }
  if (!meeting) {
    meeting = std::make_shared<Meeting>();
    meeting->run_id = run_id;
    meeting->gang = mine;
    meeting->joined.resize(plan.header->num_devices);
    open_.push_back(meeting);
  }
  meeting->joined[device] = true;
  auto leave = [&] { open_.erase(std::remove(open_.begin(), open_.end(), meeting), open_.end()); };
  if (meeting->complete()) {
    leave();
    meeting->changed.notify_all();
  }
  bool met = meeting->changed.wait_for(lock, std::chrono::nanoseconds(limit),
                                       [&] { return meeting->complete() || meeting->failed; });
  if (met && !meeting->failed) return meeting->gang;
  if (!meeting->failed) {
    meeting->failed = true;
    leave();
    meeting->changed.notify_all();
  }
  error = "only " + std::to_string(std::count(meeting->joined.begin(), meeting->joined.end(), true)) + " of " +
          std::to_string(meeting->joined.size()) + " devices joined the call within " +
          std::to_string(limit / 1000000) + " ms; run one generation at a time and block on its result";
  return nullptr;
}

Rendezvous& rendezvous() {
  static Rendezvous instance;
  return instance;
}

}  // namespace mono
