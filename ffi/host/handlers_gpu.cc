// The XLA custom call on GPUs: the same operands and checks as on the CPU. CUDA and ROCm differ in their driver only.
#include <stdexcept>
#include <string>

#include "host/gpu_buffers.h"
#include "host/gpu_call.h"
#include "host/operands.h"

namespace mono {
namespace {

// Copies of the small operands for the host, so that nothing runs that has not been checked.
class Fetched {
 public:
  Fetched(const Driver& driver, int ordinal, void* stream, const Operands& operands) {
    const Current current(driver, ordinal);
    const auto buffers = operands.small();
    size_t bytes = 0;
    for (const ffi::AnyBuffer& buffer : buffers) bytes += buffer.size_bytes();
    memory_ = take_host_memory(driver, ordinal, bytes);
    const char* at[6];
    char* next = memory_->data();
    for (size_t i = 0; i < buffers.size(); ++i) {
      at[i] = next;
      driver.copy_out(next, buffers[i].untyped_data(), buffers[i].size_bytes(), stream);
      next += buffers[i].size_bytes();
    }
    driver.synchronize(stream);
    auto ints = [&](int i) { return reinterpret_cast<const i32*>(at[i]); };
    values_ = {ints(0), reinterpret_cast<const float*>(at[1]), ints(2), ints(3), ints(4), ints(5)};
  }

  const SmallOperands& values() const { return values_; }

 private:
  std::shared_ptr<HostMemory> memory_;
  SmallOperands values_{};
};

std::shared_ptr<HostSession> open_session(i32 id, const Driver& driver) {
  if (id <= 0) return nullptr;
  auto session = find_session(id);
  if (!session) throw std::invalid_argument("session " + std::to_string(id) + " is closed");
  if (!session->reached_by(driver.platform()))
    throw std::invalid_argument("session " + std::to_string(id) + " was not opened for " + driver.name() +
                                "; call jax_mono.native.register() before it is opened");
  return session;
}

Failure run(const Driver& driver, void* stream, i32 ordinal, i64 run_id, const Operands& operands) {
  const Fetched fetched(driver, ordinal, stream, operands);
  const SmallOperands& values = fetched.values();
  operands.check(values);
  const Attributes& attributes = operands.attributes();
  const char* words = reinterpret_cast<const char*>(attributes.plan.begin());
  const GpuJob job{driver,
                   ordinal,
                   stream,
                   run_id,
                   std::string(words, attributes.plan.size() * 8),
                   operands.weights(),
                   operands.calls(values),
                   open_session(values.ints[kSession], driver),
                   attributes.mode == kStreamBenchmark,
                   attributes.wait_limit(),
                   attributes.meeting_limit(),
                   attributes.lost()};
  i32 status[2] = {};
  const Failure failure = run_on_gpu(job, status);
  return failure ? failure : not_finite(status);
}

template <Platform platform>
ffi::Error decode(void* stream, int32_t ordinal, ffi::RunId run_id, ffi::RemainingArgs arguments,
                  ffi::RemainingRets results, ffi::Span<const int64_t> plan, int32_t mode, int32_t weights,
                  int32_t wait_limit_ms, int32_t meeting_limit_ms, ffi::Span<const int32_t> fault) {
  Failure failure;
  attempt(failure, [&] {
    const Operands operands({plan, mode, weights, wait_limit_ms, meeting_limit_ms, fault}, arguments, results);
    failure = run(driver(platform), stream, ordinal, run_id.run_id, operands);
  });
  return as_error(failure);
}

auto binding() {
  return bind_operands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::RunId>());
}

}  // namespace
}  // namespace mono

#define MONO_HANDLER(name, platform)                                                                  \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, mono::decode<platform>, mono::binding())

MONO_HANDLER(mono_decode_cuda, mono::Platform::kCuda);
MONO_HANDLER(mono_decode_rocm, mono::Platform::kRocm);
