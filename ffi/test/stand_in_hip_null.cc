// Stands in for libamdhip64 and libhiprtc on machines without a GPU, for tests of everything around the program.
//
// Device memory is host memory. Launching a program runs it on the CPU on the same Call records, in threads of its own, so that
// a call gives right results if and only if the host side prepared it right. What runs depends on the architecture:
//
//   host    "compiles" to a text and runs the portable CPU program
//   fibers  is compiled by g++ and runs the GPU's own stage code, see fibers/arch.h
//
// Environment variables, read at every call, script what goes wrong:
//
//   STAND_IN_FAIL=function:error[:device],...   functions that return an error; stand_in_fail() adds some for a thread
//   STAND_IN_DEVICES, STAND_IN_MULTIPROCESSORS, STAND_IN_OCCUPANCY, STAND_IN_ARCHITECTURE   what is there
//   STAND_IN_DIES=n                             over which the blocks of probes are spread in turn
//   STAND_IN_LOG=text                           the compiler refuses with this log
//   STAND_IN_WEIGHTS=bfloat16                   of the program that is launched; else float32
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/variant.h"
#include "kernel/probe/host.h"

#define STAND_IN extern "C" __attribute__((visibility("default")))

namespace {

using namespace mono;

constexpr char kMagic[] = "stand-in program\n";
constexpr int kArchitectureAt = 1160;

std::mutex mutex;
std::map<std::string, int> counts;
std::map<std::pair<int, void*>, std::vector<std::thread>> streams;  // by device and stream
thread_local int device = 0;  // current
thread_local std::string own_script;

int number(const char* name, int usual) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : usual;
}

// Counts the call; returns the error that it shall have.
int enter(const char* function) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ++counts[function];
  }
  const char* script = std::getenv("STAND_IN_FAIL");
  std::istringstream entries(own_script + "," + (script ? script : ""));
  for (std::string entry; std::getline(entries, entry, ',');) {
    char name[64] = {};
    int error = 0, where = -1;
    std::sscanf(entry.c_str(), "%63[^:]:%d:%d", name, &error, &where);
    if (!std::strcmp(name, function) && (where < 0 || where == device)) return error;
  }
  return 0;
}

void wait(void* stream) {
  std::vector<std::thread> running;
  {
    std::lock_guard<std::mutex> lock(mutex);
    running.swap(streams[{device, stream}]);
  }
  for (std::thread& thread : running) thread.join();
}

// What a GPU would do with the records: one thread of the CPU per block.
void run(const Call* calls, int blocks) {
  const char* weights = std::getenv("STAND_IN_WEIGHTS");
  const auto type = weights && !std::strcmp(weights, "bfloat16") ? WeightType::kBfloat16 : WeightType::kFloat32;
  const Variant& variant = portable_variant();
  const int own = calls->plan.header->num_blocks;
  std::vector<Call> local(calls, calls + blocks / own);
  std::vector<std::vector<u64>> scratch;
  std::vector<std::thread> threads;
  for (Call& call : local) {
    i64 words = 8;
    for (i32 block = 0; block < own; ++block) words += variant.scratch_words(call.plan, call.device, block, type);
    scratch.emplace_back(words, 0);
    const auto address = (reinterpret_cast<uintptr_t>(scratch.back().data()) + 63) / 64 * 64;
    call.scratch = reinterpret_cast<u64*>(address);
  }
  for (int i = 0; i < blocks; ++i)
    threads.emplace_back([&, i] { variant.run_block(local[i / own], i % own, type); });
  for (std::thread& thread : threads) thread.join();
}

// The same for a probe.
void run_probe(const probe::Probe* record, int blocks) {
  const int dies = number("STAND_IN_DIES", 1);
  std::vector<std::thread> threads;
  for (int i = 0; i < blocks; ++i)
    threads.emplace_back([=] {
      probe::arch::die() = u32(i % dies);
      probe::run(*record, i);
    });
  for (std::thread& thread : threads) thread.join();
}

struct RtcProgram {
  std::string main, log, code;
  std::map<std::string, std::string> headers;
};

// A new, empty directory.
std::filesystem::path new_directory() {
  std::string path = (std::filesystem::temp_directory_path() / "stand_in_XXXXXX").string();
  return mkdtemp(path.data());
}
std::string content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Builds a library of the sources; leaves what g++ says in the log.
void compile_for_fibers(RtcProgram& program) {
  const std::filesystem::path directory = new_directory();
  program.headers["main.cc"] = program.main;
  for (const auto& [name, text] : program.headers) {
    std::filesystem::create_directories((directory / name).parent_path());
    std::ofstream(directory / name, std::ios::binary) << text;
  }
  const std::string in = " '" + directory.string();
  const std::string command = "g++ -std=c++17 -O1 -shared -fPIC -pthread -fvisibility=hidden -I" + in + "'" + in + "/main.cc' -o" +
                              in + "/program.so' 2>" + in + "/log'";
  if (std::system(command.c_str())) program.log = content(directory / "log");
  program.code += content(directory / "program.so");
  std::filesystem::remove_all(directory);
}

struct Module {
  void* library = nullptr;  // of a program for fibers
};
struct Kernel {
  void (*run)(const Call*, int) = nullptr;  // of a program for fibers
  bool decodes = true, probes = false;
};

// The size of the code stands before it, because those who load it do not say.
struct CodeHead {
  char magic[sizeof kMagic - 1];
  char fibers;
  size_t bytes;
};

}  // namespace

// How often a function was called.
STAND_IN int stand_in_count(const char* function) {
  std::lock_guard<std::mutex> lock(mutex);
  return counts[function];
}

STAND_IN void stand_in_fail(const char* script) { own_script = script; }

STAND_IN int hipInit(unsigned) { return enter("hipInit"); }
STAND_IN const char* hipGetErrorName(int error) {
  static const std::map<int, const char*> names = {
      {1, "hipErrorInvalidValue"},     {2, "hipErrorOutOfMemory"},           {100, "hipErrorNoDevice"},
      {101, "hipErrorInvalidDevice"},  {200, "hipErrorInvalidImage"},        {209, "hipErrorNoBinaryForGpu"},
      {217, "hipErrorPeerAccessUnsupported"}, {500, "hipErrorNotFound"},     {700, "hipErrorIllegalAddress"},
      {719, "hipErrorLaunchFailure"},  {720, "hipErrorCooperativeLaunchTooLarge"}};
  auto found = names.find(error);
  return found == names.end() ? "hipErrorUnknown" : found->second;
}
STAND_IN int hipGetDeviceCount(int* count) {
  *count = number("STAND_IN_DEVICES", 8);
  const int error = enter("hipGetDeviceCount");
  return error ? error : *count ? 0 : 100;
}
STAND_IN int hipGetDevice(int* ordinal) {
  *ordinal = device;
  return enter("hipGetDevice");
}
STAND_IN int hipSetDevice(int ordinal) {
  if (ordinal < 0 || ordinal >= number("STAND_IN_DEVICES", 8)) return 101;
  device = ordinal;
  return enter("hipSetDevice");
}
STAND_IN int hipDeviceGet(int* handle, int ordinal) {
  *handle = ordinal;
  return enter("hipDeviceGet");
}
STAND_IN int hipDeviceGetName(char* text, int room, int) {
  std::snprintf(text, room, "stand-in GPU");
  return enter("hipDeviceGetName");
}
STAND_IN int hipDeviceGetAttribute(int* value, int which, int) {
  *value = which == 63 ? number("STAND_IN_MULTIPROCESSORS", 304) : which == 74 ? 65536 : 0;
  return enter("hipDeviceGetAttribute");
}
STAND_IN int hipGetDevicePropertiesR0600(void* properties, int) {
  const char* name = std::getenv("STAND_IN_ARCHITECTURE");
  std::strcpy(static_cast<char*>(properties) + kArchitectureAt, name ? name : "host:sramecc+:xnack-");
  return enter("hipGetDevicePropertiesR0600");
}

namespace {
// Not zeros, so that whoever forgets to write is noticed.
int allocate(const char* function, void** address, size_t bytes) {
  *address = nullptr;
  if (int error = enter(function)) return error;
  *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*address) std::memset(*address, 0xa5, bytes);
  return *address ? 0 : 2;
}
int release(const char* function, void* address) {
  std::free(address);
  return enter(function);
}
}  // namespace

STAND_IN int hipMalloc(void** address, size_t bytes) { return allocate("hipMalloc", address, bytes); }
STAND_IN int hipExtMallocWithFlags(void** address, size_t bytes, unsigned) {
  return allocate("hipExtMallocWithFlags", address, bytes);
}
STAND_IN int hipHostMalloc(void** address, size_t bytes, unsigned) { return allocate("hipHostMalloc", address, bytes); }
STAND_IN int hipFree(void* address) { return release("hipFree", address); }
STAND_IN int hipHostFree(void* address) { return release("hipHostFree", address); }
STAND_IN int hipHostGetDevicePointer(void** mapped, void* address, unsigned) {
  *mapped = address;
  return enter("hipHostGetDevicePointer");
}

// Physical memory has no content here; addresses have it, once they are mapped.
STAND_IN int hipMemGetAllocationGranularity(size_t* bytes, const void*, int) {
  *bytes = 2 << 20;
  return enter("hipMemGetAllocationGranularity");
}
STAND_IN int hipMemCreate(void** handle, size_t, const void*, unsigned long long) {
  if (int error = enter("hipMemCreate")) return error;
  *handle = new char;
  return 0;
}
STAND_IN int hipMemAddressReserve(void** address, size_t bytes, size_t, void*, unsigned long long) {
  return allocate("hipMemAddressReserve", address, bytes);
}
STAND_IN int hipMemMap(void*, size_t, size_t, void*, unsigned long long) { return enter("hipMemMap"); }
STAND_IN int hipMemSetAccess(void*, size_t, const void*, size_t) { return enter("hipMemSetAccess"); }
STAND_IN int hipMemUnmap(void*, size_t) { return enter("hipMemUnmap"); }
STAND_IN int hipMemAddressFree(void* address, size_t) { return release("hipMemAddressFree", address); }
STAND_IN int hipMemRelease(void* handle) {
  delete static_cast<char*>(handle);
  return enter("hipMemRelease");
}

STAND_IN int hipMemcpyHtoDAsync(void* to, const void* from, size_t bytes, void* stream) {
  wait(stream);
  std::memcpy(to, from, bytes);
  return enter("hipMemcpyHtoDAsync");
}
STAND_IN int hipMemcpyDtoHAsync(void* to, const void* from, size_t bytes, void* stream) {
  wait(stream);
  std::memcpy(to, from, bytes);
  return enter("hipMemcpyDtoHAsync");
}
STAND_IN int hipMemsetD8Async(void* to, unsigned char value, size_t bytes, void* stream) {
  wait(stream);
  std::memset(to, value, bytes);
  return enter("hipMemsetD8Async");
}
STAND_IN int hipStreamSynchronize(void* stream) {
  wait(stream);
  return enter("hipStreamSynchronize");
}

STAND_IN int hipModuleLoadData(void** module, const void* image) {
  *module = nullptr;
  if (int error = enter("hipModuleLoadData")) return error;
  if (std::memcmp(image, kMagic, sizeof kMagic - 1)) return 200;
  CodeHead head;
  std::memcpy(&head, image, sizeof head);
  auto loaded = new Module;
  if (head.fibers) {
    const std::filesystem::path directory = new_directory();
    std::ofstream(directory / "program.so", std::ios::binary).write(static_cast<const char*>(image) + sizeof head, head.bytes);
    loaded->library = dlopen((directory / "program.so").c_str(), RTLD_NOW | RTLD_LOCAL);
    std::filesystem::remove_all(directory);
    if (!loaded->library) return 200;
  }
  *module = loaded;
  return 0;
}
STAND_IN int hipModuleUnload(void* module) {
  delete static_cast<Module*>(module);
  return enter("hipModuleUnload");
}
STAND_IN int hipModuleGetFunction(void** function, void* module, const char* name) {
  auto kernel = new Kernel;  // for good: as few as there are programs
  kernel->decodes = !std::strcmp(name, "mono_decode");
  kernel->probes = !std::strcmp(name, "mono_probe");
  void* library = static_cast<Module*>(module)->library;
  if (library) kernel->run = reinterpret_cast<void (*)(const Call*, int)>(dlsym(library, name));
  const bool known = library ? kernel->run != nullptr : kernel->decodes || kernel->probes || !std::strcmp(name, "mono_stream");
  *function = known ? kernel : nullptr;
  const int error = enter("hipModuleGetFunction");
  return error ? error : known ? 0 : 500;
}
STAND_IN int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = number("STAND_IN_OCCUPANCY", 1);
  return enter("hipModuleOccupancyMaxActiveBlocksPerMultiprocessor");
}
STAND_IN int hipModuleLaunchCooperativeKernel(void* function, unsigned x, unsigned, unsigned, unsigned, unsigned,
                                              unsigned, unsigned, void* stream, void** arguments) {
  if (int error = enter("hipModuleLaunchCooperativeKernel")) return error;
  const auto* kernel = static_cast<const Kernel*>(function);
  if (kernel->probes) {
    const auto* record = *static_cast<const probe::Probe* const*>(arguments[0]);
    std::lock_guard<std::mutex> lock(mutex);
    streams[{device, stream}].emplace_back([=] { run_probe(record, int(x)); });
    return 0;
  }
  if (!kernel->decodes) return 0;
  const auto* calls = *static_cast<const Call* const*>(arguments[0]);
  std::lock_guard<std::mutex> lock(mutex);
  streams[{device, stream}].emplace_back([kernel, calls, x] { kernel->run ? kernel->run(calls, int(x)) : run(calls, int(x)); });
  return 0;
}
STAND_IN int hipDeviceEnablePeerAccess(int, unsigned) { return enter("hipDeviceEnablePeerAccess"); }

STAND_IN int hiprtcVersion(int* major, int* minor) {
  *major = 7;
  *minor = 0;
  return enter("hiprtcVersion");
}
STAND_IN const char* hiprtcGetErrorString(int error) {
  return error == 6 ? "HIPRTC_ERROR_COMPILATION" : error ? "HIPRTC_ERROR_INTERNAL_ERROR" : "HIPRTC_SUCCESS";
}
STAND_IN int hiprtcCreateProgram(void** program, const char* main, const char*, int count,
                                 const char* const* texts, const char* const* names) {
  auto made = new RtcProgram{main, "", "", {}};
  for (int i = 0; i < count; ++i) made->headers[names[i]] = texts[i];
  *program = made;
  return enter("hiprtcCreateProgram");
}
STAND_IN int hiprtcDestroyProgram(void** program) {
  delete static_cast<RtcProgram*>(*program);
  return enter("hiprtcDestroyProgram");
}
STAND_IN int hiprtcCompileProgram(void* program, int, const char* const*) {
  auto& job = *static_cast<RtcProgram*>(program);
  const char* log = std::getenv("STAND_IN_LOG");
  if (log) job.log = log;
  bool found = false;
  for (const auto& [name, text] : job.headers) found = found || job.main == "#include \"" + name + "\"\n";
  if (!found) job.log = "fatal error: file not found: " + job.main;
  const bool fibers = job.main.find("/fibers.h") != std::string::npos;
  if (fibers && job.log.empty()) {
    compile_for_fibers(job);
  } else {
    job.code = job.main;
  }
  CodeHead head{};
  std::memcpy(head.magic, kMagic, sizeof head.magic);
  head.fibers = fibers;
  head.bytes = job.code.size();
  job.code.insert(0, reinterpret_cast<const char*>(&head), sizeof head);
  const int error = enter("hiprtcCompileProgram");
  return error ? error : job.log.empty() ? 0 : 6;
}
STAND_IN int hiprtcGetProgramLogSize(void* program, size_t* size) {
  *size = static_cast<RtcProgram*>(program)->log.size() + 1;
  return enter("hiprtcGetProgramLogSize");
}
STAND_IN int hiprtcGetProgramLog(void* program, char* text) {
  std::strcpy(text, static_cast<RtcProgram*>(program)->log.c_str());
  return enter("hiprtcGetProgramLog");
}
STAND_IN int hiprtcGetCodeSize(void* program, size_t* size) {
  *size = static_cast<RtcProgram*>(program)->code.size();
  return enter("hiprtcGetCodeSize");
}
STAND_IN int hiprtcGetCode(void* program, char* code) {
  const std::string& from = static_cast<RtcProgram*>(program)->code;
  std::memcpy(code, from.data(), from.size());
  return enter("hiprtcGetCode");
}
