// HIP's runtime and module API, of ROCm 6 and 7.
#include <stdexcept>
#include <vector>

#include "host/driver.h"

namespace mono {
namespace {

// Numbers from hip_runtime_api.h, part of its binary interface since ROCm 6.
constexpr int kMultiprocessors = 63, kSharedLimit = 74;                    // hipDeviceAttribute*
constexpr unsigned kPortable = 1, kMapped = 2, kCoherent = 0x40000000;     // hipHostMalloc*
constexpr unsigned kFineGrained = 1, kUncached = 3;                        // hipDeviceMalloc*
constexpr int kPeerAlreadyEnabled = 704;
constexpr size_t kPropertiesSize = 1472, kArchitectureAt = 1160;           // of hipDeviceProp_tR0600; gcnArchName [256]

class HipDriver : public Driver {
 public:
  HipDriver()
      : Driver(SharedLibrary("HIP runtime",
                             driver_libraries({"libamdhip64.so.7", "/opt/rocm/lib/libamdhip64.so.7", "libamdhip64.so.6",
                                               "/opt/rocm/lib/libamdhip64.so.6"}),
                             "install ROCm 6 or 7, or name its library with JAX_MONO_DRIVER")) {
    library().find("hipGetErrorName", error_name_);
    find_function("hipGetDevice", get_device_);
    find_function("hipSetDevice", set_device_);
    find_function("hipDeviceEnablePeerAccess", enable_peer_);
    find_function("hipExtMallocWithFlags", extended_);
    find_function("hipGetDevicePropertiesR0600", properties_);
    numbers_ = {kMultiprocessors, kSharedLimit, kPortable | kMapped | kCoherent};
    start({"hipInit", "hipGetDeviceCount", "hipDeviceGet", "hipDeviceGetName", "hipDeviceGetAttribute", "hipMalloc",
           "hipFree", "hipHostMalloc", "hipHostFree", "hipHostGetDevicePointer", "hipMemcpyHtoDAsync",
           "hipMemcpyDtoHAsync", "hipMemsetD8Async", "hipStreamSynchronize", "hipModuleLoadData", "hipModuleUnload",
           "hipModuleGetFunction", "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor",
           "hipModuleLaunchCooperativeKernel"});
  }

  Platform platform() const override { return Platform::kRocm; }
  const char* name() const override { return "ROCm"; }

  // "gfx942:sramecc+:xnack-" without the features: a program for the bare name runs with any of them.
  std::string architecture(int ordinal) const override {
    std::vector<char> properties(2 * kPropertiesSize);  // room for a runtime that has added fields
    run(properties_, static_cast<void*>(properties.data()), ordinal);
    const char* text = properties.data() + kArchitectureAt;
    properties[kArchitectureAt + 255] = 0;
    std::string name(text);
    return name.substr(0, name.find(':'));
  }

  // Peers poll this memory while they run. Uncached memory needs no flush on any side; older devices have fine-grained
  // memory only.
  void* allocate_exchange(size_t bytes) const override {
    void* address = nullptr;
    if (extended_.call(&address, bytes, kUncached) == 0) return address;
    run(extended_, &address, bytes, kFineGrained);
    return address;
  }

  // HIP gives a kernel of a module all the shared memory that its launch asks for.
  void allow_shared(void*, int) const override {}

  void reach(int ordinal) const override {
    const int error = enable_peer_.call(ordinal, 0);
    if (error && error != kPeerAlreadyEnabled) fail(enable_peer_.name, error);
  }

 protected:
  std::string error_name(int error) const override {
    const char* text = error_name_(error);
    return text ? text : "an unknown error";
  }

  intptr_t current() const override {
    int ordinal = 0;
    run(get_device_, &ordinal);
    return ordinal;
  }
  void make_current(intptr_t ordinal) const override { run(set_device_, int(ordinal)); }
  intptr_t place(int ordinal) const override { return ordinal; }

 private:
  const char* (*error_name_)(int) = nullptr;
  DriverFunction<int*> get_device_;
  DriverFunction<int> set_device_;
  DriverFunction<int, unsigned> enable_peer_;
  DriverFunction<void**, size_t, unsigned> extended_;
  DriverFunction<void*, int> properties_;
};

}  // namespace

const Driver& hip_driver() {
  static const HipDriver* const instance = new HipDriver;  // never destroyed: the runtime goes first at exit
  return *instance;
}

}  // namespace mono
