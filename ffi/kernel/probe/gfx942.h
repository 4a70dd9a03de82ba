// Probes on CDNA 3: the instructions with which the resident program moves its words (kernel/arch/gfx942.h).
#pragma once

#define MONO_PROBE __attribute__((device, always_inline)) inline

#include "kernel/probe/flag.h"

namespace mono::probe::arch {

typedef u32 Quad __attribute__((ext_vector_type(4)));

constexpr int kSystem = 1 | 16;      // sc0 sc1
constexpr u32 kRawBuffer = 0x27000;  // 32-bit elements, no swizzling

MONO_PROBE __amdgpu_buffer_rsrc_t buffer(const Flag* flag) {
  return __builtin_amdgcn_make_buffer_rsrc(const_cast<Flag*>(flag), 0, 16, kRawBuffer);
}
MONO_PROBE u32 load_tag(const Flag* flag, i32) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  Quad quad = __builtin_amdgcn_raw_buffer_load_b128(buffer(flag), 0, 0, kSystem);
  asm volatile("" : "+v"(quad));  // all of it, not only the tag
  return quad.w;
}
MONO_PROBE void store_tag(Flag* flag, u32 tag, i32) {
  const Quad quad = {tag, tag, tag, tag};
  __builtin_amdgcn_raw_buffer_store_b128(quad, buffer(flag), 0, 0, kSystem);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}
MONO_PROBE void pause() { __builtin_amdgcn_s_sleep(1); }
MONO_PROBE i64 nanoseconds() { return i64(__builtin_amdgcn_s_memrealtime()) * 10; }  // ticks of 100 MHz
// The counter is read where this stands: what is before has come to its end, what follows waits for the value.
MONO_PROBE u64 cycles() {
  u64 count = __builtin_readcyclecounter();
  asm volatile("" : "+s"(count));
  return count;
}
// Volatile loads have system scope, so neither the block's nor the die's cache answers; that at the memory's side may.
MONO_PROBE u32 load(const u32* at) {
  using Global = const volatile u32 __attribute__((address_space(1)));
  u32 value = *(Global*)at;
  asm volatile("" : "+v"(value));
  return value;
}
MONO_PROBE i32 fetch_add(i32* at) { return __hip_atomic_fetch_add(at, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT); }
MONO_PROBE u32 die() { return __builtin_amdgcn_s_getreg(20 | 0 << 6 | 3 << 11); }  // HW_REG_XCC_ID, bits 0 to 3

}  // namespace mono::probe::arch

#include "kernel/probe/probe.h"

extern "C" __attribute__((global, amdgpu_flat_work_group_size(64, 64))) void mono_probe(const mono::probe::Probe* probe) {
  if (__builtin_amdgcn_workitem_id_x()) return;
  const mono::probe::Probe own = *probe;  // in registers: nothing is loaded while something is timed
  mono::probe::run(own, int(__builtin_amdgcn_workgroup_id_x()));
}
