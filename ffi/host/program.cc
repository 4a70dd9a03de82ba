#include "host/program.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "host/compiler.h"
#include "host/program_cache.h"
#include "host/sha256.h"

namespace mono {
namespace {

constexpr char kDecode[] = "mono_decode", kStream[] = "mono_stream";

// Everything that the machine code follows from.
struct Job {
  Source main;
  std::vector<Source> headers;
  std::vector<std::string> options;

  std::string key(const std::string& compiler) const {
    Sha256 hash;
    hash.add(compiler);
    for (const std::string& option : options) hash.add(option);
    hash.add(main.text);
    for (const Source& header : headers) {
      hash.add(header.name);
      hash.add(header.text);
    }
    return hash.hex();
  }
};

// A program starts at the header of its architecture.
Source entry(const std::vector<Source>& sources, const std::string& architecture) {
  const std::string folder = "kernel/entry/", name = folder + architecture + ".h";
  std::string known;
  for (const Source& source : sources) {
    if (source.name == name) return {"mono_" + architecture, "#include \"" + name + "\"\n"};
    if (source.name.compare(0, folder.size(), folder) == 0)
      known += (known.empty() ? "" : ", ") + source.name.substr(folder.size(), source.name.size() - folder.size() - 2);
  }
  throw std::invalid_argument("there is no program for " + architecture + "; this library has " +
                              (known.empty() ? "none for any GPU" : "programs for " + known));
}

// Machine code from disk, or from the compiler.
std::string machine_code(const Compiler& with, const Job& job, const std::string& key) {
  std::string code;
  const ProgramCache cache;
  if (!cache.load(key, code)) {
    code = with.compile(job.main, job.headers, job.options);
    cache.store(key, code);
  }
  return code;
}

// The same, or from this process. Called under program()'s lock, so that the devices of a machine compile once.
const std::string& known_code(Platform platform, const Job& job) {
  static std::map<std::string, std::string> known;
  const Compiler& with = compiler(platform);
  const std::string key = job.key(with.version());
  auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = machine_code(with, job, key);
}

// No GPU calls itself this: tests put a library in the driver's place that runs the CPU's program on the same records.
constexpr char kNoGpu[] = "host";

// What to compile, and what the machine code will need.
struct Order {
  GpuShape shape;
  Job job;

  Order(Platform platform, const std::string& architecture, i64 shared_limit, const Plan& plan, WeightType type) {
    job.headers = kernel_sources();
    job.main = entry(job.headers, architecture);
    shape = architecture == kNoGpu ? GpuShape{"", 1, 0, 0} : gpu_shape(plan, type, architecture, shared_limit);
    job.headers.push_back({"shape.h", shape.header});
    job.options = compiler(platform).options(architecture);
  }
};

std::unique_ptr<Program> make(const Driver& driver, int ordinal, const Plan& plan, WeightType type) {
  auto made = std::make_unique<Program>();
  made->architecture = driver.architecture(ordinal);
  const Order order(driver.platform(), made->architecture, driver.shared_limit(ordinal), plan, type);
  made->shape = order.shape;
  const std::string& code = known_code(driver.platform(), order.job);

  const Current current(driver, ordinal);
  void* module = driver.load(code);
  try {
    made->decode = driver.find(module, kDecode);
    if (!made->decode) throw std::runtime_error("the program for " + made->architecture + " has no kernel " + kDecode);
    made->stream = driver.find(module, kStream);
    for (void* kernel : {made->decode, made->stream})
      if (kernel) driver.allow_shared(kernel, made->shape.shared_bytes);
    made->resident_blocks = driver.multiprocessors(ordinal) *
                            driver.resident_blocks(made->decode, made->shape.threads, made->shape.shared_bytes);
  } catch (...) {
    driver.unload(module);
    throw;
  }
  return made;
}

}  // namespace

std::string compile_program(Platform platform, const std::string& architecture, i64 shared_limit, const Plan& plan,
                            WeightType type) {
  const Job job = Order(platform, architecture, shared_limit, plan, type).job;
  const Compiler& with = compiler(platform);
  return machine_code(with, job, job.key(with.version()));
}

const Program& program(const Driver& driver, int ordinal, const std::string& record, WeightType type) {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::tuple<Platform, int, WeightType, std::string>, std::unique_ptr<Program>>;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = loaded[{driver.platform(), ordinal, type, record}];
  if (!slot) slot = make(driver, ordinal, Plan(record.data()), type);
  return *slot;
}

}  // namespace mono
