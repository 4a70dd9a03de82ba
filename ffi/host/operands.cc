#include "host/operands.h"

#include <initializer_list>
#include <stdexcept>

#include "kernel/simt/tuning.h"

namespace mono {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string shape(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  auto dims = buffer.dimensions();
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Compares a shape with what the plan asks for; -1 matches anything.
void expect(const char* name, const ffi::AnyBuffer& buffer, std::initializer_list<i64> expected) {
  auto dims = buffer.dimensions();
  bool same = dims.size() == expected.size();
  size_t at = 0;
  std::string wanted = "[";
  for (i64 value : expected) {
    if (same && value >= 0 && dims[at] != value) same = false;
    wanted += (at++ ? ", " : "") + (value < 0 ? std::string("any") : std::to_string(value));
  }
  if (!same) refuse(std::string(name) + " has shape " + shape(buffer) + ", the plan needs " + wanted + "]");
}

void expect_type(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type) {
  if (buffer.element_type() != type)
    refuse(std::string(name) + (type == ffi::S32 ? " must be int32" : " must be float32"));
}

ffi::AnyBuffer operand(const ffi::RemainingArgs& arguments, size_t index) {
  auto found = arguments.get<ffi::AnyBuffer>(index);
  if (!found.has_value()) refuse("operand " + std::to_string(index) + " is missing; rebuild libjax_mono");
  return found.value();
}

ffi::AnyBuffer result(const ffi::RemainingRets& results, size_t index) {
  auto found = results.get<ffi::AnyBuffer>(index);
  if (!found.has_value()) refuse("result " + std::to_string(index) + " is missing; rebuild libjax_mono");
  return *found.value();
}

// 16-bit weights come as their bit patterns.
ffi::DataType stored_type(WeightType type) { return type == WeightType::kFloat32 ? ffi::F32 : ffi::U16; }

}  // namespace

HandoffFault Attributes::lost() const {
  HandoffFault lost;
  if (fault.size() == 4) lost = {fault[0], fault[1], fault[2], fault[3]};
  return lost;
}

// In the order of jax_mono/call.py. The KV caches are operands too (5 and 6), but XLA gives their results the same memory.
Operands::Operands(const Attributes& attributes, ffi::RemainingArgs arguments, ffi::RemainingRets results)
    : attributes_(attributes),
      layers_(operand(arguments, 0)),
      head_(operand(arguments, 1)),
      constants_(operand(arguments, 2)),
      embed_(operand(arguments, 3)),
      rope_(operand(arguments, 4)),
      ints_(operand(arguments, 7)),
      floats_(operand(arguments, 8)),
      stops_(operand(arguments, 9)),
      history_(operand(arguments, 10)),
      forced_(operand(arguments, 11)),
      device_index_(operand(arguments, 12)),
      tokens_(result(results, 0)),
      logprobs_(result(results, 1)),
      top_ids_(result(results, 2)),
      top_logprobs_(result(results, 3)),
      status_(result(results, 4)),
      logits_(result(results, 5)),
      k_cache_(result(results, 6)),
      v_cache_(result(results, 7)) {
  check_plan();
  check_types();
  check_shapes();
}

// The record must be whole before anything in it is believed.
void Operands::check_plan() const {
  const size_t bytes = attributes_.plan.size() * 8;
  if (bytes < sizeof(Header)) refuse("the plan record is truncated");
  const Header& h = *plan().header;
  if (h.magic != kPlanMagic || h.size != Plan::size(h) || size_t(h.size) != bytes)
    refuse("the plan record does not fit this library; rebuild libjax_mono");
  if (!h.compressed) return;
  if (weights() != WeightType::kBfloat16) refuse("compressed tapes hold bfloat16 weights only; make the plan without");
  for (i32 device = 0; device < h.num_devices; ++device)
    for (const Stage& stage : plan().devices[device].stages)
      if (h.tile_cols != 32 || stage.width / h.tile_cols % kGroupChunks)
        refuse("compressed tapes have " + std::to_string(kGroupChunks) + " chunks of 32 columns together, not " +
               std::to_string(stage.width) + " columns");
}

void Operands::check_types() const {
  if (weights() != WeightType::kFloat32 && weights() != WeightType::kBfloat16 && weights() != WeightType::kFloat16)
    refuse("weights must be float32, bfloat16 or float16");
  for (const ffi::AnyBuffer& buffer : {layers_, head_, embed_, k_cache_, v_cache_})
    if (buffer.element_type() != stored_type(weights()))
      refuse("tapes, embedding and KV cache must all be stored as jax_mono.tape.STORAGE says for the weight dtype");
  for (const ffi::AnyBuffer& buffer : {ints_, stops_, history_, forced_, device_index_})
    expect_type("the integer operands", buffer, ffi::S32);
  for (const ffi::AnyBuffer& buffer : {constants_, rope_, floats_}) expect_type("constants, rope and floats", buffer, ffi::F32);
  for (const ffi::AnyBuffer& buffer : {tokens_, top_ids_, status_}) expect_type("the integer results", buffer, ffi::S32);
  for (const ffi::AnyBuffer& buffer : {logprobs_, top_logprobs_, logits_}) expect_type("the float results", buffer, ffi::F32);
}

void Operands::check_shapes() {
  const Plan plan = this->plan();
  const Header& h = *plan.header;
  const i32 mode = attributes_.mode;
  if (mode != kGenerate && mode != kScore && mode != kStreamBenchmark) refuse("there is no mode " + std::to_string(mode));
  if (layers_.dimensions().size() != 4 || rope_.dimensions().size() != 3 || tokens_.dimensions().size() != 2)
    refuse("wrong rank of layers, rope or tokens");
  const i64 local = layers_.dimensions()[0], capacity = rope_.dimensions()[0], room = tokens_.dimensions()[1];
  const i64 top_n = top_ids_.dimensions().size() == 3 ? top_ids_.dimensions()[2] : -1;
  const bool wants_logits = mode == kScore && logits_.element_count() > 0;
  expect("layers", layers_, {local, h.tape_rows, h.num_layers, h.layer_words});
  expect("head", head_, {local, h.tape_rows, h.head_words});
  expect("constants", constants_, {local, plan.devices[0].constants.floats});
  expect("embed", embed_, {h.vocab_size, h.hidden_size});
  expect("rope", rope_, {capacity, h.head_dim / 2, 2});
  expect("k_cache", k_cache_, {local, h.num_layers, h.max_kv_heads, capacity, h.head_dim});
  expect("v_cache", v_cache_, {local, h.num_layers, h.max_kv_heads, capacity, h.head_dim});
  expect("ints", ints_, {kIntWords});
  expect("floats", floats_, {kFloatWords});
  expect("stops", stops_, {-1});
  expect("history", history_, {-1});
  expect("forced", forced_, {mode == kScore ? room : -1});
  expect("device_index", device_index_, {1});
  expect("logprobs", logprobs_, {local, room});
  expect("top_ids", top_ids_, {local, room, top_n});
  expect("top_logprobs", top_logprobs_, {local, room, top_n});
  expect("logits", logits_, {local, wants_logits ? room : 0, h.max_vocab});
  expect("status", status_, {local, 2});
  if (local < 1 || h.num_devices % local)
    refuse("operands of " + std::to_string(local) + " devices for a plan of " + std::to_string(h.num_devices));
  if (top_n < 0 || top_n > h.vocab_size) refuse("top_n is outside the vocabulary");
  local_ = i32(local);
  capacity_ = capacity;
  room_ = room;
  top_n_ = top_n;
  wants_logits_ = wants_logits;
}

void Operands::check(const SmallOperands& values) const {
  const i64 position = values.ints[kPosition], budget = values.ints[kBudget];
  if (budget < 1 || budget > room_)
    refuse("a budget of " + std::to_string(budget) + " tokens for room for " + std::to_string(room_));
  const i64 num_forced = values.ints[kNumForced], forced_room = i64(forced_.element_count());
  if (num_forced < 1 || num_forced > forced_room)
    refuse(std::to_string(num_forced) + " tokens to feed, must be between 1 and " + std::to_string(forced_room));
  if (attributes_.mode == kScore && num_forced != budget)
    refuse(std::to_string(num_forced) + " tokens to feed for a budget of " + std::to_string(budget) + "; scoring feeds as many");
  // The token sampled after the last one fed is not fed itself.
  const i64 steps = attributes_.mode == kScore ? budget : num_forced + budget - 1;
  if (position < 0 || position + steps > capacity_)
    refuse("position " + std::to_string(position) + " + " + std::to_string(steps) + " tokens is beyond the KV cache's " +
           std::to_string(capacity_) + " positions");
  check_tokens(values.history, values.forced, values.ints[kNumForced]);
  const float* reals = values.floats;
  if (!(reals[kTemperature] >= 0.0f) || !(reals[kTopP] > 0.0f && reals[kTopP] <= 1.0f) ||
      !(reals[kMinP] >= 0.0f && reals[kMinP] <= 1.0f) || !(reals[kRepetitionPenalty] > 0.0f) || values.ints[kTopK] < 0)
    refuse("temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0 and top_k >= 0 are needed");
  const i32 devices = plan().header->num_devices, index = *values.device_index;
  if (index < 0 || index % local_ || index + local_ > devices) refuse("device index out of range");
}

void Operands::check_tokens(const i32* history, const i32* forced, i32 num_forced) const {
  const i32 vocab = plan().header->vocab_size;
  auto check = [vocab](i32 token) {
    if (token < 0 || token >= vocab)
      refuse("token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocab));
  };
  // Padding comes after the last token; a negative entry before it is a token that nobody can have meant.
  size_t length = history_.element_count();
  while (length > 0 && history[length - 1] < 0) --length;
  for (size_t i = 0; i < length; ++i) check(history[i]);
  for (i32 i = 0; i < num_forced; ++i) check(forced[i]);
}

Request Operands::request(const SmallOperands& values) const {
  const i32* words = values.ints;
  Request request{};
  request.mode = attributes_.mode == kScore ? kScore : kGenerate;
  request.position = words[kPosition];
  request.budget = words[kBudget];
  request.top_k = words[kTopK];
  request.top_n = i32(top_n_);
  request.seed[0] = u32(words[kSeed0]);
  request.seed[1] = u32(words[kSeed1]);
  request.temperature = values.floats[kTemperature];
  request.top_p = values.floats[kTopP];
  request.min_p = values.floats[kMinP];
  request.repetition_penalty = values.floats[kRepetitionPenalty];
  request.stops = static_cast<const i32*>(stops_.untyped_data());
  request.num_stops = i32(stops_.element_count());
  request.history = static_cast<const i32*>(history_.untyped_data());
  request.num_history = i32(history_.element_count());
  request.forced = static_cast<const i32*>(forced_.untyped_data());
  request.num_forced = words[kNumForced];
  return request;
}

std::vector<Call> Operands::calls(const SmallOperands& values) const {
  const Request request = this->request(values);
  std::vector<Call> calls;
  for (i32 d = 0; d < local_; ++d) {
    auto at = [&](const ffi::AnyBuffer& buffer) {
      return static_cast<char*>(buffer.untyped_data()) + buffer.size_bytes() / local_ * d;
    };
    Call call(plan());
    call.device = *values.device_index + d;
    call.kv_capacity = i32(capacity_);
    call.layers = at(layers_);
    call.head = at(head_);
    call.constants = reinterpret_cast<const float*>(at(constants_));
    call.embed = embed_.untyped_data();
    call.rope = static_cast<const float*>(rope_.untyped_data());
    call.k_cache = at(k_cache_);
    call.v_cache = at(v_cache_);
    call.request = request;
    call.outputs = {reinterpret_cast<i32*>(at(tokens_)),       reinterpret_cast<float*>(at(logprobs_)),
                    reinterpret_cast<i32*>(at(top_ids_)),      reinterpret_cast<float*>(at(top_logprobs_)),
                    wants_logits_ ? reinterpret_cast<float*>(at(logits_)) : nullptr,
                    reinterpret_cast<i32*>(at(status_))};
    calls.push_back(call);
  }
  return calls;
}

ffi::Error as_error(const Failure& failure) {
  const std::string text = "jax_mono: " + failure.text;
  switch (failure.kind) {
    case FailureKind::kNone:
      return ffi::Error::Success();
    case FailureKind::kRefused:
      return ffi::Error::InvalidArgument(text);
    case FailureKind::kLate:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, text);
    case FailureKind::kLost:
      return ffi::Error(ffi::ErrorCode::kAborted, text);
    case FailureKind::kMemory:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, text);
    case FailureKind::kNumbers:
      return ffi::Error(ffi::ErrorCode::kDataLoss, text);
    case FailureKind::kBroken:
      break;
  }
  return ffi::Error::Internal(text);
}

Failure not_finite(const i32* status) {
  if (status[1] != kNotFinite) return {};
  return {FailureKind::kNumbers, "the logits of token " + std::to_string(status[0] - 1) +
                                     " are not finite; check the checkpoint, or use a wider dtype"};
}

}  // namespace mono
