// The kernels of one plan on fibers, see arch.h. Takes the place of kernel/entry/fibers.h.
#define MONO_VARIANT fibers
#include "kernel/arch/fibers.h"
#include "kernel/simt/workspace.h"

namespace mono::fibers {
template <class T>
using Workspace = WarpWorkspace<T, arch::kWarps>;
}

#include "kernel/program.h"
#include "kernel/simt/attend.h"
#include "kernel/simt/norm.h"
#include "kernel/simt/product.h"

#include <thread>

namespace mono::fibers {

void run_blocks(const Call* calls, i32 grid) {
  std::vector<std::thread> blocks;
  for (i32 i = 0; i < grid; ++i) {
    blocks.emplace_back([calls, i] {
      const Call call = calls[i / Shape::num_blocks];
      const i32 block = i % Shape::num_blocks;
      const Scratch<Weight, Workspace<Weight>> sizes(call.plan, call.device, block, nullptr, nullptr);
      std::vector<u64> near(sizes.near_bytes / 8 + 8, 0xa5a5a5a5a5a5a5a5ull);  // not zeros, as on a GPU
      void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(near.data()) + 63) / 64 * 64);
      arch::Fibers().run([&] {
        BlockState<Weight> s(call, block, aligned, static_cast<char*>(call.scratch) + i64(block) * kFarBytes);
        run_block(s);
      });
    });
  }
  for (std::thread& block : blocks) block.join();
}

}  // namespace mono::fibers

extern "C" __attribute__((visibility("default"))) void mono_decode(const mono::Call* calls, int grid) {
  mono::fibers::run_blocks(calls, grid);
}
