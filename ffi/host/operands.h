// Operands, results and attributes of the custom call: what they are, and every check of them. The same on all platforms.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "host/failure.h"
#include "host/variant.h"
#include "xla/ffi/api/ffi.h"

namespace mono {

namespace ffi = xla::ffi;

// `Mode` in ffi/kernel/call.h goes on here: reads the tapes as the program does and nothing else, on GPUs only.
constexpr i32 kStreamBenchmark = 2;

struct Attributes {
  ffi::Span<const int64_t> plan;
  i32 mode, weights, wait_limit_ms, meeting_limit_ms;
  ffi::Span<const int32_t> fault;

  i64 wait_limit() const { return i64(wait_limit_ms) * 1000000; }
  i64 meeting_limit() const { return i64(meeting_limit_ms) * 1000000; }
  HandoffFault lost() const;
};

// Order of the integer and float request words; jax_mono/call.py mirrors it.
enum IntWord { kPosition, kNumForced, kBudget, kTopK, kSession, kSeed0, kSeed1, kIntWords };
enum FloatWord { kTemperature, kTopP, kMinP, kRepetitionPenalty, kFloatWords };

// The small operands where the host can read them. For a call on the CPU they are the operands themselves.
struct SmallOperands {
  const i32* ints;
  const float* floats;
  const i32 *stops, *history, *forced, *device_index;
};

class Operands {
 public:
  // Checks everything that can be checked without reading an operand. Throws std::invalid_argument.
  Operands(const Attributes& attributes, ffi::RemainingArgs arguments, ffi::RemainingRets results);

  Plan plan() const { return Plan(attributes_.plan.begin()); }
  WeightType weights() const { return WeightType(attributes_.weights); }
  const Attributes& attributes() const { return attributes_; }
  // Devices of the plan in this call: as many in every call of a gang.
  i32 local() const { return local_; }

  // The small operands where they are, in the order of SmallOperands.
  std::vector<ffi::AnyBuffer> small() const { return {ints_, floats_, stops_, history_, forced_, device_index_}; }

  // Checks the values of the small operands. Throws std::invalid_argument.
  void check(const SmallOperands& values) const;

  // What to run on each local device. The calls lack what the platform supplies: exchange memory, scratch memory, control
  // and session. Pointers are those of the operands and results, wherever these are.
  std::vector<Call> calls(const SmallOperands& values) const;

 private:
  void check_plan() const;
  void check_types() const;
  void check_shapes();
  void check_tokens(const i32* history, const i32* forced, i32 num_forced) const;
  Request request(const SmallOperands& values) const;

  Attributes attributes_;
  ffi::AnyBuffer layers_, head_, constants_, embed_, rope_, ints_, floats_, stops_, history_, forced_, device_index_;
  ffi::AnyBuffer tokens_, logprobs_, top_ids_, top_logprobs_, status_, logits_, k_cache_, v_cache_;
  i32 local_ = 0;
  i64 capacity_ = 0, room_ = 0, top_n_ = 0;
  bool wants_logits_ = false;
};

// The error that XLA passes on to the caller.
ffi::Error as_error(const Failure& failure);

// The error of a call that ended, if its last step was no good.
Failure not_finite(const i32* status);

// Completes what a handler is bound to: all operands, all results and the attributes.
template <class Binding>
auto bind_operands(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<ffi::Span<const int64_t>>("plan")
      .template Attr<int32_t>("mode")
      .template Attr<int32_t>("weights")
      .template Attr<int32_t>("wait_limit_ms")
      .template Attr<int32_t>("meeting_limit_ms")
      .template Attr<ffi::Span<const int32_t>>("fault");
}

}  // namespace mono
