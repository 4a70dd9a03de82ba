#include "host/gpu_buffers.h"

#include <tuple>

#include "host/pool.h"

namespace mono {
namespace {

constexpr size_t kAlignment = 256;  // of a device's part of the exchange and scratch memory

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

GpuBuffers::GpuBuffers(const Driver& driver, int ordinal, const Program& program, const std::string& bytes, i32 first,
                       i32 local, void* stream) {
  const Plan plan(bytes.data());
  const Header& h = *plan.header;
  size_t words = 0;
  std::vector<size_t> starts;
  for (i32 device = first; device < first + local; ++device) {
    starts.push_back(words);
    words += aligned(size_t(plan.devices[device].channels.words) * kWordBytes);
  }
  const size_t own = aligned(size_t(program.shape.scratch_words) * 8);
  record = DeviceMemory(driver, ordinal, bytes.size());
  exchange = DeviceMemory(driver, ordinal, words, DeviceMemory::kExchange);
  scratch = DeviceMemory(driver, ordinal, own * local);
  calls = DeviceMemory(driver, ordinal, sizeof(Call) * local);
  shared = HostMemory(driver, ordinal, sizeof(Control) + sizeof(u64) * h.num_devices * h.num_blocks);
  for (i32 i = 0; i < local; ++i) {
    exchange_of.push_back(reinterpret_cast<u64*>(exchange.data() + starts[i]));
    scratch_of.push_back(reinterpret_cast<u64*>(scratch.data() + own * i));
  }
  const Current current(driver, ordinal);
  driver.copy_in(record.data(), bytes.data(), bytes.size(), stream);
  driver.synchronize(stream);
}

std::shared_ptr<GpuBuffers> take_buffers(const Driver& driver, int ordinal, const Program& program,
                                         const std::string& record, i32 first, i32 local, void* stream) {
  using Key = std::tuple<const Program*, i32, i32>;  // a program belongs to one driver, ordinal and plan
  static auto& pool = *new Pool<Key, GpuBuffers>;    // never destroyed: the driver goes first at exit
  const Key key(&program, first, local);
  return pool.take(
      key, [&](const Key& other, const GpuBuffers&) { return other == key; },
      [&] { return std::make_unique<GpuBuffers>(driver, ordinal, program, record, first, local, stream); });
}

}  // namespace mono
