#include "host/kernel_sources.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace mono {
namespace {

std::vector<Source> read_directory(const std::string& directory) {
  namespace fs = std::filesystem;
  std::vector<Source> sources;
  std::error_code error;
  for (fs::recursive_directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) {
    if (at->path().extension() != ".h") continue;
    std::ostringstream text;
    text << std::ifstream(at->path(), std::ios::binary).rdbuf();
    sources.push_back({fs::relative(at->path(), directory).generic_string(), text.str()});
  }
  if (error || sources.empty())
    throw std::runtime_error("JAX_MONO_KERNELS is '" + directory + "', which holds no headers" +
                             (error ? " (" + error.message() + ")" : "") +
                             "; unset it, or name the directory that holds kernel/");
  return sources;
}

}  // namespace

std::vector<Source> kernel_sources() {
  std::vector<Source> sources;
  const char* directory = std::getenv("JAX_MONO_KERNELS");
  if (directory && *directory) {
    sources = read_directory(directory);
  } else {
    for (const EmbeddedSource* at = kEmbeddedSources; at->name; ++at) sources.push_back({at->name, at->text});
  }
  std::sort(sources.begin(), sources.end(), [](const Source& a, const Source& b) { return a.name < b.name; });
  return sources;
}

}  // namespace mono
