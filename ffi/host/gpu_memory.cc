#include "host/gpu_memory.h"

#include <exception>

#include "host/pool.h"

namespace mono {
namespace {

// Drivers refuse to allocate nothing.
size_t at_least_one(size_t bytes) { return bytes ? bytes : 1; }

}  // namespace

DeviceMemory::DeviceMemory(const Driver& driver, int ordinal, size_t bytes, Use use)
    : driver_(&driver), ordinal_(ordinal), bytes_(bytes) {
  const Current current(driver, ordinal);
  const size_t size = at_least_one(bytes);
  data_ = static_cast<char*>(use == kExchange ? driver.allocate_exchange(size) : driver.allocate(size));
}

DeviceMemory::~DeviceMemory() {
  if (!data_) return;
  try {
    const Current current(*driver_, ordinal_);
    driver_->release(data_);
  } catch (const std::exception&) {  // a device that has failed frees its memory with the process
  }
}

void DeviceMemory::swap(DeviceMemory& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(ordinal_, other.ordinal_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
}

HostMemory::HostMemory(const Driver& driver, int ordinal, size_t bytes)
    : driver_(&driver), ordinal_(ordinal), bytes_(bytes) {
  const Current current(driver, ordinal);
  data_ = static_cast<char*>(driver.allocate_host(at_least_one(bytes)));
}

HostMemory::~HostMemory() {
  if (!data_) return;
  try {
    const Current current(*driver_, ordinal_);
    driver_->release_host(data_);
  } catch (const std::exception&) {  // as above
  }
}

void HostMemory::swap(HostMemory& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(ordinal_, other.ordinal_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
}

std::shared_ptr<HostMemory> take_host_memory(const Driver& driver, int ordinal, size_t bytes) {
  static auto& pool = *new Pool<const Driver*, HostMemory>;  // never destroyed: the driver goes first at exit
  return pool.take(
      &driver, [&](const Driver* other, const HostMemory& memory) { return other == &driver && memory.bytes() >= bytes; },
      [&] { return std::make_unique<HostMemory>(driver, ordinal, bytes < 65536 ? 65536 : bytes); });
}

}  // namespace mono
