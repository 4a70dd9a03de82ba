// Threads of a GPU block: sharing out work and agreeing on results. Included by the architecture headers, which supply
// thread(), sync(), kWarp, shuffle() and shuffle_xor().
#pragma once

namespace mono::MONO_VARIANT::arch {

constexpr int kThreads = kStageThreads, kWarps = kThreads / kWarp;
MONO_DEVICE int warp() { return thread() / kWarp; }
MONO_DEVICE int lane() { return thread() % kWarp; }

template <class Body>
MONO_DEVICE void for_each(int count, Body body) {
  MONO_ROLLED
  for (int i = thread(); i < count; i += kThreads) body(i);
}

// A value of any type as registers.
template <class U>
struct Registers {
  static_assert(sizeof(U) % 4 == 0, "whole registers");
  static constexpr int kCount = sizeof(U) / 4;
  u32 values[kCount];
};

// Exchanges a value with the lane whose number differs in the bits of `mask`.
template <class U>
MONO_DEVICE U swapped(const U& value, int mask) {
  auto registers = __builtin_bit_cast(Registers<U>, value);
  for (int i = 0; i < Registers<U>::kCount; ++i) registers.values[i] = shuffle_xor(registers.values[i], mask);
  return __builtin_bit_cast(U, registers);
}

// The value that another lane of the warp has.
template <class U>
MONO_DEVICE U of_lane(const U& value, int from) {
  auto registers = __builtin_bit_cast(Registers<U>, value);
  for (int i = 0; i < Registers<U>::kCount; ++i) registers.values[i] = shuffle(registers.values[i], from);
  return __builtin_bit_cast(U, registers);
}

// Combines the values of so many lanes next to each other. Only what is small is unrolled: the rest runs once per token, and would
// have to come from memory.
template <class U, class Op>
MONO_DEVICE U combined(U value, int lanes, Op op) {
  if constexpr (Registers<U>::kCount <= 2) {
    for (int mask = lanes / 2; mask; mask /= 2) value = op(value, swapped(value, mask));
  } else {
    MONO_ROLLED
    for (int mask = lanes / 2; mask; mask /= 2) value = op(value, swapped(value, mask));
  }
  return value;
}

// Combines the values of all threads; every thread gets the result. op must be symmetric to the last bit. There must be a barrier
// before the next one.
template <class U, class Op>
MONO_DEVICE U reduce_before_sync(U value, Op op) {
  static_assert(Registers<U>::kCount <= kReduceWords, "enlarge the buffer");
  value = combined(value, kWarp, op);
  auto registers = __builtin_bit_cast(Registers<U>, value);
  if (lane() == 0)
    for (int i = 0; i < Registers<U>::kCount; ++i) reduce_buffer()[warp() * kReduceWords + i] = registers.values[i];
  sync();
  for (int i = 0; i < Registers<U>::kCount; ++i) registers.values[i] = reduce_buffer()[lane() % kWarps * kReduceWords + i];
  return combined(__builtin_bit_cast(U, registers), kWarps, op);
}
template <class U, class Op>
MONO_DEVICE U all_reduce(U value, Op op) {
  value = reduce_before_sync(value, op);
  sync();
  return value;
}

// Of a vector in near memory.
MONO_DEVICE float sum_of_squares(const float* x, int size) {
  float sum = 0.0f;
  for_each(size, [&](int i) { sum += x[i] * x[i]; });
  return all_reduce(sum, [](float a, float b) { return a + b; });
}

}  // namespace mono::MONO_VARIANT::arch
