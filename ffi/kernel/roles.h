// Which block of the plan a resident block is.
//
// Where a device has one die, or dies whose caches are one, it is the launched block of that number. Elsewhere the plan gives
// every die its blocks, and hardware puts blocks where it likes: so a block looks where it is and takes the next number of
// that die. Those beyond a die's share take what is left on other dies, in the order of the dies.
//
// Proof that every number is taken once. A block counts itself among the arrivals of its die, once, before anything else;
// what it counted is its rank there. Ranks below the die's share are numbers of that die. A block of a higher rank waits until
// the arrivals of all dies add up to all blocks: then no counter changes any more, and all that wait see the same counters.
// By these, surplus blocks are numbered from the first die to the last, and so are numbers that no block of their own die
// took; there are as many of one as of the other. The counters are part of the exchange memory, which is zero when a call
// starts. Nothing is handed over but the counters themselves, so nothing needs to be ordered.
#pragma once

#include "kernel/call.h"

namespace mono::MONO_VARIANT {

// For one thread of the block. A wait in vain returns -1: then the call has failed, and the block must leave.
MONO_DEVICE i32 claim_role(const Call& call, i32 launched) {
  if constexpr (Shape::num_dies == 1) return launched;
  constexpr i32 dies = Shape::num_dies;
  const Span* roles = call.plan.header->roles;
  arch::Word* words = static_cast<arch::Word*>(call.exchange[call.device]) + call.plan.devices[call.device].channels.arrivals;
  // A word each: counters of different dies are changed at the same time.
  auto counter = [words](i32 die) { return reinterpret_cast<u32*>(words + die); };
  const i32 own = i32(arch::die() % u32(dies));
  const i32 rank = i32(arch::count_up(counter(own)));
  if (rank < roles[own].count) return roles[own].first + rank;

  Control* control = call.control;
  const i64 start = arch::nanoseconds();
  MONO_ROLLED
  for (;;) {
    i32 arrived = 0;
    MONO_ROLLED
    for (i32 die = 0; die < dies; ++die) arrived += i32(arch::load_count(counter(die)));
    if (arrived == Shape::num_blocks) break;
    if (arch::load_acquire(&control->aborted) || arch::nanoseconds() - start > control->wait_limit) {
      arch::store_release(&control->missed, 1 + call.device);
      arch::store_release(&control->aborted, 1);
      return -1;
    }
    arch::pause();
  }
  i32 surplus = rank - roles[own].count;  // before this block
  MONO_ROLLED
  for (i32 die = 0; die < own; ++die) {
    const i32 more = i32(arch::load_count(counter(die))) - roles[die].count;
    surplus += more > 0 ? more : 0;
  }
  MONO_ROLLED
  for (i32 die = 0; die < dies; ++die) {
    const i32 taken = i32(arch::load_count(counter(die))), free = roles[die].count - taken;
    if (free <= 0) continue;
    if (surplus < free) return roles[die].first + taken + surplus;
    surplus -= free;
  }
  return -1;  // not reached: as many are left as blocks look for one
}

}  // namespace mono::MONO_VARIANT
