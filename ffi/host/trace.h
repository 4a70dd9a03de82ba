// Traces: when every block came to every moment of a few tokens, written to a file. jax_mono/trace.py reads it.
#pragma once

#include <string>
#include <vector>

#include "kernel/call.h"

namespace mono {

// What JAX_MONO_TRACE (a file) and JAX_MONO_TRACE_TOKENS ("FIRST,COUNT" of the tokens fed, default "8,8") ask for; an
// empty path for nothing. Throws std::invalid_argument.
struct TraceWish {
  std::string path;
  i32 first = 8, tokens = 8;
};
TraceWish trace_wish();

// Times of `devices` devices: [devices, blocks, tokens, marks_per_token].
class TraceTimes {
 public:
  TraceTimes(const TraceWish& wish, const Header& header, i32 first_device, i32 devices);

  // Of one device, counted from first_device.
  i64* of(i32 device) { return times_.data() + device * per_device_; }
  i64 per_device() const { return per_device_; }
  // Writes the file; the devices of a call with a handler each write one file each, numbered. Throws std::runtime_error.
  void write() const;

 private:
  TraceWish wish_;
  Header header_;
  i32 first_device_, devices_;
  i64 per_device_;
  std::vector<i64> times_;
};

}  // namespace mono
