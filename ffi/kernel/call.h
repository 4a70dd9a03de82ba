// One call of the resident program: what the host hands to the blocks of a device.
#pragma once

#include "kernel/plan.h"

namespace mono {

enum Mode : i32 { kGenerate, kScore };

// Why a generation ended; jax_mono/decode.py mirrors the names.
enum Finish : i32 { kLength, kStop, kCancelled, kDeadline, kNotFinite };

// The hand-offs in the order in which a token meets them, for error messages and fault injection; jax_mono/native.py
// mirrors the names. Those from kFinalInbox on happen once per token, the others in every layer.
enum Channel : i32 {
  kQkvRows,
  kAttentionParts,
  kAttentionInbox,
  kAttentionResidual,
  kActivations,
  kMlpInbox,
  kMlpResidual,
  kFinalInbox,
  kFinalSum,
  kSummary,
  kLogits,
  kChoice,
  kChannels
};
// Who publishes there for a block: those of its own device, or of all.
enum class Blocks { kOfDevice, kOfAll };
constexpr Blocks writers(Channel channel) {
  return channel == kAttentionInbox || channel == kMlpInbox || channel == kFinalInbox || channel == kSummary || channel == kLogits
             ? Blocks::kOfAll
             : Blocks::kOfDevice;
}

// What to generate, or what to score. Arrays belong to the caller.
struct Request {
  Mode mode;
  i32 position;  // of the first token fed
  i32 budget;    // steps at most
  i32 top_k;     // 0: all
  i32 top_n;     // alternatives to report per token
  float temperature, top_p, min_p, repetition_penalty;
  u32 seed[2];
  const i32* stops;  // tokens that end the generation; negative entries are padding
  i32 num_stops;
  const i32* history;  // tokens that the repetition penalty has seen; negative entries are padding
  i32 num_history;
  const i32* forced;  // the tokens to feed: the prompt's last ones, or all that are scored
  i32 num_forced;     // at least 1
};

// Where a device's blocks write; every device writes the same tokens.
struct Outputs {
  i32* tokens;          // [budget]
  float* logprobs;      // [budget]
  i32* top_ids;         // [budget, top_n]
  float* top_logprobs;  // [budget, top_n]
  float* logits;        // scoring: [budget, max_vocab], this device's rows; or null
  i32* status;          // [2]: steps done, Finish
};

// A conversation with the host while the call runs. The host side lives in ffi/host/session.h.
struct Session {
  i64 deadline;  // nanoseconds on the host's monotonic clock, 0 for none
  i32 cancel;    // set by the host
  i32 capacity;  // of the arrays below
  i32 produced;  // tokens readable; released after the token is written
  i32* tokens;
  float* logprobs;
};

// Where a block stands, ordered by token, then layer, then hand-off. The host reports the earliest of all blocks that were
// waiting when a call failed: what the others waited for follows from it.
struct Place {
  u64 key;

  Place(u32 epoch, i32 layer, Channel channel)
      : key(u64(epoch) << 32 | u64(channel < kFinalInbox ? layer : 0xffff) << 16 | u64(channel) << 4) {}
  explicit Place(u64 k) : key(k) {}
  u32 epoch() const { return u32(key >> 32); }
  i32 layer() const { return i32(key >> 16 & 0xffff); }  // 0xffff: after the last layer
  Channel channel() const { return Channel(key >> 4 & 0xfff); }
  i32 die() const { return i32(key & 0xf) - 1; }  // of the device, on which the block runs; -1: it has but one
  static u64 on_die(u64 key, u32 die) { return key | (die + 1); }
};

// Moments of a token that a trace notes, in their order. Those between kQkvInput and kMlpMixed come once per layer; the time
// up to a moment belongs to what it names. jax_mono/trace.py mirrors the names.
enum Mark : i32 {
  kBegun,
  kQkvInput,        // received and normalised
  kQkvProduct,      // and published
  kHeadsReceived,
  kAttended,        // and published
  kOInput,          // attention of all heads received and joined
  kOProduct,
  kAttentionMixed,  // and published
  kUpInput,
  kUpProduct,       // and published
  kDownInput,
  kDownProduct,
  kMlpMixed,        // and published
  kHeadInput,
  kHeadProduct,
  kSummarised,      // and published
  kChosen,
  kMarks
};
constexpr i32 kLayerMarks = kMlpMixed - kQkvInput + 1, kTokenMarks = kMarks - kLayerMarks;
constexpr i32 marks_per_token(i32 num_layers) { return kTokenMarks + num_layers * kLayerMarks; }

// Where one device's blocks note them: nanoseconds, [blocks, tokens, marks_per_token(num_layers)], for the tokens from `first` on.
struct Trace {
  i64* times = nullptr;  // null: no trace
  i32 first = 0, tokens = 0;
};

// Shared by all blocks of all devices of a call.
struct Control {
  i64 wait_limit;  // nanoseconds that one wait may last
  u64* places;     // [devices, blocks] Place::key where a block waited in vain, 0 for none
  i32 aborted;     // set by the first block whose wait was too long
  i32 missed;      // 1 + the device whose blocks did not all arrive; 0 for none, see roles.h
  // Fault injection for tests: the hand-off of this block that gets lost; device -1 for none.
  i32 lost_device, lost_block, lost_layer, lost_channel;
};

// On CPUs: the product that a block is at, of which blocks that wait may multiply tiles; see serial/offer.h.
struct alignas(64) Offer {
  u64 open;       // which tiles nobody has taken
  i32 returned;   // tiles that others have multiplied
  const void* product;
  void (*multiply)(const void* product, i32 tile);
};

// Everything the blocks of one device work on.
struct Call {
  explicit Call(const Plan& p) : plan(p) {}

  Plan plan;
  i32 device = 0;
  i32 kv_capacity = 0;
  const void* layers = nullptr;  // [blocks, layers, layer_words]
  const void* head = nullptr;    // [blocks, head_words]
  const float* constants = nullptr;
  const void* embed = nullptr;  // [vocab, hidden]
  const float* rope = nullptr;  // [kv_capacity, head_dim / 2, 2] cosines and sines
  void* k_cache = nullptr;      // [layers, max_kv_heads, kv_capacity, head_dim]
  void* v_cache = nullptr;
  void* exchange[kMaxDevices] = {};  // exchange memory of every device; [device] is the own one
  void* scratch = nullptr;           // of this device's blocks, one after the other
  i64 time_left = 0;                 // nanoseconds to the deadline when the call starts, 0 for none
  Control* control = nullptr;
  Offer* offers = nullptr;     // [devices, blocks], or null where blocks do not help each other
  Session* session = nullptr;  // may be null
  Request request = {};
  Outputs outputs = {};
  Trace trace = {};
};

}  // namespace mono
