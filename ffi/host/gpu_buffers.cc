#include "host/gpu_buffers.h"

#include <list>
#include <mutex>
#include <tuple>

namespace mono {
namespace {

constexpr size_t kIdle = 16;         // objects of each kind that are kept for the next call
constexpr size_t kAlignment = 256;   // of a device's part of the exchange and scratch memory

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Objects that nobody uses, the latest first.
template <class Key, class T>
class Pool {
 public:
  // `fits` says whether an object of that key will do.
  template <class Fits, class Make>
  std::shared_ptr<T> take(const Key& key, Fits fits, Make make) {
    std::unique_ptr<T> found;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = idle_.begin(); at != idle_.end(); ++at)
        if (fits(at->first, *at->second)) {
          found = std::move(at->second);
          idle_.erase(at);
          break;
        }
    }
    if (!found) found = make();
    return std::shared_ptr<T>(found.release(), [this, key](T* object) { put(key, std::unique_ptr<T>(object)); });
  }

 private:
  void put(const Key& key, std::unique_ptr<T> object) {
    std::list<std::pair<Key, std::unique_ptr<T>>> oldest;  // freed without the lock
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.emplace_front(key, std::move(object));
    if (idle_.size() > kIdle) oldest.splice(oldest.end(), idle_, std::prev(idle_.end()));
  }

  std::mutex mutex_;
  std::list<std::pair<Key, std::unique_ptr<T>>> idle_;
};

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

std::shared_ptr<HostMemory> take_host_memory(const Driver& driver, int ordinal, size_t bytes) {
  static auto& pool = *new Pool<const Driver*, HostMemory>;
  return pool.take(
      &driver, [&](const Driver* other, const HostMemory& memory) { return other == &driver && memory.bytes() >= bytes; },
      [&] { return std::make_unique<HostMemory>(driver, ordinal, bytes < 65536 ? 65536 : bytes); });
}

}  // namespace mono
