// Probes on Hopper: the instructions with which the resident program moves its words (kernel/arch/sm_90a.h).
#pragma once

#define MONO_PROBE __device__ __forceinline__

#include "kernel/probe/flag.h"

namespace mono::probe::arch {

MONO_PROBE u32 load_tag(const Flag* flag, i32 across) {
  u64 low, high;
  if (across) {
    asm volatile("{\n .reg .b128 word;\n ld.relaxed.sys.global.b128 word, [%2];\n mov.b128 {%0, %1}, word;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(flag)
                 : "memory");
  } else {
    asm volatile("{\n .reg .b128 word;\n ld.relaxed.gpu.global.b128 word, [%2];\n mov.b128 {%0, %1}, word;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(flag)
                 : "memory");
  }
  return u32(high >> 32);
}
MONO_PROBE void store_tag(Flag* flag, u32 tag, i32 across) {
  const u64 half = tag | u64(tag) << 32;
  if (across) {
    asm volatile("{\n .reg .b128 word;\n mov.b128 word, {%1, %1};\n st.relaxed.sys.global.b128 [%0], word;\n}" ::"l"(flag), "l"(half)
                 : "memory");
  } else {
    asm volatile("{\n .reg .b128 word;\n mov.b128 word, {%1, %1};\n st.relaxed.gpu.global.b128 [%0], word;\n}" ::"l"(flag), "l"(half)
                 : "memory");
  }
}
MONO_PROBE void pause() { asm volatile("nanosleep.u32 32;"); }
MONO_PROBE i64 nanoseconds() {
  i64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}
MONO_PROBE u64 cycles() {
  u64 now;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(now)::"memory");
  return now;
}
// The counter is read again only when the value is there.
MONO_PROBE u32 load(const u32* at) {
  u32 value;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  asm volatile("{\n .reg .pred some;\n setp.ne.u32 some, %0, 0;\n @some trap;\n}" ::"r"(value) : "memory");
  return value;
}
MONO_PROBE i32 fetch_add(i32* at) { return atomicAdd(at, 1); }
MONO_PROBE u32 die() { return 0; }

}  // namespace mono::probe::arch

#include "kernel/probe/probe.h"

extern "C" __global__ void __launch_bounds__(64, 1) mono_probe(const mono::probe::Probe* probe) {
  if (threadIdx.x) return;
  const mono::probe::Probe own = *probe;  // in registers: nothing is loaded while something is timed
  mono::probe::run(own, int(blockIdx.x));
}
