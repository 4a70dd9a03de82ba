// The kernels of one plan on CDNA 3.
#define MONO_VARIANT gfx942
#include "kernel/arch/gfx942.h"
#include "kernel/simt/workspace.h"

namespace mono::gfx942 {
template <class T>
using Workspace = WarpWorkspace<T, arch::kThreads / kSquad>;
}

#include "kernel/program.h"
#include "kernel/roles.h"
#include "kernel/simt/attend.h"
#include "kernel/simt/join.h"
#include "kernel/simt/mix.h"
#include "kernel/simt/norm.h"
#include "kernel/simt/product.h"
#include "kernel/simt/set_course.h"

// One block per compute unit, so two waves per SIMD with 256 registers each. Two blocks would have 128 each and keep no more
// loads under way, and plans have no use for them: each block owns a tile of hidden rows, which few models have 608 of.
#define MONO_KERNEL                                                              \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(mono::kStageThreads, mono::kStageThreads), \
                            amdgpu_waves_per_eu(2, 2))) void

namespace mono::gfx942 {

MONO_DEVICE void* near_memory() {
  extern MONO_SHARED unsigned char dynamic_memory[];
  return dynamic_memory;
}

// Constant memory: read by scalar loads, which wait for no weights, and its pointers are known to lead to global memory.
MONO_DEVICE const Call& own_call(const Call* calls) {
  using Constant = const Call __attribute__((address_space(4)));
  return *(const Call*)((Constant*)calls + __builtin_amdgcn_workgroup_id_x() / u32(Shape::num_blocks));
}
// The block of the plan that this one is, or -1: see claim_role().
MONO_DEVICE i32 own_block(const Call& call) {
  const i32 launched = i32(__builtin_amdgcn_workgroup_id_x() % u32(Shape::num_blocks));
  if constexpr (Shape::num_dies == 1) return launched;
  MONO_SHARED static i32 role;
  if (arch::thread() == 0) role = claim_role(call, launched);
  arch::sync();
  return arch::agreed(role);
}

// Moves what is seldom needed from scalar registers, of which there are too few, to vector registers.
MONO_DEVICE void make_vectors(BlockState<Weight>& s) {
  auto vector = [](auto&... values) { (arch::make_vector(values), ...); };
  vector(s.scratch.logits, s.scratch.scores, s.scratch.seen, s.first_row, s.rows, s.link.place, s.link.control);
}

}  // namespace mono::gfx942

// grid: devices of `calls` x blocks; block: kStageThreads.
MONO_KERNEL mono_decode(const mono::Call* calls) {
  using namespace mono;
  using namespace mono::gfx942;
  const Call& call = own_call(calls);
  const i32 block = own_block(call);
  if (block < 0) return;
  set_course(call, block, first_head(call.request));
  BlockState<Weight> s(call, block, near_memory(), static_cast<char*>(call.scratch) + i64(block) * kFarBytes);
  make_vectors(s);
  s.link.pump.start();
  run_block(s);
}

// Reads the tapes as often as the request's budget says and does nothing with them: the limit of decoding.
MONO_KERNEL mono_stream(const mono::Call* calls) {
  using namespace mono;
  using namespace mono::gfx942;
  const Call& call = own_call(calls);
  const i32 block = own_block(call);
  if (block < 0) return;
  const i32 pieces = set_course(call, block, 0) * call.request.budget;
  arch::Pump pump;
  pump.start();
  MONO_ROLLED
  for (i32 p = pump.first(); p < pieces; p += arch::kWarps) pump.drop();
}
