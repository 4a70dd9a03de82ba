#include "host/gpu_call.h"

#include <cstring>
#include <stdexcept>

#include "host/gpu_gang.h"
#include "host/rendezvous.h"
#include "host/trace.h"

namespace mono {
namespace {

// Where the handlers of one launch, one per GPU, find their gang.
Rendezvous<GpuGang>& gpu_rendezvous() {
  static Rendezvous<GpuGang> instance;
  return instance;
}

// The part of one GPU. Nothing is loaded, allocated or freed between the launch and its end: that could wait for a
// program that waits for this GPU.
class Member {
 public:
  explicit Member(const GpuJob& job)
      : job_(job),
        driver_(job.driver),
        plan_(job.record.data()),
        devices_(plan_.header->num_devices),
        local_(i32(job.calls.size())),
        members_(devices_ / local_) {}

  Failure run(i32* status) {
    Failure failure;
    attempt(failure, [&] { prepare(); });
    Failure late = join();
    if (late) return failure ? failure : late;
    if (!failure) gang_->bring(job_.ordinal, first(), buffers_);
    failure = gang_->meet(GpuGang::kPrepared, failure, job_.meeting_limit);
    attempt(failure, [&] { connect(); });
    failure = gang_->meet(GpuGang::kConnected, failure, job_.meeting_limit);
    if (failure) return failure;

    attempt(failure, [&] { launch(); });
    // Without this GPU the others would wait in vain.
    if (failure) __atomic_store_n(&gang_->shared().control().aborted, 1, __ATOMIC_RELEASE);
    attempt(failure, [&] { finish(status); });
    // Every wait of every block is bounded, so the others are at most that far behind.
    failure = gang_->meet(GpuGang::kFinished, failure, 2 * job_.wait_limit);
    if (failure) return failure;
    const GpuBuffers& shared = gang_->shared();
    const std::string lost =
        lost_handoff(shared.control(), shared.places(), devices_ * plan_.header->num_blocks, plan_.header->num_blocks);
    return lost.empty() ? Failure{} : Failure{FailureKind::kLost, lost};
  }

 private:
  i32 first() const { return job_.calls.front().device; }
  unsigned blocks() const { return unsigned(local_ * plan_.header->num_blocks); }

  // Everything that this GPU can do alone.
  void prepare() {
    program_ = &program(driver_, job_.ordinal, job_.record, job_.weights);
    if (job_.benchmark && !program_->stream)
      throw std::invalid_argument("the program for " + program_->architecture + " has no benchmark");
    if (i64(blocks()) > program_->resident_blocks)
      throw std::invalid_argument("the plan runs " + std::to_string(blocks()) + " blocks on one GPU, and " +
                                  driver_.device_name(job_.ordinal) + " (" + program_->architecture + ") holds " +
                                  std::to_string(program_->resident_blocks) + " of them at once; plan fewer blocks");
    buffers_ = take_buffers(driver_, job_.ordinal, *program_, job_.record, first(), local_, job_.stream);
    upload_ = take_host_memory(driver_, job_.ordinal, sizeof(Call) * local_ + 2 * sizeof(i32));
    if (first() == 0)
      start_control(buffers_->control(), buffers_->places(), devices_ * plan_.header->num_blocks, job_.wait_limit, job_.lost);
    const Current current(driver_, job_.ordinal);
    driver_.zero(buffers_->exchange.data(), buffers_->exchange.bytes(), job_.stream);
    if (!wish_.path.empty()) {
      times_ = std::make_unique<TraceTimes>(wish_, *plan_.header, first(), local_);
      traced_ = DeviceMemory(driver_, job_.ordinal, local_ * times_->per_device() * sizeof(i64));
      driver_.zero(traced_.data(), traced_.bytes(), job_.stream);
    }
    driver_.synchronize(job_.stream);
  }

  Failure join() {
    gang_ = std::make_shared<GpuGang>(devices_, members_);
    if (members_ == 1) return {};
    std::string error;
    gang_ = gpu_rendezvous().join(job_.run_id, devices_, first(), local_, job_.meeting_limit, gang_, error);
    return gang_ ? Failure{} : Failure{FailureKind::kLate, error};
  }

  // Everything that needs the addresses of the others.
  void connect() {
    const Current current(driver_, job_.ordinal);
    for (int other : gang_->ordinals())
      if (other != job_.ordinal) driver_.reach(other);
    auto* calls = reinterpret_cast<Call*>(upload_->data());
    for (i32 i = 0; i < local_; ++i) {
      Call call = job_.calls[i];
      call.plan = Plan(job_.record.data());
      move_plan(call.plan);
      for (i32 device = 0; device < devices_; ++device) call.exchange[device] = gang_->exchange(device);
      call.scratch = buffers_->scratch_of[i];
      call.control = &gang_->shared().control();
      call.session = job_.session ? job_.session->shared() : nullptr;
      call.time_left = job_.session ? job_.session->time_left() : 0;
      if (times_) call.trace = {reinterpret_cast<i64*>(traced_.data()) + i * times_->per_device(), wish_.first, wish_.tokens};
      std::memcpy(static_cast<void*>(calls + i), &call, sizeof call);
    }
    driver_.copy_in(buffers_->calls.data(), calls, sizeof(Call) * local_, job_.stream);
    driver_.synchronize(job_.stream);
  }

  // From the record's place on the host to that on the GPU.
  void move_plan(Plan& plan) const {
    auto moved = [&](auto* pointer) {
      const auto offset = reinterpret_cast<const char*>(pointer) - job_.record.data();
      return reinterpret_cast<decltype(pointer)>(buffers_->record.data() + offset);
    };
    plan.header = moved(plan.header);
    plan.layers = moved(plan.layers);
    plan.devices = moved(plan.devices);
    plan.blocks = moved(plan.blocks);
  }

  void launch() {
    const Current current(driver_, job_.ordinal);
    void* calls = buffers_->calls.data();
    void* arguments[] = {&calls};
    driver_.launch(job_.benchmark ? program_->stream : program_->decode, blocks(), unsigned(program_->shape.threads),
                   unsigned(program_->shape.shared_bytes), job_.stream, arguments);
  }

  void finish(i32* status) {
    const Current current(driver_, job_.ordinal);
    char* words = upload_->data() + sizeof(Call) * local_;
    driver_.copy_out(words, job_.calls.front().outputs.status, 2 * sizeof(i32), job_.stream);
    driver_.synchronize(job_.stream);
    std::memcpy(status, words, 2 * sizeof(i32));
    if (!times_) return;
    driver_.copy_out(times_->of(0), traced_.data(), traced_.bytes(), job_.stream);
    driver_.synchronize(job_.stream);
    times_->write();
  }

  const GpuJob& job_;
  const Driver& driver_;
  const Plan plan_;
  const i32 devices_, local_, members_;
  const TraceWish wish_ = trace_wish();
  std::unique_ptr<TraceTimes> times_;
  DeviceMemory traced_;
  const Program* program_ = nullptr;
  std::shared_ptr<GpuBuffers> buffers_;
  std::shared_ptr<HostMemory> upload_;
  std::shared_ptr<GpuGang> gang_;
};

}  // namespace

Failure run_on_gpu(const GpuJob& job, i32* status) { return Member(job).run(status); }

}  // namespace mono
