// The kernels of one plan on Hopper.
#define MONO_VARIANT sm_90a
#include "kernel/arch/sm_90a.h"
#include "kernel/simt/workspace.h"

namespace mono::sm_90a {
template <class T>
using Workspace = WarpWorkspace<T, arch::kThreads / kSquad>;
}

#include "kernel/program.h"
#include "kernel/simt/attend.h"
#include "kernel/simt/join.h"
#include "kernel/simt/mix.h"
#include "kernel/simt/norm.h"
#include "kernel/simt/product.h"
#include "kernel/simt/feed.h"

namespace mono::sm_90a {

constexpr i32 kAllThreads = kStageThreads + arch::kPumpThreads;

// Copies what every stage looks at into shared memory, and readies the ring.
MONO_DEVICE void begin(const Call* calls, Call& call, i32 block, PieceRun* runs) {
  const u32* from = reinterpret_cast<const u32*>(calls + blockIdx.x / Shape::num_blocks);
  for (i32 i = i32(threadIdx.x); i < i32(sizeof(Call) / 4); i += kAllThreads) reinterpret_cast<u32*>(&call)[i] = from[i];
  if (threadIdx.x == 0) {
    arch::init_barrier(&arch::ring().stop);
    for (i32 slot = 0; slot < kSlots; ++slot) {
      arch::init_barrier(&arch::ring().full[slot]);
      arch::init_barrier(&arch::ring().empty[slot]);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < kStages) runs[threadIdx.x] = {call.plan.devices[call.device], call.plan.block(call.device, block), i32(threadIdx.x)};
  __syncthreads();
}

// One block: some threads feed the ring while others run `stages(call, block, runs)`.
template <class Stages>
MONO_DEVICE void run(const Call* calls, Stages stages) {
  __shared__ alignas(16) unsigned char call_memory[sizeof(Call)];
  __shared__ alignas(8) unsigned char run_memory[kStages * sizeof(PieceRun)];
  Call& call = *reinterpret_cast<Call*>(call_memory);
  PieceRun* runs = reinterpret_cast<PieceRun*>(run_memory);
  const i32 block = i32(blockIdx.x) % Shape::num_blocks;
  begin(calls, call, block, runs);
  if (threadIdx.x >= kStageThreads) {
    arch::give_registers();
    const i32 pump = i32(threadIdx.x) - kStageThreads, feeder = pump / arch::kWarp;
    if (feeder < arch::kFeeders) feed_tokens<Weight>(call, block, runs, feeder);
  } else {
    arch::take_registers();
    stages(call, block, runs);
    arch::sync();
    if (threadIdx.x == 0) arch::arrive(&arch::ring().stop);
  }
}

}  // namespace mono::sm_90a

// grid: devices of `calls` x blocks; block: kAllThreads.
extern "C" __global__ void __launch_bounds__(mono::sm_90a::kAllThreads, 1) mono_decode(const mono::Call* calls) {
  using namespace mono;
  using namespace mono::sm_90a;
  run(calls, [](const Call& call, i32 block, const PieceRun*) {
    char* far = static_cast<char*>(call.scratch) + i64(block) * kFarBytes;
    BlockState<Weight> s(call, block, arch::near_memory(), far);
    run_block(s);
  });
}

// Reads the tapes as often as the request's budget says and does nothing with them: the limit of decoding.
extern "C" __global__ void __launch_bounds__(mono::sm_90a::kAllThreads, 1) mono_stream(const mono::Call* calls) {
  using namespace mono;
  using namespace mono::sm_90a;
  run(calls, [](const Call& call, i32, const PieceRun* runs) { drop_tokens(call, runs); });
}
