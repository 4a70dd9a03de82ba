// Stands in for libamdhip64 and libhiprtc on a machine with an NVIDIA GPU: the same functions, forwarded to libcuda and
// libnvrtc, so that the ROCm side of the host code can run a real program on a real device.
//
//   g++ -std=c++17 -O1 -shared -fPIC ffi/test/stand_in_hip_cuda.cc -ldl -o stand_in.so
//
// JAX_MONO_DRIVER and JAX_MONO_COMPILER name it. STAND_IN_NVRTC is the path of libnvrtc, if the system does not find it;
// STAND_IN_ARCHITECTURE is what the devices say they are, sm_90a by default.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define STAND_IN extern "C" __attribute__((visibility("default")))

namespace {

std::mutex mutex;
std::map<std::string, int> counts;
std::map<int, void*> contexts;
thread_local int device = 0;  // current

void* find(const char* name) {
  static void* const cuda = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  static void* const nvrtc = [] {
    const char* named = std::getenv("STAND_IN_NVRTC");
    for (const char* path : {named ? named : "", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
      if (*path)
        if (void* found = dlopen(path, RTLD_NOW | RTLD_LOCAL)) return found;
    return static_cast<void*>(nullptr);
  }();
  void* library = std::strncmp(name, "nvrtc", 5) ? cuda : nvrtc;
  void* found = library ? dlsym(library, name) : nullptr;
  if (!found) std::fprintf(stderr, "stand-in: %s is missing\n", name);
  return found;
}

// Counts the HIP function and calls the CUDA function; 999 if there is none.
template <class... A>
int forward(const char* counted, const char* name, A... arguments) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ++counts[counted];
  }
  using Function = int (*)(A...);
  const auto function = reinterpret_cast<Function>(find(name));
  return function ? function(arguments...) : 999;
}

// HIP's current device is a number of the thread; CUDA's is a context.
int enter() {
  void* context;
  {
    std::lock_guard<std::mutex> lock(mutex);
    context = contexts[device];
  }
  if (!context) {
    if (int error = forward("", "cuDevicePrimaryCtxRetain", &context, device)) return error;
    std::lock_guard<std::mutex> lock(mutex);
    contexts[device] = context;
  }
  return forward("", "cuCtxSetCurrent", context);
}

constexpr int kMaxDynamicShared = 8;
int allow_shared(void* function, size_t bytes) { return forward("", "cuFuncSetAttribute", function, kMaxDynamicShared, int(bytes)); }

}  // namespace

#define HIP(name, parameters, cuda, ...)                                  \
  STAND_IN int name parameters {                                          \
    if (int error = enter()) return error;                                \
    return forward(#name, cuda, __VA_ARGS__);               \
  }

STAND_IN int stand_in_count(const char* function) {
  std::lock_guard<std::mutex> lock(mutex);
  return counts[function];
}

STAND_IN const char* hipGetErrorName(int error) {
  const char* name = nullptr;
  return forward("hipGetErrorName", "cuGetErrorName", error, &name) == 0 && name ? name : "an unknown error";
}
STAND_IN int hipInit(unsigned flags) { return forward("hipInit", "cuInit", flags); }
STAND_IN int hipGetDeviceCount(int* count) { return forward("hipGetDeviceCount", "cuDeviceGetCount", count); }
STAND_IN int hipGetDevice(int* ordinal) {
  *ordinal = device;
  return 0;
}
STAND_IN int hipSetDevice(int ordinal) {
  int count = 0;
  if (int error = forward("", "cuInit", 0u)) return error;
  if (int error = hipGetDeviceCount(&count)) return error;
  if (ordinal < 0 || ordinal >= count) return 101;
  device = ordinal;
  return enter();
}
STAND_IN int hipDeviceGet(int* handle, int ordinal) { return forward("hipDeviceGet", "cuDeviceGet", handle, ordinal); }
STAND_IN int hipDeviceGetName(char* text, int room, int handle) {
  return forward("hipDeviceGetName", "cuDeviceGetName", text, room, handle);
}
STAND_IN int hipDeviceGetAttribute(int* value, int which, int handle) {
  return forward("hipDeviceGetAttribute", "cuDeviceGetAttribute", value, which == 63 ? 16 : which == 74 ? 97 : -1, handle);
}
STAND_IN int hipGetDevicePropertiesR0600(void* properties, int) {
  const char* name = std::getenv("STAND_IN_ARCHITECTURE");
  std::strcpy(static_cast<char*>(properties) + 1160, name ? name : "sm_90a");
  return 0;
}

HIP(hipMalloc, (void** address, size_t bytes), "cuMemAlloc_v2", address, bytes)
HIP(hipExtMallocWithFlags, (void** address, size_t bytes, unsigned), "cuMemAlloc_v2", address, bytes)
HIP(hipFree, (void* address), "cuMemFree_v2", address)
// Portable and mapped are the same bits; HIP's others have no counterpart.
HIP(hipHostMalloc, (void** address, size_t bytes, unsigned flags), "cuMemHostAlloc", address, bytes, flags & 3)
HIP(hipHostFree, (void* address), "cuMemFreeHost", address)
HIP(hipHostGetDevicePointer, (void** mapped, void* address, unsigned flags), "cuMemHostGetDevicePointer_v2", mapped, address, flags)
HIP(hipMemcpyHtoDAsync, (void* to, const void* from, size_t bytes, void* stream), "cuMemcpyHtoDAsync_v2", to, from, bytes, stream)
HIP(hipMemcpyDtoHAsync, (void* to, const void* from, size_t bytes, void* stream), "cuMemcpyDtoHAsync_v2", to, from, bytes, stream)
HIP(hipMemsetD8Async, (void* to, unsigned char value, size_t bytes, void* stream), "cuMemsetD8Async", to, value, bytes, stream)
HIP(hipStreamSynchronize, (void* stream), "cuStreamSynchronize", stream)
HIP(hipModuleLoadData, (void** module, const void* image), "cuModuleLoadData", module, image)
HIP(hipModuleUnload, (void* module), "cuModuleUnload", module)
HIP(hipModuleGetFunction, (void** function, void* module, const char* name), "cuModuleGetFunction", function, module, name)

// HIP needs no leave for large shared memory.
STAND_IN int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
  if (int error = enter()) return error;
  if (int error = allow_shared(function, shared)) return error;
  return forward("hipModuleOccupancyMaxActiveBlocksPerMultiprocessor", "cuOccupancyMaxActiveBlocksPerMultiprocessor", blocks,
                 function, threads, shared);
}
STAND_IN int hipModuleLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                              unsigned bz, unsigned shared, void* stream, void** arguments) {
  if (int error = enter()) return error;
  if (int error = allow_shared(function, shared)) return error;
  return forward("hipModuleLaunchCooperativeKernel", "cuLaunchCooperativeKernel", function, gx, gy, gz, bx, by, bz, shared,
                 stream, arguments);
}
STAND_IN int hipDeviceEnablePeerAccess(int ordinal, unsigned flags) {
  const int own = device;
  device = ordinal;
  const int error = enter();  // makes the other device's context
  device = own;
  if (error) return error;
  if (int other = enter()) return other;
  void* peer;
  {
    std::lock_guard<std::mutex> lock(mutex);
    peer = contexts[ordinal];
  }
  return forward("hipDeviceEnablePeerAccess", "cuCtxEnablePeerAccess", peer, flags);
}

STAND_IN int hiprtcVersion(int* major, int* minor) { return forward("hiprtcVersion", "nvrtcVersion", major, minor); }
STAND_IN const char* hiprtcGetErrorString(int error) {
  using Function = const char* (*)(int);
  const auto function = reinterpret_cast<Function>(find("nvrtcGetErrorString"));
  return function ? function(error) : "no NVRTC";
}
STAND_IN int hiprtcCreateProgram(void** program, const char* text, const char* name, int count, const char* const* texts,
                                 const char* const* names) {
  return forward("hiprtcCreateProgram", "nvrtcCreateProgram", program, text, name, count, texts, names);
}
STAND_IN int hiprtcDestroyProgram(void** program) { return forward("hiprtcDestroyProgram", "nvrtcDestroyProgram", program); }
STAND_IN int hiprtcCompileProgram(void* program, int count, const char* const* options) {
  std::vector<std::string> texts = {"-default-device"};
  for (int i = 0; i < count; ++i) {
    const std::string option = options[i], offload = "--offload-arch=";
    if (option == "-O3") continue;
    const bool names_gpu = option.compare(0, offload.size(), offload) == 0;
    texts.push_back(names_gpu ? "--gpu-architecture=" + option.substr(offload.size()) : option);
  }
  std::vector<const char*> flags;
  for (const std::string& text : texts) flags.push_back(text.c_str());
  return forward("hiprtcCompileProgram", "nvrtcCompileProgram", program, int(flags.size()), static_cast<const char* const*>(flags.data()));
}
STAND_IN int hiprtcGetProgramLogSize(void* program, size_t* size) {
  return forward("hiprtcGetProgramLogSize", "nvrtcGetProgramLogSize", program, size);
}
STAND_IN int hiprtcGetProgramLog(void* program, char* text) {
  return forward("hiprtcGetProgramLog", "nvrtcGetProgramLog", program, text);
}
STAND_IN int hiprtcGetCodeSize(void* program, size_t* size) { return forward("hiprtcGetCodeSize", "nvrtcGetCUBINSize", program, size); }
STAND_IN int hiprtcGetCode(void* program, char* code) { return forward("hiprtcGetCode", "nvrtcGetCUBIN", program, code); }
