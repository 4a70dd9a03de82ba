// The text of the resident program, carried in the library: GPUs get it compiled when it is first needed.
#pragma once

#include <string>
#include <vector>

namespace mono {

struct Source {
  std::string name;  // as others include it: "kernel/types.h"
  std::string text;
};

// All headers under ffi/kernel, sorted by name; or those of the directory JAX_MONO_KERNELS, read anew each time. Throws
// std::runtime_error if that directory cannot be read.
std::vector<Source> kernel_sources();

// Written by cmake/embed_kernels.cmake; ends with a null name.
struct EmbeddedSource {
  const char *name, *text;
};
extern const EmbeddedSource kEmbeddedSources[];

}  // namespace mono
