#include "host/mapped_memory.h"

#include <exception>

namespace mono {
namespace {

// CUmem... and hipMem... structures and numbers are the same: parts of the binary interfaces of CUDA and of ROCm since 5.
struct Location {
  i32 type = 1;  // a device
  i32 id = 0;
};
struct Properties {
  i32 type = 1;     // pinned
  i32 handles = 0;  // none to give to other processes
  Location location;
  void* unused = nullptr;
  u64 flags = 0;
};
static_assert(sizeof(Properties) == 32, "as in cuda.h and hip_runtime_api.h");
struct Access {
  Location location;
  i32 flags = 3;  // read and write
};
constexpr int kRecommended = 1;

template <class... P>
DriverFunction<P...> function(const Driver& driver, const char* cuda, const char* hip) {
  DriverFunction<P...> found;
  driver.find_function(driver.platform() == Platform::kCuda ? cuda : hip, found);
  return found;
}

}  // namespace

#define MONO_FUNCTION(variable, name, ...) const auto variable = function<__VA_ARGS__>(driver_, "cu" name, "hip" name)

MappedMemory::MappedMemory(const Driver& driver, int ordinal, size_t bytes) : driver_(driver), ordinal_(ordinal) {
  MONO_FUNCTION(granularity_of, "MemGetAllocationGranularity", size_t*, const Properties*, int);
  MONO_FUNCTION(create, "MemCreate", void**, size_t, const Properties*, u64);
  MONO_FUNCTION(reserve, "MemAddressReserve", void**, size_t, size_t, void*, u64);
  MONO_FUNCTION(map, "MemMap", void*, size_t, size_t, void*, u64);
  MONO_FUNCTION(set_access, "MemSetAccess", void*, size_t, const Access*, size_t);
  const Current current(driver, ordinal);
  Properties properties;
  properties.location.id = ordinal;
  size_t granularity = 0;
  driver.run(granularity_of, &granularity, &properties, kRecommended);
  bytes_ = (bytes + granularity - 1) / granularity * granularity;
  Access access;
  access.location.id = ordinal;
  try {
    driver.run(create, &handle_, bytes_, &properties, u64(0));
    driver.run(reserve, &address_, bytes_, granularity, static_cast<void*>(nullptr), u64(0));
    driver.run(map, address_, bytes_, size_t(0), handle_, u64(0));
    mapped_ = true;
    driver.run(set_access, address_, bytes_, &access, size_t(1));
  } catch (...) {
    unmap();
    throw;
  }
}

MappedMemory::~MappedMemory() { unmap(); }

void MappedMemory::unmap() noexcept {
  try {
    MONO_FUNCTION(undo, "MemUnmap", void*, size_t);
    MONO_FUNCTION(free, "MemAddressFree", void*, size_t);
    MONO_FUNCTION(release, "MemRelease", void*);
    const Current current(driver_, ordinal_);
    if (mapped_) driver_.run(undo, address_, bytes_);
    if (address_) driver_.run(free, address_, bytes_);
    if (handle_) driver_.run(release, handle_);
  } catch (const std::exception&) {  // a device that has failed frees its memory with the process
  }
}

}  // namespace mono
