// The C interface that jax_mono/native.py loads: records, memory bandwidth, and what this processor
// can do. Sessions are in session.cc, GPUs in api_gpu.cc.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <thread>
#include <vector>

#include "host/variant.h"

namespace mono {
namespace {

struct Field {
  const char* name;
  i64 offset;
};

#define MONO_FIELD(Record, field) {#Record "." #field, offsetof(Record, field)}
#define MONO_SIZE(Record) {#Record, sizeof(Record)}
const Field kFields[] = {
    MONO_SIZE(Header),
    MONO_SIZE(Layer),
    MONO_SIZE(Stage),
    MONO_SIZE(Channels),
    MONO_SIZE(Constants),
    MONO_SIZE(Device),
    MONO_SIZE(Block),
    MONO_SIZE(Span),
    MONO_FIELD(Header, layer_words),
    MONO_FIELD(Header, head_words),
    MONO_FIELD(Header, magic),
    MONO_FIELD(Header, size),
    MONO_FIELD(Header, num_devices),
    MONO_FIELD(Header, num_blocks),
    MONO_FIELD(Header, num_layers),
    MONO_FIELD(Header, num_lanes),
    MONO_FIELD(Header, hidden_size),
    MONO_FIELD(Header, vocab_size),
    MONO_FIELD(Header, head_dim),
    MONO_FIELD(Header, queries_per_kv),
    MONO_FIELD(Header, kv_splits),
    MONO_FIELD(Header, kv_chunk),
    MONO_FIELD(Header, max_kv_heads),
    MONO_FIELD(Header, max_vocab),
    MONO_FIELD(Header, tile_rows),
    MONO_FIELD(Header, tile_cols),
    MONO_FIELD(Header, rope_interleaved),
    MONO_FIELD(Header, qkv_bias),
    MONO_FIELD(Header, qk_norm),
    MONO_FIELD(Header, head_kind),
    MONO_FIELD(Header, norm_eps),
    MONO_FIELD(Header, hidden_width),
    MONO_FIELD(Header, floats_per_word),
    MONO_FIELD(Header, weights_per_word),
    MONO_FIELD(Header, hidden_run),
    MONO_FIELD(Header, activation_run),
    MONO_FIELD(Header, logits_run),
    MONO_FIELD(Header, history_layers),
    MONO_FIELD(Header, num_dies),
    MONO_FIELD(Header, tape_rows),
    MONO_FIELD(Header, granule_words),
    MONO_FIELD(Header, period),
    MONO_FIELD(Header, roles),
    MONO_FIELD(Header, copy_words),
    MONO_FIELD(Header, region_periods),
    MONO_FIELD(Header, compressed),
    MONO_FIELD(Header, flat_activations),
    MONO_FIELD(Header, layers_swizzle),
    MONO_FIELD(Header, head_swizzle),
    MONO_FIELD(Layer, window),
    MONO_FIELD(Layer, source),
    MONO_FIELD(Layer, pushed),
    MONO_FIELD(Layer, own_scale),
    MONO_FIELD(Stage, tile_words),
    MONO_FIELD(Stage, rows),
    MONO_FIELD(Stage, width),
    MONO_FIELD(Stage, lanes),
    MONO_FIELD(Stage, tiles_per_lane),
    MONO_FIELD(Channels, words),
    MONO_FIELD(Channels, layer_stride),
    MONO_FIELD(Channels, qkv),
    MONO_FIELD(Channels, attention),
    MONO_FIELD(Channels, activation),
    MONO_FIELD(Channels, residual),
    MONO_FIELD(Channels, inbox),
    MONO_FIELD(Channels, final_inbox),
    MONO_FIELD(Channels, final_sum),
    MONO_FIELD(Channels, summary),
    MONO_FIELD(Channels, logits),
    MONO_FIELD(Channels, choice),
    MONO_FIELD(Channels, arrivals),
    MONO_FIELD(Constants, attention_norm),
    MONO_FIELD(Constants, ffn_norm),
    MONO_FIELD(Constants, final_norm),
    MONO_FIELD(Constants, qkv_bias),
    MONO_FIELD(Constants, q_norm),
    MONO_FIELD(Constants, k_norm),
    MONO_FIELD(Constants, floats),
    MONO_FIELD(Device, stages),
    MONO_FIELD(Device, channels),
    MONO_FIELD(Device, constants),
    MONO_FIELD(Device, lanes),
    MONO_FIELD(Device, kv_heads),
    MONO_FIELD(Device, neurons),
    MONO_FIELD(Device, vocab),
    MONO_FIELD(Block, layers),
    MONO_FIELD(Block, head),
    MONO_FIELD(Block, offsets),
    MONO_FIELD(Block, shares),
    MONO_FIELD(Block, hidden),
    MONO_FIELD(Block, attention),
};

}  // namespace

}  // namespace mono

#define MONO_EXPORT extern "C" __attribute__((visibility("default")))

using mono::i32;
using mono::i64;

// Sizes ("Header") and field offsets ("Header.magic") of the plan's records; null past the end.
MONO_EXPORT const char* mono_record_field(i32 index, i64* value) {
  if (index < 0 || size_t(index) >= sizeof(mono::kFields) / sizeof(mono::kFields[0])) return nullptr;
  *value = mono::kFields[index].offset;
  return mono::kFields[index].name;
}

// Writes the name of the CPU variant in use, or why there is none; returns whether there is one.
MONO_EXPORT i32 mono_cpu_variant(char* out, i32 room) {
  try {
    snprintf(out, room, "%s", mono::cpu_variant().name);
    return 1;
  } catch (const std::exception& error) {
    snprintf(out, room, "%s", error.what());
    return 0;
  }
}

// Bytes per second with which `threads` threads read a buffer once, each its own part as `streams` streams.
MONO_EXPORT double mono_read_bandwidth(const void* data, i64 bytes, i32 threads, i32 streams) {
  const mono::Variant& variant = mono::cpu_variant();
  const i64 part = bytes / threads / 64 * 64;
  std::atomic<mono::u64> sum{0};
  auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (i32 i = 0; i < threads; ++i)
    workers.emplace_back([&, i] {
      sum += variant.read_memory(static_cast<const char*>(data) + i * part, part, streams);
    });
  for (std::thread& worker : workers) worker.join();
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  volatile mono::u64 keep = sum;  // the reads must not be optimised away
  (void)keep;
  return double(part) * threads / seconds.count();
}
