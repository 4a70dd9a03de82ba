// Runs the resident program on operands from a file, without XLA and Python, so that a sanitizer sees every access.
//
//   sanitize_driver FILE
//
// scripts/sanitize.py builds it, writes the file with the outcome it expects, and reads the verdict: one line, and exit
// status 0 if the outcome is the expected one.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "host/gang.h"
#include "host/session.h"

// Of ffi/host/session.cc.
extern "C" {
mono::i32 mono_session_open(mono::i32 capacity, double seconds, mono::i32 platform, char* error, mono::i32 room);
mono::i32 mono_session_read(mono::i32 id, mono::i32 known, mono::i32 room, mono::i32 milliseconds, mono::i32* tokens,
                            float* logprobs);
void mono_session_cancel(mono::i32 id);
void mono_session_close(mono::i32 id);
}

namespace {

using namespace mono;

// A file of named arrays: per array the lengths of its name and of its data (int64), then both.
class Operands {
 public:
  explicit Operands(const char* path) {
    std::ifstream file(path, std::ios::binary);
    i64 lengths[2];
    while (file.read(reinterpret_cast<char*>(lengths), sizeof lengths)) {
      std::string name(lengths[0], '\0');
      file.read(name.data(), lengths[0]);
      // Words of eight bytes, for alignment; as many as the data needs, so that reading on is an error.
      std::vector<u64> data((lengths[1] + 7) / 8);
      if (!file.read(reinterpret_cast<char*>(data.data()), lengths[1])) throw std::runtime_error("the file is truncated");
      arrays_[name] = {std::move(data), lengths[1]};
    }
    if (arrays_.empty()) throw std::runtime_error("the file is missing or empty");
  }

  template <class T>
  T* data(const std::string& name) {
    return reinterpret_cast<T*>(arrays_.at(name).first.data());
  }
  template <class T>
  i64 count(const std::string& name) const {
    return arrays_.at(name).second / i64(sizeof(T));
  }
  i32 integer(const std::string& name) { return *data<i32>(name); }
  float real(const std::string& name) { return *data<float>(name); }

 private:
  std::map<std::string, std::pair<std::vector<u64>, i64>> arrays_;
};

// What one device works on. Every array is an allocation of its own, so that an address sanitizer knows its end.
struct DeviceMemory {
  std::vector<char> layers, head, constants, k_cache, v_cache;
  std::vector<i32> tokens, top_ids;
  std::vector<float> logprobs, top_logprobs, logits;
  i32 status[2] = {-1, -1};

  DeviceMemory(Operands& file, const Plan& plan, i32 device)
      : layers(part(file, plan, "layers", device)),
        head(part(file, plan, "head", device)),
        constants(part(file, plan, "constants", device)) {
    const Header& h = *plan.header;
    const i64 room = file.integer("budget"), top_n = file.integer("top_n"), capacity = file.integer("capacity");
    const i64 weight_bytes = file.integer("weights") == i32(WeightType::kFloat32) ? 4 : 2;
    k_cache.resize(h.num_layers * h.max_kv_heads * capacity * h.head_dim * weight_bytes);
    v_cache.resize(k_cache.size());
    tokens.resize(room);
    logprobs.resize(room);
    top_ids.resize(room * top_n);
    top_logprobs.resize(room * top_n);
    if (file.integer("want_logits")) logits.resize(room * h.max_vocab);
  }

 private:
  static std::vector<char> part(Operands& file, const Plan& plan, const char* name, i32 device) {
    const i64 bytes = file.count<char>(name) / plan.header->num_devices;
    const char* from = file.data<char>(name) + bytes * device;
    return std::vector<char>(from, from + bytes);
  }
};

Request make_request(Operands& file) {
  Request r{};
  r.mode = Mode(file.integer("mode"));
  r.position = file.integer("position");
  r.budget = file.integer("budget");
  r.top_k = file.integer("top_k");
  r.top_n = file.integer("top_n");
  r.temperature = file.real("temperature");
  r.top_p = file.real("top_p");
  r.min_p = file.real("min_p");
  r.repetition_penalty = file.real("repetition_penalty");
  r.seed[0] = file.data<u32>("seed")[0];
  r.seed[1] = file.data<u32>("seed")[1];
  r.stops = file.data<i32>("stops");
  r.num_stops = i32(file.count<i32>("stops"));
  r.history = file.data<i32>("history");
  r.num_history = i32(file.count<i32>("history"));
  r.forced = file.data<i32>("forced");
  r.num_forced = file.integer("num_forced");
  return r;
}

Call make_call(Operands& file, const Plan& plan, i32 device, DeviceMemory& memory, Session* session) {
  Call call(plan);
  call.device = device;
  call.kv_capacity = file.integer("capacity");
  call.layers = memory.layers.data();
  call.head = memory.head.data();
  call.constants = reinterpret_cast<const float*>(memory.constants.data());
  call.embed = file.data<char>("embed");
  call.rope = file.data<float>("rope");
  call.k_cache = memory.k_cache.data();
  call.v_cache = memory.v_cache.data();
  call.session = session;
  call.request = make_request(file);
  call.outputs = {memory.tokens.data(),       memory.logprobs.data(),
                  memory.top_ids.data(),      memory.top_logprobs.data(),
                  memory.logits.empty() ? nullptr : memory.logits.data(), memory.status};
  return call;
}

// The host's end of a streamed call: takes tokens as they appear and cancels after some of them.
void follow(i32 session, i32 cancel_after, i32 room, const bool* done, std::vector<i32>& seen) {
  std::vector<i32> tokens(room);
  std::vector<float> logprobs(room);
  for (bool last = false; !last;) {
    last = __atomic_load_n(done, __ATOMIC_ACQUIRE);  // before the look, so that nothing is missed
    const i32 known = i32(seen.size());
    const i32 end = mono_session_read(session, known, room - known, last ? 0 : 20, tokens.data(), logprobs.data());
    for (i32 i = known; i < end; ++i) seen.push_back(tokens[i - known]);
    if (cancel_after >= 0 && i32(seen.size()) >= cancel_after) mono_session_cancel(session);
  }
}

// Runs all devices: as lane threads in one gang, or each from a thread of its own as XLA does under shard_map. Returns the
// error that each device reports.
std::vector<std::string> run(const Plan& plan, std::vector<Call> calls, bool meet, i64 limit, const HandoffFault& fault,
                             WeightType type) {
  std::vector<std::string> errors(calls.size());
  if (!meet) {
    Gang gang(plan, limit, fault);
    gang.run(portable_variant(), type, calls);
    errors.assign(calls.size(), gang.error());
    return errors;
  }
  std::vector<std::thread> threads;
  for (size_t device = 0; device < calls.size(); ++device)
    threads.emplace_back([&, device] {
      auto gang = std::make_shared<Gang>(plan, limit, fault);
      gang = rendezvous().join(1, plan.header->num_devices, i32(device), 1, limit, gang, errors[device]);
      if (!gang) return;
      gang->run(portable_variant(), type, {calls[device]});
      errors[device] = gang->error();
    });
  for (std::thread& thread : threads) thread.join();
  return errors;
}

class Verdict {
 public:
  void require(bool holds, const std::string& what) {
    if (!holds && what_.empty()) what_ = what;
  }

  // Compares `count` numbers with those of the file, where NaN stands for any number. Other flags may round differently.
  void compare(Operands& file, const char* name, const float* got, i64 count) {
    const float* wanted = file.data<float>(name);
    for (i64 i = 0; i < count; ++i) {
      if (std::isnan(wanted[i])) continue;
      const float error = std::fabs(got[i] - wanted[i]);
      require(error <= 1e-4f, std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", not " +
                                  std::to_string(wanted[i]));
      if (error > worst_) worst_ = error;
    }
  }

  const std::string& what() const { return what_; }
  float worst() const { return worst_; }

 private:
  std::string what_;
  float worst_ = 0.0f;
};

void check_outputs(Verdict& verdict, Operands& file, const Plan& plan, std::vector<DeviceMemory>& memory,
                   const std::vector<i32>& streamed) {
  const bool cancels = file.integer("cancel_after") >= 0;
  const i32 room = file.integer("budget"), top_n = file.integer("top_n");
  const i32 steps = memory[0].status[0];
  if (cancels) {
    verdict.require(memory[0].status[1] == kCancelled, "the call was not cancelled");
    verdict.require(steps >= file.integer("cancel_after") && steps < room, "cancelled at " + std::to_string(steps));
  } else {
    verdict.require(steps == file.data<i32>("expected_status")[0], std::to_string(steps) + " steps were done");
    verdict.require(memory[0].status[1] == file.data<i32>("expected_status")[1], "it ended for another reason");
  }
  for (size_t device = 0; device < memory.size() && verdict.what().empty(); ++device) {
    DeviceMemory& m = memory[device];
    const std::string where = " of device " + std::to_string(device);
    verdict.require(m.status[0] == steps && m.status[1] == memory[0].status[1], "the status" + where + " differs");
    for (i32 i = 0; i < steps; ++i) {
      const i32 wanted = file.data<i32>("expected_tokens")[i];
      verdict.require(m.tokens[i] == wanted, "token " + std::to_string(i) + where + " is " + std::to_string(m.tokens[i]) +
                                                 ", not " + std::to_string(wanted));
    }
    verdict.require(std::equal(m.top_ids.begin(), m.top_ids.begin() + i64(steps) * top_n, file.data<i32>("expected_top_ids")),
                    "the alternatives" + where + " differ");
    verdict.compare(file, "expected_logprobs", m.logprobs.data(), steps);
    verdict.compare(file, "expected_top_logprobs", m.top_logprobs.data(), i64(steps) * top_n);
    // Only the device's own rows are written.
    const i64 width = plan.header->max_vocab, own = plan.devices[device].vocab.count;
    for (i64 row = 0; row < i64(m.logits.size()) / width; ++row) {
      const float* wanted = file.data<float>("expected_logits") + (device * room + row) * width;
      for (i64 i = 0; i < own; ++i)
        verdict.require(std::fabs(m.logits[row * width + i] - wanted[i]) <= 1e-4f, "the logits" + where + " differ");
    }
  }
  verdict.require(!file.integer("streams") || std::equal(streamed.begin(), streamed.end(), memory[0].tokens.begin()),
                  "the streamed tokens differ");
  verdict.require(!file.integer("streams") || i32(streamed.size()) == steps,
                  std::to_string(streamed.size()) + " tokens were streamed");
}

int check(const char* path) {
  Operands file(path);
  const Plan plan(file.data<u64>("plan"));
  std::vector<DeviceMemory> memory;
  for (i32 device = 0; device < plan.header->num_devices; ++device) memory.emplace_back(file, plan, device);

  i32 session = 0;
  std::thread follower;
  std::vector<i32> streamed;
  bool done = false;
  const i32 room = file.integer("budget");
  if (file.integer("streams")) {
    session = mono_session_open(room, 0.0, 0, nullptr, 0);
    follower = std::thread(follow, session, file.integer("cancel_after"), room, &done, std::ref(streamed));
  }
  std::vector<Call> calls;
  {
    auto open = find_session(session);
    for (i32 device = 0; device < plan.header->num_devices; ++device)
      calls.push_back(make_call(file, plan, device, memory[device], open ? open->shared() : nullptr));
    HandoffFault fault;
    const i32* lost = file.data<i32>("lost");
    if (file.count<i32>("lost") == 4) fault = {lost[0], lost[1], lost[2], lost[3]};
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::string> errors = run(plan, calls, file.integer("meet"), i64(file.integer("limit_ms")) * 1000000,
                                                fault, WeightType(file.integer("weights")));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    __atomic_store_n(&done, true, __ATOMIC_RELEASE);
    if (follower.joinable()) follower.join();
    if (session) mono_session_close(session);

    Verdict verdict;
    for (const std::string& error : errors) verdict.require(error == errors[0], "devices report different errors");
    const bool loses = file.count<i32>("lost") == 4;
    verdict.require(errors[0].empty() != loses, errors[0].empty() ? "the lost hand-off went unnoticed" : errors[0]);
    if (!loses && verdict.what().empty()) check_outputs(verdict, file, plan, memory, streamed);
    if (!verdict.what().empty()) {
      std::printf("wrong: %s\n", verdict.what().c_str());
      return 1;
    }
    std::printf("%d tokens in %.2f s, log-probabilities within %.1g%s%s\n", loses ? 0 : memory[0].status[0],
                seconds.count(), double(verdict.worst()), loses ? "; " : "", errors[0].c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: sanitize_driver FILE\n");
    return 2;
  }
  try {
    return check(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
