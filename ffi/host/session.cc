#include "host/session.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <thread>

namespace mono {
namespace {

constexpr size_t kRecordBytes = (sizeof(Session) + 63) / 64 * 64;

std::mutex sessions_mutex;
std::map<i32, std::shared_ptr<HostSession>>& sessions() {
  static std::map<i32, std::shared_ptr<HostSession>> open;
  return open;
}

i64 monotonic_now() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

HostSession::HostSession(i32 capacity, i64 deadline, const Driver* driver) : driver_(driver) {
  const size_t bytes = kRecordBytes + size_t(capacity) * (sizeof(i32) + sizeof(float));
  char* at;
  if (driver) {
    pinned_ = take_host_memory(*driver, 0, bytes);
    at = pinned_->data();
  } else {
    own_.resize((bytes + 7) / 8);
    at = reinterpret_cast<char*>(own_.data());
  }
  shared_ = new (at) Session{};
  shared_->deadline = deadline;
  shared_->capacity = capacity;
  shared_->tokens = reinterpret_cast<i32*>(at + kRecordBytes);
  shared_->logprobs = reinterpret_cast<float*>(shared_->tokens + capacity);
}

void HostSession::await_more(i32 known, std::chrono::nanoseconds longest) const {
  const auto until = std::chrono::steady_clock::now() + longest;
  for (i32 now = produced(); now <= known; now = produced()) {
    const auto left = until - std::chrono::steady_clock::now();
    if (left <= left.zero()) return;
    if (driver_) {  // nothing on a GPU can wake a thread
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    } else {  // a look takes a moment from a processor that may be decoding, so blocks say when there is something to see
      const i64 nanoseconds = std::chrono::nanoseconds(left).count();
      const timespec time{time_t(nanoseconds / 1000000000), long(nanoseconds % 1000000000)};
      syscall(SYS_futex, &shared_->produced, FUTEX_WAIT_PRIVATE, now, &time, nullptr, 0);
    }
  }
}

i64 HostSession::time_left() const {
  if (shared_->deadline == 0) return 0;
  const i64 left = shared_->deadline - monotonic_now();
  return left > 0 ? left : 1;
}

std::shared_ptr<HostSession> find_session(i32 id) {
  std::lock_guard<std::mutex> lock(sessions_mutex);
  auto found = sessions().find(id);
  return found == sessions().end() ? nullptr : found->second;
}

}  // namespace mono

#define MONO_EXPORT extern "C" __attribute__((visibility("default")))

using mono::i32;
using mono::i64;

// Opens a session for up to `capacity` tokens that ends `seconds` from now (0: never) and that GPUs of `platform` can
// reach (0: none). Returns its number, > 0, or 0 and writes why there is none.
MONO_EXPORT i32 mono_session_open(i32 capacity, double seconds, i32 platform, char* error, i32 room) {
  static std::atomic<i32> next{1};
  const i64 deadline = seconds > 0 ? mono::monotonic_now() + i64(seconds * 1e9) : 0;
  std::shared_ptr<mono::HostSession> session;
  try {
    const mono::Driver* driver = platform ? &mono::driver(mono::Platform(platform)) : nullptr;
    session = std::make_shared<mono::HostSession>(capacity, deadline, driver);
  } catch (const std::exception& failure) {
    std::snprintf(error, room, "%s", failure.what());
    return 0;
  }
  std::lock_guard<std::mutex> lock(mono::sessions_mutex);
  i32 id = next++;
  mono::sessions()[id] = session;
  return id;
}

// Waits at most `milliseconds` for more than `known` tokens; returns how many are readable, or -1 if the session is
// closed. Copies tokens [known, result) and their log-probabilities, at most `room` of them.
MONO_EXPORT i32 mono_session_read(i32 id, i32 known, i32 room, i32 milliseconds, i32* tokens, float* logprobs) {
  auto session = mono::find_session(id);
  if (!session) return -1;
  session->await_more(known, std::chrono::milliseconds(milliseconds));
  i32 end = session->produced();
  if (end > known + room) end = known + room;
  for (i32 i = known; i < end; ++i) {
    tokens[i - known] = session->shared()->tokens[i];
    logprobs[i - known] = session->shared()->logprobs[i];
  }
  return end;
}

MONO_EXPORT void mono_session_cancel(i32 id) {
  if (auto session = mono::find_session(id)) session->cancel();
}

MONO_EXPORT void mono_session_close(i32 id) {
  std::shared_ptr<mono::HostSession> last;  // freed after the lock is: that may wait for a GPU
  std::lock_guard<std::mutex> lock(mono::sessions_mutex);
  auto found = mono::sessions().find(id);
  if (found == mono::sessions().end()) return;
  last = std::move(found->second);
  mono::sessions().erase(found);
}

MONO_EXPORT i32 mono_sessions_open() {
  std::lock_guard<std::mutex> lock(mono::sessions_mutex);
  return i32(mono::sessions().size());
}
