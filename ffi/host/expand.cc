// Compressed tapes back to weights on the CPU, for prefill: XLA's own code for it takes as long as the products. GPUs do it
// in XLA. See jax_mono/compression.py.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "host/operands.h"

#define MONO_VARIANT expansion
#define MONO_DEVICE inline
namespace mono::MONO_VARIANT {
namespace arch {
inline float bits_float(u32 x) {
  float out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}
}  // namespace arch
struct Shape {
  bool compressed;
};
}  // namespace mono::MONO_VARIANT
#include "kernel/compressed.h"

namespace mono {
namespace {

using namespace expansion;

constexpr i32 kRows = 8, kCols = 32, kRowWords = 16;  // of a chunk; words of a plane's row
constexpr i64 kFewest = 1 << 20;                      // weights that are worth a thread

// What to take from every part.
struct Parts {
  i64 words, width;  // of a part: 16-bit words on the tape; columns
  i32 length;        // chunks of a piece
  i32 first, rows;

  i64 weights() const { return rows * width; }

  void expand(const u16* part, u16* out) const {
    const i32 cols = length * kCols;
    for (i64 col = 0; col < width; col += cols, part += piece_words(length, true)) {
      u32 head[kHeadBytes / 4];
      std::memcpy(head, part, sizeof head);
      for (i32 r = 0; r < rows; ++r) {
        const i32 row = first + r;
        const u32 shift = (scale_exponent(head[kEntries + row / 4], row) - kScaleOfCodes) << 7;
        for (i32 group = 0; group < length / kGroupChunks; ++group)
          expand_row(part + kHeadWords + (group * 3 * kPlaneBytes + row * kRowWords * 4) / 2, shift & 0xffffu,
                     out + r * width + col + group * kGroupChunks * kCols);
      }
      for (i32 i = 0; i < kEntries && Entry{head[i]}.used(); ++i) {
        const Entry entry{head[i]};
        if (entry.row() >= first && entry.row() < first + rows)
          out[(entry.row() - first) * width + col + entry.col()] = u16(entry.word >> 16);
      }
    }
  }

 private:
  // A row of a group: 16 words of each plane, by lane and chunk, are four pairs each.
  static void expand_row(const u16* plane, u32 shift, u16* out) {
    u32 words[3][kRowWords], pairs[kRowWords][4];
    for (i32 k = 0; k < 3; ++k) std::memcpy(words[k], plane + k * (kPlaneBytes / 2), sizeof words[k]);
    for (i32 i = 0; i < kRowWords; ++i) {
      const Codes codes(words[0][i], words[1][i], words[2][i]);
      for (i32 k = 0; k < 4; ++k) {
        const u32 pair = codes.pairs[k];  // a zero stays zero
        const u32 low = pair & 0x0780u ? shift : 0, high = pair & 0x07800000u ? shift << 16 : 0;
        pairs[i][k] = ((pair + low) & 0xffffu) | ((pair & 0xffff0000u) + high);
      }
    }
    for (i32 i = 0; i < kRowWords; ++i)
      std::memcpy(out + i % kGroupChunks * kCols + i / kGroupChunks * 8, pairs[i], sizeof pairs[i]);
  }
};

void run(const ffi::AnyBuffer& words, ffi::Result<ffi::AnyBuffer> out, i32 length, i32 first) {
  const auto from = words.dimensions(), to = out->dimensions();
  if (words.element_type() != ffi::DataType::U16 || out->element_type() != ffi::DataType::U16 || from.size() < 2 ||
      to.size() != from.size() + 1)
    throw std::invalid_argument("compressed parts are uint16 [parts, words], and so are [parts, rows, columns] of them");
  const Parts parts{from[from.size() - 1], to[to.size() - 1], length, first, i32(to[to.size() - 2])};
  const bool is_piece = length >= kGroupChunks && length <= kLongestPiece && length % kGroupChunks == 0;
  if (!is_piece || first < 0 || first + parts.rows > kRows || parts.words < 1 || parts.width % (length * kCols) ||
      parts.words != parts.width / (length * kCols) * piece_words(length, true) ||
      i64(words.element_count()) / parts.words * parts.weights() != i64(out->element_count()))
    throw std::invalid_argument("compressed parts of " + std::to_string(parts.words) + " words do not hold " +
                                std::to_string(parts.width) + " columns in pieces of " + std::to_string(length) + " chunks");
  const i64 count = i64(words.element_count()) / parts.words;
  auto some = [&](i64 begin, i64 end) {
    for (i64 part = begin; part < end; ++part)
      parts.expand(static_cast<const u16*>(words.untyped_data()) + part * parts.words,
                   static_cast<u16*>(out->untyped_data()) + part * parts.weights());
  };
  const i64 cores = std::max(1u, std::thread::hardware_concurrency());
  const i64 threads = std::max<i64>(1, std::min(cores, count * parts.weights() / kFewest));
  std::vector<std::thread> others;
  for (i64 i = 1; i < threads; ++i) {
    const i64 begin = count * i / threads, end = count * (i + 1) / threads;
    try {
      others.emplace_back(some, begin, end);
    } catch (const std::system_error&) {  // no more threads
      some(begin, end);
    }
  }
  some(0, count / threads);
  for (std::thread& other : others) other.join();
}

ffi::Error expand(ffi::AnyBuffer words, ffi::Result<ffi::AnyBuffer> out, int32_t length, int32_t first) {
  Failure failure;
  attempt(failure, [&] { run(words, out, length, first); });
  return as_error(failure);
}

}  // namespace
}  // namespace mono

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* mono_expand_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(mono_expand_cpu, mono::expand,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("length")
                                  .Attr<int32_t>("first"));
