// A GPU block on the host, for tests: its threads are fibers of one operating system thread, which take turns at every barrier,
// shuffle and poll. Runs the stage code of GPUs (kernel/simt) on machines without one. When all fibers wait for one another,
// some of them at another place than the rest, the program stops: on a GPU it would hang or read garbage.
//
// Takes the place of kernel/arch/fibers.h.
#pragma once

#include <sched.h>
#include <time.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#define MONO_DEVICE inline
#define MONO_OUTLINE inline
#define MONO_COLD inline
#define MONO_ROLLED
#define MONO_UNROLLED

#include "kernel/call.h"
#include "kernel/simt/tuning.h"
#include "shape.h"

namespace mono::MONO_VARIANT {

MONO_DEVICE Shape shape_of(const Plan&) { return {}; }
MONO_DEVICE constexpr Extents extents_of(const Plan&, i32, i32) { return kExtents; }

}  // namespace mono::MONO_VARIANT

namespace mono::MONO_VARIANT::arch {

// ---- fibers ------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32, kReduceWords = 8, kFibers = kStageThreads;

class Fibers {
 public:
  // Runs body(i) for all threads of a block, to the end.
  void run(const std::function<void()>& body) {
    current() = this;
    body_ = &body;
    fibers_.resize(kFibers);
    for (int i = 0; i < kFibers; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, [] { current()->start(); }, 0);
    }
    for (int left = kFibers; left > 0;) {
      progress_ = polled_ = false;
      for (index_ = 0; index_ < kFibers; ++index_) {
        if (fibers_[index_].done) continue;
        swapcontext(&scheduler_, &fibers_[index_].context);
        left -= fibers_[index_].done;
      }
      if (progress_) continue;
      if (!polled_) {
        std::fprintf(stderr, "the threads of a block wait at different places\n");
        std::abort();
      }
      sched_yield();  // another block has to publish first
    }
  }

  int index() const { return index_; }
  // Lets the others go on. `polling`: waits for another block.
  void yield(bool polling) {
    polled_ |= polling;
    swapcontext(&fibers_[index_].context, &scheduler_);
  }
  void went_on() { progress_ = true; }

  static Fibers*& current() {
    static thread_local Fibers* fibers;
    return fibers;
  }

  // Meets `count` fibers at a barrier.
  struct Barrier {
    int arrived = 0;
    unsigned long turn = 0;
  };
  void meet(Barrier& barrier, int count) {
    const unsigned long turn = barrier.turn;
    went_on();
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.turn;
    }
    while (barrier.turn == turn) yield(false);
    went_on();
  }

  Barrier block, warps[kFibers / kWarp];
  u32 exchanged[kFibers], reduced[kFibers / kWarp * kReduceWords];

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  void start() {
    (*body_)();
    fibers_[index_].done = true;
    went_on();
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  int index_ = 0;
  bool progress_ = false, polled_ = false;
};

MONO_DEVICE Fibers& fibers() { return *Fibers::current(); }
MONO_DEVICE int thread() { return fibers().index(); }
MONO_DEVICE void sync() { fibers().meet(fibers().block, kFibers); }
// A value that all threads of the block have.
template <class U>
MONO_DEVICE const U& agreed(const U& value) {
  return value;
}
MONO_DEVICE u32 uniform(u32 value) { return value; }
MONO_DEVICE u64 uniform(u64 value) { return value; }
MONO_DEVICE i32 anew(i32 x) { return x; }  // see sm_90a.h
using Known = i32;  // a number that all of them have
MONO_DEVICE u32 shuffle(u32 value, int from) {
  Fibers& all = fibers();
  const int index = all.index();
  Fibers::Barrier& warp = all.warps[index / kWarp];
  all.exchanged[index] = value;
  all.meet(warp, kWarp);
  const u32 other = all.exchanged[index / kWarp * kWarp + from];
  all.meet(warp, kWarp);
  return other;
}
MONO_DEVICE u32 shuffle_xor(u32 value, int mask) { return shuffle(value, thread() % kWarp ^ mask); }
MONO_DEVICE u32* reduce_buffer() { return fibers().reduced; }
MONO_DEVICE void add(u64* at, u64 value) { *at += value; }
MONO_DEVICE void set_bits(u32* at, u32 bits) { *at |= bits; }

}  // namespace mono::MONO_VARIANT::arch

#include "kernel/simt/threads.h"
#include "kernel/simt/walk.h"
#include "kernel/simt/word.h"

namespace mono::MONO_VARIANT::arch {

// ---- words of the exchange memory --------------------------------------------------------------------------------

constexpr int kLooksAtAll = 1, kWordsInFlight = 4, kRoundsAhead = 2;

// Which words this block has loaded and stored so far, if the entry wants to know.
struct Accesses {
  bool noted = false;
  std::set<const Word*> loaded, stored;
  std::set<const Word*> loaded_own, stored_own;  // of these, where only blocks of one device should meet
};
inline thread_local Accesses accesses;

// The half with the tag comes last and is looked at first: as good as one access, since nobody overwrites what is not read.
MONO_DEVICE Word load_word(const Word* at, Blocks writers = Blocks::kOfAll) {
  if (accesses.noted) accesses.loaded.insert(at);
  if (accesses.noted && writers == Blocks::kOfDevice) accesses.loaded_own.insert(at);
  const u64* halves = reinterpret_cast<const u64*>(at);
  const u64 high = __atomic_load_n(halves + 1, __ATOMIC_ACQUIRE), low = __atomic_load_n(halves, __ATOMIC_RELAXED);
  return {{u32(low), u32(low >> 32), u32(high)}, u32(high >> 32)};
}
MONO_DEVICE void store_word(Word* at, const Word& word) {
  if (accesses.noted) accesses.stored.insert(at);
  u64* halves = reinterpret_cast<u64*>(at);
  __atomic_store_n(halves, word.payload[0] | u64(word.payload[1]) << 32, __ATOMIC_RELAXED);
  __atomic_store_n(halves + 1, word.payload[2] | u64(word.tag) << 32, __ATOMIC_RELEASE);
}
// Stores so many copies of a word, `stride` words apart, for blocks of this device.
MONO_DEVICE void store_copies(Word* at, const Word& word, int copies, i64 stride) {
  for (int copy = 0; copy < copies; ++copy) {
    if (accesses.noted) accesses.stored_own.insert(at + copy * stride);
    store_word(at + copy * stride, word);
  }
}
MONO_DEVICE void store_place(u64* at, u64 key) { __atomic_store_n(at, key, __ATOMIC_RELAXED); }
MONO_DEVICE i32 load_acquire(const i32* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
MONO_DEVICE void store_release(i32* at, i32 value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
// What the entry says of this block.
inline thread_local u32 own_die = 0;
MONO_DEVICE u32 die() { return own_die; }
MONO_DEVICE u32 count_up(u32* at) { return __atomic_fetch_add(at, 1u, __ATOMIC_RELAXED); }
MONO_DEVICE u32 load_count(const u32* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
MONO_DEVICE void pause() { sched_yield(); }
MONO_DEVICE void yield() {}
MONO_DEVICE void wake(i32*) {}  // the host looks by itself
MONO_DEVICE i64 nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return i64(now.tv_sec) * 1000000000 + now.tv_nsec;
}
constexpr bool kTraces = kTraceCalls;
MONO_DEVICE i64 trace_clock() { return nanoseconds(); }

// ---- numbers ------------------------------------------------------------------------------------------------------

constexpr int kTileRows = 8, kTileCols = 32, kLanesPerRow = 4;

MONO_DEVICE float to_float(bf16 x) { return bits_float(u32(x.bits) << 16); }
MONO_DEVICE float to_float(f16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }
MONO_DEVICE void from_float(float x, bf16& out) {
  const u32 bits = float_bits(x);
  out.bits = x != x ? u16(bits >> 16 | 0x40) : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MONO_DEVICE void from_float(float x, f16& out) { out.bits = __builtin_bit_cast(u16, _Float16(x)); }
template <class T>
MONO_DEVICE float rounded(float x) {
  T out;
  from_float(x, out);
  return to_float(out);
}
MONO_DEVICE float sqrt(float x) { return __builtin_sqrtf(x); }

}  // namespace mono::MONO_VARIANT::arch

#include "kernel/compressed.h"

namespace mono::MONO_VARIANT::arch {

// ---- weights -----------------------------------------------------------------------------------------------------

MONO_DEVICE Course& course() {
  static thread_local Course of_block;
  return of_block;
}

MONO_DEVICE Swizzle& swizzle() {
  static thread_local Swizzle of_block;
  return of_block;
}

// A piece of the tape where it lies.
class Piece {
 public:
  MONO_DEVICE Piece(const Walk& at, i32 chunks) : at_(at), chunks_(chunks) {}
  template <class T>
  MONO_DEVICE float product(const T* x) const {
    return Shape::compressed ? compressed_product(x) : plain_product(x);
  }

 private:
  template <class U>
  MONO_DEVICE U read(u32 byte) const {
    return *reinterpret_cast<const U*>(at_.granule() + at_.offset(byte));
  }
  template <class T>
  MONO_DEVICE float plain_product(const T* x) const {
    float sum = 0.0f;
    for (i32 c = 0; c < chunks_; ++c) {
      for (i32 k = 0; k < kTileCols; ++k) {
        const u32 byte = u32(((c * kTileRows + lane() / kLanesPerRow) * kTileCols + k) * sizeof(T));
        sum += to_float(read<T>(byte)) * to_float(x[c * kTileCols + k]);
      }
    }
    return sum;
  }
  template <class T>
  MONO_DEVICE float compressed_product(const T* x) const {
    const i32 row = lane() / kLanesPerRow;
    float sum = 0.0f;
    for (i32 c = 0; c < chunks_; ++c) {
      for (i32 part = 0; part < 4; ++part) {
        const u32 at = u32(kHeadBytes + c / kGroupChunks * kGroupBytes + (row * 4 + part) * 16 + c % kGroupChunks * 4);
        const Codes codes(read<u32>(at), read<u32>(at + kPlaneBytes), read<u32>(at + 2 * kPlaneBytes));
        for (i32 k = 0; k < 8; ++k)
          sum += bits_float(codes.pairs[k / 2] >> (k % 2 * 16) << 16) * to_float(x[c * kTileCols + part * 8 + k]);
      }
    }
    sum *= row_scale(read<u32>(u32(kEntries + row / 4) * 4), row);
    for (i32 i = 0; i < kEntries; ++i) {
      const Entry entry{read<u32>(u32(i * 4))};
      if (entry.used() && entry.row() == row) sum += entry.product(to_float(x[entry.col()]));
    }
    return sum;
  }

  Walk at_;
  i32 chunks_;
};

constexpr bool kTakesPieces = true;

// Walks the tape as CDNA 3's does, and lets warps take pieces as Hopper's does. See Pump in kernel/arch/sm_90a.h.
class Pump {
 public:
  // The block's course must be set.
  MONO_DEVICE void start() { walk_.skip(course(), warp()); }
  MONO_DEVICE void step() {}
  MONO_DEVICE i32 first() const { return i32((warp() - next_ % kWarps + kWarps) % kWarps); }
  MONO_DEVICE void advance(i32 pieces) { next_ += pieces; }

  template <class T>
  MONO_DEVICE float dot(i32, const T* x, i32 chunks) {
    return next(chunks).product(x);
  }
  template <int kChunks>
  MONO_DEVICE Piece take(i32) {
    return next(kChunks);
  }

 private:
  MONO_DEVICE Piece next(i32 chunks) {
    const Piece piece(walk_, chunks);
    walk_.skip(course(), kWarps);
    return piece;
  }

  u32 next_ = 0;
  Walk walk_;
};
MONO_DEVICE Pump* pump_of(Pump&) { return nullptr; }

// Looks once, then it is the others' turn.
MONO_DEVICE Word poll(const Word* at, u32 tag, Pump*) {
  const Word word = load_word(at);
  if (word.tag != tag) {
    fibers().yield(true);
  } else {
    fibers().went_on();
  }
  return word;
}

}  // namespace mono::MONO_VARIANT::arch
