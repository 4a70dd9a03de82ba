// The C interface that jax_mono/native.py loads, for GPUs: what is there and why not, and the program's sources.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "host/compiler.h"
#include "host/program.h"
#include "host/program_cache.h"

namespace mono {
namespace {

void copy(const std::string& text, char* out, i32 room) { std::snprintf(out, size_t(room), "%s", text.c_str()); }

// Lines of "key<TAB>value". Each part is looked at even if one before it fails.
std::string report(Platform platform) {
  std::string text;
  auto line = [&](const char* key, const std::string& value) { text += std::string(key) + "\t" + value + "\n"; };
  try {
    const Driver& found = driver(platform);
    const int devices = found.devices();
    for (int ordinal = 0; ordinal < devices; ++ordinal)
      line("device", found.device_name(ordinal) + "\t" + found.architecture(ordinal) + "\t" +
                         std::to_string(found.multiprocessors(ordinal)) + "\t" +
                         std::to_string(found.shared_limit(ordinal)));
  } catch (const std::exception& error) {
    line("driver_error", error.what());
  }
  try {
    line("compiler", compiler(platform).version());
  } catch (const std::exception& error) {
    line("compiler_error", error.what());
  }
  line("cache", ProgramCache().directory());
  return text;
}

}  // namespace
}  // namespace mono

#define MONO_EXPORT extern "C" __attribute__((visibility("default")))

using mono::i32;
using mono::i64;

// Writes what there is of platform 1 (CUDA) or 2 (ROCm).
MONO_EXPORT void mono_gpu_report(i32 platform, char* out, i32 room) {
  mono::copy(mono::report(mono::Platform(platform)), out, room);
}

// Directories, separated by colons, to look for the run-time compilers in first.
MONO_EXPORT void mono_set_compiler_path(const char* directories) { mono::set_compiler_path(directories); }

// Name and text of a source of the resident program; false past the end.
MONO_EXPORT i32 mono_kernel_source(i32 index, const char** name, const char** text) {
  for (i32 i = 0; i <= index; ++i)
    if (!mono::kEmbeddedSources[i].name) return 0;
  *name = mono::kEmbeddedSources[index].name;
  *text = mono::kEmbeddedSources[index].text;
  return 1;
}

// Compiles the program of a plan without a GPU. Writes its machine code, or why there is none, as far as there is room;
// returns the code's bytes, or 0.
MONO_EXPORT i64 mono_compile(i32 platform, const char* architecture, i64 shared_limit, const void* plan, i32 weights,
                             char* out, i64 room) {
  try {
    const std::string code = mono::compile_program(mono::Platform(platform), architecture, shared_limit, mono::Plan(plan),
                                                   mono::WeightType(weights));
    if (i64(code.size()) <= room) std::memcpy(out, code.data(), code.size());
    return i64(code.size());
  } catch (const std::exception& error) {
    mono::copy(error.what(), out, i32(room));
    return 0;
  }
}

// The header "shape.h" of a plan's program, for those who compile it themselves; also threads and bytes of dynamic shared
// memory of a block. Writes the text, or why there is none, as far as there is room; returns the text's bytes, or 0.
MONO_EXPORT i64 mono_gpu_shape(const char* architecture, i64 shared_limit, const void* plan, i32 weights, i32* threads,
                               i32* shared_bytes, char* out, i32 room) {
  try {
    const mono::GpuShape shape = mono::gpu_shape(mono::Plan(plan), mono::WeightType(weights), architecture, shared_limit);
    *threads = shape.threads;
    *shared_bytes = shape.shared_bytes;
    mono::copy(shape.header, out, room);
    return i64(shape.header.size());
  } catch (const std::exception& error) {
    mono::copy(error.what(), out, room);
    return 0;
  }
}
