// The host: one thread per block, 64-byte vectors through the compiler's vector types.
//
// This header is compiled once per instruction set (ffi/host/program_*.cc); MONO_VARIANT names the namespace, so that
// no inline function of one instruction set can stand in for another's. It needs no standard header for the same
// reason.
#pragma once

#include "kernel/call.h"
#include "kernel/extents.h"

#if defined(__AVX512BF16__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MONO_DEVICE inline
#define MONO_OUTLINE inline __attribute__((noinline))
#define MONO_COLD MONO_OUTLINE
#define MONO_ROLLED
#define MONO_UNROLLED

namespace mono::MONO_VARIANT::arch {

// ---- threads of a block ------------------------------------------------------------------------------------------

// A block is one thread, so "each of the block's threads takes a part" is a plain loop.
constexpr int kThreads = 1;
MONO_DEVICE int thread() { return 0; }
template <class Body>
MONO_DEVICE void for_each(int count, Body body) {
  for (int i = 0; i < count; ++i) body(i);
}
MONO_DEVICE void sync() {}
// A value that all threads of the block have.
template <class U>
MONO_DEVICE const U& agreed(const U& value) {
  return value;
}
MONO_DEVICE i32 anew(i32 x) { return x; }  // see sm_90a.h
using Known = i32;  // a number that all of them have
template <class U, class Op>
MONO_DEVICE U all_reduce(U value, Op) {
  return value;
}
// Updates of near and far memory that several threads may make at once elsewhere.
MONO_DEVICE void add(u64* at, u64 value) { *at += value; }
MONO_DEVICE void set_bits(u32* at, u32 bits) { *at |= bits; }

// ---- words of the exchange memory --------------------------------------------------------------------------------

// Payload in the lower half, tag in the upper half.
using Word = u64;
constexpr int kFloatsPerWord = 1;
template <class T>
constexpr int kWeightsPerWord = 1;
constexpr int kLooksAtAll = 0;  // whoever waits has something else to do
constexpr int kWordsInFlight = 8;  // loads of one thread before it looks at the first

// Atomic, with no ordering of its own: a word carries everything that its reader needs.
MONO_DEVICE void store_word(Word* at, Word word) { __atomic_store_n(at, word, __ATOMIC_RELAXED); }
// Stores so many copies of a word, `stride` words apart.
MONO_DEVICE void store_copies(Word* at, Word word, int copies, i64 stride) {
  MONO_ROLLED
  for (int copy = 0; copy < copies; ++copy) store_word(at + copy * stride, word);
}
MONO_DEVICE Word load_word(const Word* at, Blocks = Blocks::kOfAll) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
MONO_DEVICE void store_place(u64* at, u64 key) { __atomic_store_n(at, key, __ATOMIC_RELAXED); }
MONO_DEVICE u32 tag_of(Word word) { return u32(word >> 32); }
MONO_DEVICE float value_of(Word word) { return __builtin_bit_cast(float, u32(word)); }

MONO_DEVICE Word pack(u32 tag, const u32 (&payload)[1]) { return Word(tag) << 32 | payload[0]; }
MONO_DEVICE Word pack(u32 tag, const float (&payload)[1]) { return Word(tag) << 32 | __builtin_bit_cast(u32, payload[0]); }
MONO_DEVICE Word pack(u32 tag, const bf16 (&payload)[1]) { return Word(tag) << 32 | payload[0].bits; }
MONO_DEVICE void unpack(Word word, u32 (&payload)[1]) { payload[0] = u32(word); }
MONO_DEVICE void unpack(Word word, float (&payload)[1]) { payload[0] = value_of(word); }
MONO_DEVICE void unpack(Word word, bf16 (&payload)[1]) { payload[0].bits = u16(word); }
// Writes a word's weight where the others of the vector are.
template <class T>
MONO_DEVICE void store_weights(Word word, T* at) {
  unpack(word, reinterpret_cast<T(&)[1]>(*at));
}

template <class T>
MONO_DEVICE T load_acquire(const T* at) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
template <class T>
MONO_DEVICE void store_release(T* at, T value) {
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
MONO_DEVICE void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}
// With fewer cores than blocks the writer may need this very core.
MONO_DEVICE void yield() { sched_yield(); }
// Wakes the host's thread that waits for a number to change, if one does.
MONO_DEVICE void wake(i32* at) { syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

MONO_DEVICE i64 nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return i64(now.tv_sec) * 1000000000 + now.tv_nsec;
}

constexpr bool kTraces = true;
MONO_DEVICE i64 trace_clock() { return nanoseconds(); }

// ---- pump ---------------------------------------------------------------------------------------------------------

// Multiplies tiles for a block that is late; returns whether there were any. In serial/offer.h.
MONO_DEVICE bool help(Offer* offers, i32 count);

// Fetches a block's next weights into its second-level cache while the block has something else to do than multiply:
// waiting, reading hand-offs, normalising. Memory then never idles for long. When that is done, a block that still waits helps
// others.
class Pump {
 public:
  static constexpr i64 kRunAhead = 512 << 10;  // bytes; half of the second-level cache of current server cores

  // Points at the weights of the next product.
  void aim(const void* tape, i64 bytes) {
    at_ = static_cast<const char*>(tape);
    end_ = at_ + (bytes < kRunAhead ? bytes : kRunAhead);
  }
  // Fetches one cache line; returns whether there was one to fetch.
  bool step() {
    if (at_ >= end_) return false;
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
    return true;
  }
  void steps(int lines) {
    for (int i = 0; i < lines && step(); ++i) {
    }
  }
  // Says whom to help, if anybody.
  void help_with(Offer* offers, i32 count) {
    offers_ = offers;
    num_offers_ = count;
  }
  void help_others() const {
    if (offers_ && at_ >= end_) help(offers_, num_offers_);
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  Offer* offers_ = nullptr;
  i32 num_offers_ = 0;
};

// Looks at a word until it has the tag, but not for long: the clock must be looked at, and the core offered to others.
// Meanwhile the pump works, and after a while the block helps others.
MONO_DEVICE Pump* pump_of(Pump& pump) { return &pump; }
MONO_DEVICE Word poll(const Word* at, u32 tag, Pump* pump) {
  constexpr int kPolls = 256;
  Word word = 0;
  for (int i = 0; i < kPolls && tag_of(word = load_word(at)) != tag; ++i)
    if (!pump->step()) pause();
  if (tag_of(word) != tag) pump->help_others();
  return word;
}

// ---- numbers ------------------------------------------------------------------------------------------------------

MONO_DEVICE u32 float_bits(float x) { return __builtin_bit_cast(u32, x); }
MONO_DEVICE float bits_float(u32 x) { return __builtin_bit_cast(float, x); }

MONO_DEVICE float to_float(float x) { return x; }
MONO_DEVICE float to_float(bf16 x) { return bits_float(u32(x.bits) << 16); }

// Round to nearest even, as XLA does; NaN stays NaN.
MONO_DEVICE void from_float(float x, float& out) { out = x; }
MONO_DEVICE void from_float(float x, bf16& out) {
  u32 bits = float_bits(x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = nan ? u16((bits >> 16) | 0x40) : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class T>
MONO_DEVICE float rounded(float x) {
  T out;
  from_float(x, out);
  return to_float(out);
}

// ---- vectors ------------------------------------------------------------------------------------------------------

typedef float Vec16 __attribute__((vector_size(64)));
typedef u32 Vec16u __attribute__((vector_size(64)));
typedef i32 Vec16i __attribute__((vector_size(64)));
typedef u16 Vec16h __attribute__((vector_size(32)));

MONO_DEVICE float sum(const Vec16& v) {
  float part[8];
  for (int i = 0; i < 8; ++i) part[i] = v[i] + v[i + 8];
  for (int step = 4; step; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
}
MONO_DEVICE void load(const float* at, Vec16& out) { __builtin_memcpy(&out, at, sizeof out); }
MONO_DEVICE void load(const bf16* at, Vec16& out) {
  Vec16h raw;
  __builtin_memcpy(&raw, at, sizeof raw);
  Vec16u wide = __builtin_convertvector(raw, Vec16u) << 16;
  __builtin_memcpy(&out, &wide, sizeof out);
}

MONO_DEVICE void store(const Vec16& value, float* at) { __builtin_memcpy(at, &value, sizeof value); }
MONO_DEVICE void store(const Vec16& value, bf16* at) {
  Vec16u bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  Vec16u nan = (Vec16u)((bits & 0x7fffffffu) > 0x7f800000u);
  Vec16u nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  Vec16h out = __builtin_convertvector((nearest & ~nan) | (quiet & nan), Vec16h);
  __builtin_memcpy(at, &out, sizeof out);
}

// out = x * factor * scale, rounded to the weight type.
template <class T>
MONO_DEVICE void scale_vector(const float* x, float factor, const float* scale, T* out, int size) {
  int i = 0;
  for (; i + 16 <= size; i += 16) {
    Vec16 a, b;
    load(x + i, a);
    load(scale + i, b);
    store(a * factor * b, out + i);
  }
  for (; i < size; ++i) from_float(x[i] * factor * scale[i], out[i]);
}

constexpr int kTileRows = 8, kTileCols = 32;

// The sums of a tile's rows, each added up as sum() does, all at once where the processor can.
MONO_DEVICE void store_sums(const Vec16 (&rows)[kTileRows], float* out) {
#if defined(__AVX__)
  __m256 half[8], quarter[4], eighth[2];
  for (int r = 0; r < 8; ++r) {
    __m256 parts[2];
    __builtin_memcpy(parts, &rows[r], sizeof parts);
    half[r] = _mm256_add_ps(parts[0], parts[1]);
  }
  // Two rows to a vector, then four, then all eight.
  for (int r = 0; r < 4; ++r)
    quarter[r] = _mm256_add_ps(_mm256_permute2f128_ps(half[r], half[r + 4], 0x20),
                               _mm256_permute2f128_ps(half[r], half[r + 4], 0x31));
  for (int r = 0; r < 2; ++r)
    eighth[r] = _mm256_add_ps(_mm256_shuffle_ps(quarter[2 * r], quarter[2 * r + 1], 0x44),
                              _mm256_shuffle_ps(quarter[2 * r], quarter[2 * r + 1], 0xee));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_shuffle_ps(eighth[0], eighth[1], 0x88),
                                      _mm256_shuffle_ps(eighth[0], eighth[1], 0xdd)));
#else
  for (int r = 0; r < kTileRows; ++r) out[r] = sum(rows[r]);
#endif
}

// The tape is one linear stream, which hardware prefetches, but no further than to the end of a page of 4 KiB: products wait at
// its beginning. So each line is asked for some lines ahead, into the second-level cache only: requests into the first
// cost more than they save (measured on Zen 4).
constexpr int kLinesAhead = 24, kLine = 64;
template <class T>
MONO_DEVICE void ask_ahead(const T* row) {
  const char* at = reinterpret_cast<const char*>(row) + kLinesAhead * kLine;
  for (int i = 0; i < int(kTileCols * sizeof(T)); i += kLine) __builtin_prefetch(at + i, 0, 2);
}

// Products of one tile (kTileRows rows of `chunks` chunks of kTileCols) with an activation vector. Activations are
// stored in the weight type, which is what the products round them to on every target.
template <class T>
MONO_DEVICE void dot_tile(const T* tile, const T* x, int chunks, float* out) {
  Vec16 acc[kTileRows] = {};
  for (int c = 0; c < chunks; ++c) {
    Vec16 x0, x1;
    load(x + c * kTileCols, x0);
    load(x + c * kTileCols + 16, x1);
    for (int r = 0; r < kTileRows; ++r) {
      const T* w = tile + (c * kTileRows + r) * kTileCols;
      ask_ahead(w);
      Vec16 w0, w1;
      load(w, w0);
      load(w + 16, w1);
      acc[r] += w0 * x0;
      acc[r] += w1 * x1;
    }
  }
  store_sums(acc, out);
}

#if defined(__AVX512BF16__)
template <>
MONO_DEVICE void dot_tile<bf16>(const bf16* tile, const bf16* x, int chunks, float* out) {
  Vec16 acc[kTileRows] = {};
  for (int c = 0; c < chunks; ++c) {
    __m512bh xs = (__m512bh)_mm512_loadu_si512(x + c * kTileCols);
    for (int r = 0; r < kTileRows; ++r) {
      const bf16* w = tile + (c * kTileRows + r) * kTileCols;
      ask_ahead(w);
      acc[r] = (Vec16)_mm512_dpbf16_ps((__m512)acc[r], (__m512bh)_mm512_loadu_si512(w), xs);
    }
  }
  store_sums(acc, out);
}
#endif

// q . k over one head.
template <class T>
MONO_DEVICE float dot_head(const float* q, const T* k, int size) {
  Vec16 acc = {};
  int i = 0;
  for (; i + 16 <= size; i += 16) {
    Vec16 a, b;
    load(q + i, a);
    load(k + i, b);
    acc += a * b;
  }
  float total = sum(acc);
  for (; i < size; ++i) total += q[i] * to_float(k[i]);
  return total;
}

// Asks for numbers that come next, into the second-level cache.
template <class T>
MONO_DEVICE void ask_for(const T* from, int count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int i = 0; i < int(count * sizeof(T)); i += kLine) __builtin_prefetch(at + i, 0, 2);
}

// q . k of `count` heads that follow one another, as dot_head() computes each, several at once.
template <class T>
MONO_DEVICE void dot_heads(const float* q, const T* keys, int size, int count, float* out) {
  int n = 0;
  for (; n + kTileRows <= count; n += kTileRows) {
    const T* k = keys + n * size;
    Vec16 acc[kTileRows] = {};
    int i = 0;
    for (; i + 16 <= size; i += 16) {
      Vec16 a, b;
      load(q + i, a);
      for (int r = 0; r < kTileRows; ++r) {
        load(k + r * size + i, b);
        acc[r] += a * b;
      }
    }
    store_sums(acc, out + n);
    for (; i < size; ++i)
      for (int r = 0; r < kTileRows; ++r) out[n + r] += q[i] * to_float(k[r * size + i]);
  }
  for (; n < count; ++n) out[n] = dot_head(q, keys + n * size, size);
}

// out += sum of weights[p] * values[p] over `count` heads that follow one another, one after the other.
template <int kVectors, class T>
MONO_DEVICE void add_weighted(float* out, const float* weights, const T* values, int size, int count) {
  Vec16 acc[kVectors];
  for (int v = 0; v < kVectors; ++v) load(out + 16 * v, acc[v]);
  for (int p = 0; p < count; ++p)
    for (int v = 0; v < kVectors; ++v) {
      Vec16 value;
      load(values + p * size + 16 * v, value);
      acc[v] += weights[p] * value;
    }
  for (int v = 0; v < kVectors; ++v) store(acc[v], out + 16 * v);
}
template <class T>
MONO_DEVICE void add_heads(float* out, const float* weights, const T* values, int size, int count) {
  int i = 0;
  for (; i + 64 <= size; i += 64) add_weighted<4>(out + i, weights, values + i, size, count);
  for (; i + 16 <= size; i += 16) add_weighted<1>(out + i, weights, values + i, size, count);
  for (; i < size; ++i)
    for (int p = 0; p < count; ++p) out[i] += weights[p] * to_float(values[p * size + i]);
}

MONO_DEVICE float sum_of_squares(const float* x, int size) {
  return dot_head(x, x, size);
}

MONO_DEVICE float sqrt(float x) { return __builtin_sqrtf(x); }

}  // namespace mono::MONO_VARIANT::arch

namespace mono::MONO_VARIANT {

// One library serves all models: dimensions are read from the plan.
using Shape = const Header&;
MONO_DEVICE Shape shape_of(const Plan& plan) { return *plan.header; }
MONO_DEVICE Extents extents_of(const Plan& plan, i32 device, i32 block) { return block_extents(plan, device, block); }

}  // namespace mono::MONO_VARIANT
