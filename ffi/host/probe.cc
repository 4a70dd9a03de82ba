// Probes of GPUs and of this processor, for jax_mono/bringup/probes.py; what they do is in kernel/probe/probe.h.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/compiler.h"
#include "host/gpu_memory.h"
#include "host/mapped_memory.h"
#include "kernel/probe/host.h"

namespace mono {

// What the C interface takes. `platform` 0 is this processor.
struct HandOff {
  i32 platform, writer, reader;  // and the devices
  i32 first, second;             // and their blocks, which take turns
  i32 rounds, pollers, blocks, limit_ms;
};
struct Reads {
  i32 platform, device;
  i32 mapped;  // whether the memory comes from the driver's virtual memory functions
  i32 pages, lines, sweeps, blocks, limit_ms;
  i64 address;  // of memory that is there already and is left as it is; 0 for fresh memory
};

namespace {

using probe::Flag;
using probe::Probe;

constexpr unsigned kThreads = 64;  // of a block on GPUs; one of them works

// Small enough not to be kept on disk.
std::string machine_code(Platform platform, const std::string& architecture) {
  const std::string name = "kernel/probe/" + architecture + ".h";
  const std::vector<Source> sources = kernel_sources();
  if (std::none_of(sources.begin(), sources.end(), [&](const Source& source) { return source.name == name; }))
    throw std::invalid_argument("there are no probes for " + architecture);
  const Compiler& with = compiler(platform);
  return with.compile({"mono_probe_" + architecture, "#include \"" + name + "\"\n"}, sources, with.options(architecture));
}

// The kernel of a GPU, compiled and loaded once.
void* kernel(const Driver& driver, int ordinal) {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::pair<Platform, int>, void*>;
  std::lock_guard<std::mutex> lock(mutex);
  void*& found = loaded[{driver.platform(), ordinal}];
  if (found) return found;
  const std::string code = machine_code(driver.platform(), driver.architecture(ordinal));
  const Current current(driver, ordinal);
  found = driver.find(driver.load(code), "mono_probe");
  if (!found) throw std::runtime_error("the probes for " + driver.architecture(ordinal) + " have no kernel mono_probe");
  return found;
}

// One device's part: its memory, and the launch.
class Device {
 public:
  Device(const Driver& driver, int ordinal, i32 blocks, size_t times)
      : driver_(driver),
        ordinal_(ordinal),
        blocks_(blocks),
        times_(times),
        kernel_(kernel(driver, ordinal)),
        exchange_(driver, ordinal, kFlagBytes + (blocks + probe::kDies) * sizeof(i32) + times * sizeof(float), DeviceMemory::kExchange),
        record_(driver, ordinal, sizeof(Probe)) {
    const Current current(driver, ordinal);
    driver.zero(exchange_.data(), exchange_.bytes(), nullptr);
    driver.synchronize(nullptr);
  }

  // The word that this device waits for, if it is the writer (1) or the reader (0) of the first one.
  Flag* flag(int which) const { return reinterpret_cast<Flag*>(exchange_.data()) + which; }

  void launch(Probe probe) {
    i32* ints = reinterpret_cast<i32*>(exchange_.data() + kFlagBytes);
    probe.dies = ints;
    probe.claimed = ints + blocks_;
    probe.times = reinterpret_cast<float*>(ints + blocks_ + probe::kDies);
    const Current current(driver_, ordinal_);
    driver_.copy_in(record_.data(), &probe, sizeof probe, nullptr);
    driver_.synchronize(nullptr);
    void* record = record_.data();
    void* arguments[] = {&record};
    driver_.launch(kernel_, unsigned(blocks_), kThreads, 0, nullptr, arguments);
  }

  void finish(i32* dies, float* times) {
    const Current current(driver_, ordinal_);
    std::vector<char> ints((blocks_ + probe::kDies) * sizeof(i32));
    driver_.synchronize(nullptr);
    driver_.copy_out(ints.data(), exchange_.data() + kFlagBytes, ints.size(), nullptr);
    driver_.copy_out(times, exchange_.data() + kFlagBytes + ints.size(), times_ * sizeof(float), nullptr);
    driver_.synchronize(nullptr);
    std::memcpy(dies, ints.data(), blocks_ * sizeof(i32));
  }

 private:
  static constexpr size_t kFlagBytes = 2 * sizeof(Flag);

  const Driver& driver_;
  const int ordinal_;
  const i32 blocks_;
  const size_t times_;
  void* const kernel_;
  const DeviceMemory exchange_;  // also holds what comes out: no cache has to be written back for it
  DeviceMemory record_;
};

Probe hand_off_of(const HandOff& request) {
  Probe probe{};
  probe.limit = i64(request.limit_ms) * 1000000;
  probe.first = request.first;
  probe.second = request.second;
  probe.rounds = request.rounds;
  probe.pollers = request.pollers;
  probe.across = request.writer != request.reader;
  return probe;
}

// A thread for every block.
void run_here(Probe probe, i32 blocks, i32* dies, float* times) {
  std::vector<Flag> flags(2);
  probe.ping = &flags[0];
  probe.pong = &flags[1];
  probe.dies = dies;
  probe.times = times;
  std::vector<std::thread> threads;
  for (i32 block = 0; block < blocks; ++block) threads.emplace_back([&, block] { probe::run(probe, block); });
  for (std::thread& thread : threads) thread.join();
}

void hand_off(const HandOff& request, i32* dies, float* time) {
  Probe probe = hand_off_of(request);
  if (request.platform == 0) return run_here(probe, request.blocks, dies, time);
  const Driver& with = driver(Platform(request.platform));
  Device writer(with, request.writer, request.blocks, 1);
  probe.pong = writer.flag(1);
  if (!probe.across) {
    probe.ping = writer.flag(0);
    writer.launch(probe);
    return writer.finish(dies, time);
  }
  Device reader(with, request.reader, request.blocks, 1);
  probe.ping = reader.flag(0);
  for (auto [from, to] : {std::pair(request.writer, request.reader), std::pair(request.reader, request.writer)}) {
    const Current current(with, from);
    with.reach(to);
  }
  Probe answer = probe;
  answer.first = probe.second = -1;
  reader.launch(answer);
  writer.launch(probe);
  std::vector<i32> others(request.blocks);
  float unused;
  writer.finish(dies, time);
  reader.finish(others.data(), &unused);
}

void read_pages(const Reads& request, i32* dies, float* times) {
  Probe probe{};
  probe.limit = i64(request.limit_ms) * 1000000;
  probe.first = probe.second = -1;
  probe.pages = request.pages;
  probe.lines = request.lines;
  const size_t bytes = size_t(request.pages) * probe::kPageBytes, each = size_t(probe::kDies) * request.pages;
  const auto* given = reinterpret_cast<const u32*>(request.address);
  if (request.platform == 0) {
    const std::vector<u32> memory(given ? 0 : bytes / sizeof(u32));
    probe.memory = given ? given : memory.data();
    for (i32 sweep = 0; sweep < request.sweeps; ++sweep) {
      std::vector<i32> claimed(probe::kDies);
      probe.claimed = claimed.data();
      run_here(probe, request.blocks, dies, times + sweep * each);
    }
    return;
  }
  const Driver& with = driver(Platform(request.platform));
  std::unique_ptr<const MappedMemory> mapped;
  DeviceMemory allocated;
  if (!given) {
    if (request.mapped) {
      mapped = std::make_unique<MappedMemory>(with, request.device, bytes);
    } else {
      allocated = DeviceMemory(with, request.device, bytes);
    }
    char* memory = mapped ? mapped->data() : allocated.data();
    const Current current(with, request.device);
    with.zero(memory, bytes, nullptr);  // so that it is there
    with.synchronize(nullptr);
    given = reinterpret_cast<const u32*>(memory);
  }
  probe.memory = given;
  for (i32 sweep = 0; sweep < request.sweeps; ++sweep) {
    Device device(with, request.device, request.blocks, each);
    device.launch(probe);
    device.finish(dies, times + sweep * each);
  }
}

template <class Work>
i32 guarded(char* error, i32 room, Work work) {
  try {
    work();
    return 1;
  } catch (const std::exception& caught) {
    std::snprintf(error, size_t(room), "%s", caught.what());
    return 0;
  }
}

}  // namespace
}  // namespace mono

#define MONO_EXPORT extern "C" __attribute__((visibility("default")))

// Mean nanoseconds from a block's store until another block has seen it, or -1 if the limit was reached, and the die of every
// block of the writer's device. Returns 0 and says why if there are none.
MONO_EXPORT mono::i32 mono_probe_hand_off(const mono::HandOff* request, mono::i32* dies, float* time, char* error, mono::i32 room) {
  return mono::guarded(error, room, [&] { mono::hand_off(*request, dies, time); });
}

// Nanoseconds of a read of each page from each die, [sweeps, 16, pages], zeros for dies that there are not; -1 if the limit of a
// sweep was reached.
MONO_EXPORT mono::i32 mono_probe_pages(const mono::Reads* request, mono::i32* dies, float* times, char* error, mono::i32 room) {
  return mono::guarded(error, room, [&] { mono::read_pages(*request, dies, times); });
}

// Compiles the probes without a GPU; returns 0 and says why if that cannot be.
MONO_EXPORT mono::i32 mono_probe_compile(mono::i32 platform, const char* architecture, char* error, mono::i32 room) {
  return mono::guarded(error, room, [&] { mono::machine_code(mono::Platform(platform), architecture); });
}
