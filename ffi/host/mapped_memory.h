// Memory of a GPU through the driver's virtual memory functions: physical memory in one piece, as far as the driver has it, under
// addresses in the same order.
#pragma once

#include "host/driver.h"

namespace mono {

class MappedMemory {
 public:
  // Throws std::runtime_error that names the driver's function and its error, or the function that it has not.
  MappedMemory(const Driver& driver, int ordinal, size_t bytes);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  char* data() const { return static_cast<char*>(address_); }

 private:
  void unmap() noexcept;

  const Driver& driver_;
  const int ordinal_;
  size_t bytes_ = 0;  // rounded up to what the driver deals in
  void *handle_ = nullptr, *address_ = nullptr;
  bool mapped_ = false;
};

}  // namespace mono
