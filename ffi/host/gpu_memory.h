// Memory of a GPU, and host memory that GPUs reach, owned by objects.
#pragma once

#include <memory>
#include <utility>

#include "host/driver.h"

namespace mono {

class DeviceMemory {
 public:
  enum Use { kOwn, kExchange };

  DeviceMemory() = default;
  DeviceMemory(const Driver& driver, int ordinal, size_t bytes, Use use = kOwn);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(DeviceMemory& other) noexcept;

  const Driver* driver_ = nullptr;
  int ordinal_ = 0;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Pinned; the kernels of all devices reach it under the same address while they run.
class HostMemory {
 public:
  HostMemory() = default;
  HostMemory(const Driver& driver, int ordinal, size_t bytes);
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept { swap(other); }
  HostMemory& operator=(HostMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(HostMemory& other) noexcept;

  const Driver* driver_ = nullptr;
  int ordinal_ = 0;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory of at least `bytes` that nobody uses; it returns to the others when the last reference goes. Freeing it could
// wait for a program that runs.
std::shared_ptr<HostMemory> take_host_memory(const Driver& driver, int ordinal, size_t bytes);

}  // namespace mono
