// The XLA custom call on the CPU: checks its operands, then runs the resident program.
//
// One handler serves both forms. With as many devices' operands as the plan has devices it runs them all (lane threads,
// the default); with one device's operands it meets the handlers of the others (inside jax.shard_map).
#include <stdexcept>
#include <string>

#include "host/gang.h"
#include "host/operands.h"
#include "host/session.h"

namespace mono {
namespace {

Failure run(i64 run_id, const Operands& operands) {
  const Attributes& attributes = operands.attributes();
  if (attributes.mode == kStreamBenchmark) throw std::invalid_argument("this mode runs on GPUs only");
  if (operands.weights() == WeightType::kFloat16)
    throw std::invalid_argument("float16 weights run on GPUs only; on the CPU use bfloat16 or float32");
  const auto small = operands.small();
  auto ints = [&](int i) { return static_cast<const i32*>(small[i].untyped_data()); };
  const SmallOperands values{ints(0), static_cast<const float*>(small[1].untyped_data()), ints(2), ints(3), ints(4), ints(5)};
  operands.check(values);
  std::vector<Call> calls = operands.calls(values);

  std::shared_ptr<HostSession> session;
  if (const i32 id = values.ints[kSession]; id > 0) {
    session = find_session(id);
    if (!session) throw std::invalid_argument("session " + std::to_string(id) + " is closed");
    for (Call& call : calls) {
      call.session = session->shared();
      call.time_left = session->time_left();
    }
  }

  const Plan plan = operands.plan();
  if (plan.header->period > 1)
    throw std::invalid_argument("the plan's tapes take turns in memory, as on a GPU of several dies; plan without a topology");
  const i32 devices = plan.header->num_devices;
  const Variant& variant = cpu_variant();
  auto gang = std::make_shared<Gang>(plan, attributes.wait_limit(), attributes.lost());
  if (operands.local() != devices) {
    std::string error;
    gang = rendezvous().join(run_id, devices, calls[0].device, operands.local(), attributes.meeting_limit(), gang, error);
    if (!gang) return {FailureKind::kLate, error};
  }
  gang->run(variant, operands.weights(), calls);
  if (std::string error = gang->error(); !error.empty()) return {FailureKind::kLost, error};
  return not_finite(calls.front().outputs.status);
}

ffi::Error decode(ffi::RunId run_id, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                  ffi::Span<const int64_t> plan, int32_t mode, int32_t weights, int32_t wait_limit_ms,
                  int32_t meeting_limit_ms, ffi::Span<const int32_t> fault) {
  Failure failure;
  attempt(failure, [&] {
    failure = run(run_id.run_id, Operands({plan, mode, weights, wait_limit_ms, meeting_limit_ms, fault}, arguments, results));
  });
  return as_error(failure);
}

}  // namespace
}  // namespace mono

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mono_decode_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(mono_decode_cpu, mono::decode, mono::bind_operands(xla::ffi::Ffi::Bind().Ctx<xla::ffi::RunId>()));
