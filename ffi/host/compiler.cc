#include "host/compiler.h"

#include <cstdlib>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace mono {
namespace {

std::mutex path_mutex;
std::string path;

std::vector<std::string> libraries(Platform platform) {
  const char* named = std::getenv("JAX_MONO_COMPILER");
  if (named && *named) return {named};
  const bool cuda = platform == Platform::kCuda;
  const std::vector<std::string> usual = cuda ? std::vector<std::string>{"libnvrtc.so.13", "libnvrtc.so.12"}
                                              : std::vector<std::string>{"libhiprtc.so.7", "libhiprtc.so.6"};
  std::vector<std::string> found;
  {
    std::lock_guard<std::mutex> lock(path_mutex);
    std::istringstream directories(path);
    for (std::string directory; std::getline(directories, directory, ':');)
      for (const std::string& name : usual)
        if (!directory.empty()) found.push_back(directory + "/" + name);
  }
  found.insert(found.end(), usual.begin(), usual.end());
  for (const std::string& name : usual) found.push_back((cuda ? "/usr/local/cuda/lib64/" : "/opt/rocm/lib/") + name);
  return found;
}

}  // namespace

Compiler::Compiler(Platform platform)
    : platform_(platform),
      prefix_(platform == Platform::kCuda ? "nvrtc" : "hiprtc"),
      library_(platform == Platform::kCuda ? "NVRTC" : "hipRTC", libraries(platform),
               platform == Platform::kCuda
                   ? "pip install nvidia-cuda-nvrtc, or name the library with JAX_MONO_COMPILER"
                   : "install ROCm's hiprtc, or name the library with JAX_MONO_COMPILER") {
  const bool cuda = platform == Platform::kCuda;
  find("Version", get_version_);
  find("GetErrorString", error_name_);
  find("CreateProgram", create_);
  find("DestroyProgram", destroy_);
  find("CompileProgram", compile_);
  find("GetProgramLogSize", log_size_);
  find("GetProgramLog", log_);
  find(cuda ? "GetCUBINSize" : "GetCodeSize", code_size_);
  find(cuda ? "GetCUBIN" : "GetCode", code_);
  int major = 0, minor = 0;
  if (int error = get_version_(&major, &minor)) fail("Version", error);
  version_ = std::string(cuda ? "NVRTC " : "hipRTC ") + std::to_string(major) + "." + std::to_string(minor);
}

void Compiler::fail(const char* function, int error) const {
  throw std::runtime_error(prefix_ + function + " of " + library_.name() + " failed with " + error_name_(error) + " (" +
                           std::to_string(error) + "); reinstall the compiler, or name another one with JAX_MONO_COMPILER");
}

std::vector<std::string> Compiler::options(const std::string& architecture) const {
  if (platform_ == Platform::kCuda) return {"--gpu-architecture=" + architecture, "--std=c++17", "-default-device"};
  return {"--offload-arch=" + architecture, "-std=c++17", "-O3"};
}

std::string Compiler::log(Job job) const {
  size_t size = 0;
  if (log_size_(job, &size) || size == 0) return {};
  std::string text(size, '\0');
  if (log_(job, text.data())) return {};
  while (!text.empty() && (text.back() == '\0' || text.back() == '\n')) text.pop_back();
  return text;
}

std::string Compiler::compile(const Source& main, const std::vector<Source>& headers,
                              const std::vector<std::string>& options) const {
  std::vector<const char*> texts, names, flags;
  for (const Source& header : headers) {
    texts.push_back(header.text.c_str());
    names.push_back(header.name.c_str());
  }
  for (const std::string& option : options) flags.push_back(option.c_str());

  struct Owner {
    const Compiler* compiler;
    Job job = nullptr;
    ~Owner() {
      if (job) compiler->destroy_(&job);
    }
  } owner{this};
  if (int error = create_(&owner.job, main.text.c_str(), main.name.c_str(), int(headers.size()), texts.data(), names.data()))
    fail("CreateProgram", error);
  if (int error = compile_(owner.job, int(flags.size()), flags.data())) {
    std::string said;
    for (const std::string& option : options) said += " " + option;
    throw std::runtime_error(version_ + " could not compile " + main.name + " with" + said + " (" + error_name_(error) +
                             "):\n" + log(owner.job));
  }
  size_t size = 0;
  if (int error = code_size_(owner.job, &size)) fail(platform_ == Platform::kCuda ? "GetCUBINSize" : "GetCodeSize", error);
  if (size == 0) throw std::runtime_error(version_ + " made no machine code of " + main.name + ":\n" + log(owner.job));
  std::string code(size, '\0');
  if (int error = code_(owner.job, code.data())) fail(platform_ == Platform::kCuda ? "GetCUBIN" : "GetCode", error);
  return code;
}

const Compiler& compiler(Platform platform) {
  if (platform == Platform::kCuda) {
    static const Compiler* const nvrtc = new Compiler(platform);
    return *nvrtc;
  }
  static const Compiler* const hiprtc = new Compiler(platform);
  return *hiprtc;
}

void set_compiler_path(const std::string& directories) {
  std::lock_guard<std::mutex> lock(path_mutex);
  path = directories;
}

}  // namespace mono
