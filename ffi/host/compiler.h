// The run-time compiler of a platform: NVRTC or hipRTC, which have the same functions under two prefixes.
#pragma once

#include <string>
#include <vector>

#include "host/driver.h"
#include "host/kernel_sources.h"

namespace mono {

class Compiler {
 public:
  explicit Compiler(Platform platform);

  // Name and version, "NVRTC 13.0".
  const std::string& version() const { return version_; }

  // Options for an architecture, as compile() passes them on. They are part of what a cached program is known by.
  std::vector<std::string> options(const std::string& architecture) const;

  // Compiles `main` to machine code; it may include `headers` by their names. Throws std::runtime_error with the
  // compiler's log.
  std::string compile(const Source& main, const std::vector<Source>& headers,
                      const std::vector<std::string>& options) const;

 private:
  using Job = void*;

  [[noreturn]] void fail(const char* function, int error) const;
  std::string log(Job job) const;
  template <class F>
  void find(const std::string& function, F*& pointer) const {
    library_.find((prefix_ + function).c_str(), pointer);
  }

  const Platform platform_;
  const std::string prefix_;
  const SharedLibrary library_;
  std::string version_;
  int (*get_version_)(int*, int*);
  const char* (*error_name_)(int);
  int (*create_)(Job*, const char*, const char*, int, const char* const*, const char* const*);
  int (*destroy_)(Job*);
  int (*compile_)(Job, int, const char* const*);
  int (*log_size_)(Job, size_t*);
  int (*log_)(Job, char*);
  int (*code_size_)(Job, size_t*);
  int (*code_)(Job, char*);
};

// The compiler of a platform, loaded at the first call that succeeds. Throws std::runtime_error if it is not there.
const Compiler& compiler(Platform platform);

// Directories, separated by colons, to look for the compilers' libraries in before the system's own.
void set_compiler_path(const std::string& directories);

}  // namespace mono
