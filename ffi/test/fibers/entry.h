// The kernels of one plan on fibers, see arch.h. Takes the place of kernel/entry/fibers.h.
//
//   FIBER_DIES=0,1,1,-,...   the dies on which blocks find themselves, in the order of their launch and over again; a block of
//                            die - never starts
//   FIBER_ROLES=FILE         blocks note there which of the plan's they are: device, launched as, die, block
//   FIBER_WORDS=FILE         and there which words of the exchange memory they have loaded (L) and stored (S), and which of these as
//                            words that stay on a device (l, s): the letter, device, block, device whose memory it is, first word,
//                            words that follow each other
#define MONO_VARIANT fibers
#include "kernel/arch/fibers.h"
#include "kernel/simt/workspace.h"

namespace mono::fibers {
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

#include <mutex>
#include <sstream>
#include <string>
#include <thread>

namespace mono::fibers {

// Where the i-th block finds itself: a die, or nowhere (-1).
int die_of(i32 launched) {
  const char* named = std::getenv("FIBER_DIES");
  std::vector<std::string> dies;
  std::istringstream list(named ? named : "0");
  for (std::string die; std::getline(list, die, ',');) dies.push_back(die);
  const std::string& own = dies[launched % dies.size()];
  return own == "-" ? -1 : std::stoi(own);
}

void note_role(const Call& call, i32 launched, i32 role) {
  const char* path = std::getenv("FIBER_ROLES");
  FILE* file = path ? std::fopen(path, "a") : nullptr;
  if (!file) return;
  std::fprintf(file, "%d %d %u %d\n", call.device, launched, arch::die(), role);  // short enough to be written at once
  std::fclose(file);
}

void note_words(const Call& call, i32 block, char how, const std::set<const arch::Word*>& words, FILE* file) {
  for (i32 device = 0; device < Shape::num_devices; ++device) {
    const auto* base = static_cast<const arch::Word*>(call.exchange[device]);
    const auto end = words.lower_bound(base + call.plan.devices[device].channels.words);
    for (auto at = words.lower_bound(base); at != end;) {
      const arch::Word* first = *at;
      i64 count = 0;
      for (; at != end && *at == first + count; ++at) ++count;
      std::fprintf(file, "%c %d %d %d %lld %lld\n", how, call.device, block, device, (long long)(first - base), (long long)count);
    }
  }
}

void note_accesses(const Call& call, i32 block) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  FILE* file = std::fopen(std::getenv("FIBER_WORDS"), "a");
  if (!file) return;
  note_words(call, block, 'L', arch::accesses.loaded, file);
  note_words(call, block, 'S', arch::accesses.stored, file);
  note_words(call, block, 'l', arch::accesses.loaded_own, file);
  note_words(call, block, 's', arch::accesses.stored_own, file);
  std::fclose(file);
}

void run_block_of(const Call& call, i32 launched) {
  const int die = die_of(launched);
  if (die < 0) return;
  arch::own_die = u32(die);
  const i32 block = claim_role(call, launched);
  note_role(call, launched, block);
  if (block < 0) return;
  const Scratch<Weight, Workspace<Weight>> sizes(Shape{}, kExtents, block == 0, nullptr, nullptr);
  std::vector<u64> near(sizes.near_bytes / 8 + 8, 0xa5a5a5a5a5a5a5a5ull);  // not zeros, as on a GPU
  arch::accesses.noted = std::getenv("FIBER_WORDS") != nullptr;
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(near.data()) + 63) / 64 * 64);
  arch::Fibers().run([&] {
    set_course(call, block, first_head(call.request));
    BlockState<Weight> s(call, block, aligned, static_cast<char*>(call.scratch) + i64(block) * kFarBytes);
    s.link.pump.start();
    run_block(s);
  });
  if (arch::accesses.noted) note_accesses(call, block);
}

void run_blocks(const Call* calls, i32 grid) {
  std::vector<std::thread> blocks;
  for (i32 i = 0; i < grid; ++i)
    blocks.emplace_back([calls, i] { run_block_of(Call(calls[i / Shape::num_blocks]), i % Shape::num_blocks); });
  for (std::thread& block : blocks) block.join();
}

}  // namespace mono::fibers

extern "C" __attribute__((visibility("default"))) void mono_decode(const mono::Call* calls, int grid) {
  mono::fibers::run_blocks(calls, grid);
}
