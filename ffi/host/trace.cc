#include "host/trace.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace mono {
namespace {

constexpr i64 kTraceMagic = 0x6563617274;  // "trace"
constexpr i32 kMostTokens = 1024;

}  // namespace

TraceWish trace_wish() {
  TraceWish wish;
  const char* path = std::getenv("JAX_MONO_TRACE");
  if (!path || !*path) return wish;
  wish.path = path;
  const char* tokens = std::getenv("JAX_MONO_TRACE_TOKENS");
  if (!tokens || !*tokens) return wish;
  char rest;
  if (std::sscanf(tokens, "%d,%d%c", &wish.first, &wish.tokens, &rest) != 2 || wish.first < 0 || wish.tokens < 1 ||
      wish.tokens > kMostTokens)
    throw std::invalid_argument("JAX_MONO_TRACE_TOKENS is '" + std::string(tokens) +
                                "', must be FIRST,COUNT with a count from 1 to " + std::to_string(kMostTokens));
  return wish;
}

TraceTimes::TraceTimes(const TraceWish& wish, const Header& header, i32 first_device, i32 devices)
    : wish_(wish),
      header_(header),
      first_device_(first_device),
      devices_(devices),
      per_device_(i64(header.num_blocks) * wish.tokens * marks_per_token(header.num_layers)),
      times_(per_device_ * devices, 0) {}

void TraceTimes::write() const {
  std::string path = wish_.path;
  if (devices_ != header_.num_devices) path += "." + std::to_string(first_device_);
  const i64 head[] = {kTraceMagic,     first_device_, devices_,           header_.num_blocks, header_.num_layers, wish_.first,
                      wish_.tokens, marks_per_token(header_.num_layers)};
  std::FILE* file = std::fopen(path.c_str(), "wb");
  bool whole = file && std::fwrite(head, sizeof head, 1, file) == 1 &&
               std::fwrite(times_.data(), sizeof(i64), times_.size(), file) == times_.size();
  if (file && std::fclose(file)) whole = false;
  if (!whole)
    throw std::runtime_error("cannot write the trace " + path + "; JAX_MONO_TRACE must name a file that can be written");
}

}  // namespace mono
