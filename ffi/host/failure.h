// Why a call failed while it ran, from what its blocks left behind. The same on every platform.
#pragma once

#include <exception>
#include <string>

#include "kernel/call.h"

namespace mono {

// What kind of error the caller sees.
enum class FailureKind { kNone, kRefused, kLate, kLost, kMemory, kNumbers, kBroken };

struct Failure {
  FailureKind kind = FailureKind::kNone;
  std::string text;

  explicit operator bool() const { return kind != FailureKind::kNone; }
  // std::invalid_argument refuses the call, std::bad_alloc is memory, everything else is broken.
  static Failure of(const std::exception& error);
};

// Runs `step` and turns what it throws into a failure; does nothing if there is one already.
template <class Step>
void attempt(Failure& failure, Step step) {
  if (failure) return;
  try {
    step();
  } catch (const std::exception& error) {
    failure = Failure::of(error);
  }
}

// Fault injection for tests: the hand-off that gets lost.
struct HandoffFault {
  i32 device = -1, block = 0, layer = 0, channel = 0;
};

// Prepares the record that all blocks of a call share. `places` has one word per device and block.
void start_control(Control& control, u64* places, i32 count, i64 wait_limit, const HandoffFault& fault);

// Empty, or which hand-off did not arrive. `places` as the host reaches them.
std::string lost_handoff(const Control& control, const u64* places, i32 count, i32 blocks);

}  // namespace mono
