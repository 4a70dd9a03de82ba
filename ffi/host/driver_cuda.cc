// CUDA's driver API. Addresses are 64-bit numbers there, which are passed like pointers.
#include <mutex>
#include <vector>

#include "host/driver.h"

namespace mono {
namespace {

// Numbers from cuda.h, part of its binary interface.
constexpr int kMultiprocessors = 16, kSharedOptIn = 97, kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kMaxDynamicShared = 8;                                              // CU_FUNC_ATTRIBUTE_*
constexpr unsigned kPortable = 1, kMapped = 2;                                    // CU_MEMHOSTALLOC_*
constexpr int kPeerAlreadyEnabled = 704;

class CudaDriver : public Driver {
 public:
  CudaDriver()
      : Driver(SharedLibrary("CUDA driver", driver_libraries({"libcuda.so.1"}),
                             "install NVIDIA's driver, or name its library with JAX_MONO_DRIVER")) {
    find_function("cuGetErrorName", error_name_);
    find_function("cuCtxGetCurrent", get_current_);
    find_function("cuCtxSetCurrent", set_current_);
    find_function("cuDevicePrimaryCtxRetain", retain_);
    find_function("cuCtxEnablePeerAccess", enable_peer_);
    find_function("cuFuncSetAttribute", set_attribute_);
    numbers_ = {kMultiprocessors, kSharedOptIn, kPortable | kMapped};
    start({"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuMemAlloc_v2",
           "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuMemHostGetDevicePointer_v2", "cuMemcpyHtoDAsync_v2",
           "cuMemcpyDtoHAsync_v2", "cuMemsetD8Async", "cuStreamSynchronize", "cuModuleLoadData", "cuModuleUnload",
           "cuModuleGetFunction", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuLaunchCooperativeKernel"});
  }

  Platform platform() const override { return Platform::kCuda; }
  const char* name() const override { return "CUDA"; }

  // Instructions of one generation only ("a") exist from 9.0 on.
  std::string architecture(int ordinal) const override {
    const int major = attribute(ordinal, kMajor), minor = attribute(ordinal, kMinor);
    return "sm_" + std::to_string(major) + std::to_string(minor) + (major >= 9 ? "a" : "");
  }

  void* allocate_exchange(size_t bytes) const override { return allocate(bytes); }

  void allow_shared(void* function, int bytes) const override { run(set_attribute_, function, kMaxDynamicShared, bytes); }

  void reach(int ordinal) const override {
    const int error = enable_peer_.call(reinterpret_cast<void*>(place(ordinal)), 0);
    if (error && error != kPeerAlreadyEnabled) fail(enable_peer_.name, error);
  }

 protected:
  std::string error_name(int error) const override {
    const char* text = nullptr;
    return error_name_.call(error, &text) == 0 && text ? text : "an unknown error";
  }

  intptr_t current() const override {
    void* context = nullptr;
    run(get_current_, &context);
    return reinterpret_cast<intptr_t>(context);
  }
  void make_current(intptr_t context) const override { run(set_current_, reinterpret_cast<void*>(context)); }

  // The primary context, which XLA uses too. It is retained once and kept.
  intptr_t place(int ordinal) const override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ordinal >= int(contexts_.size())) contexts_.resize(ordinal + 1);
    if (!contexts_[ordinal]) run(retain_, &contexts_[ordinal], device(ordinal));
    return reinterpret_cast<intptr_t>(contexts_[ordinal]);
  }

 private:
  DriverFunction<int, const char**> error_name_;
  DriverFunction<void**> get_current_;
  DriverFunction<void*> set_current_;
  DriverFunction<void**, int> retain_;
  DriverFunction<void*, unsigned> enable_peer_;
  DriverFunction<void*, int, int> set_attribute_;
  mutable std::mutex mutex_;
  mutable std::vector<void*> contexts_;
};

}  // namespace

const Driver& cuda_driver() {
  static const CudaDriver* const instance = new CudaDriver;  // never destroyed: the driver goes first at exit
  return *instance;
}

}  // namespace mono
