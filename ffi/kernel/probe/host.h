// Probes on a CPU: a thread for every block, all on die 0.
#pragma once

#include <sched.h>
#include <time.h>

#define MONO_PROBE inline

#include "kernel/probe/flag.h"

namespace mono::probe::arch {

MONO_PROBE u32 load_tag(const Flag* flag, i32) { return __atomic_load_n(&flag->tag, __ATOMIC_RELAXED); }
MONO_PROBE void store_tag(Flag* flag, u32 tag, i32) { __atomic_store_n(&flag->tag, tag, __ATOMIC_RELAXED); }
MONO_PROBE void pause() { sched_yield(); }  // there may be fewer cores than blocks
MONO_PROBE i64 nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return i64(now.tv_sec) * 1000000000 + now.tv_nsec;
}
MONO_PROBE u64 cycles() { return u64(nanoseconds()); }
MONO_PROBE u32 load(const u32* at) { return *static_cast<const volatile u32*>(at); }
MONO_PROBE i32 fetch_add(i32* at) { return __atomic_fetch_add(at, 1, __ATOMIC_RELAXED); }
MONO_PROBE u32& die() {  // tests let blocks run on others
  static thread_local u32 of_thread = 0;
  return of_thread;
}

}  // namespace mono::probe::arch

#include "kernel/probe/probe.h"
