// The XLA custom call for CPU: checks its operands, then runs the resident program.
//
// One handler serves both forms. With as many devices' operands as the plan has devices it runs them all (lane threads,
// the default); with one device's operands it meets the handlers of the others (inside jax.shard_map).
#include <cerrno>
#include <exception>
#include <string>

#include "host/gang.h"
#include "host/session.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mono {
namespace {

template <ffi::DataType type>
using Buffer = ffi::Buffer<type>;
using Ints = Buffer<ffi::S32>;
using Floats = Buffer<ffi::F32>;

ffi::Error refuse(const std::string& what) { return ffi::Error::InvalidArgument("jax_mono: " + what); }

std::string shape(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Compares a shape with what the plan asks for; -1 matches anything. Returns what is wrong, or nothing.
template <class B>
std::string mismatch(const char* name, const B& buffer, std::initializer_list<i64> expected) {
  auto dims = buffer.dimensions();
  bool same = dims.size() == expected.size();
  size_t at = 0;
  std::string wanted = "[";
  for (i64 value : expected) {
    if (same && value >= 0 && dims[at] != value) same = false;
    wanted += (at++ ? ", " : "") + (value < 0 ? std::string("any") : std::to_string(value));
  }
  if (same) return {};
  return std::string(name) + " has shape " + shape(dims) + ", the plan needs " + wanted + "]";
}

// Order of the integer and float request words; jax_mono/call.py mirrors it.
enum IntWord { kPosition, kFirstToken, kBudget, kTopK, kSession, kSeed0, kSeed1, kIntWords };
enum FloatWord { kTemperature, kTopP, kMinP, kRepetitionPenalty, kFloatWords };

bool in_vocabulary(const Ints& tokens, i32 vocab, bool padding, i32& bad) {
  for (size_t i = 0; i < tokens.element_count(); ++i) {
    i32 token = tokens.typed_data()[i];
    if (token >= vocab || (token < 0 && !padding)) {
      bad = token;
      return false;
    }
  }
  return true;
}

ffi::Error decode(ffi::RunId run_id, ffi::AnyBuffer layers, ffi::AnyBuffer head, Floats constants, ffi::AnyBuffer embed,
                  Floats rope, ffi::AnyBuffer, ffi::AnyBuffer, Ints ints, Floats floats, Ints stops, Ints history,
                  Ints forced, Ints device_index, ffi::Result<Ints> tokens, ffi::Result<Floats> logprobs,
                  ffi::Result<Ints> top_ids, ffi::Result<Floats> top_logprobs, ffi::Result<Ints> status,
                  ffi::Result<Floats> logits, ffi::Result<ffi::AnyBuffer> k_cache, ffi::Result<ffi::AnyBuffer> v_cache,
                  ffi::Span<const int64_t> plan_words, int32_t mode, int32_t weights, int32_t wait_limit_ms, int32_t meeting_limit_ms,
                  ffi::Span<const int32_t> fault_words) {
  // The record must be whole before anything in it is believed.
  if (plan_words.size() * 8 < sizeof(Header)) return refuse("the plan record is truncated");
  const Plan plan(plan_words.begin());
  const Header& h = *plan.header;
  if (h.magic != kPlanMagic || h.size != Plan::size(h) || size_t(h.size) != plan_words.size() * 8)
    return refuse("the plan record does not fit this library; rebuild libjax_mono");

  // Order of jax_mono.tape.STORAGE. bfloat16 comes as its bit patterns.
  const auto weight_type = WeightType(weights);
  if (weight_type != WeightType::kFloat32 && weight_type != WeightType::kBfloat16)
    return refuse("weights must be float32 or bfloat16");
  const ffi::DataType stored = weight_type == WeightType::kFloat32 ? ffi::F32 : ffi::U16;
  for (ffi::DataType type : {layers.element_type(), head.element_type(), embed.element_type(), k_cache->element_type(),
                             v_cache->element_type()})
    if (type != stored)
      return refuse("tapes, embedding and KV cache must all be stored as jax_mono.tape.STORAGE says for the weight dtype");

  if (layers.dimensions().size() != 4 || rope.dimensions().size() != 3 || tokens->dimensions().size() != 2)
    return refuse("wrong rank of layers, rope or tokens");
  const i64 local = layers.dimensions()[0], capacity = rope.dimensions()[0], room = tokens->dimensions()[1];
  const i64 top_n = top_ids->dimensions().size() == 3 ? top_ids->dimensions()[2] : -1;
  const i64 scored = mode == kScore ? room : 0;
  const bool wants_logits = mode == kScore && logits->element_count() > 0;
  for (const std::string& wrong :
       {mismatch("layers", layers, {local, h.num_blocks, h.num_layers, h.layer_words}),
        mismatch("head", head, {local, h.num_blocks, h.head_words}),
        mismatch("constants", constants, {local, plan.devices[0].constants.floats}),
        mismatch("embed", embed, {h.vocab_size, h.hidden_size}),
        mismatch("rope", rope, {capacity, h.head_dim / 2, 2}),
        mismatch("k_cache", *k_cache, {local, h.num_layers, h.max_kv_heads, capacity, h.head_dim}),
        mismatch("v_cache", *v_cache, {local, h.num_layers, h.max_kv_heads, capacity, h.head_dim}),
        mismatch("ints", ints, {kIntWords}), mismatch("floats", floats, {kFloatWords}), mismatch("stops", stops, {-1}),
        mismatch("history", history, {-1}), mismatch("forced", forced, {scored}),
        mismatch("logprobs", *logprobs, {local, room}), mismatch("top_ids", *top_ids, {local, room, top_n}),
        mismatch("top_logprobs", *top_logprobs, {local, room, top_n}),
        mismatch("logits", *logits, {local, wants_logits ? room : 0, h.max_vocab}), mismatch("status", *status, {local, 2})})
    if (!wrong.empty()) return refuse(wrong);
  if (local != h.num_devices && local != 1)
    return refuse("operands of " + std::to_string(local) + " devices for a plan of " + std::to_string(h.num_devices));

  const i32* words = ints.typed_data();
  const float* reals = floats.typed_data();
  Request request{};
  request.mode = Mode(mode);
  request.position = words[kPosition];
  request.first_token = words[kFirstToken];
  request.budget = words[kBudget];
  request.top_k = words[kTopK];
  request.top_n = i32(top_n);
  request.seed[0] = u32(words[kSeed0]);
  request.seed[1] = u32(words[kSeed1]);
  request.temperature = reals[kTemperature];
  request.top_p = reals[kTopP];
  request.min_p = reals[kMinP];
  request.repetition_penalty = reals[kRepetitionPenalty];
  request.stops = stops.typed_data();
  request.num_stops = i32(stops.element_count());
  request.history = history.typed_data();
  request.num_history = i32(history.element_count());
  request.forced = forced.typed_data();
  if (request.budget < 1 || request.budget > room)
    return refuse("a budget of " + std::to_string(request.budget) + " tokens for room for " + std::to_string(room));
  if (request.position < 0 || i64(request.position) + request.budget > capacity)
    return refuse("position " + std::to_string(request.position) + " + budget " + std::to_string(request.budget) +
                  " is beyond the KV cache's " + std::to_string(capacity) + " positions");
  i32 bad = request.first_token;
  if ((mode != kScore && (bad < 0 || bad >= h.vocab_size)) || !in_vocabulary(history, h.vocab_size, true, bad) ||
      !in_vocabulary(forced, h.vocab_size, false, bad))
    return refuse("token " + std::to_string(bad) + " is outside the vocabulary of " + std::to_string(h.vocab_size));
  if (!(request.temperature >= 0.0f) || !(request.top_p > 0.0f && request.top_p <= 1.0f) ||
      !(request.min_p >= 0.0f && request.min_p <= 1.0f) || !(request.repetition_penalty > 0.0f) || request.top_k < 0)
    return refuse("temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0 and top_k >= 0 are needed");
  if (top_n < 0 || top_n > h.vocab_size) return refuse("top_n is outside the vocabulary");

  std::shared_ptr<HostSession> session;
  if (words[kSession] > 0) {
    session = find_session(words[kSession]);
    if (!session) return refuse("session " + std::to_string(words[kSession]) + " is closed");
  }

  const i32 index = device_index.typed_data()[0];
  if (local == 1 && (index < 0 || index >= h.num_devices)) return refuse("device index out of range");
  std::vector<Call> calls;
  for (i32 d = 0; d < local; ++d) {
    auto at = [d, local](auto& buffer) { return static_cast<char*>(buffer.untyped_data()) + buffer.size_bytes() / local * d; };
    Call call(plan);
    call.device = local == 1 ? index : d;
    call.kv_capacity = i32(capacity);
    call.layers = at(layers);
    call.head = at(head);
    call.constants = reinterpret_cast<const float*>(at(constants));
    call.embed = embed.untyped_data();
    call.rope = rope.typed_data();
    call.k_cache = at(*k_cache);
    call.v_cache = at(*v_cache);
    call.session = session ? session->shared() : nullptr;
    call.request = request;
    call.outputs = {reinterpret_cast<i32*>(at(*tokens)),       reinterpret_cast<float*>(at(*logprobs)),
                    reinterpret_cast<i32*>(at(*top_ids)),      reinterpret_cast<float*>(at(*top_logprobs)),
                    wants_logits ? reinterpret_cast<float*>(at(*logits)) : nullptr,
                    reinterpret_cast<i32*>(at(*status))};
    calls.push_back(call);
  }

  HandoffFault fault;
  if (fault_words.size() == 4) fault = {fault_words[0], fault_words[1], fault_words[2], fault_words[3]};
  try {
    const Variant& variant = cpu_variant();
    auto gang = std::make_shared<Gang>(plan, i64(wait_limit_ms) * 1000000, fault);
    if (local != h.num_devices) {
      std::string error;
      gang = rendezvous().join(run_id.run_id, plan, index, i64(meeting_limit_ms) * 1000000, gang, error);
      if (!gang) return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_mono: " + error);
    }
    gang->run(variant, weight_type, calls);
    std::string error = gang->error();
    if (!error.empty()) return ffi::Error(ffi::ErrorCode::kAborted, "jax_mono: " + error);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_mono: out of memory for exchange and scratch buffers");
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
  const i32* done = calls.front().outputs.status;
  if (done[1] == kNotFinite)
    return ffi::Error(ffi::ErrorCode::kDataLoss,
                      "jax_mono: the logits of token " + std::to_string(done[0] - 1) +
                          " are not finite; check the checkpoint, or use a wider dtype");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mono

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mono_decode_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(mono_decode_cpu, mono::decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::RunId>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<mono::Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<mono::Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<mono::Ints>()
                                  .Arg<mono::Floats>()
                                  .Arg<mono::Ints>()
                                  .Arg<mono::Ints>()
                                  .Arg<mono::Ints>()
                                  .Arg<mono::Ints>()
                                  .Ret<mono::Ints>()
                                  .Ret<mono::Floats>()
                                  .Ret<mono::Ints>()
                                  .Ret<mono::Floats>()
                                  .Ret<mono::Ints>()
                                  .Ret<mono::Floats>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("plan")
                                  .Attr<int32_t>("mode")
                                  .Attr<int32_t>("weights")
                                  .Attr<int32_t>("wait_limit_ms")
                                  .Attr<int32_t>("meeting_limit_ms")
                                  .Attr<ffi::Span<const int32_t>>("fault"));
