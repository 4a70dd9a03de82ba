#include "host/rendezvous.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>

namespace mono {

struct Meetings::Meeting {
  i64 run_id;
  std::shared_ptr<void> gang;
  std::vector<bool> joined;
  bool failed = false;
  std::condition_variable changed;

  bool complete() const { return std::all_of(joined.begin(), joined.end(), [](bool here) { return here; }); }
};

std::shared_ptr<void> Meetings::join(i64 run_id, i32 devices, i32 first, i32 count, i64 limit,
                                     const std::shared_ptr<void>& mine, std::string& error) {
  std::unique_lock<std::mutex> lock(mutex_);
  // A device that comes a second time under one run (a call inside a loop) finds its place taken and opens the next
  // meeting; the others will do the same in the same order.
  std::shared_ptr<Meeting> meeting;
  for (const auto& open : open_)
    if (open->run_id == run_id && i32(open->joined.size()) == devices && !open->joined[first]) {
      meeting = open;
      break;
    }
  if (!meeting) {
    meeting = std::make_shared<Meeting>();
    meeting->run_id = run_id;
    meeting->gang = mine;
    meeting->joined.resize(devices);
    open_.push_back(meeting);
  }
  std::fill_n(meeting->joined.begin() + first, count, true);
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

}  // namespace mono
