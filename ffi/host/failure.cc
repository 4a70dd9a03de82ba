#include "host/failure.h"

#include <new>
#include <stdexcept>

namespace mono {
namespace {

const char* const kChannelNames[kChannels] = {
    "qkv rows",  "attention parts",    "attention inbox", "residual after attention", "activations", "mlp inbox",
    "residual after mlp", "final inbox", "final sum",     "summary",                  "logits",      "choice"};

}  // namespace

Failure Failure::of(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error)) return {FailureKind::kMemory, "out of memory for exchange and scratch buffers"};
  const bool refused = dynamic_cast<const std::invalid_argument*>(&error);
  return {refused ? FailureKind::kRefused : FailureKind::kBroken, error.what()};
}

void start_control(Control& control, u64* places, i32 count, i64 wait_limit, const HandoffFault& fault) {
  control = {};
  for (i32 i = 0; i < count; ++i) places[i] = 0;
  control.wait_limit = wait_limit;
  control.places = places;
  control.lost_device = fault.device;
  control.lost_block = fault.block;
  control.lost_layer = fault.layer;
  control.lost_channel = fault.channel;
}

std::string lost_handoff(const Control& control, const u64* places, i32 count, i32 blocks) {
  if (!__atomic_load_n(&control.aborted, __ATOMIC_ACQUIRE)) return {};
  const std::string limit = std::to_string(control.wait_limit / 1000000);
  if (i32 device = __atomic_load_n(&control.missed, __ATOMIC_ACQUIRE))
    return "not all blocks of device " + std::to_string(device - 1) + " started within " + limit +
           " ms. Something else keeps part of the GPU busy; free it, plan fewer blocks, or raise JAX_MONO_WAIT_LIMIT_MS";
  i32 first = 0;
  u64 earliest = ~u64(0);
  for (i32 block = 0; block < count; ++block) {
    u64 key = __atomic_load_n(&places[block], __ATOMIC_RELAXED);
    if (key == 0 || key >= earliest) continue;
    earliest = key;
    first = block;
  }
  const Place place(earliest);
  if (earliest == ~u64(0) || place.channel() >= kChannels)
    return "a block gave up without saying where; run it again, and report this if it stays";
  const std::string where = place.channel() < kFinalInbox ? "in layer " + std::to_string(place.layer()) : "after the last layer";
  return "device " + std::to_string(first / blocks) + ", block " + std::to_string(first % blocks) +
         " waited longer than " + limit + " ms for '" +
         kChannelNames[place.channel()] + "' " + where + ", epoch " + std::to_string(place.epoch()) +
         ". A block stopped publishing; if the machine was merely overloaded, raise JAX_MONO_WAIT_LIMIT_MS";
}

}  // namespace mono
